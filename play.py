"""The page of `python cli.py play`: a game of game.py, in the browser.

NiceGUI is the server, the page and its buttons; what stands here is only what goes where. Each
visitor has a game of his own, with a worker process for its real simulator. A timer of the page
does one thing after the other that was asked for, in a thread, so that the page stays live.

No file is served besides NiceGUI's own: pictures and films go through the page's connection.
"""

from __future__ import annotations

import base64
import contextlib
import io
import socket
from collections import deque
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

import render
from charts import BLUE, GREEN, GREY, ORANGE
from game import PARTED_LEVELS, PARTED_MM, Game, Parts, Track, load_parts
from runs import Run
from vecenv import VecRealEnv

try:
    from nicegui import app, ui
    from nicegui import run as threads
except ImportError as missing:
    raise ValueError(
        f"play: {missing}; expected NiceGUI; run: pip install -r requirements-play.txt"
    ) from missing

VISITORS = 4  # at a time: each has a worker process, and they take turns to imagine
PERIOD = 0.05  # seconds between two decisions at least: 20 a second are the robot's own speed
WAITING = 3  # key presses that are remembered while a decision is being played

KEYS = {  # of the keyboard, lower case, to a way to move (game.directions) or "grip"
    "arrowleft": "left", "arrowright": "right", "arrowup": "forward", "arrowdown": "back",
    "a": "left", "d": "right", "w": "forward", "s": "back", "r": "up", "f": "down", " ": "grip",
}  # fmt: skip
PAD = (  # the buttons, in rows of three: way, sign, explanation
    ("up", "lift", "lift the hand: R"), ("forward", "↑", "away from you"),
    ("down", "lower", "lower the hand: F"), ("left", "←", "left"), ("stay", "wait", "do nothing"),
    ("right", "→", "right"), ("grip", "grip", "close or open the gripper: space"),
    ("back", "↓", "towards you"),
)  # fmt: skip
NAMES = {"you": "You", "sft": "SFT", "policy": "Post-trained", "expert": "Expert"}
RED = "#CC3311"

# What was clicked with a mouse (detail > 0) must not keep the focus: the space bar would click it
# again. Neither arrows nor the space bar may scroll the page while they move the hand.
SCRIPT = """<script>
addEventListener("click", (e) => e.detail && setTimeout(() => {
  if (document.activeElement?.tagName !== "INPUT") document.activeElement?.blur();
}), true);
addEventListener("keydown", (e) => {
  if (e.target === document.body && (e.key.startsWith("Arrow") || e.key === " "))
    e.preventDefault();
});
</script>"""
STYLE = """
.nicegui-content { max-width: 1180px; margin: 0 auto; padding: 12px; gap: 10px; }
.worlds { display: grid; grid-template-columns: repeat(3, 1fr); gap: 14px; width: 100%; }
.panel { display: grid; grid-template-columns: minmax(0, 1fr); gap: 4px; align-content: start; }
.picture, .picture img { width: 100%; border-radius: 4px; image-rendering: pixelated; }
.chart { width: 100%; height: 130px; }
.pad { display: grid; grid-template-columns: repeat(3, 56px); gap: 4px; }
.pad button { min-height: 44px; padding: 0; font-size: 15px; }
@media (max-width: 640px) {
  .worlds { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; }
  .line { min-height: 40px; }
  .chart { height: 100px; }
  .panel:nth-child(3) { grid-column: 1 / 3; grid-template-columns: 36% 1fr; column-gap: 8px; }
  .panel:nth-child(3) .title { grid-column: 1 / 3; }
  .panel:nth-child(3) .picture { grid-row: 2 / 4; }
  .panel:nth-child(3) .line { min-height: 0; }
}
"""


def serve(folder: Path, host: str, port: int, browser: bool) -> None:
    """Serve the page for a run folder until Ctrl-C. ValueError (one line): no run, no dream in it,
    an address that cannot be had."""
    run = Run.open(folder)
    check_address(host, port)
    render.choose_backend()
    parts = load_parts(run)
    make_page(parts)
    for note in parts.notes:
        print(note)
    named = f"[{host}]" if ":" in host else host
    print(f"playing {folder} at http://{named}:{port} (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        ui.run(
            host=host, port=port, title="Inside the dream", show=browser, reload=False,
            show_welcome_message=False,
        )  # fmt: skip


def check_address(host: str, port: int) -> None:
    """ValueError, one line, where nothing can listen at host and port."""
    if not 1 <= port <= 65535:
        raise ValueError(f"--port: got {port}; expected 1 to 65535")
    if not host.strip():  # it would mean every address, and the page asks for no password
        raise ValueError(
            "--host: got nothing; expected an address of this machine; leave it out for 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except (OSError, TypeError, UnicodeError) as error:
            told = getattr(error, "strerror", None) or error
            raise ValueError(
                f"--host, --port: cannot listen at {host}:{port} ({told}); "
                "expected an address of this machine and a free port; choose another --port"
            ) from error


def make_page(parts: Parts) -> None:
    """Register the page at / for a run's parts."""
    visits: set[Visit] = set()
    ui.add_css(STYLE, shared=True)
    ui.add_head_html(SCRIPT, shared=True)

    @ui.page("/")
    async def page(task: str = "", start: str = "", who: str = "") -> None:
        client = ui.context.client
        await client.connected()  # who only asks for the page and leaves costs nothing
        if client.is_deleted:
            return
        if len(visits) >= VISITORS:
            ui.label(
                f"{VISITORS} people are playing already, which is all that fit here. A place is "
                "free as soon as one of them closes the page: reload then."
            ).classes("text-lg")
            return
        visit = Visit(parts, Game(parts, VecRealEnv(1, parts.env, workers=1)))
        visits.add(visit)

        async def leave() -> None:
            await threads.io_bound(visit.game.close)
            visits.discard(visit)

        client.on_delete(leave)
        visit.build()
        visit.begin(*known(parts, task, start, who))

    def end() -> None:
        for visit in visits:
            visit.game.close()

    app.on_shutdown(end)


def known(parts: Parts, task: str, start: str, who: str) -> tuple[str, int, str]:
    """(task, number of the start, who acts) of the address's query; what makes no sense does
    nothing: the first task, start 0 and a person stand in for it."""
    number = int(start) if start.isascii() and start.isdigit() and len(start) < 5 else 0
    task = task if task in parts.tasks else parts.tasks[0]
    return task, number, who if who in parts.actors else "you"


class Visit:
    """One visitor: his game, what he asked for, and the page that shows it."""

    def __init__(self, parts: Parts, game: Game):
        self.parts, self.game = parts, game
        self.client = ui.context.client
        self.running = False  # the policy or the expert goes on by itself
        self.wishes: deque = deque()  # what was asked for and is not done yet: functions

    # -- what can be asked for

    def begin(self, task: str, number: int, who: str = "") -> None:
        """A start of a task; without `who`, whoever acted before goes on acting."""
        self.wishes.clear()
        self.wishes.append(partial(self.game.reset, task, number))
        self.task.set_value(task)
        if who:
            self.who.set_value(who)

    def again(self) -> None:
        self.begin(self.task.value, self.game.number)

    def new_start(self) -> None:
        self.begin(self.task.value, self.game.number + 1)

    def choose_task(self) -> None:
        """The list of tasks changed: by the visitor, or by `begin`, which has asked already."""
        ui.run_javascript("document.activeElement?.blur()")  # keys belong to the hand again
        if self.game.start is not None and self.task.value != self.game.start.task:
            self.begin(self.task.value, self.game.number)

    def choose_actor(self) -> None:
        # What a page sends need not be one of its choices.
        self.running = self.who.value in self.parts.actors and self.who.value != "you"
        self.show_running()

    def move(self, way: str, repeated: bool = False) -> None:
        """A person's decision; whoever acted before stops. A key that is held makes no queue."""
        if len(self.wishes) >= (1 if repeated else WAITING):
            return
        self.who.set_value("you")
        self.wishes.append(partial(self.game.push, way))

    def pause(self) -> None:
        self.running = not self.running and self.who.value != "you"
        self.show_running()

    def step(self) -> None:
        """One decision of whoever acts, then a pause."""
        self.running = False
        self.show_running()
        if len(self.wishes) < WAITING:
            self.wishes.append(partial(self.game.decide, self.who.value))

    def key(self, event) -> None:
        """A key of the keyboard."""
        modifiers = event.modifiers
        if not event.action.keydown or modifiers.ctrl or modifiers.alt or modifiers.meta:
            return
        name = event.key.name.lower()
        commands = {"p": self.pause, "o": self.step, "x": self.again, "n": self.new_start}
        if name in KEYS:
            self.move(KEYS[name], event.action.repeat)
        elif name in commands and not event.action.repeat:
            commands[name]()

    async def save(self, ending: str) -> None:
        """Download all since the start as a film."""
        if self.game.start is not None:
            film = await threads.io_bound(self.game.film, ending)
            name = f"{self.game.start.task}_{self.game.number}.{ending}"
            ui.download.content(film, name)

    async def tick(self) -> None:
        """Do the next thing that was asked for, or let the policy go on; then show it."""
        if self.wishes:
            work = self.wishes.popleft()
        elif self.running and not self.game.over:
            work = partial(self.game.decide, self.who.value)
        else:
            return
        try:
            await threads.io_bound(work)
        except RuntimeError as error:  # the worker of the real simulator ended, or failed
            self.running = False
            print(f"a game broke off: {error}", flush=True)
            self.state.set_text("The real simulator broke off; reload the page for a new one.")
            return
        if self.game.over:
            self.running = False
        if not self.client.is_deleted:
            self.show()

    # -- the page

    def build(self) -> None:
        """Everything that is on the page; `show` fills it."""
        with ui.row().classes("w-full items-baseline gap-x-4 gap-y-0"):
            ui.label("Inside the dream").classes("text-xl font-bold")
            self.text = ui.label("").props("data-test=instruction")
        self.state = ui.label("Opening both worlds ...").props("data-test=state")
        with ui.element("div").classes("worlds"):
            dreamt, real = self.game.etas
            self.dream = Panel("dream", "The dream", ORANGE, dreamt, 1)
            self.real = Panel("real", "The real simulator", BLUE, real, 1)
            self.apart = Panel("apart", "Where the two part", RED, PARTED_MM, 2.5 * PARTED_MM)
        with ui.row().classes("w-full items-start gap-x-8 gap-y-3"):
            self.build_pad()
            self.build_controls()
        for note in self.parts.notes:
            ui.label(note).classes("text-sm text-gray-600")
        ui.keyboard(self.key, ignore=["input", "select", "textarea", "button"])
        ui.timer(PERIOD, self.tick)

    def build_pad(self) -> None:
        """The on-screen buttons that move the hand."""
        with ui.element("div").classes("pad"):
            for way, sign, words in PAD:
                button = ui.button(sign, on_click=partial(self.move, way)).props("no-caps outline")
                button.props(f'data-test={way} aria-label="{words}"').tooltip(words)

    def build_controls(self) -> None:
        """Who acts, from where, and what is kept."""
        actors = {name: NAMES[name] for name in self.parts.actors}
        with ui.column().classes("gap-2 flex-1 min-w-[300px]"):
            self.who = ui.toggle(actors, value="you", on_change=self.choose_actor)
            self.who.props("no-caps data-test=who")
            with ui.row().classes("gap-2 items-center"):
                self.run_button = ui.button("Play", on_click=self.pause)
                self.run_button.props("no-caps data-test=run")
                for words, do in (
                    ("Step", self.step), ("Reset", self.again), ("New start", self.new_start),
                ):  # fmt: skip
                    name = words.lower().replace(" ", "-")
                    ui.button(words, on_click=do).props(f"no-caps outline data-test={name}")
                for ending in ("gif", "mp4"):
                    save = ui.button(ending.upper(), on_click=partial(self.save, ending))
                    save.props(f"no-caps flat icon=download data-test={ending}")
            with ui.row().classes("gap-4 items-center"):
                self.task = ui.select(
                    list(self.parts.tasks), value=self.parts.tasks[0], on_change=self.choose_task
                )
                self.task.props("dense outlined data-test=task").classes("w-52")
                ui.switch("policies see reality").bind_value_to(
                    self.game, "sees", lambda on: "real" if on else "dream"
                ).props("data-test=sees")
            ui.label(
                "Keys: arrows or WASD move the hand, R and F lift and lower it, space is the "
                "gripper; P play or pause, O one step, X reset, N new start. The two have parted "
                f"when the hands are more than {PARTED_MM:.0f} mm from each other, or a block of "
                f"the pictures (outlined) differs by more than {PARTED_LEVELS:.0f} levels of 255."
            ).classes("text-sm text-gray-600")
        self.show_running()

    def show_running(self) -> None:
        """The button says what it would do; a person needs none."""
        self.run_button.set_text("Pause" if self.running else "Play")
        self.run_button.set_enabled(self.who.value != "you")

    def show(self) -> None:
        """The game as it is now."""
        game, t = self.game, len(self.game.chunks)
        assert game.start is not None  # a page shows a game once it has begun
        self.show_running()
        self.text.set_text(f"{game.start.task}, start {game.number}: “{game.instruction}”")
        length, parted = max(self.parts.horizon, t), game.parted
        self.dream.threshold = game.etas[0]  # each task has its own
        marks = [] if parted is None else [(parted, "parted", RED)]
        for panel, track, words in (
            (self.dream, game.dream, "R says success"), (self.real, game.real, "success"),
        ):  # fmt: skip
            first = track.first_success
            own = [] if first is None else [(first, "success", GREEN)]
            panel.show(track.images[-1], told(track, words), track.rewards, marks + own, length)
        line = "nowhere yet"
        if t:
            millimetres, levels = game.apart[-1]
            line = f"hands {millimetres:.0f} mm, pictures {levels:.0f} levels"
        distances = [millimetres for millimetres, _ in game.apart]
        self.apart.show(game.difference(), line, distances, marks, length)
        self.state.set_text(self.state_words(t, parted))

    def state_words(self, t: int, parted: int | None) -> str:
        """Where the game is, how fast it goes, and whether the two are still one."""
        words = [f"decision {t}"]
        if self.game.over:
            words.append("the end: reset or take a new start")
        elif t > self.parts.horizon:
            words.append(f"the dream was trained up to {self.parts.horizon}")
        if parted is not None:
            words.append(f"parted at decision {parted}")
        rates = self.game.rates()
        if rates is not None:
            words.append(f"{rates[0]:.1f} frames/s dreamt, {rates[1]:.1f} in both worlds")
        return " · ".join(words)


def told(track: Track, words: str) -> str:
    """What a world says of itself now: R, and since when it succeeds."""
    reward = track.rewards[-1] if track.rewards else np.nan
    said = "" if np.isnan(reward) else f"R = {reward:.2f}"
    if track.first_success is not None:
        said += f"{', ' if said else ''}{words} at decision {track.first_success}"
    return said or "no success yet"


# ------------------------------------------------------------------------------- a picture, a curve


class Panel:
    """A picture, one line about it, and a curve over decisions with its threshold."""

    def __init__(self, name: str, title: str, colour: str, threshold: float | None, top: float):
        with ui.element("div").classes("panel"):
            ui.label(title).classes("title font-bold").style(f"color: {colour}")
            self.picture = ui.interactive_image().classes("picture")
            self.picture.props(f"data-test={name}")
            self.line = ui.label("").classes("line text-sm").props(f"data-test={name}-line")
            self.chart = None
            if threshold is not None:
                self.chart = ui.echart(curve(colour, top), renderer="svg").classes("chart")
                self.chart.props(f"data-test={name}-curve")
        self.threshold = threshold

    def show(
        self, image: np.ndarray, line: str, values: list[float], marks: list[tuple], length: int
    ) -> None:
        """image (H, W, 3) uint8; values: of decisions 1, 2 ...; marks: (decision, word, colour)."""
        self.picture.set_source(data_url(image))
        self.line.set_text(line)
        if self.chart is None or self.threshold is None:
            return
        word = "stop" if self.threshold < 1 else f"{self.threshold:.0f} mm"
        lines = [vertical(*mark) for mark in marks]
        lines.append({"yAxis": self.threshold, "label": {"formatter": word}})
        series = self.chart.options["series"][0]
        series["data"] = [[i + 1, value] for i, value in enumerate(values)]
        series["markLine"]["data"] = lines
        self.chart.options["xAxis"]["max"] = 10 * int(np.ceil(length / 10))
        if values and self.threshold >= 1:
            axis = self.chart.options["yAxis"]
            axis["max"] = max(2.5 * self.threshold, 10 * np.ceil(max(values) / 10))
        self.chart.update()


def curve(colour: str, top: float) -> dict:
    """ECharts' options of an empty curve over decisions, from 0 to `top`."""
    line = {"lineStyle": {"color": GREY}, "label": {"position": "insideEndTop", "fontSize": 10}}
    return {
        "animation": False,
        "grid": {"left": 30, "right": 8, "top": 8, "bottom": 22},
        "xAxis": {"type": "value", "min": 0, "max": 30, "splitLine": {"show": False}},
        "yAxis": {"type": "value", "min": 0, "max": top, "splitNumber": 2},
        "series": [
            {
                "type": "line",
                "color": colour,
                "symbolSize": 4,
                "data": [],
                "markLine": {"silent": True, "symbol": "none", "data": [], **line},
            }
        ],
    }


def vertical(decision: int, word: str, colour: str) -> dict:
    """A mark of a curve: a vertical line at a decision."""
    place = "insideStartTop" if word == "parted" else "insideEndTop"  # below, above: no overlap
    label = {"formatter": word, "position": place, "fontSize": 10, "color": colour}
    return {"xAxis": decision, "lineStyle": {"color": colour}, "label": label}


def data_url(image: np.ndarray) -> str:
    """A picture (H, W, 3) uint8 as a PNG inside an address, so that no file is needed."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

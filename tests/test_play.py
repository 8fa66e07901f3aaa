"""The page of `python cli.py play`: its address and query, and a real browser that plays.

The browser tests are slow and share one server, whose run has untrained networks: what they check
is the page. They need Chromium and Playwright (pip install playwright; its own browser is not
needed). The README's picture is made here too, from a run that means something:

    WORLDENV_PLAY_RUN=runs/example python -m pytest -m slow tests/test_play.py -k picture
"""

import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import psutil
import pytest

pytest.importorskip("nicegui", reason="nicegui is in requirements-play.txt")

from test_game import CONFIG, TASKS, ScriptedPolicy, ScriptedSimulator, finish, looking, run

import play
from game import Parts

__all__ = ["run"]  # a fixture
ROOT = Path(play.__file__).resolve().parent
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
PATIENCE = 60_000  # milliseconds; a page takes 5 seconds on free cores


# -------------------------------------------------------------------------------- without a browser


@pytest.mark.parametrize(
    "query, understood",
    [
        (("drawer-open", "12", "sft"), ("drawer-open", 12, "sft")),
        (("", "", ""), ("reach", 0, "you")),
        (("levitate", "-1", "policy"), ("reach", 0, "you")),  # there is no post-trained policy
        (("<script>", "1e9", "../../etc/passwd"), ("reach", 0, "you")),
        (("reach", "99999999", "Expert"), ("reach", 0, "you")),
        (("reach", "²", "expert"), ("reach", 0, "expert")),
    ],
)
def test_what_makes_no_sense_in_the_address_does_nothing(query, understood):
    policies = {"sft": ScriptedPolicy()}
    parts = Parts(CONFIG, TASKS, looking(), ScriptedSimulator(), policies=policies)
    assert play.known(parts, *query) == understood


@pytest.mark.parametrize(
    "host, port", [("127.0.0.1", 0), ("127.0.0.1", 70000), ("192.0.2.1", 8080)]
)
def test_an_address_that_cannot_be_had(host, port):
    with pytest.raises(ValueError, match="choose another --port|expected 1 to 65535"):
        play.check_address(host, port)


def test_a_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ValueError, match="cannot listen"):
            play.check_address("127.0.0.1", other.getsockname()[1])


def test_a_picture_becomes_an_address():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    assert (decode(play.data_url(image)) == image).all()


def test_a_run_without_a_dream_is_refused(run):
    with pytest.raises(ValueError, match="no dream to play in"):
        play.serve(run.folder, "127.0.0.1", free_port(), False)


def decode(address: str) -> np.ndarray:
    """The picture in a data address."""
    with urllib.request.urlopen(address) as data:
        return imageio.imread(io.BytesIO(data.read()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ----------------------------------------------------------------------------------- with a browser


class Server:
    """`python cli.py play` as a user starts it."""

    def __init__(self, folder: Path):
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, str(ROOT / "cli.py"), "play", str(folder), "--no-browser"]
        command += ["--port", str(self.port)]
        # NiceGUI behaves otherwise when it finds pytest in its environment.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=folder.parent,
            env=environment,
        )  # fmt: skip
        for _ in range(600):
            assert self.process.poll() is None, self.process.stdout.read()
            try:
                urllib.request.urlopen(self.address).close()
                return
            except urllib.error.URLError:
                time.sleep(0.2)
        raise TimeoutError("no page after two minutes")

    def workers(self) -> list[psutil.Process]:
        """The simulators: a spawned process each (one more keeps track of them)."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.ZombieProcess):  # has just ended
                found += [child] if "spawn_main" in " ".join(child.cmdline()) else []
        return found

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGINT)
        try:
            text, _ = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, text


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if not BROWSER:
        pytest.skip("no Chromium; Debian: apt-get install chromium")
    with playwright.sync_playwright() as made:
        # Root, as in a container, has no sandbox of Chromium's.
        browser = made.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server(run):
    for name in ("simulator", "sft", "reflector"):
        finish(run, name)
    made = Server(run.folder)
    yield made
    if made.process.poll() is None:
        made.stop()


def visit(chromium, address: str, wait: bool = True, **settings):
    """A new visitor's page (no cookies are shared), once both worlds are open."""
    page = chromium.new_context(**settings).new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    if wait:
        page.wait_for_function(
            "document.querySelector('[data-test=real] img')?.src.startsWith('data:')"
        )
    return page


def part(page, name: str):
    return page.locator(f"[data-test={name}]")


def image(page, name: str) -> np.ndarray:
    """The picture of a panel, as the browser has it."""
    return decode(part(page, name).locator("img").get_attribute("src")).astype(int)


def decision(page) -> int:
    return int(part(page, "state").inner_text().split()[1])


def until(page, count: int) -> None:
    """Wait for a decision to be shown, in the text, and in the pictures, which come with it."""
    page.wait_for_function(
        "n => parseInt(document.querySelector('[data-test=state]').innerText.split(' ')[1]) >= n",
        arg=count,
    )
    page.wait_for_timeout(300)


def points(page, name: str) -> int:
    """How many points a curve has: ECharts draws a white circle for each."""
    return part(page, name).locator("path[fill='#fff']").count()


def press(page, key: str, times: int) -> None:
    """Key presses, each when the one before has been played."""
    for _ in range(times):
        before = decision(page)
        page.keyboard.press(key)
        until(page, before + 1)


@pytest.mark.slow
def test_a_visitor_plays(chromium, server):
    """Nonsense in the address does nothing; keys and buttons move the arm in both pictures, the
    curves grow, the expert takes over and gives back, a film can be had."""
    page = visit(chromium, f"{server.address}/?task=levitate&start=-3&who=%3Cscript%3E&x=../..")
    assert decision(page) == 0 and "start 0" in part(page, "instruction").inner_text()
    start = {name: image(page, name) for name in ("dream", "real")}
    assert (start["dream"] == start["real"]).all() and (image(page, "apart") == 255).all()
    press(page, "ArrowLeft", 3)
    assert decision(page) == 3
    for name in ("dream", "real"):
        assert np.abs(image(page, name) - start[name]).max() > 50, name
    assert [points(page, f"{name}-curve") for name in ("dream", "real", "apart")] == [3, 3, 3]
    assert part(page, "dream-line").inner_text().startswith("R = 0.")
    assert "stop" in part(page, "dream-curve").text_content()

    part(page, "up").click()
    until(page, 4)
    page.keyboard.press("Space")  # the button that was clicked must not be clicked again
    until(page, 5)
    assert decision(page) == 5
    page.get_by_role("button", name="Expert").click()
    until(page, 8)
    page.keyboard.press("p")
    page.wait_for_function("document.querySelector('[data-test=run]').innerText === 'Play'")
    page.wait_for_timeout(1500)  # the decision that was being made comes yet
    paused = decision(page)
    page.wait_for_timeout(1500)
    assert decision(page) == paused >= 8 and part(page, "run").inner_text() == "Play"
    press(page, "w", 1)  # a person takes over
    assert decision(page) == paused + 1 and part(page, "run").is_disabled()
    page.wait_for_timeout(300)
    assert points(page, "dream-curve") == paused + 1

    for ending in ("gif", "mp4"):
        with page.expect_download() as download:
            part(page, ending).click()
        assert download.value.suggested_filename.endswith(f"_0.{ending}")
        film = imageio.imread(download.value.path(), extension=f".{ending}", index=None)
        assert len(film) == paused + 2 and film.shape[1:3] == (4 * 64, 3 * 4 * 64)

    part(page, "new-start").click()
    page.wait_for_function(
        "document.querySelector('[data-test=instruction]').innerText.includes('start 1')"
    )
    assert decision(page) == 0 and points(page, "dream-curve") == 0

    part(page, "sees").click()
    page.wait_for_function("document.activeElement === document.body")
    press(page, "Space", 1)  # the gripper's, not the switch's
    assert part(page, "sees").get_attribute("aria-checked") == "true"
    part(page, "task").click()
    page.get_by_role("option", name="handle-press").click()
    page.wait_for_function(
        "document.querySelector('[data-test=instruction]').innerText.startsWith('handle-press')"
    )
    press(page, "ArrowDown", 1)  # the hand's, not the list's
    assert part(page, "instruction").inner_text().startswith("handle-press, start 1")
    page.context.close()


@pytest.mark.slow
def test_a_simulator_that_breaks_off(chromium, server):
    """Its visitor is told so; a new page has a new one."""
    page = visit(chromium, server.address)
    for worker in server.workers():
        worker.kill()
    page.keyboard.press("ArrowLeft")
    page.get_by_text("broke off; reload").wait_for()
    page.reload()
    page.wait_for_function(
        "document.querySelector('[data-test=real] img')?.src.startsWith('data:')"
    )
    press(page, "ArrowLeft", 1)
    page.context.close()


@pytest.mark.slow
def test_visitors_do_not_mix(chromium, server):
    """What one does, the other does not see; a fifth waits; who leaves takes his worker along."""
    first, second = (visit(chromium, server.address) for _ in range(2))
    press(first, "ArrowLeft", 2)
    before = image(second, "real")
    press(first, "ArrowLeft", 1)
    assert (decision(first), decision(second)) == (3, 0)
    assert (image(second, "real") == before).all()
    press(second, "ArrowRight", 1)
    assert (decision(first), decision(second)) == (3, 1)

    others = [visit(chromium, server.address) for _ in range(play.VISITORS - 2)]
    fifth = visit(chromium, server.address, wait=False)
    fifth.get_by_text("playing already").wait_for()
    assert len(server.workers()) == play.VISITORS
    for page in (first, second, *others, fifth):
        page.context.close()
    for _ in range(300):
        if not server.workers():
            break
        time.sleep(0.2)
    assert not server.workers()
    visit(chromium, server.address).context.close()


@pytest.mark.slow
def test_nothing_else_is_served_and_ctrl_c_ends_it(server, run):
    """Only this machine is listened to, no file of the run or beside it can be had, and nothing is
    written; at the end no process stays."""
    listening = [
        c for c in psutil.Process(server.process.pid).net_connections() if c.status == "LISTEN"
    ]
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}
    for path in (
        "config.json", "../run/config.json", "%2e%2e/run/config.json", "stages.json", "docs",
        "_nicegui/../config.json", "etc/passwd", "//etc/passwd", "openapi.json",
    ):  # fmt: skip
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.address}/{path}")
        assert refused.value.code == 404, path
    code, text = server.stop()
    assert code == 0 and "Traceback" not in text, text
    assert sorted(path.name for path in run.folder.parent.iterdir()) == ["run"]


@pytest.mark.slow
@pytest.mark.skipif("WORLDENV_PLAY_RUN" not in os.environ, reason="WORLDENV_PLAY_RUN names no run")
def test_picture_for_the_readme(chromium):
    """docs/play.png: SFT and the mug, which moves along in the dream only."""
    server = Server(Path(os.environ["WORLDENV_PLAY_RUN"]).absolute())
    try:
        size = {"width": 1180, "height": 850}
        page = visit(chromium, f"{server.address}/?task=coffee-push&start=4&who=sft", viewport=size)
        until(page, 18)
        page.keyboard.press("p")
        page.wait_for_timeout(2000)
        picture = ROOT / "docs" / "play.png"
        page.screenshot(path=picture)
        assert picture.stat().st_size < 200_000
    finally:
        server.stop()

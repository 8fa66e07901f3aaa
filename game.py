"""Playing inside the dream: the learned world and the real simulator side by side.

    start --+--> o_0, s_0 --> WorldEnv ---R, stop---.       dream: simulator, reflector
            |                    ^                  |
            |     one chunk a_t -+                  +--> where the two part
            |                    v                  |
            '--> o_0, s_0 --> VecRealEnv --success--'       real: MuJoCo, in a worker process

Both begin at the same real start and are given the same chunks, whoever chose them: a person, the
SFT policy, the post-trained policy or the expert. Nothing here knows of a page (play.py): a Game
can be played from a test or a notebook as well.

The reflector's stop ends nothing here: its word is shown, and both worlds go on to DECISIONS.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from camera import Camera
from demos import camera_of, write_film
from evaluate import test_starts
from films import side_by_side
from reflector import reflector_frames
from runs import BadRun, Run
from tasks import EnvConfig, Start
from vecenv import VecRealEnv
from vlm import tokenize, without_padding
from worldenv import NoReflector, WorldEnv

ACTORS = ("you", "sft", "policy", "expert")
# A person needs longer than the policies: both worlds end here, not at the run's horizon. What the
# dream shows after that horizon it was not trained for.
DECISIONS = 200
# The two have parted when the hands are further from each other than half the width of Meta-World's
# cubes, or an eighth of the picture's width and height differs by more than this, in its mean: a
# thing that is elsewhere, or gone. A good dream's own noise is 10 to 20 there [measured here].
PARTED_MM = 20.0
PARTED_LEVELS = 32.0  # of 255
BLOCKS = 8  # along a side of the picture
RED = (204, 51, 17)
SHARPER = 4  # times: by how much the picture of the difference is darkened, to be seen
FILM_FPS = 10


@dataclass
class Parts:
    """What a run has to play with; shared by all games, and used by one of them at a time."""

    env: EnvConfig  # as both worlds are played: the run's, with the horizon DECISIONS
    tasks: tuple[str, ...]
    camera: Camera
    simulator: Any  # as WorldEnv takes it
    reflector: Any = None  # None: not trained yet
    policies: dict = field(default_factory=dict)  # "sft", "policy": has act(observation, running)
    notes: list[str] = field(default_factory=list)  # one sentence for each part that is missing
    horizon: int = 30  # the run's own
    seed: int = 0  # of the dreams
    lock: threading.Lock = field(default_factory=threading.Lock)  # games take turns to imagine

    @property
    def actors(self) -> list[str]:
        """Who can act, of ACTORS."""
        return [name for name in ACTORS if name in ("you", "expert") or name in self.policies]


def load_parts(run: Run) -> Parts:
    """Everything of a run folder that is there already; BadRun where there is no dream yet."""
    if run.config.rl_env == "real":
        raise BadRun(
            f"{run.folder}: was trained in the real simulator and has no dream; expected a run "
            "with one; make it with: python cli.py train --out ANOTHER_FOLDER"
        )
    if not run.checkpoint("simulator").is_file():
        raise BadRun(
            f"{run.folder}: has no simulator yet, so there is no dream to play in; expected a run "
            "up to that stage; give its train command again, with --until simulator if you like"
        )
    camera = camera_of(run.episodes_folder)
    parts = Parts(
        env=replace(run.config.env, horizon=max(DECISIONS, run.config.env.horizon)),
        tasks=run.config.tasks,
        camera=camera,
        simulator=run.simulator(camera),
        horizon=run.config.env.horizon,
        seed=run.config.seed,
    )
    missing = "give the run's train command again to go on"
    if run.checkpoint("reflector").is_file():
        parts.reflector = run.reflector()
    else:
        parts.notes.append(f"No reflector yet, so no reward curve; {missing}.")
    for name, words in (("sft", "SFT"), ("policy", "post-trained")):
        if run.checkpoint(name).is_file():
            parts.policies[name] = run.policy(name)
        else:
            parts.notes.append(f"No {words} policy yet; {missing}.")
    return parts


# ------------------------------------------------------------------------------------------- a hand


def directions(camera: Camera) -> dict[str, np.ndarray]:
    """For each way to move the hand, as it looks in the picture, (3,) float32 in the world's axes,
    its largest entry 1 or -1: full speed.

    Left, right, back (towards the viewer) and forward lie in the table's plane. Where the
    picture is turned by 180 degrees against MuJoCo's, its right is the camera's left:

        right = R e_x (turned: -R e_x),    forward = -R e_z,    both without z,    up = (0, 0, 1)
    """
    rotation = np.asarray(camera.rotation, np.float64).reshape(3, 3)
    flat = np.array([1.0, 1.0, 0.0])
    right = -rotation[:, 0] if camera.turned else rotation[:, 0]
    ways = {"right": right * flat, "forward": -rotation[:, 2] * flat, "up": np.eye(3)[2]}
    ways |= {"left": -ways["right"], "back": -ways["forward"], "down": -ways["up"]}
    return {name: (way / np.abs(way).max()).astype(np.float32) for name, way in ways.items()}


def held_chunk(way: np.ndarray | None, grip: float, shape: tuple[int, ...]) -> np.ndarray:
    """A chunk (K, A) of K equal steps: the first three numbers move the hand (None: not at all),
    the last is the gripper's, what lies between (a robot that turns its hand) is 0."""
    action = np.zeros(shape[1], np.float32)
    if way is not None:
        action[:3] = way
    action[-1] = grip
    return np.tile(action, (shape[0], 1))


# ------------------------------------------------------------------------------------------- a game


@dataclass
class Track:
    """What one world showed since the start, over T decisions."""

    images: list[np.ndarray]  # T+1 of (H, W, 3) uint8
    states: list[np.ndarray]  # T+1 of (S,) float32
    rewards: list[float] = field(default_factory=list)  # T of R in [0, 1]; NaN without a reflector
    success: list[bool] = field(default_factory=list)  # T; real: the true one, dream: R says it

    @property
    def first_success(self) -> int | None:
        """The first decision (from 1) that succeeded, None where none did."""
        return self.success.index(True) + 1 if True in self.success else None


class Game:
    """One game: two worlds that are given the same chunks.

    env: vecenv.VecRealEnv with one slot, or what has its face. Every method may be called from any
    thread; they wait for each other. `close` ends the env's worker.
    """

    def __init__(self, parts: Parts, env: VecRealEnv):
        self.parts, self.env = parts, env
        self.world = WorldEnv(
            parts.simulator, parts.reflector or NoReflector(), {}, 1, parts.env, parts.seed
        )
        self.ways = directions(parts.camera)
        self.sees = "dream"  # whose picture the policies look at; the expert knows the true state
        self.turn = threading.Lock()
        self.closed = False
        self.start: Start | None = None
        self.number, self.instruction = 0, ""
        self.dream, self.real = Track([], []), Track([], [])

    # -- starting

    def reset(self, task: str, number: int) -> None:
        """Both worlds at start `number` of the development split of a task of the run
        (ValueError: another task, a number out of range)."""
        if task not in self.parts.tasks:
            raise ValueError(f"task: got {task!r}; expected one of {', '.join(self.parts.tasks)}")
        (start,) = test_starts((task,), 1, "dev", number)
        with self.turn:
            if self.closed:
                return
            options = {"starts": [start], "stop_on_success": False}
            seen, _ = self.env.reset(options=options)
            image, state = seen["image"][0], seen["state"][0]
            self.world.starts = {start: (image, state)}
            with self.parts.lock:
                # With its seed: the same start and the same actions are the same dream again.
                dreamt, _ = self.world.reset(seed=self.parts.seed, options=options)
            self._seen = {"dream": dreamt, "real": seen}
            self.dream, self.real = Track([image], [state]), Track([image], [state])
            self.start, self.number = start, number
            self.instruction = seen["instruction"][0]
            self.chunks: list[np.ndarray] = []  # what both worlds were given, T of (K, A)
            self.actors: list[str] = []  # who chose each
            self.apart: list[tuple[float, float]] = []  # T of (mm, levels), see `apart`
            self.grip = -1.0  # a person's gripper: -1 opens, +1 closes
            self.took: deque[tuple[float, float]] = deque(maxlen=10)  # seconds: dream, all

    # -- deciding

    @property
    def over(self) -> bool:
        """Nothing more can be played from this start."""
        return self.closed or self.start is None or len(self.chunks) >= self.parts.env.horizon

    def push(self, way: str) -> None:
        """A person's decision: the hand one of `self.ways`, or "grip": the gripper the other way,
        or "stay"."""
        if way == "grip":
            self.grip = -self.grip
        self._play("you", lambda: held_chunk(self.ways.get(way), self.grip, self._shape))

    def decide(self, actor: str) -> None:
        """One decision of "sft", "policy" or "expert"; "you" stays where it is."""
        if actor == "you":
            self.push("stay")
        elif actor == "expert":
            self._play("expert", None)
        else:
            policy, running = self.parts.policies[actor], np.ones(1, bool)
            self._play(actor, lambda: policy.act(self._seen[self.sees], running)[0])

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.env.action_space.shape[1:]

    def _play(self, actor: str, choose) -> None:
        """The chunk (K, A) that `choose` returns, in both worlds; None: reality's own expert."""
        with self.turn:
            if self.over:
                return
            began = time.perf_counter()
            if choose is None:
                chunks, seen, _, _, _, infos = self.env.expert_step()
            else:
                with self.parts.lock:
                    chunks = choose()[None]
                seen, _, _, _, infos = self.env.step(chunks)
            with self.parts.lock:
                imagining = time.perf_counter()
                self.world.done[:] = False  # the reflector's stop ends nothing here
                dreamt, _, _, _, verdict = self.world.step(chunks)
                imagined = time.perf_counter() - imagining
                self._note(self.dream, dreamt, verdict["reflector"][0], verdict["success"][0])
                self._note(self.real, seen, np.nan, infos["success"][0])
                self.real.rewards[-1] = self._judge_reality()
            self._seen = {"dream": dreamt, "real": seen}
            self.chunks.append(chunks[0])
            self.actors.append(actor)
            self.apart.append(apart(self.dream, self.real))
            self.took.append((imagined, time.perf_counter() - began))

    def _note(self, track: Track, seen: dict, reward: float, success: bool) -> None:
        track.images.append(seen["image"][0].copy())
        track.states.append(seen["state"][0].copy())
        track.rewards.append(float(reward))
        track.success.append(bool(success))

    def _judge_reality(self) -> float:
        """R of the real frame that was seen last: the very reflector of the dream."""
        if self.parts.reflector is None:
            return float("nan")
        frames = reflector_frames(np.stack(self.real.images[:1] + self.real.images[-2:]), 2)
        state = torch.from_numpy(self.real.states[-1])[None]
        tokens = without_padding(tokenize([self.instruction]))
        return float(self.parts.reflector.reward(torch.from_numpy(frames)[None], tokens, state)[0])

    # -- looking

    @property
    def etas(self) -> tuple[float | None, float | None]:
        """The thresholds above which the reflector stops in the dream (of this task, once there is
        one) and in reality; None without one."""
        judge = self.parts.reflector
        if judge is None:
            return None, None
        return judge.dream_eta(self.instruction), float(judge.threshold)

    @property
    def parted(self) -> int | None:
        """The first decision after which hands or pictures are further apart than PARTED_MM or
        PARTED_LEVELS (see `apart`); None while they are not."""
        far = [mm > PARTED_MM or levels > PARTED_LEVELS for mm, levels in self.apart]
        return far.index(True) + 1 if True in far else None

    def rates(self) -> tuple[float, float] | None:
        """Over the last decisions: frames/s of the dream alone, and of both worlds with whoever
        acts (a frame of each a decision); None before the first."""
        if not self.took:
            return None
        dream, both = np.mean(self.took, axis=0)
        return 1 / dream, 1 / both

    def difference(self, t: int = -1) -> np.ndarray:
        """(H, W, 3) uint8: white where the two pictures agree, darker where they do not, and a red
        line around each block by which they have parted."""
        error = difference(self.dream.images[t], self.real.images[t])
        grey = (255 - SHARPER * error).clip(0, 255).astype(np.uint8)
        shown = grey[..., None].repeat(3, axis=-1)
        side = len(error) // BLOCKS
        for row, column in np.argwhere(blocks(error) > PARTED_LEVELS) * side:
            block = shown[row : row + side, column : column + side]
            block[[0, -1]] = block[:, [0, -1]] = RED
        return shown

    def film(self, ending: str) -> bytes:
        """All since the start as a film, "gif" or "mp4": dream, reality, difference."""
        with self.turn:
            count = len(self.real.images)
            differences = [self.difference(t) for t in range(count)]
            films = [np.stack(x) for x in (self.dream.images, self.real.images, differences)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"play.{ending}"
            write_film(path, side_by_side(films), fps=FILM_FPS)
            return path.read_bytes()

    def close(self) -> None:
        """End the worker of the real environment; waits for a decision that is being played."""
        with self.turn:
            self.closed = True
            self.env.close()


def apart(dream: Track, real: Track) -> tuple[float, float]:
    """How far apart the two are now: hands in mm, and the pictures in levels of 255, in the mean of
    the block where they differ most."""
    hands = np.linalg.norm(dream.states[-1][:3] - real.states[-1][:3])
    worst = blocks(difference(dream.images[-1], real.images[-1])).max()
    return 1000 * float(hands), float(worst)


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Two pictures (H, W, 3) uint8 -> (H, W): mean absolute difference of the three colours."""
    return np.abs(a.astype(np.int16) - b).mean(-1)


def blocks(error: np.ndarray) -> np.ndarray:
    """(H, W) -> (BLOCKS, BLOCKS), the mean of each block."""
    side = len(error) // BLOCKS
    return error.reshape(BLOCKS, side, BLOCKS, side).mean((1, 3))

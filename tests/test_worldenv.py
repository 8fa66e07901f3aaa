"""WorldEnv with a scripted simulator and reflector: who is stopped, when, with which reward."""

import ctypes
import resource
from dataclasses import replace

import gymnasium
import numpy as np
import psutil
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from demos import Episode
from instructions import INSTRUCTIONS
from simulator import memory_indices
from tasks import EnvConfig, RealEnv, Start
from worldenv import NoReflector, WorldEnv, give_back_memory, keep_freed_memory, start_frames

SIZE, CHUNK, HORIZON = 16, 2, 4
CONFIG = EnvConfig(size=SIZE, chunk=CHUNK, horizon=HORIZON)
ETA = 0.75


class ScriptedSimulator:
    """x, the state's first number, moves by the chunk's first actions; frames are 100 x bright.

    It insists on being asked rightly: memory newest first, reference tokens of the slot's start.
    """

    def __init__(self):
        self.asked = 0
        self.memories: list[np.ndarray] = []
        self.motions: list[list[float]] = []  # of x, before every decision
        self.targets: list[list[float]] = []  # of x, too

    def first_look(self, first: torch.Tensor) -> tuple[torch.Tensor]:
        assert first.shape[1:] == (3, SIZE, SIZE) and first.min() >= -0.5 and first.max() <= 0.5
        return (first[:, :1, :1, 0],)

    def next_state(self, state, motion, action) -> torch.Tensor:
        assert action.abs().max() <= 1
        if motion is not None:
            self.motions.append((state[:, :4] - motion[:, :4])[:, 0].tolist())
            self.targets.append(motion[:, 4].tolist())
        following = state.clone()
        following[:, 0] += action[:, :, 0].sum(1)
        return following

    def next_frame(self, memory, state, next_state, action, look=None, generator=None):
        assert memory.dtype == torch.uint8 and memory.shape[1:] == (4, SIZE, SIZE, 3)
        first = memory[:, 3, 0, 0, 0].float() / 255 - 0.5
        assert torch.allclose(look[0][:, 0, 0], first, atol=1e-6)
        assert torch.equal(next_state, self.next_state(state, None, action))
        self.asked += len(memory)
        self.memories.append(memory[:, :, 0, 0, 0].numpy())
        brightness = (100 * next_state[:, 0]).clamp(0, 255).round().to(torch.uint8)
        return brightness[:, None, None, None].expand(-1, SIZE, SIZE, 3)


class NoisySimulator(ScriptedSimulator):
    """The same, but every frame carries noise from the environment's generator."""

    def next_frame(self, memory, state, next_state, action, look=None, generator=None):
        noise = torch.randint(0, 9, (len(memory), SIZE, SIZE, 3), generator=generator)
        frame = super().next_frame(memory, state, next_state, action, look, generator)
        return (frame.long() + noise).clamp(0, 255).to(torch.uint8)


class ScriptedReflector(NoReflector):
    """0.9 where the current frame shows x above 1, else a fifth of x."""

    threshold = dream_threshold = torch.tensor(ETA)

    def reward(self, frames, tokens, state, landmarks=None) -> torch.Tensor:
        assert frames.dtype == torch.uint8 and frames.shape[1:] == (3, SIZE, SIZE, 3)
        assert (tokens > 0).any(1).all()  # a running slot has an instruction
        x = frames[:, 2].float().mean((1, 2, 3)) / 100
        return torch.where(x > 1, 0.9, x / 5)


def known_starts() -> dict[Start, tuple[np.ndarray, np.ndarray]]:
    """Three starts at x = 0, 0.1 and 0.2, with matching frames."""
    tasks = ("drawer-open", "handle-press", "reach")
    starts = {}
    for number, task in enumerate(tasks):
        image = np.full((SIZE, SIZE, 3), 10 * number, np.uint8)
        state = np.array([0.1 * number, 0, 0, 1], np.float32)
        starts[Start(task, number)] = (image, state)
    return starts


def world(num_envs: int = 3, simulator=None) -> WorldEnv:
    """A scripted world."""
    simulator = simulator or ScriptedSimulator()
    return WorldEnv(simulator, ScriptedReflector(), known_starts(), num_envs, CONFIG)


def push(*amounts: float) -> np.ndarray:
    """Chunks that move slot i's x by amounts[i]."""
    actions = np.zeros((len(amounts), CHUNK, 4), np.float32)
    actions[:, :, 0] = np.array(amounts)[:, None] / CHUNK
    return actions


# ---------------------------------------------------------------------------------------- semantics


def test_reset_shows_the_real_start():
    """Image, state and first wording of each start, nobody done."""
    env = world()
    observation, infos = env.reset(options={"starts": list(known_starts())})
    for slot, (start, (image, state)) in enumerate(known_starts().items()):
        assert (observation["image"][slot] == image).all()
        assert (observation["state"][slot] == state).all()
        assert observation["instruction"][slot] == INSTRUCTIONS[start.task][0]
    assert not env.done.any() and not infos["success"].any()


def test_reflector_stops_and_rewards():
    """The second R > eta in a row terminates with reward R; before, the episode goes on with
    reward 0."""
    env = world()
    env.reset(options={"starts": list(known_starts())})
    _, rewards, terminations, _, infos = env.step(push(0.3, 1.0, 0.3))
    assert infos["reflector"].tolist() == pytest.approx([0.06, 0.9, 0.1])
    assert not rewards.any() and not terminations.any() and not infos["success"].any()
    observation, rewards, terminations, truncations, infos = env.step(push(0.2, 0.0, 0.2))
    assert terminations.tolist() == [False, True, False] and not truncations.any()
    assert rewards.tolist() == pytest.approx([0.0, 0.9, 0.0])
    assert infos["reflector"].tolist() == pytest.approx([0.1, 0.9, 0.14])
    assert infos["success"].tolist() == terminations.tolist() == env.done.tolist()
    assert observation["image"][:, 0, 0, 0].tolist() == [50, 110, 70]
    assert observation["state"][:, 0].tolist() == pytest.approx([0.5, 1.1, 0.7])


@pytest.mark.parametrize("eta, stops", [(0.05, True), (0.15, False), (0.95, False)])
def test_the_threshold_is_the_reflectors_own(eta, stops):
    """The eta that is calibrated for dreams decides, not 0.5 and not that for real frames: R = 0.1
    stops above it only."""
    env = world(1)
    env.reflector.dream_threshold = torch.tensor(eta)
    env.reset(options={"starts": list(known_starts())[:1]})
    env.step(push(0.5))
    _, rewards, terminations, _, _ = env.step(push(0.0))
    assert terminations[0] == stops and rewards[0] == pytest.approx(0.1 if stops else 0.0)
    env.step(push(1.0))
    assert env.step(push(0.0))[2][0] == (not stops and eta < 0.9)


def test_each_task_stops_at_its_own_eta():
    """Three slots with the same R: only those whose task's eta is below it stop, after a reset and
    after a branch."""
    env = world()
    etas = dict(zip((INSTRUCTIONS[start.task][0] for start in known_starts()), (0.05, 0.5, 0.09)))
    env.reflector.dream_eta = etas.__getitem__
    env.reset(options={"starts": list(known_starts())})
    env.step(push(0.5, 0.4, 0.3))
    states = env.get_states([2, 1, 0])
    assert env.step(push(0.0, 0.0, 0.0))[2].tolist() == [True, False, True]
    env.set_states(states)
    assert env.step(push(0.0, 0.0, 0.0))[2].tolist() == [True, False, True]
    env.set_states(states[1:])
    assert env.step(push(0.0, 0.0, 0.0))[2].tolist() == [False, True, False]


def test_what_looks_like_success_for_a_moment_does_not_stop():
    """R above eta, below, above, and a reset or a branch from before: only two in a row stop."""
    env = world(1)
    env.reset(options={"starts": list(known_starts())[:1]})
    env.step(push(0.2))
    before = env.get_states([0])
    for amount in (1.0, -1.0, 1.0):
        assert not env.step(push(amount))[2].any()
    above = env.get_states([0])
    env.set_states(before)
    assert not env.step(push(1.0))[2].any()
    env.reset(options={"starts": list(known_starts())[:1]})
    assert not env.step(push(1.2))[2].any()
    longer = WorldEnv(
        env.simulator, env.reflector, known_starts(), 1, replace(CONFIG, horizon=HORIZON + 1)
    )
    longer.set_states(above)
    assert longer.step(push(0.0))[2].all()  # the branch remembers that R was above eta


def test_horizon_truncates_with_the_last_reward():
    """Whoever is never stopped gets R of the last frame at the horizon, and is not a success."""
    env = world(1)
    env.reset(options={"starts": list(known_starts())[:1]})
    for decision in range(HORIZON):
        _, rewards, terminations, truncations, infos = env.step(push(0.1))
        last = decision == HORIZON - 1
        assert truncations.tolist() == [last] == env.done.tolist() and not terminations.any()
        assert rewards[0] == pytest.approx(0.4 / 5 if last else 0.0)
    assert not infos["success"].any()


def test_success_at_the_horizon_terminates_and_does_not_truncate():
    """At the last decision the reflector's verdict goes first."""
    env = world(1)
    env.reset(options={"starts": list(known_starts())[:1]})
    for amount in (0.1, 0.1, 1.0, 0.0):
        _, rewards, terminations, truncations, _ = env.step(push(amount))
    assert terminations[0] and not truncations[0] and rewards[0] == pytest.approx(0.9)


def test_done_slots_rest():
    """A stopped slot keeps its observation, earns nothing more and costs no imagined frame."""
    env = world()
    env.reset(options={"starts": list(known_starts())})
    env.step(push(0.1, 1.0, 0.1))
    before, *_ = env.step(push(0.1, 0.0, 0.1))
    after, rewards, terminations, truncations, infos = env.step(push(0.1, -1.0, 0.1))
    assert (after["image"][1] == before["image"][1]).all()
    assert (after["state"][1] == before["state"][1]).all()
    assert rewards[1] == infos["reflector"][1] == 0
    assert not (terminations[1] or truncations[1] or infos["success"][1]) and env.done[1]
    assert env.imagined_frames == env.simulator.asked == 3 + 3 + 2


def test_slots_without_a_start_rest_from_the_beginning():
    """Fewer starts than slots is fine."""
    env = world()
    env.reset(options={"starts": list(known_starts())[:2]})
    assert env.done.tolist() == [False, False, True]
    env.step(push(0.1, 0.1, 1.0))
    assert env.imagined_frames == 2


def test_step_after_all_are_done_does_nothing():
    """No slot runs: no frame, no reward."""
    env = world(1)
    env.reset(options={"starts": list(known_starts())[:1]})
    env.step(push(1.5))
    env.step(push(0.0))
    _, rewards, terminations, truncations, _ = env.step(push(1.5))
    assert env.imagined_frames == 2
    assert not (rewards.any() or terminations.any() or truncations.any())


def test_actions_are_clipped_like_real_ones():
    """A chunk of 5s moves no further than a chunk of 1s."""
    env = world(1)
    env.reset(options={"starts": list(known_starts())[:1]})
    observation, *_ = env.step(np.full((1, CHUNK, 4), 5.0, np.float32))
    assert observation["state"][0, 0] == pytest.approx(CHUNK)


def test_simulator_remembers_the_slots_own_history():
    """At time t it is given the frames of memory_indices(t), from the same slot."""
    env = world(2)
    env.reset(options={"starts": list(known_starts())[:2]})
    frames = [[0], [10]]
    for _ in range(HORIZON):
        observation, *_ = env.step(push(0.2, 0.1))
        for slot in range(2):
            frames[slot].append(int(observation["image"][slot, 0, 0, 0]))
    assert frames == [[0, 20, 40, 60, 80], [10, 20, 30, 40, 50]]
    for time, memory in enumerate(env.simulator.memories):
        expected = [[frames[slot][i] for i in memory_indices(time)] for slot in range(2)]
        assert memory.tolist() == expected


def test_kinematics_is_told_the_motion():
    """s_t - s_{t-1}: none before the first decision of an episode, a branch remembers its own;
    and the target, which starts at the hand and moves by a hundredth of the action."""
    env = world(2)
    for _ in range(2):
        env.reset(options={"starts": list(known_starts())[:2]})
        start = env._states[:, 0].tolist()
        env.step(push(0.3, 0.2))
        env.step(push(0.1, 0.1))
        env.set_states(env.get_states([1, 0]))
        env.step(push(0.0, 0.0))
    expected = [[0.0, 0.0], [0.3, 0.2], [0.1, 0.1]] * 2
    assert np.allclose(env.simulator.motions, expected, atol=1e-6)
    assert np.allclose(env.simulator.targets[0], start, atol=1e-6)
    moved = np.add(start, [0.003, 0.002])
    assert np.allclose(env.simulator.targets[1], moved, atol=1e-6)
    assert np.allclose(env.simulator.targets[2], (moved + [0.001, 0.001])[::-1], atol=1e-6)
    env.reset(options={"starts": list(known_starts())[:2]})
    env.step(push(0.3, 0.2))
    env.set_states(env.get_states([1, 0]))
    env.step(push(0.0, 0.0))
    assert np.allclose(env.simulator.motions[-1], [0.2, 0.3], atol=1e-6)


def test_many_slots_are_imagined_like_few():
    """More slots than fit one block: every slot goes on as if alone, some of them at rest."""
    env = world(75)
    env.reset(options={"starts": list(known_starts())[:1] * 70})
    amounts = np.linspace(0, 1.2, 75)
    for decision in range(1, 4):
        observation, _, terminations, _, _ = env.step(push(*amounts))
        for slot in (0, 1, 30, 31, 32, 33, 40, 63, 64, 69, 70, 74):
            played = min(decision, next((t for t in (2, 3) if (t - 1) * amounts[slot] > 1.005), 3))
            x = played * amounts[slot] if slot < 70 else 0.0
            assert observation["state"][slot, 0] == pytest.approx(x, abs=1e-4), slot
    assert env.done[70:].all() and not env.done[:20].any()


def test_a_second_episode_forgets_the_first():
    """After a reset the same actions give the same episode."""
    env = world(1)
    seen = []
    for _ in range(2):
        env.reset(options={"starts": list(known_starts())[2:]})
        episode = [env.step(push(0.1)) for _ in range(HORIZON)]
        seen.append([step[0]["image"].copy() for step in episode] + [step[1] for step in episode])
    assert all((a == b).all() for a, b in zip(*seen, strict=True))


def test_observations_are_not_changed_by_later_steps():
    """What was handed out stays as it was."""
    env = world(1)
    observation, _ = env.reset(options={"starts": list(known_starts())[:1]})
    image, state = observation["image"].copy(), observation["state"].copy()
    env.step(push(0.5))
    assert (observation["image"] == image).all() and (observation["state"] == state).all()


# ---------------------------------------------------------------------------------------- branching


def test_branches_continue_like_the_uninterrupted_dream():
    """Two copies of one moment, in other slots, go on exactly as the original does."""
    env, original = world(3), world(3)
    for one in (env, original):
        one.reset(options={"starts": list(known_starts())})
        one.step(push(0.1, 0.2, 0.3))
    (state,) = env.get_states([1])
    env.step(push(0.1, 0.1, 0.1))  # the slots have gone on: a branch goes back in time
    observation = env.set_states([state, state])
    assert env.done.tolist() == [False, False, True]
    assert (observation["image"][0] == original._observations()["image"][1]).all()
    for _ in range(HORIZON - 1):
        expected = original.step(push(0.2, 0.2, 0.2))
        branched = env.step(push(0.2, 0.2, 0.0))
        for slot in (0, 1):
            assert (branched[0]["image"][slot] == expected[0]["image"][1]).all()
            assert (branched[0]["state"][slot] == expected[0]["state"][1]).all()
            assert branched[0]["instruction"][slot] == expected[0]["instruction"][1]
            for mine, theirs in zip(branched[1:4], expected[1:4], strict=True):
                assert mine[slot] == theirs[1]
            assert branched[4]["reflector"][slot] == expected[4]["reflector"][1]
    last = env.simulator.memories[-1]
    assert (last == original.simulator.memories[-1][1]).all()  # the memory came along


def test_a_saved_moment_can_be_used_again():
    """Neither the dream it was taken from nor a branch that used it changes it."""
    env = world(1)
    env.reset(options={"starts": list(known_starts())[:1]})
    env.step(push(0.3))
    (state,) = env.get_states([0])
    env.step(push(0.7))
    for _ in range(2):
        env.reset(options={"starts": list(known_starts())[2:]})
        env.step(push(0.5))
        assert env.set_states([state])["image"][0, 0, 0, 0] == 30
        observation, *_ = env.step(push(0.1))
        assert observation["image"][0, 0, 0, 0] == 40
        assert env.simulator.memories[-1].tolist() == [[30, 0, 0, 0]]


def test_branches_respect_the_horizon():
    """A branch from decision t0 has horizon - t0 decisions left."""
    env = world(1)
    env.reset(options={"starts": list(known_starts())[:1]})
    for _ in range(HORIZON - 1):
        env.step(push(0.0))
    env.set_states(env.get_states([0]))
    assert not env.done[0]
    assert env.step(push(0.0))[3][0]


# ---------------------------------------------------------------------------------------- bad input


def test_unknown_start_is_refused():
    """A dream begins at a real start state only."""
    with pytest.raises(ValueError, match="no real start frame is known"):
        world().reset(options={"starts": [Start("reach", 77)]})


def test_more_starts_than_slots_are_refused():
    """With what was got and what was expected."""
    with pytest.raises(ValueError, match="got 3 starts, expected 1 to 2"):
        world(2).reset(options={"starts": list(known_starts())})


def test_actions_of_another_shape_are_refused():
    """Before anything is imagined."""
    env = world()
    env.reset()
    with pytest.raises(ValueError, match="actions: got shape"):
        env.step(np.zeros((3, CHUNK + 1, 4), np.float32))
    assert env.imagined_frames == 0


# ---------------------------------------------------------------------------------------- Gymnasium


def test_observations_are_in_the_observation_space():
    """After a reset, after steps, after a branch, and with slots that rest from the beginning."""
    env = world()
    assert isinstance(env, gymnasium.vector.VectorEnv)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert env.observation_space.contains(env.step(0.2 * env.action_space.sample())[0])
    assert env.observation_space.contains(env.set_states(env.get_states([0])))
    fewer = world()
    observation, _ = fewer.reset(options={"starts": list(known_starts())[:1]})
    assert fewer.observation_space.contains(observation)


class Single(gymnasium.Env):
    """One slot as a single environment: Gymnasium 1.4 has no checker for vector environments."""

    def __init__(self, env: gymnasium.vector.VectorEnv):
        assert env.num_envs == 1
        self.env = env
        self.observation_space = env.single_observation_space
        self.action_space = env.single_action_space

    def first(self, values: dict) -> dict:
        return {name: value[0] for name, value in values.items()}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        observation, infos = self.env.reset(seed=seed, options=options)
        return self.first(observation), self.first(infos)

    def step(self, action):
        observation, rewards, terminations, truncations, infos = self.env.step(action[None])
        outcome = float(rewards[0]), bool(terminations[0]), bool(truncations[0])
        return self.first(observation), *outcome, self.first(infos)


def test_gymnasium_checker_passes_on_the_dream():
    """Determinism under a seed included, with a simulator that draws noise."""
    check_env(Single(world(1, NoisySimulator())), skip_render_check=True)


def test_gymnasium_checker_passes_on_reality():
    """The real environment of one task."""
    check_env(RealEnv("button-press-topdown", CONFIG).unwrapped, skip_render_check=True)


def test_dream_and_reality_have_the_same_face():
    """The same spaces, so that one policy and one rollout function serve both."""
    real = RealEnv("button-press-topdown", CONFIG)
    env = world()
    assert env.single_observation_space == real.observation_space
    assert env.single_action_space == real.action_space


def test_start_frames_are_the_first_frames():
    """One start per episode, named by task and seed."""
    image = np.arange(3 * 4 * 4 * 3).reshape(3, 4, 4, 3).astype(np.uint8)
    state = np.arange(12).reshape(3, 4).astype(np.float32)
    action, success = np.zeros((2, CHUNK, 4), np.float32), np.zeros(3, np.uint8)
    episode = Episode(image, state, action, success, "reach", "reach the goal", 5, "exploration")
    ((start, (first, where)),) = start_frames([episode]).items()
    assert start == Start("reach", 5)
    assert (first == image[0]).all() and (where == state[0]).all()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_kept():
    """Blocks of the size of a decision's pictures, made and freed again and again, are not fetched
    from the system each time: it would hand them out in pages of 4 KiB."""
    keep_freed_memory()

    def decision() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(5_000_000) for _ in range(4)]  # 20 MB each, together 80
        del blocks
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    decision()
    assert sum(decision() for _ in range(5)) < 5 * 80e6 / 4096 / 10
    held = psutil.Process().memory_info().rss
    give_back_memory()
    assert psutil.Process().memory_info().rss < held - 60e6

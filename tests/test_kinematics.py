"""Forward kinematics: the target's arithmetic, and a hand that lags behind it."""

import numpy as np
import pytest
import torch
from sklearn.ensemble import ExtraTreesRegressor

from demos import Episode
from fit import FitConfig, fit
from kinematics import (
    TREES,
    Kinematics,
    answer,
    contact_dim,
    contact_features,
    episode_batches,
    motion_at_rest,
    motion_before,
    motion_dim,
    next_motion,
    whole_episodes,
)
from tasks import ACTION_DIM, LIBERO, METAWORLD, STATE_DIM, EnvConfig, RealEnv

CHUNK = 4


def lagging_episodes(count: int, seed: int = 0) -> list[Episode]:
    """In every decision the hand covers half of the way to its target; the gripper obeys."""
    rng = np.random.default_rng(seed)
    episodes = []
    for _ in range(count):
        length = int(rng.integers(4, 12))
        action = rng.uniform(-1, 1, (length, CHUNK, ACTION_DIM)).astype(np.float32)
        action[:, :, :3] += rng.uniform(-0.6, 0.6, 3)  # somewhere to go
        action = action.clip(-1, 1)
        state = np.zeros((length + 1, STATE_DIM), np.float32)
        state[0] = [*rng.uniform([-0.1, 0.6, 0.2], [0.1, 0.8, 0.3]), 1.0]
        target = state[0, :3].copy()
        for t in range(length):
            target += 0.01 * action[t, :, :3].sum(0)
            state[t + 1, :3] = (state[t, :3] + target) / 2
            state[t + 1, 3] = 0.5 - 0.5 * action[t, -1, 3]
        image, success = np.zeros((length + 1, 8, 8, 3), np.uint8), np.zeros(length + 1, np.uint8)
        episodes.append(Episode(image, state, action, success, "reach", "", 0, "expert"))
    return episodes


def test_the_target_is_what_the_actions_add_up_to():
    """One centimetre for an action of 1, none for the gripper, nothing outside the workspace."""
    state = torch.tensor([[0.0, 0.6, 0.2, 1.0], [0.49, 0.6, 0.2, 1.0]])
    motion = motion_at_rest(state)
    assert torch.equal(motion[:, :STATE_DIM], state) and motion.shape == (2, motion_dim(METAWORLD))
    action = torch.zeros(2, CHUNK, ACTION_DIM)
    action[:, :, 0], action[:, :2, 1], action[:, :, 3] = 1.0, -0.5, 1.0
    after = next_motion(state + 1, motion, action)
    assert torch.equal(after[:, :STATE_DIM], state + 1)  # what was now is then the past
    expected = torch.tensor([[0.04, 0.59, 0.2], [METAWORLD.high[0], 0.59, 0.2]])
    assert torch.allclose(after[:, STATE_DIM:], expected, atol=1e-6)


def test_motions_of_an_episode():
    """At rest at first; afterwards the state before and the sum of the actions."""
    episode = lagging_episodes(1)[0]
    found = np.stack([motion_before(episode, t) for t in range(len(episode) + 1)])
    assert found.shape == (len(episode) + 1, motion_dim(METAWORLD)) and found.dtype == np.float32
    assert np.array_equal(found[0], [*episode.state[0], *episode.state[0, :3]])
    assert np.array_equal(found[1:, :STATE_DIM], episode.state[:-1])
    sums = 0.01 * episode.action[..., :3].sum(1).cumsum(0) + episode.state[0, :3]
    assert np.allclose(found[1:, STATE_DIM:], sums, atol=1e-5)


def test_learns_a_hand_that_lags_behind_its_target():
    """Open loop on other episodes: within two millimetres where a hand that stays is 5 cm off."""
    torch.manual_seed(0)
    episodes, others = lagging_episodes(60), lagging_episodes(20, seed=1)
    kinematics = Kinematics(CHUNK)
    kinematics.set_range(np.concatenate([e.state for e in episodes]))
    sample = episode_batches(episodes, 32, 0)
    fit(kinematics, sample, FitConfig(steps=300, learning_rate=3e-3, warmup=10))
    with torch.no_grad():
        loss, metrics = kinematics(whole_episodes(others))
    stays = [1000 * np.linalg.norm(e.state[1:, :3] - e.state[0, :3], axis=1) for e in others]
    assert np.concatenate(stays).mean() > 50
    assert metrics["millimetres"] < 2 and loss < 0.2


def test_episodes_of_any_length_count_alike():
    """What fills up a short episode changes neither loss nor gradient."""
    short, long = sorted(lagging_episodes(8), key=len)[0], sorted(lagging_episodes(8), key=len)[-1]
    assert len(short) < len(long)
    kinematics = Kinematics(CHUNK)
    together = whole_episodes([short, long])
    with torch.no_grad():
        apart = [kinematics(whole_episodes([e]))[0].item() for e in (short, long)]
        expected = (apart[0] * len(short) + apart[1] * len(long)) / (len(short) + len(long))
        assert kinematics(together)[0].item() == pytest.approx(expected, rel=1e-5)
        together["action"][0, len(short) :] = 1.0
        assert kinematics(together)[0].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("robot", [METAWORLD, LIBERO])
def test_open_loop_is_one_decision_after_the_other(robot):
    """Training unrolls the law with less bookkeeping; what it unrolls is `smooth`, decision by
    decision, also where the target starts from the hand."""
    torch.manual_seed(0)
    kinematics = Kinematics(CHUNK, robot=robot)
    torch.nn.init.normal_(kinematics.network[-1].weight)
    first = torch.tensor(robot.middle) + 0.1 * torch.randn(3, robot.state_dim)
    action = torch.rand(3, 6, CHUNK, robot.action_dim) * 2 - 1
    path = kinematics.open_loop(first, action)
    state, motion = first, motion_at_rest(first)
    for t in range(6):
        following = kinematics.smooth(state, motion, action[:, t])
        motion = next_motion(state, motion, action[:, t], robot)
        state = following
        torch.testing.assert_close(path[:, t], state)
    assert (path[:, 1:] - path[:, :-1]).abs().max() > 0.001


def test_next_state_stays_inside_what_was_ever_seen():
    """An absurd state is pulled back to the range of the episodes."""
    seen = np.concatenate([e.state for e in lagging_episodes(5)])
    kinematics = Kinematics(CHUNK)
    kinematics.set_range(seen)
    far = torch.full((1, STATE_DIM), 1e3)
    absurd = kinematics.next_state(far, motion_at_rest(far), torch.zeros(1, CHUNK, ACTION_DIM))
    assert torch.equal(absurd[0].detach(), torch.from_numpy(seen.max(0)))


def test_the_target_is_metaworlds_own():
    """After every decision of random actions our sum is where MuJoCo's mocap body is."""
    env = RealEnv("reach-wall", EnvConfig(horizon=9))
    try:
        observation, _ = env.reset(seed=3)
        state = torch.from_numpy(observation["state"])[None]
        # Meta-World's own start: the target stands where it was put, the hand not quite there yet.
        motion, offset = motion_at_rest(state), None
        rng = np.random.default_rng(0)
        for _ in range(6):
            action = rng.uniform(-1, 1, (CHUNK, ACTION_DIM)).astype(np.float32)
            observation, *_ = env.step(action)
            motion = next_motion(state, motion, torch.from_numpy(action)[None])
            gap = env._sim.data.mocap_pos[0] - motion[0, STATE_DIM:].numpy()
            assert np.linalg.norm(gap) < 0.05
            offset = gap if offset is None else offset
            assert np.allclose(gap, offset, atol=1e-4)
    finally:
        env.close()


# ----------------------------------------------------------------------------------------- contact


def stuck_episodes(count: int, seed: int = 0) -> list[Episode]:
    """Something is in the way: the hand stays while it is pulled by less than 8 cm, whatever the
    step, and then leaps halfway to its target."""
    rng = np.random.default_rng(seed)
    episodes = []
    for _ in range(count):
        action = np.zeros((8, CHUNK, ACTION_DIM), np.float32)
        action[:, :, 0] = rng.uniform(0.3, 0.7)
        state = np.tile(np.float32([0.0, 0.6, 0.2, 1.0]), (9, 1))
        for t in range(8):
            target = 0.01 * action[: t + 1, :, 0].sum()
            pull = target - state[t, 0]
            state[t + 1, 0] = state[t, 0] + (pull / 2 if pull > 0.08 else 0)
        image, success = np.zeros((9, 8, 8, 3), np.uint8), np.zeros(9, np.uint8)
        episodes.append(Episode(image, state, action, success, "reach", "", 0, "expert"))
    return episodes


def open_loop_path(kinematics: Kinematics, episode: Episode) -> np.ndarray:
    """The hand's x after every decision, by network and forest, from the start and the actions."""
    state, path = torch.from_numpy(episode.state[:1]), []
    motion = motion_at_rest(state)
    for t in range(len(episode)):
        action = torch.from_numpy(episode.action[t : t + 1])
        following = kinematics.next_state(state, motion, action)
        motion, state = next_motion(state, motion, action), following
        path.append(float(state[0, 0]))
    return np.array(path)


@torch.no_grad()
def test_the_forest_lets_a_stuck_hand_go():
    """An untrained network knows nothing of it; the forest holds the hand and lets it go within a
    decision of the true one, on other episodes, and at pulls beyond all recorded ones too."""
    torch.manual_seed(0)
    episodes = stuck_episodes(60)
    kinematics = Kinematics(CHUNK)
    kinematics.set_range(np.concatenate([e.state for e in episodes]))
    kinematics.remember(episodes)
    for other in stuck_episodes(10, seed=1):
        true, found = other.state[1:, 0], open_loop_path(kinematics, other)
        let_go = [int(np.argmax(path > 0.02)) for path in (true, found)]
        assert found[: let_go[1]].max() < 0.01 and abs(let_go[0] - let_go[1]) <= 1
    hard = torch.zeros(1, CHUNK, ACTION_DIM)
    hard[:, :, 0] = 1.0
    state = torch.tensor([[0.0, 0.6, 0.2, 1.0]])
    motion = motion_at_rest(state)
    motion[:, STATE_DIM] = 0.4  # pulled by 40 cm; at most some 10 were recorded
    assert float(kinematics.next_state(state, motion, hard)[0, 0]) > 0.03


@torch.no_grad()
def test_a_checkpoint_brings_the_forest_along():
    """State dict to state dict: the same next states, without the episodes."""
    torch.manual_seed(0)
    kinematics, other = Kinematics(CHUNK), Kinematics(CHUNK)
    kinematics.remember(stuck_episodes(5))
    other.load_state_dict(kinematics.state_dict())
    state = torch.rand(4, STATE_DIM)
    now = state, motion_at_rest(state), torch.rand(4, CHUNK, ACTION_DIM)
    assert torch.equal(kinematics.next_state(*now), other.next_state(*now))
    assert not torch.equal(kinematics.next_state(*now), kinematics.smooth(*now))


@pytest.mark.parametrize("rows", [1, 7])
def test_the_forest_answers_as_scikit_learn_does(rows):
    """To the last bit, by whatever number of threads it was grown."""
    kinematics = Kinematics(CHUNK)
    kinematics.remember(stuck_episodes(5))
    asked = np.random.default_rng(rows).normal(size=(rows, contact_dim(METAWORLD)))
    forest, asked = kinematics._grown(), asked.astype(np.float32)
    alone = ExtraTreesRegressor(TREES, random_state=0)
    grown_from = kinematics.moments[: int(kinematics.recorded)].numpy()
    alone.fit(*np.split(grown_from, [contact_dim(METAWORLD)], axis=1))
    answers = answer(forest, asked), forest.predict(asked), alone.predict(asked)
    assert answers[0].shape == (rows, STATE_DIM)
    assert all(np.array_equal(answers[0], other) for other in answers)


@torch.no_grad()
def test_what_the_forest_is_grown_from():
    """Features and what the network was off by, row for row; at most as many as there is room for,
    drawn by seed; without any the network stands alone."""
    episodes = lagging_episodes(3)
    kinematics = Kinematics(CHUNK, moments=64)
    now = (
        torch.rand(2, STATE_DIM),
        torch.rand(2, motion_dim(METAWORLD)),
        torch.rand(2, CHUNK, ACTION_DIM),
    )
    assert torch.equal(kinematics.next_state(*now), kinematics.smooth(*now))
    kinematics.remember(episodes)
    assert int(kinematics.recorded) == sum(len(e) for e in episodes)
    e, t = episodes[0], 2
    row = kinematics.moments[t]
    then = (torch.from_numpy(x)[None] for x in (e.state[t], motion_before(e, t), e.action[t]))
    then = tuple(then)
    assert contact_features(*then).shape == (1, contact_dim(METAWORLD))
    assert torch.allclose(row[: contact_dim(METAWORLD)], contact_features(*then)[0], atol=1e-6)
    off = (torch.from_numpy(e.state[t + 1]) - kinematics.smooth(*then)[0]) / kinematics.unit
    assert torch.allclose(row[contact_dim(METAWORLD) :], off, atol=1e-4)
    few = [Kinematics(CHUNK, moments=4) for _ in range(2)]
    for part in few:
        part.load_state_dict({k: v for k, v in kinematics.state_dict().items() if k != "moments"},
                             strict=False)  # fmt: skip
        part.remember(episodes)
        assert int(part.recorded) == 4
    assert torch.equal(few[0].moments, few[1].moments)

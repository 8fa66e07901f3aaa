"""Dreams along real episodes, and the pool of own rollouts, with a scripted simulator."""

import numpy as np
import pytest
import torch

from demos import Episode
from dreams import OwnRollouts, dream_along
from simulator import memory_indices, transition_batches
from tasks import EnvConfig
from worldenv import NoReflector, WorldEnv

SIZE, CHUNK = 16, 2
CONFIG = EnvConfig(size=SIZE, chunk=CHUNK, horizon=8)


class Brightening:
    """Each imagined frame is brighter by 10 times the chunk's first number; the state adds it."""

    def first_look(self, first: torch.Tensor) -> tuple[torch.Tensor]:
        return (first[:, :1, :1, 0],)

    def next_state(self, state, motion, action):
        return state + action[:, 0]

    def next_frame(self, memory, state, next_state, action, look=None, generator=None):
        brighter = 10 * action[:, 0, 0].round().to(torch.uint8)
        return memory[:, 0] + brighter[:, None, None, None]


class AlwaysStop(NoReflector):
    """Would end every dream at once."""

    threshold = dream_threshold = torch.tensor(0.5)

    def reward(self, frames, tokens, state, landmarks=None):
        return torch.ones(len(frames))


def episode(length: int, task: str = "reach", seed: int = 0) -> Episode:
    """A real episode: each frame brighter by 11, each state larger by 1.1; success at the end."""
    times = np.arange(length + 1)
    action = np.zeros((length, CHUNK, 4), np.float32)
    action[:, 0, 0] = 1.0
    return Episode(
        image=np.full((length + 1, SIZE, SIZE, 3), 20 + 11 * times[:, None, None, None], np.uint8),
        state=(1.1 * times).astype(np.float32)[:, None].repeat(4, 1),
        action=action,
        success=(times == length).astype(np.uint8),
        task=task,
        instruction="reach the red ball",
        seed=seed,
        source="exploration",
    )  # fmt: skip


def world(num_envs: int) -> WorldEnv:
    """A scripted world that knows no start of its own."""
    return WorldEnv(Brightening(), AlwaysStop(), {}, num_envs, CONFIG)


@pytest.mark.parametrize("num_envs", [1, 2, 4])
@pytest.mark.parametrize("begins", [None, [0, 2, 5]])
def test_a_dream_is_real_up_to_where_it_begins(num_envs, begins):
    """Frames and states are reality's up to `begin`, imagined afterwards; the rest is reality's."""
    episodes = [episode(1), episode(3, seed=1), episode(7, seed=2)]
    dreams = dream_along(world(num_envs), episodes, begins)
    for real, dream, begin in zip(episodes, dreams, begins or [0, 0, 0], strict=True):
        later = np.maximum(np.arange(len(real) + 1) - begin, 0)
        brightness = real.image[begin, 0, 0, 0] + 10 * later
        assert (dream.image[: begin + 1] == real.image[: begin + 1]).all()
        assert dream.image[begin:, 0, 0, 0].tolist() == brightness[begin:].tolist()
        assert np.allclose(dream.state[begin:, 0], real.state[begin, 0] + later[begin:], atol=1e-6)
        assert (dream.success == real.success).all() and (dream.action == real.action).all()
        assert (real.image[:, 0, 0, 0] == 20 + 11 * np.arange(len(real) + 1)).all()  # untouched


def test_own_rollouts_come_late_and_are_renewed():
    """Nothing before `after`; then num_envs more every `every` steps, at most four times that."""
    episodes = [episode(4), episode(5, "drawer-open"), episode(3, seed=1)]
    rollouts = OwnRollouts(world(2), episodes, after=3, every=2)
    sizes = [len(rollouts(step)) for step in range(15)]
    assert sizes == [0, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 8, 8, 8, 8]
    pool = rollouts.pool
    assert {real.task for _, real, _ in pool} == {"reach", "drawer-open"}  # the tasks in turn
    for dream, real, begin in pool:
        assert dream.image[begin, 0, 0, 0] == real.image[begin, 0, 0, 0]
        assert dream.image[begin + 1, 0, 0, 0] == real.image[begin, 0, 0, 0] + 10


def test_half_of_a_batch_remembers_dreams_and_is_asked_for_reality():
    """Odd rows: memory and states of the dream, action and next frame of the real episode."""
    real = episode(7)
    (dream,) = dream_along(world(1), [real], [2])
    sample = transition_batches([real], 16, 0, lambda step: [(dream, real, 2)] if step else [])
    batch = {name: x.numpy() for name, x in sample(1).items()}
    for row in range(16):
        after = int(batch["next"][row, 0, 0, 0])
        t = (after - 20) // 11 - 1  # the real next frame says which decision it was
        seen = dream if row % 2 else real
        assert t >= (2 if row % 2 else 0)
        assert (batch["memory"][row] == seen.image[memory_indices(t)]).all()
        assert (batch["state"][row] == seen.state[t]).all()
        assert (batch["next_state"][row] == seen.state[t + 1]).all()
    before = {name: x.numpy() for name, x in sample(0).items()}  # no dreams yet: all rows are real
    for row in range(16):
        t = (int(before["next"][row, 0, 0, 0]) - 20) // 11 - 1
        assert (before["memory"][row] == real.image[memory_indices(t)]).all()

"""Frames stay uint8: no stage holds all of them as float32, not even for a moment.

Every piece of work that a stage consists of runs on enough frames that its own batches are small
beside them, under two watchers: one sees every tensor that torch makes (also those in a backward
pass that are gone at once), the other how far numpy's memory rises.
"""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scripted import random_episode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from camera import Camera
from demos import Episode, play
from dreams import OwnRollouts
from evaluate import reflector_card, simulator_card
from fit import FitConfig, fit
from kinematics import episode_batches
from policy import Policy, PolicyConfig, imitation_batches
from ppo import LoopConfig, loop
from reflector import (
    Reflector,
    ReflectorConfig,
    calibrate,
    calibrate_probabilities,
    frame_batches,
)
from simulator import Simulator, SimulatorConfig, transition_batches
from tasks import EnvConfig, Start
from worldenv import WorldEnv, start_frames

SIZE, LENGTH, EPISODES = 32, 12, 24
VALUES = EPISODES * (LENGTH + 1) * SIZE * SIZE * 3  # in all frames, as many bytes in uint8
CAMERA = Camera((0.0, 0.0, 1.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), 42.0, SIZE)
# No averaged weights: for those `fit` copies the whole part, and with a simulator its forest, which
# is large beside so few frames but holds none.
FIT = FitConfig(steps=2, batch=4, warmup=1)


class Largest(TorchDispatchMode):
    """Remembers the most values of a floating tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.values = max(self.values, x.numel())
        return result


def holds_all_as_float(work: Callable[[], object]) -> bool:
    """Whether `work` ever makes a floating tensor of half of all frames, or raises numpy's memory
    by three times their bytes (as uint8 a copy takes once as many, as float32 four times). It runs
    twice: what is imported and built for good in the first round is not counted."""
    work()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        with Largest() as largest:
            work()
        risen = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    return largest.values >= VALUES / 2 or risen >= 3 * VALUES


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    tasks = "reach", "push"
    return [
        random_episode(seed, LENGTH, SIZE, tasks[seed % 2], source="exploration")
        for seed in range(EPISODES)
    ]


@pytest.fixture(scope="module")
def parts(episodes):
    """Policy, simulator and reflector, tiny and untrained, with a forest and an album."""
    torch.manual_seed(0)
    simulator = Simulator(SimulatorConfig(size=SIZE, channels=(32, 32, 32), album=64), CAMERA)
    simulator.kinematics.remember(episodes)
    simulator.album.fill(episodes)
    policy = Policy(PolicyConfig(size=SIZE, width=8, hidden=16))
    return policy.eval(), simulator.eval(), Reflector(ReflectorConfig(size=SIZE, width=32)).eval()


def works(episodes: list[Episode], parts) -> dict[str, Callable[[], object]]:
    """What the stages of train.py do with frames, by name."""
    policy, simulator, reflector = parts
    config = EnvConfig(size=SIZE, horizon=LENGTH)
    world = WorldEnv(simulator, reflector, start_frames(episodes), 8, config)
    draw = lambda iteration, groups: [Start(e.task, e.seed) for e in episodes[:groups]]  # noqa: E731
    settings = LoopConfig(iterations=1, groups=2, rollouts=4, minibatch=8, decisions=40)

    def simulate() -> None:
        simulator.album.fill(episodes)
        own = OwnRollouts(world, episodes, after=1, every=1)
        fit(simulator, transition_batches(episodes, 4, 0, own), FIT)

    def judge() -> None:
        fit(reflector, frame_batches(episodes, 4, 0), FIT)
        calibrate_probabilities(reflector, episodes)
        calibrate(reflector, episodes, episodes)
        reflector_card(reflector, episodes, 0.5)

    return {
        "sft": lambda: fit(policy, imitation_batches(episodes, 4, 0), FIT),
        "play": lambda: play(world, draw(0, 8), policy.act, "evaluation", None),
        "kinematics": lambda: fit(simulator.kinematics, episode_batches(episodes, 4, 0), FIT),
        "forest": lambda: simulator.kinematics.remember(episodes),
        "simulator": simulate,
        "simulator card": lambda: simulator_card(world, episodes),  # dreams along all of them
        "reflector": judge,
        "rl": lambda: loop(world, policy, draw, settings, seed=0),
    }


@pytest.mark.parametrize(
    "name",
    ["sft", "play", "kinematics", "forest", "simulator", "simulator card", "reflector", "rl"],
)  # fmt: skip
def test_no_stage_holds_all_frames_as_float(name, episodes, parts):
    assert not holds_all_as_float(works(episodes, parts)[name])


def test_those_that_do_are_caught(episodes):
    """In torch, in numpy, and where the copy is gone at once."""
    frames = np.concatenate([e.image for e in episodes])
    assert holds_all_as_float(lambda: torch.from_numpy(frames).float().mean())
    assert holds_all_as_float(lambda: frames.astype(np.float32).mean())
    assert holds_all_as_float(lambda: frames[: len(frames) // 2] / np.float64(255))
    assert not holds_all_as_float(lambda: torch.from_numpy(frames.copy())[:9].float())


def test_what_is_kept_is_uint8(episodes, parts):
    """Episodes, the history of the dream, the album, and the rollouts that LOOP learns from."""
    from ppo import plain_rollouts

    policy, simulator, reflector = parts
    world = WorldEnv(
        simulator, reflector, start_frames(episodes), 4, EnvConfig(size=SIZE, horizon=3)
    )
    starts = [Start(e.task, e.seed) for e in episodes[:2]]
    settings = LoopConfig(groups=2, rollouts=2, branch=0)
    rollouts = plain_rollouts(world, policy, starts, settings, torch.Generator().manual_seed(0))
    (dream,) = play(world, starts[:1], policy.act, "evaluation", None)
    assert rollouts.image.dtype == dream.image.dtype == np.uint8
    assert world.get_states([0])[0][0].dtype == np.uint8
    assert simulator.album.frames.dtype == torch.uint8

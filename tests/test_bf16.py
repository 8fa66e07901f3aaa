"""bfloat16 beside float32: the same dreams and losses but for rounding.

A processor that does not compute in bfloat16 can do it slowly, so it is forced here. A bfloat16 has
eight bits: a number is off by 0.2 % at most, a sum of many such by less than its largest ones are.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from shared_work import CAMERA, EPISODES, SIZE
from test_simulator import imagine, moving_square, small_simulator

import worldenv
from fit import FitConfig, bf16_autocast, fit
from kinematics import episode_batches
from policy import Policy, PolicyConfig, imitation_batches
from reflector import Reflector, ReflectorConfig, frame_batches
from simulator import Simulator, SimulatorConfig
from tasks import EnvConfig
from worldenv import NoReflector, WorldEnv, start_frames

GREY = 0.5  # of 255: what a dreamt frame may differ, on average over its pixels; measured: 0.06
LOSS = 0.005  # what a loss may differ, as a share of it; measured: 0.001 and less
CPU = torch.device("cpu")


@contextmanager
def computing_in(dtype: torch.dtype, part: torch.nn.Module):
    """As on a processor that is quick in bfloat16, or as on one that is not. In the end it is
    checked that the first convolution of the part did compute in it."""
    seen = []
    conv = next(module for module in part.modules() if isinstance(module, torch.nn.Conv2d))
    hook = conv.register_forward_hook(lambda module, given, answer: seen.append(answer.dtype))
    with pytest.MonkeyPatch.context() as patch:
        able = {"avx512_bf16": dtype == torch.bfloat16}
        patch.setattr(torch.cpu, "get_capabilities", lambda: able)
        yield
    hook.remove()
    assert seen and set(seen) == {dtype}


def test_dreamt_frames_agree():
    """Of a simulator that has learned to copy and to paint: 40 steps on four transitions."""
    simulator, batch = small_simulator(), moving_square(4)
    fit(simulator, lambda step: batch, FitConfig(steps=40, learning_rate=2e-3, warmup=10))
    frames = {}
    for dtype in (torch.float32, torch.bfloat16):
        with computing_in(dtype, simulator.unet):
            frames[dtype] = imagine(simulator, batch).float()
    off = (frames[torch.float32] - frames[torch.bfloat16]).abs()
    moved = (frames[torch.float32] - batch["memory"][:, 0].float()).abs()
    assert moved.mean() > 20 * GREY  # else a frame that is merely copied would pass
    assert 0 < off.mean() < GREY


def test_rewards_agree():
    """R of a reflector in both; it keeps the digits of its last layer, so that rows do not tie."""
    torch.manual_seed(0)
    reflector = Reflector(ReflectorConfig(size=SIZE, width=32)).eval()
    reflector.head.weight.data.mul_(5)  # R from .1 to .9
    frames = torch.randint(0, 256, (64, 3, SIZE, SIZE, 3)).to(torch.uint8)
    tokens, state = torch.randint(1, 50, (64, 5)), torch.rand(64, 4)
    rewards = {}
    for dtype in (torch.float32, torch.bfloat16):
        with computing_in(dtype, reflector.vlm):
            rewards[dtype] = reflector.reward(frames, tokens, state)
    off = (rewards[torch.float32] - rewards[torch.bfloat16]).abs()
    assert rewards[torch.float32].std() > 0.1 and 0 < off.mean() < 0.01
    assert len(set(rewards[torch.bfloat16].tolist())) == 64


def test_dreamt_states_are_the_same_bits():
    """Over whole dreams: kinematics are outside of the autocast, since their errors add up."""
    torch.manual_seed(0)
    simulator = Simulator(SimulatorConfig(size=SIZE, channels=(32, 32, 32), album=8), CAMERA)
    simulator.album.fill(EPISODES)
    kinematics = simulator.kinematics
    fit(kinematics, episode_batches(EPISODES, 6, 0), FitConfig(steps=20, batch=6, warmup=2))
    known, config = start_frames(EPISODES), EnvConfig(size=SIZE, horizon=6)
    actions = np.random.default_rng(0).uniform(-1, 1, (6, len(known), 4, 4)).astype(np.float32)
    states = {}
    for dtype in (torch.float32, torch.bfloat16):
        env = WorldEnv(simulator.eval(), NoReflector(), known, len(known), config, 0)
        env.reset(options={"starts": list(known)})
        with computing_in(dtype, simulator.unet):
            states[dtype] = np.stack([env.step(action)[0]["state"] for action in actions])
    assert states[torch.float32].tobytes() == states[torch.bfloat16].tobytes()
    assert np.ptp(states[torch.float32], axis=0).min() > 0
    # Inside of it they would be others: the comparison would notice.
    state, action = torch.from_numpy(states[torch.float32][0]), torch.from_numpy(actions[0])
    motion = worldenv.motion_at_rest(state)
    exact = simulator.next_state(state, motion, action)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(simulator.next_state(state, motion, action), exact)


PARTS = {
    "policy": lambda: Policy(PolicyConfig(size=SIZE, chunk=4, width=16, hidden=64)),
    "reflector": lambda: Reflector(ReflectorConfig(size=SIZE, width=32)),
    "simulator": small_simulator,
}
SAMPLES = {
    "policy": imitation_batches(EPISODES, 16, 0),
    "reflector": frame_batches(EPISODES, 16, 0),
    "simulator": lambda step: moving_square(4),
}


@pytest.mark.parametrize("name", PARTS)
def test_losses_agree(name):
    """Of a part after a few steps, with the same augmentations, as `fit` computes it."""
    torch.manual_seed(0)
    part, sample = PARTS[name](), SAMPLES[name]
    fit(part, sample, FitConfig(steps=10, warmup=2))
    part.train()
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        with computing_in(dtype, part):
            torch.manual_seed(1)
            with bf16_autocast(CPU):
                loss, _ = part(sample(10))
        assert loss.dtype == torch.float32
        loss.backward()
        losses[dtype] = loss.item()
    off = abs(losses[torch.bfloat16] / losses[torch.float32] - 1)
    assert 0 < off < LOSS

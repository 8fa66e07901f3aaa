"""Branches: does the dream rank nearly equal actions as reality does? Scripted worlds whose answer
is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_trust import CHUNK, CONFIG, TASKS, Bright, Deaf, Faithful, Push, Reality, episode

from branches import Recorder, branch_truth, draw_moments, real_states, within, within_interval
from ppo import LoopConfig
from worldenv import WorldEnv

LOOP = LoopConfig(rollouts=4, branch=3, noise=1.0)
SLOTS = 8


class Contrary(Faithful):
    """A dream in which the hand goes the other way: reality's mirror image."""

    def next_state(self, state, motion, action):
        return super().next_state(state, motion, -action)

    def next_frame(self, memory, state, next_state, action, tokens=None, generator=None):
        brightness = (140 + 20 * next_state[:, 0]).clamp(0, 255).round().to(torch.uint8)
        return brightness[:, None, None, None].expand_as(memory[:, 0])


def recorded(task: str, pushes: list[float]):
    """An episode of reality: x = x / 2 + both actions of the chunk."""
    pushed = episode([0] * (len(pushes) + 1), [100] * (len(pushes) + 1), task)
    for t, push in enumerate(pushes):
        pushed.action[t, :, 0] = push
        pushed.state[t + 1, 0] = pushed.state[t, 0] / 2 + CHUNK * push
        pushed.image[t + 1] = round(100 + 20 * float(pushed.state[t + 1, 0]))
    return pushed


EPISODES = [recorded(task, [0.1, -0.1, 0.2, 0.1]) for task in TASKS]


def truth(simulator, groups: int = 24, dx: float = 0.2) -> dict:
    world = WorldEnv(simulator, Bright(), {}, SLOTS, CONFIG)
    return branch_truth(world, Reality(Bright(), SLOTS), Push(dx), EPISODES, LOOP, groups)


def test_a_dream_that_is_reality_ranks_every_branch_alike():
    """The same chunks end alike: agreement 1, correlation 1, and there was something to rank."""
    result = truth(Faithful())
    assert result["agreement"]["share"] == 1 and result["within"]["value"] == pytest.approx(1)
    assert (result["groups"], result["rollouts"], result["noisy_decisions"]) == (24, 4, 3)
    assert result["mixed"] > 0.2


def test_plain_loops_noise_does_not_end():
    """Without branching every decision is drawn: so is every decision here."""
    world = WorldEnv(Faithful(), Bright(), {}, SLOTS, CONFIG)
    plain = replace(LOOP, branch=0)
    result = branch_truth(world, Reality(Bright(), SLOTS), Push(0.2), EPISODES, plain, 24)
    assert result["noisy_decisions"] == CONFIG.horizon
    assert result["mixed"] > 0.2 and result["within"]["value"] == pytest.approx(1)


def test_a_deaf_dream_ranks_nothing():
    """No branch differs from another in the dream: the correlation has no value."""
    assert truth(Deaf())["within"] is None


def test_a_contrary_dream_ranks_the_wrong_way_round():
    assert truth(Contrary())["within"]["high"] < 0


def test_correlation_inside_groups_against_loops():
    rng = np.random.default_rng(0)
    dreamt, real = rng.random((5, 4)), rng.random((5, 4)).round()
    above, left, right = 0.0, 0.0, 0.0
    for g in range(5):
        for n in range(4):
            a = dreamt[g, n] - sum(dreamt[g]) / 4
            b = real[g, n] - sum(real[g]) / 4
            above, left, right = above + a * b, left + a * a, right + b * b
    assert within(dreamt, real) == pytest.approx(above / (left * right) ** 0.5)


def test_differences_between_groups_do_not_count():
    """A dream that knows which start is easy, and nothing else, gets no credit for it."""
    rng = np.random.default_rng(1)
    easy = np.repeat([0.0, 1.0], 50)[:, None]
    dreamt, real = easy + 1e-3 * rng.random((100, 8)), easy + 1e-3 * rng.random((100, 8))
    assert np.corrcoef(dreamt.ravel(), real.ravel())[0, 1] > 0.99
    # 700 free differences: the standard error is 0.04, five of them 0.2 (false alarm 1e-6, seeded)
    assert abs(within(dreamt, real)) < 0.2
    assert within(easy.repeat(8, 1), real) is None


def test_interval_covers_the_value_and_narrows():
    rng = np.random.default_rng(2)
    widths = []
    for groups in (20, 500):
        real = rng.random((groups, 8))
        found = within_interval(real + rng.random((groups, 8)), real, rng)
        assert found["low"] < found["value"] < found["high"]
        assert found["value"] == pytest.approx(0.5**0.5, abs=0.2)
        widths.append(found["high"] - found["low"])
    assert widths[1] < widths[0] / 3


def test_moments_come_before_success_and_tasks_in_turn():
    episodes = [episode([0, 0, 1, 1], task="reach"), episode([0, 0, 0, 0, 0], task="push")]
    moments = draw_moments(episodes, 60, np.random.default_rng(0))
    assert [e.task for e, _ in moments[:4]] == ["reach", "push", "reach", "push"]
    assert {t for e, t in moments if e.task == "reach"} == {0, 1}
    assert {t for e, t in moments if e.task == "push"} == {0, 1, 2, 3}
    assert draw_moments([episode([1, 1, 1])], 3, np.random.default_rng(0))[0][1] == 0


def test_reality_is_replayed_to_the_moment():
    """By what stops no more than the recording was stopped, to states that the oracle does stop."""
    env = Reality(Bright(), SLOTS)
    states = real_states(env, [(EPISODES[0], 3), (EPISODES[1], 0), (EPISODES[2], 1)])
    assert not env.stop and all(stops for ((_, _, stops),) in states)
    env.set_states(states)
    for slot, t in enumerate((3, 0, 1)):
        ((_, state, _),) = env.get_states([slot])[0]
        assert state[1][0] == pytest.approx(EPISODES[slot].state[t, 0])


def test_the_recorder_plays_the_same_noise_again():
    """Where the dream had ended, and after its last decision, the mean policy goes on; where the
    policy sees something else, it answers to that."""
    recorder = Recorder(Push(0.3), 1.0, shared=True, generator=torch.Generator().manual_seed(0))
    observation = {
        "image": np.zeros((3, 16, 16, 3), np.uint8),
        "state": np.zeros((3, 4), np.float32),
        "instruction": ("reach the goal",) * 3,
    }
    drawn = recorder.act(observation, np.array([True, True, False]))
    again = recorder.again(observation, np.array([True, False, True]))
    assert again[0] == pytest.approx(drawn[0], abs=1e-6) and np.abs(drawn[0] - drawn[1]).max() > 0.1
    assert not again[1].any() and again[2, 0].tolist() == pytest.approx([0.3, 0, 0, 0])
    later = recorder.again(observation, np.ones(3, bool))
    assert np.allclose(later[:, :, 0], 0.3)
    recorder.replayed, recorder.policy = 0, Push(-0.4)
    other = recorder.again(observation, np.array([True, False, False]))
    expected = drawn[0] - np.array([0.7, 0, 0, 0])
    assert other[0] == pytest.approx(expected.clip(-1, 1), abs=1e-6)


def test_fewer_slots_than_rollouts_make_smaller_groups():
    world = WorldEnv(Faithful(), Bright(), {}, 2, CONFIG)
    loop = replace(LOOP, rollouts=8)
    result = branch_truth(world, Reality(Bright(), 2), Push(0.2), EPISODES, loop, 3)
    assert result["rollouts"] == 2 and result["groups"] == 3

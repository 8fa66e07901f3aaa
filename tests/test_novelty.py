"""Novelty of dreams on scripted episodes whose distances are known."""

import numpy as np
import pytest
import torch
from test_trust import CONFIG, Bright, Deaf, Push, episode
from torch import nn

from novelty import SHARE, Novelty, NoveltyGauge, strayed, trusted


def path(xs: list[float], task: str = "reach"):
    """An episode whose hand is at these x."""
    walked = episode([0] * len(xs), task=task)
    walked.state[:, 0] = xs
    return walked


RECORDED = [path([0.0, 0.1, 0.2, 0.3]), path([5.0, 5.1, 5.2, 5.3], "push")]


def test_distances_are_to_the_nearest_recorded_state_of_the_same_task():
    novelty = Novelty(RECORDED, [])
    assert novelty.distances(path([9.0, 0.12, 0.35, 5.0])) == pytest.approx([0.02, 0.05, 4.7])


def test_the_limit_is_what_held_out_episodes_stay_below():
    """Distances 0.01 to 1.00 in a hundred steps: the 95th percentile of them is 0.9505."""
    held_out = path([0.0, *(0.3 + np.arange(1, 101) / 100)])
    novelty = Novelty(RECORDED, [held_out])
    assert novelty.limits["reach"] == pytest.approx(0.9505)
    assert novelty.limits["push"] == pytest.approx(0.9505)  # none of its own: all of the others'
    assert novelty.share(held_out) == pytest.approx(SHARE)
    assert novelty.share(path([0.0, 0.3, 0.4, 2.0, 3.0])) == 0.5


def test_strayed_by_hand():
    """Twice the share at the beginning, and never less than twice that of held-out episodes."""
    assert not strayed({"novel": [0.1, 0.1]}, {"novel": [0.2, 0.2]})
    assert strayed({"novel": [0.1, 0.1]}, {"novel": [0.2, 0.22]})
    assert not strayed({"novel": [0.0]}, {"novel": [0.1]})
    assert strayed({"novel": [0.0]}, {"novel": [0.11]})


def test_stop_rule_on_a_scripted_straying():
    near, far = {"novel": [0.06]}, {"novel": [0.3]}
    assert trusted([near]) == 0
    assert trusted([near, near, near]) == 2
    assert trusted([near, near, far]) == 1
    assert trusted([near, far, near]) == 0  # it has stopped: what came later is not seen


class Shifting(nn.Module):
    """A policy whose push is its only weight."""

    def __init__(self):
        super().__init__()
        self.dx = nn.Parameter(torch.zeros(()))

    def act(self, observation, running):
        return Push(self.dx.item()).act(observation, running)


class Moving(Deaf):
    """A simulator whose hand goes where it is pushed."""

    def next_state(self, state, motion, action):
        following = state.clone()
        following[:, 0] += action[..., 0].sum(1)
        return following


def test_gauge_restores_the_weights_before_the_straying():
    """Pushed gently the hand stays near what was recorded, pushed hard it leaves: no real episode
    is needed to see it."""
    held_out = [path([0.0, 0.05, 0.1, 0.37]), path([0.0, 0.0, 0.2, 0.31])]
    for i, e in enumerate(held_out):
        e.seed = i
    policy = Shifting()
    gauge = NoveltyGauge(Moving(), Bright(), Novelty(RECORDED, held_out), held_out, CONFIG, 2)
    stopped = []
    for iteration, push in enumerate((0.0, 0.0, 0.01, 0.02, 0.9)):
        with torch.no_grad():
            policy.dx.fill_(push)
        stopped.append(gauge.look(policy, iteration, last=iteration == 3))
    assert stopped == [False, False, False, False, True]
    assert [probe["iteration"] for probe in gauge.probes] == [0, 2, 3, 4]
    assert gauge.probes[0]["novel"] == [0, 0] and np.mean(gauge.probes[3]["novel"]) > 0.5
    assert all("real" not in probe for probe in gauge.probes)
    assert gauge.imagined_frames > 0
    assert "0% of their decisions were novel at first" in gauge.warning()
    assert gauge.restore(policy) == 3 and policy.dx.item() == pytest.approx(0.02)
    gauge.probes.pop()
    assert gauge.warning() is None

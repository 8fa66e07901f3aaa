"""What tests/ceiling.py counts, by hand; and that its stored results are what they say."""

import json
from pathlib import Path

import ceiling
import numpy as np
import pytest
from scripted import random_episode

RESULTS = sorted((Path(__file__).resolve().parent.parent / "results").glob("ceiling-*.json"))


def test_two_lists_of_episodes_are_compared():
    """They end alike in one of two starts; the second's hand is 3 and 4 cm off in x and y."""
    one = [random_episode(seed, 3, 16, "coffee-push") for seed in range(2)]
    other = [random_episode(seed, 3, 16, "coffee-push") for seed in range(2)]
    for episode, success in zip([*one, *other], (1, 0, 1, 1), strict=True):
        episode.success[-1] = success
    other[1].state[1:, :2] += (0.03, 0.04)
    found = ceiling.compared(one, other)
    assert (found["real"], found["other"], found["agreement"]) == ([1, 0], [1, 1], 0.5)
    assert found["hand_mm"] == pytest.approx(25) and found["hand_mm_last"] == pytest.approx(25)


def test_a_push_moves_the_whole_chunk_and_not_the_gripper():
    """By one draw for x, y, z each; what the policy gave stays as it is, and so does the range."""
    chunk = np.full((500, 4, 4), 0.5, np.float32)
    act = ceiling.pushed(lambda observation, on: chunk, 0.1, 0)
    moved = act({}, np.ones(500, bool)) - 0.5
    assert (chunk == 0.5).all() and (moved[..., 3] == 0).all()
    assert (moved == moved[:, :1]).all() and abs(moved[:, 0, :3].std() - 0.1) < 0.01
    assert (ceiling.pushed(lambda *_: chunk, 100.0, 0)({}, np.ones(500, bool)) <= 1).all()
    assert (ceiling.pushed(lambda *_: chunk, 0.0, 0)({}, np.ones(500, bool)) == chunk).all()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_stored_shares_are_those_of_the_stored_outcomes(path):
    found = json.loads(path.read_text())
    for row in [found["dream"], *found["pushes"].values()]:
        alike = np.mean(np.equal(row["real"], row["other"]))
        assert row["agreement"] == pytest.approx(alike) and len(row["real"]) == len(found["tasks"])
    assert found["pushes"]["0.0"]["agreement"] == 1.0  # reality is the same twice

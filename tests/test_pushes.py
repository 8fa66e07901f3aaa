"""Pushes: the noise of exploration episodes, again in scripted dreams whose answer is known."""

import numpy as np
import pytest
import torch
from test_branches import Contrary
from test_trust import CONFIG, HORIZON, TASKS, Bright, Deaf, Faithful, Push, Reality

from demos import play
from pushes import (
    FEWEST,
    LARGEST,
    LateExplorer,
    dream_pushes,
    effects,
    push_report,
    recover_pushes,
)
from tasks import Start
from worldenv import WorldEnv

NOISE, SLOTS, ROUNDS = 1.5, 8, 12


def explored(policy) -> tuple[list, np.ndarray, np.ndarray]:
    """(episodes of scripted reality, the decisions (n,) and pushes (n, 4) that were drawn)."""
    env, episodes, begins, sizes = Reality(Bright(), SLOTS), [], [], []
    for number in range(ROUNDS):
        explorer = LateExplorer(policy, NOISE, HORIZON, torch.Generator().manual_seed(number))
        starts = [Start(TASKS[0], SLOTS * number + i) for i in range(SLOTS)]
        episodes += play(env, starts, explorer.act, "exploration", after_success=1)
        begins.append(np.ceil(explorer.begins))
        u = explorer._first[:, 0]
        sizes.append(NOISE * -u.sign() * torch.log1p(-u.abs().clamp(max=1 - 1e-6)))
    return episodes, np.concatenate(begins), torch.cat(sizes).numpy()


@pytest.fixture(scope="module")
def trials():
    return explored(Push(0.2))


def dream(simulator) -> WorldEnv:
    return WorldEnv(simulator, Bright(), {}, SLOTS, CONFIG)


def test_decision_and_size_are_those_that_were_drawn(trials):
    """Of what the actions show: a dimension that is always clipped says as much as its limit."""
    episodes, begins, sizes = trials
    by_start = {push.episode.seed: push for push in recover_pushes(Push(0.2), episodes)}
    assert len(by_start) > 40
    for i, episode in enumerate(episodes):
        if begins[i] >= episode.until_success:
            assert episode.seed not in by_start  # succeeded without a push
            continue
        push = by_start[episode.seed]
        assert push.decision == begins[i]
        shown = np.abs(np.array([0.2, 0, 0, 0]) + 0.2 * sizes[i]) < 0.999
        assert push.size[shown] == pytest.approx(sizes[i][shown], abs=1e-4)
        limit = (np.sign(sizes[i]) - np.array([0.2, 0, 0, 0])) / 0.2
        assert push.size[~shown] == pytest.approx(limit[~shown], abs=1e-4)


def test_a_dream_that_is_reality_has_its_effects(trials):
    """More dx, more success: clear in reality, and the same in the dream to the last digit."""
    report = push_report(dream(Faithful()), Push(0.2), trials[0])
    assert report["agreement"]["share"] == 1 and report["same_sign"] == report["clear"] >= 1
    task = report["tasks"][TASKS[0]]
    assert task["n"] == report["pushes"] and task["dream"] == task["real"]
    assert report["differ"] == 0 and report["effects"] == 4
    assert task["real"]["effect"][0] > 2 * task["real"]["error"][0]


def test_a_contrary_dream_has_the_other_sign(trials):
    report = push_report(dream(Contrary()), Push(0.2), trials[0])
    task = report["tasks"][TASKS[0]]
    assert task["dream"]["effect"][0] < -2 * task["dream"]["error"][0]
    assert report["same_sign"] < report["clear"] and report["differ"] >= 1
    real, lie = (task[side]["effect"][0] for side in ("real", "lie"))
    assert lie == pytest.approx(task["dream"]["effect"][0] - real)  # the regression is linear


def test_a_deaf_dream_has_no_effects(trials):
    report = push_report(dream(Deaf()), Push(0.2), trials[0])
    assert report["tasks"][TASKS[0]]["dream"] == {"effect": [0] * 4, "error": [0] * 4}
    assert report["same_sign"] == 0


def test_the_dream_begins_at_the_moment_of_the_push(trials):
    """As many dreams as pushes, whatever the number of slots."""
    pushes = recover_pushes(Push(0.2), trials[0])[: SLOTS + 3]
    outcomes = dream_pushes(dream(Faithful()), Push(0.2), pushes)
    assert outcomes.tolist() == [push.episode.succeeded for push in pushes]


def test_a_few_pushes_make_nothing_clear(trials):
    """Ten trials fit four numbers closely, whatever happened."""
    report = push_report(dream(Contrary()), Push(0.2), trials[0][:10])
    assert 2 <= report["pushes"] < FEWEST and report["clear"] == report["differ"] == 0


def test_episodes_without_a_push_have_no_report(trials):
    env = Reality(Bright(), SLOTS)
    starts = [Start(TASKS[0], i) for i in range(SLOTS)]
    calm = play(env, starts, Push(0.2).act, "exploration", after_success=1)
    assert push_report(dream(Faithful()), Push(0.2), calm) is None


def test_effects_against_the_formula_for_one_dimension():
    """b = S_uy / (S_uu + 1), with means taken out; what is larger counts as LARGEST."""
    rng = np.random.default_rng(0)
    u = rng.laplace(size=(50, 1)) * 3
    y = (rng.random(50) < 0.5).astype(float)
    assert np.abs(u).max() > LARGEST
    a = u[:, 0].clip(-LARGEST, LARGEST)
    a, left = a - a.mean(), y - y.mean()
    b = (a * left).sum() / ((a * a).sum() + 1)
    error = np.sqrt(((left - b * a) ** 2).sum() / 48 / ((a * a).sum() + 1))
    found = effects(u.astype(np.float32), y)
    assert found[0] == pytest.approx([b], rel=1e-5) and found[1] == pytest.approx([error], rel=1e-5)

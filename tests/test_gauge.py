"""The exploitation gauge on scripted probes: when dream and reality part, which policy stays."""

import numpy as np
import torch
from torch import nn

import gauge as gauge_module
from gauge import (
    PROBE_STARTS,
    Gauge,
    ended,
    kept,
    parted,
    probe_starts,
    shown,
    tasks_to_dream,
)
from tasks import SPLITS, EnvConfig, Start, split_of


def probe(real: list[int], imagined: list[int]) -> dict:
    """A probe with these successes."""
    return {"real": real, "imagined": imagined}


GOOD = probe([1] * 12 + [0] * 8, [1] * 12 + [0] * 8)
EXPLOITED = probe([1] * 6 + [0] * 14, [1] * 18 + [0] * 2)  # 6 of 20 lost, the dream promises more
WORSE_IN_BOTH = probe([1] * 6 + [0] * 14, [1] * 5 + [0] * 15)
BETTER = probe([1] * 16 + [0] * 4, [1] * 17 + [0] * 3)


def test_parted_by_hand():
    """6 of 20 starts lost: mean -0.3, standard error 0.47 / sqrt(20) = 0.105; one start: within."""
    assert parted(GOOD, EXPLOITED)
    one_lost = probe([1] * 11 + [0] * 9, [1] * 18 + [0] * 2)
    # mean -0.05, standard deviation 0.2236, standard error 0.05: not below -1.64 of it
    assert not parted(GOOD, one_lost)
    assert not parted(GOOD, GOOD)
    assert not parted(GOOD, BETTER)


def test_a_fall_that_the_dream_shows_is_no_exploitation():
    """The dream does not promise what reality does not keep: LOOP may repair it."""
    assert not parted(GOOD, WORSE_IN_BOTH)


def test_shown_by_hand():
    """4 of 20 starts won: mean 0.2, standard error 0.41 / sqrt(20) = 0.092; one start: within."""
    assert shown(GOOD, BETTER)
    one_won = probe([1] * 13 + [0] * 7, [1] * 12 + [0] * 8)
    # mean 0.05, standard deviation 0.2236, standard error 0.05: not above 1.28 of it
    assert not shown(GOOD, one_won)
    assert not shown(GOOD, GOOD)
    assert not shown(GOOD, EXPLOITED)


def test_stop_rule_on_a_scripted_divergence():
    """Rises in both, then the dream alone: the last policy before they part is kept."""
    assert kept([GOOD]) == 0
    assert kept([GOOD, BETTER]) == 1
    assert kept([GOOD, BETTER, EXPLOITED]) == 1 and ended([GOOD, BETTER, EXPLOITED]) == 2
    # It has stopped: what came later is not seen.
    assert kept([GOOD, EXPLOITED, BETTER]) == 0 and ended([GOOD, EXPLOITED, BETTER]) == 1
    assert kept([GOOD, BETTER, BETTER]) == 2 and ended([GOOD, BETTER, BETTER]) == 3


def test_a_gain_that_is_not_shown_is_not_kept():
    """The start stays where LOOP gave nothing, or lost in both worlds, even if nothing parted."""
    assert kept([GOOD, GOOD, GOOD]) == 0 and ended([GOOD, GOOD, GOOD]) == 3
    assert kept([GOOD, WORSE_IN_BOTH]) == 0 and ended([GOOD, WORSE_IN_BOTH]) == 2
    assert kept([GOOD, BETTER, WORSE_IN_BOTH]) == 1


def test_a_task_that_is_promised_falsely_or_lost_is_left_out():
    """Three tasks of ten starts: one in which two successes are dreamt only, one that loses a start
    at the second look and wins it back, one that gains."""
    tasks = ["reach"] * 10 + ["door-open"] * 10 + ["drawer-open"] * 10
    honest = [1] * 5 + [0] * 5
    first = probe(honest * 3, [1] * 7 + [0] * 3 + honest * 2)
    assert tasks_to_dream([first], tasks) == ("door-open", "drawer-open")
    # One of ten is not yet too many.
    nearly = probe(honest * 3, [1] * 6 + [0] * 4 + honest * 2)
    assert tasks_to_dream([nearly], tasks) == ("reach", "door-open", "drawer-open")
    second = probe(honest + [1] * 4 + [0] * 6 + [1] * 6 + [0] * 4, honest * 3)
    assert tasks_to_dream([nearly, second], tasks) == ("reach", "drawer-open")
    assert tasks_to_dream([nearly, second, nearly], tasks) == ("reach", "drawer-open")


def test_probe_starts_belong_to_nobody_else():
    """The last of the rl split; 1000 a seed, which LOOP in the real simulator never draws."""
    seen = set()
    for seed in range(100):
        seeds = {start.seed for start in probe_starts(("reach", "drawer-open"), 50, seed)}
        assert len(seeds) == 50 and not seeds & seen
        assert all(split_of(s) == "rl" and s >= SPLITS["rl"].stop - PROBE_STARTS for s in seeds)
        seen |= seeds


class Everywhere:
    """Nothing is novel to it."""

    def share(self, episode) -> float:
        return 0.25


class ScriptedEpisode:
    """All that the gauge reads of an episode."""

    def __init__(self, succeeded: int):
        self.succeeded = bool(succeeded)

    def __len__(self) -> int:
        return 7


def test_gauge_restores_the_weights_before_the_parting(monkeypatch):
    """Probes at 0, 2, 4 updates; the third has parted: the weights of the second come back."""
    script = iter([GOOD, BETTER, EXPLOITED])

    def scripted(*_):
        now = next(script)
        return tuple([ScriptedEpisode(s) for s in now[name]] for name in ("real", "imagined"))

    monkeypatch.setattr(gauge_module, "play_both", scripted)
    films = iter("ab")  # of the probes that were the best so far
    monkeypatch.setattr(gauge_module, "telling_films", lambda *_: next(films))
    policy = nn.Linear(1, 1)
    starts = [Start("reach", seed) for seed in range(20)]
    gauge = Gauge(None, None, None, starts, EnvConfig(), every=2, novelty=Everywhere())
    stopped = []
    for iteration in range(5):
        with torch.no_grad():
            policy.weight.fill_(iteration)
        stopped.append(gauge.look(policy, iteration))
    assert stopped == [False, False, False, False, True]
    assert [p["iteration"] for p in gauge.probes] == [0, 2, 4]
    assert np.mean(gauge.probes[1]["real"]) == 0.8
    assert gauge.probes[1]["novel"] == [0.25] * 20
    assert gauge.imagined_frames == 3 * 20 * 7
    assert gauge.restore(policy) == 2
    assert policy.weight.item() == 2 and gauge.films == "b"


def test_the_last_iteration_is_looked_at_too(monkeypatch):
    """Or what was trained since the last look could never be kept."""
    monkeypatch.setattr(gauge_module, "play_both", lambda *_: ([], []))
    monkeypatch.setattr(gauge_module, "telling_films", lambda *_: {})
    monkeypatch.setattr(gauge_module, "kept", lambda probes: 0)
    monkeypatch.setattr(gauge_module, "ended", len)
    gauge = Gauge(None, None, None, [], EnvConfig(), every=3, novelty=Everywhere())
    for iteration in range(6):
        gauge.look(nn.Linear(1, 1), iteration, last=iteration == 5)
    assert [probe["iteration"] for probe in gauge.probes] == [0, 3, 5]


def test_warning_names_cause_and_remedy():
    """More than 0.2 apart: which of the two lies, and what to do; else nothing."""
    gauge = Gauge(None, None, None, [], EnvConfig(), every=1, novelty=Everywhere())
    for probes, words in (
        (EXPLOITED, ["promises more", "0.90", "0.30", "train the simulator longer"]),
        (probe([1] * 16 + [0] * 4, [1] * 2 + [0] * 18), ["misses", "0.10", "0.80", "threshold"]),
    ):
        gauge.probes = [probes]
        assert all(word in gauge.warning() for word in words)
    gauge.probes = [GOOD]
    assert gauge.warning() is None

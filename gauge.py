"""The exploitation gauge: while the policy learns in the dream, does what it promises come true?

Paper's section: none; it stands where "RL post-training" has a fixed number of steps.

A dream is learned, so a policy that is trained in it can learn to please it: imagined success rises
and real success does not. Every few iterations, and after the last, the mean policy is therefore
played from the same few real starts, in the dream and in reality, and LOOP ends when the two part:

    imagined  .58  .66  .72  .80
    real      .56  .62  .66  .50   <- parted: the policy of the third probe is kept
    iteration  0    5    10   15

What is kept has to have shown, in reality, that it is better than what LOOP began with; else that
is kept. So LOOP in an untrue dream costs time, and seldom success.

A dream can be true of one task and untrue of another. A task whose dreams promise falsely, or whose
real success has fallen, is left out from that look on (`tasks_to_dream`); LOOP goes on with the
others, and ends at the next look when none is left.

The real episodes of the probes are counted in the ledger. Their starts are the last of the "rl"
split: neither development nor test starts ever decide anything here.

# DEVIATION: the paper trains for a fixed number of steps and keeps what comes out; here a counted
#   handful of real episodes says when to stop, which tasks to leave out, and whether to keep any of
#   it; because the dream's own success rises whether or not the real one does.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch

from demos import Episode, play
from films import telling_films
from novelty import Novelty
from resume import with_prefix
from tasks import SPLITS, EnvConfig, Start
from worldenv import WorldEnv, start_frames

# The last ones of the "rl" split belong to calibration and the gauge, 1000 a seed.
PROBE_STARTS = 100_000
HALLUCINATED = 0.15  # share of a task's starts above which its dreams teach nothing true


def probe_starts(tasks: tuple[str, ...], per_task: int, seed: int, skipped: int = 0) -> list[Start]:
    """`per_task` starts a task that LOOP in the real simulator never draws; no two seeds of
    training share one. skipped: how many a task come before them and are not meant."""
    last = SPLITS["rl"].stop - 1 - 1000 * seed - skipped
    return [Start(task, last - i) for task in tasks for i in range(per_task)]


def real_starts(tasks: tuple[str, ...], seed: int):
    """draw(iteration, G): new real starts for LOOP in the real simulator, the tasks in turn."""

    def draw(iteration: int, groups: int) -> list[Start]:
        rng = np.random.default_rng([seed, iteration])
        seeds = rng.integers(SPLITS["rl"].start, SPLITS["rl"].stop - PROBE_STARTS, groups)
        return [Start(tasks[i % len(tasks)], int(s)) for i, s in enumerate(seeds)]

    return draw


def known_starts(tasks: tuple[str, ...], seed: int, known: dict, gauge=None):
    """draw(iteration, G): starts whose first real frame is `known`, the tasks in turn that a
    `Gauge` has not left out. Where it has left out all, its next look ends LOOP: until then, all
    again."""
    by_task = {task: [start for start in known if start.task == task] for task in tasks}

    def draw(iteration: int, groups: int) -> list[Start]:
        rng = np.random.default_rng([seed, len(known), iteration])  # len: of a round
        left = gauge.tasks if isinstance(gauge, Gauge) and gauge.tasks else tasks
        now = [left[i % len(left)] for i in range(groups)]
        return [by_task[task][rng.integers(len(by_task[task]))] for task in now]

    return draw


def play_both(
    simulator, reflector, policy, env, starts: list[Start], config: EnvConfig, seed: int = 0
) -> tuple[list[Episode], list[Episode]]:
    """The mean policy from the same real starts in reality and in the dream: two lists of episodes.

    Both end at the first success: reality's own, and what the reflector takes for one (success[t]
    of a dreamt episode is its verdict). With one denoising step nothing is drawn at random.
    """
    real = play(env, starts, policy.act, "evaluation", after_success=0)
    world = WorldEnv(simulator, reflector, start_frames(real), len(starts), config, seed)
    return real, play(world, starts, policy.act, "evaluation", after_success=0)


class Gauge:
    """Probes the policy now and then, says which to keep, and remembers the weights of that one.

    probes: dicts of "iteration" (updates made before it), "real" and "imagined" (success of every
    start, lists of 0 and 1 in the order of `starts`), and "novel" (share of novel decisions of
    every dream, see novelty.py, to compare that stop rule with this one).
    films: of the probe to keep what `films.telling_films` found: a success and the worst lie, each
    as (what it shows, film).
    """

    def __init__(
        self, simulator, reflector, env, starts: list[Start], config: EnvConfig, every: int,
        novelty: Novelty,
    ):  # fmt: skip
        self.parts, self.env, self.starts = (simulator, reflector), env, starts
        self.config, self.every, self.novelty = config, every, novelty
        self.probes: list[dict] = []
        self.imagined_frames = 0  # the ledger
        self.films: dict[str, tuple[str, np.ndarray]] = {}
        self._weights: dict = {}

    def look(self, policy, iteration: int, last: bool = False) -> bool:
        """Probe the policy after `iteration` updates if it is time to, or these were the last;
        True when dream and reality have parted, or no task is left to dream of."""
        if iteration % self.every and not last:
            return False
        real, dream = play_both(*self.parts, policy, self.env, self.starts, self.config)
        self.probes.append(
            {
                "iteration": iteration,
                "real": [int(episode.succeeded) for episode in real],
                "imagined": [int(episode.succeeded) for episode in dream],
                "novel": [self.novelty.share(episode) for episode in dream],
            }
        )
        self.imagined_frames += sum(len(episode) for episode in dream)
        if kept(self.probes) == len(self.probes) - 1:  # no earlier one can come back any more
            self.films = telling_films(self.parts[1], real, dream)
            self._weights = copy.deepcopy(policy.state_dict())
        return ended(self.probes) < len(self.probes) or not self.tasks

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that LOOP goes on to dream of, after the first look."""
        return tasks_to_dream(self.probes, [start.task for start in self.starts])

    def warning(self) -> str | None:
        """One plain sentence, cause and remedy, when the last probe says that the dream lies."""
        real, imagined = (float(np.mean(self.probes[-1][name])) for name in ("real", "imagined"))
        if imagined - real > 0.2:
            return (
                f"the dream promises more than reality keeps (imagined {imagined:.2f}, real "
                f"{real:.2f}): the reflector stops falsely on dreamt frames, or objects obey too "
                "well; explore more, or train the simulator longer"
            )
        if real - imagined > 0.2:
            return (
                f"the dream misses successes (imagined {imagined:.2f}, real {real:.2f}): objects "
                "stay behind in it, or the threshold is too high for dreamt frames; train the "
                "simulator longer"
            )
        return None

    def restore(self, policy) -> int:
        """Put the weights of the probe to keep into `policy`; returns its iteration."""
        policy.load_state_dict(self._weights)
        return self.probes[kept(self.probes)]["iteration"]

    def state(self) -> dict:
        """Probes, counts, weights and films for resume.py."""
        words = {name: shows for name, (shows, _) in self.films.items()}
        state = {"probes": self.probes, "imagined_frames": self.imagined_frames, "words": words}
        state |= {f"film.{name}": torch.from_numpy(film) for name, (_, film) in self.films.items()}
        return state | {f"weights.{name}": tensor for name, tensor in self._weights.items()}

    def set_state(self, state: dict) -> None:
        """Put back what `state` gave."""
        self.probes, self.imagined_frames = state["probes"], state["imagined_frames"]
        words = state["words"].items()
        self.films = {name: (shows, state[f"film.{name}"].numpy()) for name, shows in words}
        self._weights = with_prefix(state, "weights.")


def shares(probe: dict) -> dict[str, float]:
    """Shares of all starts of a probe: success "imagined" and "real", "agreement" of the two,
    "hallucinated" (in the dream only) and "missed" (in reality only)."""
    imagined, real = np.array(probe["imagined"], bool), np.array(probe["real"], bool)
    found = {
        "imagined": imagined,
        "real": real,
        "agreement": imagined == real,
        "hallucinated": imagined & ~real,
        "missed": ~imagined & real,
    }
    return {name: float(which.mean()) for name, which in found.items()}


def parted(best: dict, now: dict) -> bool:
    """Whether `now` promises at least as much as `best`, the probe with the most real success so
    far, and keeps less.

    d_i = real_now_i - real_best_i over the n starts;  parted when imagined success did not fall and

        mean(d) < -1.64 std(d) / sqrt(n),

    below it a paired difference falls by chance one time in twenty.
    """
    gain, error = _paired_gain(best, now)
    promised = np.mean(now["imagined"]) >= np.mean(best["imagined"])
    return bool(promised and gain < -1.64 * error)


def shown(first: dict, now: dict) -> bool:
    """Whether `now` has shown a gain over `first`, by the same paired differences:

        mean(d) > 1.28 std(d) / sqrt(n),

    above it a difference that is none rises by chance one time in ten.
    """
    gain, error = _paired_gain(first, now)
    return bool(gain > 1.28 * error)


def tasks_to_dream(probes: list[dict], tasks: list[str]) -> tuple[str, ...]:
    """The tasks that LOOP goes on to dream of. tasks: of every start, in the order of the probes'
    lists. Over the looks i so far and a task's starts, a task is left out for good where

        max_i mean(imagined_i and not real_i) > HALLUCINATED  or  min_i mean(real_i) < mean(real_0)

    with no allowance for chance: one start that is lost is enough.
    """
    left = []
    for task in dict.fromkeys(tasks):
        at = np.array([name == task for name in tasks])
        real = np.array([probe["real"] for probe in probes], bool)[:, at]
        imagined = np.array([probe["imagined"] for probe in probes], bool)[:, at]
        promised = (imagined & ~real).mean(1)
        if promised.max() <= HALLUCINATED and real.mean(1).min() >= real[0].mean():
            left.append(task)
    return tuple(left)


def _paired_gain(before: dict, now: dict) -> tuple[float, float]:
    """mean(d) of d_i = real_now_i - real_before_i over the n starts, and std(d) / sqrt(n) (0 where
    there is one start)."""
    difference = np.subtract(now["real"], before["real"])
    error = difference.std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return float(difference.mean()), float(error)


def kept(probes: list[dict]) -> int:
    """Index of the probe whose policy is kept. Of the probes before the first that has parted
    (`ended`) it is the one with the most real success among those that have `shown` a gain over the
    first (the latest of equals); where none has, it is the first."""
    best = 0
    for i, now in enumerate(probes[: ended(probes)]):
        if shown(probes[0], now) and np.mean(now["real"]) >= np.mean(probes[best]["real"]):
            best = i
    return best


def ended(probes: list[dict]) -> int:
    """How many probes there are before the one that has parted from the best before it; all, where
    none has."""
    best = probes[0]
    for i, now in enumerate(probes):
        if parted(best, now):
            return i
        best = max(best, now, key=lambda probe: np.mean(probe["real"]))
    return len(probes)

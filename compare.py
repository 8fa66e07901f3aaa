"""Compared fairly: what post-training in the dream is worth beside the alternatives.

From the same demonstrations and the same SFT policy, for every seed:

    sft                 imitation of the demonstrations
    filtered_bc         it goes on with successful exploration episodes
    dream_bc            and does the same on dreams of them: where LOOP in the dream begins
    more_sft            it goes on for as long without them
    filtered_bc_equal_budget
                        filtered BC whose exploration has what calibration and gauge cost as well
    real_equal_budget   LOOP in the real simulator, with no more real episodes than the dream cost
    real_equal_rollouts LOOP in the real simulator, with as many rollouts as in the dream
    dream               the method
    rounds              two rounds, with no more real episodes in all than one may cost

and the paper's ablation of the dream, extra data (exploration episodes for simulator and reflector;
the policy imitates them either way) yes or no, reflector trained or not:

    dream_no_extra_data, dream_untrained_reflector, dream_neither

Each is measured on the same test starts under the three terminations; imitation and LOOP in the
real simulator, which train no reflector, are stopped by that of "dream".

Below OUT/seed<S>/ a method is a run folder, but for those whose policies are on the way of the
run "dream" and those that only imitate, which have a file of results. What is finished is not done
again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import order
import pipeline
import train as stages
from charts import BLUE, GREY, ORANGE, png
from checkpoints import first_difference, save_part
from demos import parse_json, write_atomically
from evaluate import (
    TERMINATIONS,
    cpu_seconds,
    current_commit,
    evaluate_all,
    mean_interval,
    real_episodes,
    test_starts,
)
from fit import fit
from policy import Policy, imitation_batches
from resume import only_training
from runs import Run, RunConfig, config_to_json

ON_THE_WAY = {  # method -> the stages of the run "dream" that it is made of
    "sft": ("demos", "sft"),
    "filtered_bc": ("demos", "sft", "explore", "filtered_bc"),
    "dream_bc": order.STAGES[: order.STAGES.index("dream_bc") + 1],
}
RUNS = {  # method -> the stages that it shares with the run "dream"
    "dream": (),
    "real_equal_budget": ("demos", "sft"),
    "real_equal_rollouts": ("demos", "sft"),
    "rounds": ("demos", "sft"),
    "dream_no_extra_data": ("demos", "sft", "explore", "filtered_bc"),
    "dream_untrained_reflector": ("demos", "sft", "explore", "filtered_bc", "simulator"),
    "dream_neither": ("demos", "sft", "explore", "filtered_bc"),
}
METHODS = (*ON_THE_WAY, "more_sft", "filtered_bc_equal_budget", *RUNS)
REAL_GROUPS = 2  # groups a task in an iteration of real_equal_budget: few, yet several iterations


def compare(
    out: Path,
    config: RunConfig,
    seeds: Iterable[int],
    methods: Iterable[str],
    say: Callable[[str], None],
    progress: Callable[[str, int, int, dict], None],
) -> list[dict]:
    """Run what is not finished; a record {"seed", "method", "results", "ledger"} for each seed and
    method, in order, each once; of RL in a dream also "agreement", the share of test starts whose
    outcome dream and reality agree on, and "kept", after how many of LOOP's iterations."""
    seeds, records = list(dict.fromkeys(seeds)), []
    for seed in seeds:  # a folder of other settings is told at once, and not hours later
        if (out / f"seed{seed}" / "dream").exists():
            Run.create(out / f"seed{seed}" / "dream", replace(config, seed=seed))
    for seed in seeds:
        folder, one = out / f"seed{seed}", replace(config, seed=seed)
        base = _run(folder / "dream", one, say, progress)
        for method in dict.fromkeys(methods):
            if method in ON_THE_WAY:
                results = base.stages["evaluate"]["results"][method]
                entry = {"results": results, "ledger": _spent(base, ON_THE_WAY[method])}
            elif method == "more_sft":
                entry = _more_sft(base, say, progress)
            elif method == "filtered_bc_equal_budget":
                entry = _filtered_bc_equal_budget(base, say, progress)
            else:
                run = base
                if method != "dream":
                    settings = variant(one, method, base)
                    _share(base, folder / method, settings, RUNS[method])
                    run = _run(folder / method, settings, say, progress)
                results = run.stages["evaluate"]["results"]["policy"]
                entry = {"results": results, "ledger": training_ledger(run), **_of_the_dream(run)}
            records.append({"seed": seed, "method": method, **entry})
    return records


def _of_the_dream(run: Run) -> dict:
    """Whether its dream is true, and whether the gauge kept what LOOP did there (after the last
    round)."""
    found = run.stages["evaluate"].get("agreement")
    if not found:
        return {}
    rl = [stage for name, stage in run.stages.items() if order.round_of(name)[0] == "rl"]
    return {"agreement": found["agreement"]["share"], "kept": rl[-1]["kept"]}


def variant(config: RunConfig, method: str, base: Run) -> RunConfig:
    """The settings of a method, from those of the run "dream" and what that run has spent."""
    loop = config.real_loop
    if method == "real_equal_budget":
        budget = real_budget(base)
        a_group = loop.rollouts + (1 if loop.branch else 0)  # episodes: branches and their trunk
        groups = min(loop.groups, REAL_GROUPS * len(config.tasks), max(1, budget // a_group))
        loop = replace(loop, groups=groups, iterations=max(1, budget // (groups * a_group)))
        return replace(config, rl_env="real", real_loop=loop)
    if method == "real_equal_rollouts":  # the gauge may have ended the dream early
        same: dict[str, Any] = {"groups": config.loop.groups, "rollouts": config.loop.rollouts}
        loop = replace(loop, iterations=len(base.stages["rl"]["history"]), **same)
        return replace(config, rl_env="real", real_loop=loop)
    if method == "rounds":  # the second calibrates and looks as often as the first
        looks = 1 + math.ceil(config.loop.iterations / config.probe_every)
        again = config.round_exploration + (1 + looks) * config.probes
        return replace(config, rounds=2, exploration=max(1, config.exploration - again))
    if method == "filtered_bc_equal_budget":
        return replace(config, exploration=real_budget(base) // len(config.tasks))
    untrained = replace(config.reflector_fit, steps=1, learning_rate=1e-9)
    return {
        "dream": config,
        "dream_no_extra_data": replace(config, extra_data=False),
        "dream_untrained_reflector": replace(config, reflector_fit=untrained),
        "dream_neither": replace(config, extra_data=False, reflector_fit=untrained),
    }[method]


def training_ledger(run: Run) -> dict[str, int]:
    """What the training of a run has spent; evaluation is not training."""
    return _spent(run, [name for name in run.stages if name != "evaluate"])


def _spent(run: Run, names: Iterable[str]) -> dict[str, int]:
    total: Counter = Counter()
    for name in names:
        total.update(run.stages[name]["ledger"])
    return dict(total)


def real_budget(run: Run) -> int:
    """Real episodes beyond the demonstrations that the training of a run has cost."""
    return real_episodes(training_ledger(run))


def _run(folder: Path, config: RunConfig, say, progress, until: str | None = None) -> Run:
    """A method that is a run, or its first stages: those that are not finished."""
    run = Run.create(folder, config)
    say(f"{folder.parent.name}, {folder.name}")
    with only_training(folder):
        beside = order.side_by_side(config)
        pipeline.train(run, lambda text: say(f"  {text}"), progress, until, beside)
    return run


def _share(base: Run, folder: Path, config: RunConfig, shared: tuple[str, ...]) -> None:
    """A new run folder with checkpoints, episodes, pictures and records of the shared stages. It is
    made beside its place and moved there when complete; a copy that was killed begins anew."""
    if folder.is_dir() and any(folder.iterdir()):
        return  # begun before, or somebody else's: Run.create will see
    copy = folder.with_name(f".{folder.name}.copy")
    shutil.rmtree(copy, ignore_errors=True)
    run = Run.create(copy, config)
    count = sum(_episodes_of(base.stages[name]) for name in shared)
    files = [
        base.checkpoint(name) for name in ("sft", "filtered_bc", "simulator") if name in shared
    ]
    if config.rl_env == "real":  # lent: it stops the policy in the evaluation
        files.append(base.checkpoint("reflector"))
    files += sorted(base.episodes_folder.glob("episode_*.safetensors"))[:count]
    files += [base.episodes_folder / "dataset.json"]
    files += [base.folder / "pictures" / "demonstrations.png"]
    if "simulator" in shared:
        files += (base.folder / "pictures").glob("dream_*")
    for path in files:
        target = copy / path.relative_to(base.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    alone = {  # nothing else is done beside them here
        name: {key: x for key, x in base.stages[name].items() if key != "beside_seconds"}
        for name in shared
    }
    _write_json(run.folder / "stages.json", alone)
    os.replace(copy, folder)


def _episodes_of(stage: dict) -> int:
    ledger = stage["ledger"]
    return ledger.get("demonstrations", 0) + ledger.get("exploration_episodes", 0)


def _more_sft(base: Run, say, progress) -> dict:
    """Imitation of the demonstrations goes on from SFT, as long and as fast as filtered BC."""
    path = base.folder.parent / "more_sft.json"
    if path.exists():
        return _read(path, base.config)
    say(f"{base.folder.parent.name}, more_sft")
    config, used = base.config, cpu_seconds()
    demonstrations, _, _ = stages.sources(base)
    policy, settings = base.policy("sft"), config.filtered_bc
    torch.manual_seed(config.seed * 1000 + 500)  # no stage of a run has this one
    sample = imitation_batches(demonstrations, settings.batch, config.seed + 500)
    fit(policy, sample, settings, lambda s, loss, m: progress("sft", s, settings.steps, m))
    save_part(path.with_suffix(".safetensors"), policy, asdict(config.policy))
    ledger = _spent(base, ("demos", "sft"))
    ledger["cpu_seconds"] += round(cpu_seconds() - used)
    return _judged(base, policy, ledger, path, say)


def _filtered_bc_equal_budget(base: Run, say, progress) -> dict:
    """Filtered BC of more exploration episodes: together as many real ones as "dream" has cost."""
    folder = base.folder.parent / "filtered_bc_equal_budget"
    path = folder.with_suffix(".json")
    if path.exists():
        return _read(path, base.config)
    settings = variant(base.config, folder.name, base)
    _share(base, folder, settings, ("demos", "sft"))
    run = _run(folder, settings, say, progress, until="filtered_bc")
    return _judged(base, run.policy("filtered_bc"), training_ledger(run), path, say)


def _judged(base: Run, policy: Policy, ledger: dict, path: Path, say) -> dict:
    """The entry of a policy that is no run's own, stopped by the reflector of "dream"; to `path`,
    last: with that the method is finished."""
    config = base.config
    with stages.RealWorkers(config) as real:
        starts = test_starts(config.tasks, config.test_starts)
        results = evaluate_all(policy, real.open(), starts, base.reflector())
    entry = {"results": results, "ledger": ledger}
    _write_json(path, {**entry, "config": asdict(config)})
    say(f"  real success {results['oracle']['mean']:.3f}")
    return entry


def _read(path: Path, config: RunConfig) -> dict:
    """An entry that is finished; ValueError where it is spoiled, or of other settings. (Entries of
    earlier versions do not tell theirs.)"""
    expected = json.loads(config_to_json(config))
    try:
        entry = parse_json(path.read_text())
        float(entry["results"]["oracle"]["mean"])
        saved = entry.get("config", expected)
        found = {"results": entry["results"], "ledger": entry["ledger"]}
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path}: not readable ({error}); expected a finished method; delete it, and the same "
            "command makes it again"
        ) from error
    if saved != expected:
        raise ValueError(
            f"{path}: of other settings ({first_difference(saved, expected)}); expected those of "
            "this comparison; delete it, and the same command makes it again"
        )
    return found


def _write_json(path: Path, content) -> None:
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False).encode())


# ---------------------------------------------------------------------------------------- the table


def table(records: list[dict]) -> list[dict]:
    """A row per method: success under each termination, its difference to filtered BC of the same
    seed, and that of "dream" to it ("dream_minus"), each as {"mean", "low", "high", "n"} over seeds
    (Student's 95 % interval, None with one seed; None in all where nothing was measured); so also
    "agreement", and "loop_kept", in how many of n seeds LOOP's result was kept; and means of what
    training has cost: "demonstrations", "real_episodes" beyond them, "real_steps" of both,
    "imagined_frames" and "cpu_hours"."""
    filtered, dream = (
        {r["seed"]: r["results"]["oracle"]["mean"] for r in records if r["method"] == method}
        for method in ("filtered_bc", "dream")
    )
    rows = []
    for method in dict.fromkeys(r["method"] for r in records):
        mine = [r for r in records if r["method"] == method]
        ledgers = [r["ledger"] for r in mine]
        row: dict = {
            "method": method,
            "demonstrations": float(np.mean([x.get("demonstrations", 0) for x in ledgers])),
            "real_episodes": float(np.mean([real_episodes(x) for x in ledgers])),
            "real_steps": float(np.mean([_real_steps(x) for x in ledgers])),
            "imagined_frames": float(np.mean([x.get("imagined_frames", 0) for x in ledgers])),
            "cpu_hours": float(np.mean([x.get("cpu_seconds", 0) / 3600 for x in ledgers])),
        }
        for termination in TERMINATIONS:
            results = [r["results"] for r in mine if termination in r["results"]]
            row[termination] = _interval([result[termination]["mean"] for result in results])
        own = {r["seed"]: r["results"]["oracle"]["mean"] for r in mine}
        row["against_filtered_bc"] = _paired(own, filtered) if method != "filtered_bc" else None
        row["dream_minus"] = _paired(dream, own) if method != "dream" else None
        row["agreement"] = _interval([r["agreement"] for r in mine if "agreement" in r])
        kept = [r["kept"] > 0 for r in mine if "kept" in r]
        row["loop_kept"] = {"kept": sum(kept), "n": len(kept)} if kept else None
        rows.append(row)
    return rows


def _real_steps(ledger: dict) -> int:
    return sum(count for name, count in ledger.items() if name.endswith("_steps"))


def _paired(ours: dict[int, float], theirs: dict[int, float]) -> dict | None:
    """Differences of seeds that both have."""
    return _interval([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def _interval(values: list[float]) -> dict | None:
    if not values:
        return None
    mean, low, high = mean_interval(values)
    bounds = {"low": low, "high": high} if len(values) > 1 else {"low": None, "high": None}
    return {"mean": mean, **bounds, "n": len(values)}


def markdown(rows: list[dict]) -> str:
    """The rows as a Markdown table, in percent (intervals cut at 0 and 100) and points."""

    def cell(entry: dict | None, sign: str = "") -> str:
        if entry is None:
            return "-"
        text = f"{100 * entry['mean']:{sign}.1f}"
        if entry["low"] is None:
            return f"{text} (n = {entry['n']})"
        bounds = (entry["low"], entry["high"]) if sign else _cut(entry)
        low, high = (f"{100 * bound:{sign}.1f}" for bound in bounds)
        return f"{text} ({low} to {high}, n = {entry['n']})"

    lines = [
        "| method | demonstrations | further real episodes | real steps | imagined frames "
        "| processor hours | stop: oracle | stop: reflector | no stop | minus filtered BC, oracle "
        "| dream minus it, oracle | dream and reality agree | LOOP's result kept |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [cell(row[termination]) for termination in TERMINATIONS]
        cells += [cell(row["against_filtered_bc"], "+"), cell(row["dream_minus"], "+")]
        kept = row["loop_kept"]
        cells += [cell(row["agreement"]), f"{kept['kept']} of {kept['n']}" if kept else "-"]
        counts = ("demonstrations", "real_episodes", "real_steps", "imagined_frames")
        cost = [f"{row[name]:,.0f}" for name in counts] + [f"{row['cpu_hours']:.1f}"]
        lines.append(f"| {' | '.join([row['method'], *cost, *cells])} |")
    return "\n".join(lines) + "\n"


def _cut(entry: dict) -> tuple[float, float]:
    """The bounds of a rate: Student's interval does not know that there is no more than all."""
    return max(entry["low"], 0.0), min(entry["high"], 1.0)


def chart(rows: list[dict]) -> bytes:
    """A PNG: success under each termination, a line per method, with intervals over seeds, cut at 0
    and 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    looks = {"oracle": (BLUE, "o"), "reflector": (ORANGE, "s"), "none": (GREY, "^")}
    for aside, (termination, (colour, marker)) in enumerate(looks.items()):
        look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none"}
        axes.plot([], [], label=f"stop: {termination}", **look)
        for i, entry in enumerate(row[termination] for row in rows):
            if entry is None:
                continue
            bounds = [entry["mean"]] * 2 if entry["low"] is None else _cut(entry)
            height = i + 0.2 * (aside - 1)
            axes.plot(bounds, [height] * 2, color=colour)
            axes.plot(entry["mean"], height, **look)
    axes.set_yticks(range(len(rows)), [row["method"].replace("_", " ") for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="real success on test starts", xlim=(-0.02, 1.02))
    axes.grid(axis="x", color="#DDDDDD")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return png(figure)


def write(out: Path, records: list[dict], command: str, hardware: str) -> None:
    """compare.json (records and rows), compare.md and compare.png in the folder `out`."""
    rows = table(records)
    told = {"command": command, "commit": current_commit(), "hardware": hardware}
    content = {**told, "rows": rows, "records": records}
    note = (
        f"`{command}`, commit {told['commit']}; {hardware}; mean over seeds with Student's 95 % "
        "interval.\n"
    )
    _write_json(out / "compare.json", content)
    write_atomically(out / "compare.md", (markdown(rows) + "\n" + note).encode())
    write_atomically(out / "compare.png", chart(rows))

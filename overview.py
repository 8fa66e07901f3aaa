"""Several runs in one page: success, agreement, costs, and what differs between their settings.

Like report.py it measures nothing. Where runs differ in nothing but the seed, a row below theirs
has the mean over seeds with Student's 95 % interval, as in the README's table.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from charts import POLICIES, curves_chart
from demos import write_atomically
from evaluate import REAL_EPISODES, TERMINATIONS, mean_interval
from order import stages_of, wall_seconds
from page import html_page, plain
from report import (
    flat_settings,
    kept_agreement,
    of_rounds,
    rate,
    table,
    what_is_missing,
    whole_loop,
    write_report,
)
from runs import Run
from terminal import COPY, check_files, check_output

REPORT_MB = 20  # to be free on the disk
LEDGER = {  # column -> which counts of the ledger it sums
    "demonstrations": ("demonstrations",),
    "exploration": ("exploration_episodes",),
    "calibration and gauge": ("calibration_episodes", "gauge_episodes"),
    "LOOP in the real simulator": ("rl_episodes",),
    "all of these": ("demonstrations", *REAL_EPISODES),
    "evaluation": ("evaluation_episodes",),
    "imagined frames": ("imagined_frames",),
}


def write(folders: list[Path], out: Path | None = None) -> list[Path]:
    """One run: rewrite its report.md and report.html. Several: write the page `out` (default:
    comparison.html beside the first run) and leave their folders alone. Returns what was written.

    Raises ValueError (BadRun) for a folder that is no run or is named twice, or an `out` that is
    not to be written to; nothing is written then.
    """
    runs = [Run.open(folder) for folder in folders]
    if len(runs) == 1:
        if out is not None:
            raise ValueError("--out: got one run; expected several; one is written into its folder")
        check_output(runs[0].folder, REPORT_MB, COPY)
        path = write_report(runs[0])
        return [path, path.with_suffix(".html")]
    places = [folder.resolve() for folder in folders]
    for place in places:
        if places.count(place) > 1:
            raise ValueError(f"{place}: named twice; expected different runs; leave one out")
    path = out or places[0].parent / "comparison.html"
    if path.suffix != ".html" or path.is_dir():
        raise ValueError(f"--out: got {path}; expected a file that ends in .html; choose another")
    check_output(path.parent, REPORT_MB)
    check_files(path)
    with what_is_missing(folders):
        page = overview(dict(zip(short_names(places), runs, strict=True))).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return [path]


def short_names(places: list[Path]) -> list[str]:
    """The folders without the part of their path that all share."""
    shared = os.path.commonpath([place.parent for place in places])
    return [str(place.relative_to(shared)) for place in places]


def overview(runs: dict[str, Run]) -> str:
    """The page. runs: by the name that it shows, in order."""
    pictures = {}
    histories = {name: whole_loop(run) for name, run in runs.items()}
    if any(history for history, _ in histories.values()):
        pictures["curves.png"] = curves_chart(
            {
                name: (history, probes, runs[name].config.rl_env)
                for name, (history, probes) in histories.items()
                if history
            }
        )
    lines = [f"# World-Env: {len(runs)} runs", "", *_about(runs)]
    for section in (_success, _dream, _cost):
        lines += ["", *section(runs)]
    if pictures:
        words = "Success of the mean policy over LOOP's iterations, at the gauge's looks; where "
        words += "there was no gauge, of the rollouts that LOOP learns from."
        lines += ["", "## Learning curves", "", words, ""]
        lines += ["![Learning curves of all runs](curves.png)"]
    return html_page("\n".join(lines) + "\n", pictures.get)


# ----------------------------------------------------------------------------------------- sections


def _about(runs: dict[str, Run]) -> list[str]:
    """Seeds, what is missing, and the settings that are not the same in all."""
    settings = {name: flat_settings(run.config) for name, run in runs.items()}
    keys = list(dict.fromkeys(key for values in settings.values() for key in values))
    differing = [
        key
        for key in keys
        if key != "seed" and len({values.get(key) for values in settings.values()}) > 1
    ]
    rows = []
    for name, run in runs.items():
        missing = [stage for stage in stages_of(run.config) if stage not in run.stages]
        state = f"not finished: {', '.join(missing)}" if missing else "finished"
        values = [plain(settings[name].get(key, "-")) for key in differing]
        rows.append([plain(name), str(run.config.seed), state, *values])
    lines = table(["run", "seed", "state", *map(plain, differing)], rows)
    same = "no setting but the seed differs" if not differing else "those that differ are shown"
    return [*lines, "", f"Of {len(keys)} settings, {same}."]


def _success(runs: dict[str, Run]) -> list[str]:
    lines = ["## Real success"]
    for termination in TERMINATIONS:
        rows = []
        for name, run in runs.items():
            cells = [_rate(run, policy, termination) for policy in POLICIES]
            cells += [_points(gain(run, than, termination)) for than in ("sft", "filtered_bc")]
            rows.append([plain(name), *cells])
        measures = [
            (lambda run, p=p, t=termination: percent_of(run, p, t), "{:.1f}") for p in POLICIES
        ]
        measures += [
            (lambda run, p=p, t=termination: gain(run, p, t), "{:+.1f}")
            for p in ("sft", "filtered_bc")
        ]
        rows = _with_means(runs, rows, measures)
        header = ["run", *(label for label, *_ in POLICIES.values())]
        header += ["minus SFT, points", "minus filtered BC"]
        lines += ["", f"### Stopped by: {termination}", "", *table(header, rows)]
    note = "Percent of test starts with Wilson's 95 % interval; means over seeds with Student's."
    return [*lines, "", note]


def _dream(runs: dict[str, Run]) -> list[str]:
    """At the test starts, of the policy that was kept; reflector and simulator on held-out
    episodes."""
    shares = ("agreement", "hallucinated", "missed")
    rows = []
    for name, run in runs.items():
        found = kept_agreement(run) if run.config.rl_env == "dream" else None
        cells = [rate(found[s] | {"success": found[s]["share"]}) if found else "-" for s in shares]
        stage = (of_rounds(run, "rl") or [{}])[-1]
        cells += [_value(card(run, *path), text) for path, text in CARDS.values()]
        rows.append([plain(name), *cells, str(stage.get("kept", "-"))])
    measures: list[tuple[Callable, str]]
    measures = [(lambda run, s=s: _share(run, s), "{:.1f}") for s in shares]
    measures += [(lambda run, p=path: card(run, *p), text) for path, text in CARDS.values()]
    measures += [(lambda run: None, "")]
    rows = _with_means(runs, rows, measures)
    header = ["run", *(f"{share}, %" for share in shares), *CARDS, "iterations kept"]
    note = "Agreement, hallucinated and missed: the kept policy from the test starts (in runs of "
    note += "earlier versions from the gauge's), as shares of all; the rest on held-out episodes."
    return ["## Does the dream tell the truth?", "", *table(header, rows), "", note]


CARDS = {  # column -> (stage, key or keys), format
    "AUROC, real frames": (("reflector", "reflector_auroc"), "{:.3f}"),
    "AUROC, dreamt": (("reflector", "generated", "reflector_auroc"), "{:.3f}"),
    "PSNR at the last decision, dB": (("simulator", "sim_psnr_last"), "{:.1f}"),
    "hand off at the last decision, mm": (("simulator", "hand_mm_last"), "{:.1f}"),
}


def _cost(runs: dict[str, Run]) -> list[str]:
    """What the runs took of the machine, and what they counted in their ledgers."""
    machine: list[tuple[Callable, str]] = [
        (lambda run: wall_seconds(run.stages) / 60 if run.stages else None, "{:.1f}"),
        (lambda run: run.ledger().get("cpu_seconds"), "{:,.0f}"),
        (lambda run: over_stages(run, "peak_gib", max), "{:.1f}"),
    ]
    ledger: list[tuple[Callable, str]] = [
        (lambda run, names=names: sum(run.ledger().get(name, 0) for name in names), "{:,.0f}")
        for names in LEDGER.values()
    ]
    lines = ["## Time, memory, ledger"]
    for header, measures in (
        (["run", "minutes", "CPU seconds", "peak memory, GiB"], machine),
        (["run", *LEDGER], ledger),
    ):
        rows = [
            [plain(name), *(_value(measure(run), text) for measure, text in measures)]
            for name, run in runs.items()
        ]
        lines += ["", *table(header, _with_means(runs, rows, measures))]
    note = "Episodes by what they were played for, all of them real; evaluation trains nothing."
    return [*lines, "", note]


# ------------------------------------------------------------------------------ figures of one run


def percent_of(run: Run, policy: str, termination: str) -> float | None:
    """Mean real success in percent; None where it was not measured."""
    results = run.stages.get("evaluate", {}).get("results", {})
    result = results.get(policy, {}).get(termination)
    return None if result is None else 100 * result["mean"]


def gain(run: Run, than: str, termination: str) -> float | None:
    """Points of the post-trained policy above another of the same run."""
    after, before = (percent_of(run, policy, termination) for policy in ("policy", than))
    return None if after is None or before is None else after - before


def card(run: Run, stage: str, *keys: str) -> float | None:
    """What the last round's stage recorded below these keys."""
    value: Any = (of_rounds(run, stage) or [{}])[-1]
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def over_stages(run: Run, key: str, reduce: Callable) -> float | None:
    """Sum or maximum over the finished stages; None where none is finished."""
    values = [stage[key] for stage in run.stages.values()]
    return reduce(values) if values else None


def _share(run: Run, name: str) -> float | None:
    found = kept_agreement(run) if run.config.rl_env == "dream" else None
    return 100 * found[name]["share"] if found else None


def _rate(run: Run, policy: str, termination: str) -> str:
    results = run.stages.get("evaluate", {}).get("results", {})
    result = results.get(policy, {}).get(termination)
    return "-" if result is None else rate(result | {"success": result["mean"]})


def _points(value: float | None) -> str:
    return _value(value, "{:+.1f}")


def _value(value: float | None, text: str) -> str:
    return "-" if value is None else text.format(value)


# --------------------------------------------------------------------------------- mean over seeds


def seeds_alone(runs: dict[str, Run]) -> list[list[Run]]:
    """Groups of two or more runs that differ in nothing but the seed (of runs with the same seed
    too, the last)."""
    groups: dict = {}
    for run in runs.values():
        groups.setdefault(replace(run.config, seed=0), {})[run.config.seed] = run
    return [list(group.values()) for group in groups.values() if len(group) > 1]


def _with_means(
    runs: dict[str, Run], rows: list[list[str]], measures: list[tuple[Callable, str]]
) -> list[list[str]]:
    """The rows, and for each group of seeds one more with mean and Student's interval.

    measures: for every column but the first a function run -> number or None, and its format.
    """
    means = []
    for group in seeds_alone(runs):
        seeds = ", ".join(str(run.config.seed) for run in group)
        cells = []
        for measure, text in measures:
            values = [value for value in map(measure, group) if value is not None]
            cells.append(_mean(values, text, len(group)))
        means.append([f"**mean of seeds {seeds}**", *cells])
    return rows + means


def _mean(values: list[float], text: str, seeds: int) -> str:
    if len(values) < 2:
        return "-"
    mean, low, high = (text.format(value) for value in mean_interval(values))
    return f"{mean} [{low}, {high}]" + (f", n = {len(values)}" if len(values) < seeds else "")

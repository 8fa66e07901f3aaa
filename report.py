"""report.md, report.html and the charts: what a run did, told from stages.json alone.

Nothing is measured here: `write_report` only formats what the stages recorded (and what `trust`
left in RUN/trust), so a report can be rewritten at any time and of a run that is only half done.
The HTML page is the Markdown text, rendered by page.py with pictures and films in it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from charts import POLICIES, learning_chart, rl_chart, success_chart
from checkpoints import SPOILED
from demos import Episode, parse_json, play, write_atomically
from dreams import dream_along
from evaluate import (
    TERMINATIONS,
    agreement,
    agreement_words,
    known,
    psnr,
    rank_words,
    test_starts,
    versions,
    with_interval,
)
from gauge import kept, shares
from novelty import trusted
from order import round_of, stages_of, wall_seconds
from page import html_page, plain
from ppo import no_signal
from reflector import judge_episodes, stop_at
from runs import BadRun, Run, RunConfig
from vecenv import VecRealEnv
from worldenv import WorldEnv, start_frames


def write_report(run: Run) -> Path:
    """Write report.md, report.html and their charts (pictures/*.png) into the run folder; return
    the path of report.md. Raises BadRun (ValueError) for a damaged RUN/trust/trust.json, and for a
    stages.json that lacks something or is spoiled; nothing is written then."""
    path = run.folder / "report.md"
    with what_is_missing([run.folder]):
        text, charts = report_text(run), _charts(run)
        encoded = text.encode()
    for name, chart in charts.items():
        (run.folder / "pictures").mkdir(exist_ok=True)
        write_atomically(run.folder / "pictures" / name, chart)
    page = html_page(text, lambda name: _bytes(run.folder, name))
    write_atomically(path.with_suffix(".html"), page.encode())
    write_atomically(path, encoded)
    return path


def report_text(run: Run, pictures: bool = True) -> str:
    """All sections as Markdown. Its pictures are named whether they are there yet or not; without
    `pictures` none is."""
    sections = [_title, _results, _learning, _gauge, _trust, _films, _reflector, _simulator, _rl]
    sections += [_cost, _ledger, _settings, _versions, _pictures]
    if not pictures:
        sections = [section for section in sections if section not in (_films, _pictures)]
    lines = [[x for x in section(run) if pictures or x[:2] != "!["] for section in sections]
    written = ["\n".join(section).strip() for section in lines]  # "" where a stage has not run
    return "\n\n".join(part for part in written if part) + "\n"


@contextlib.contextmanager
def what_is_missing(folders: list[Path]) -> Iterator[None]:
    """A record that lacks a key or has something else in its place, of another version or edited
    by hand, as BadRun."""
    try:
        yield
    except BadRun:
        raise
    except SPOILED as error:
        what = f"has no {error}" if isinstance(error, KeyError) else f"is spoiled ({error!r:.200})"
        raise BadRun(
            f"{', '.join(map(str, folders))}: a stages.json {what}; expected what `train` "
            "of this version writes; report it with the version that trained it, or train again"
        ) from error


def _charts(run: Run) -> dict[str, bytes]:
    """File name -> PNG, for the stages that have run."""
    results = run.stages.get("evaluate", {}).get("results", {})
    found = {
        f"success_{name}.png": success_chart(results, name, run.config.tasks)
        for name in _judged(results)
    }
    history, probes = whole_loop(run)
    if history:
        found["learning.png"] = learning_chart(history, probes, run.config.rl_env)
        found["rl.png"] = rl_chart(history)
    return found


def _bytes(folder: Path, name: str) -> bytes | None:
    """One of the run's own pictures; a spoiled record may name any file of this machine."""
    path = (folder / name).resolve()
    own = [(folder / place).resolve() for place in ("pictures", "trust")]
    return path.read_bytes() if path.parent in own and path.is_file() else None


def _judged(results: dict) -> list[str]:
    """The terminations that any policy was measured under."""
    return [name for name in TERMINATIONS if any(name in result for result in results.values())]


def of_rounds(run: Run, name: str) -> list[dict]:
    """What a stage recorded in each round that it is finished in, e.g. rl and rl_2."""
    names = [n for n in stages_of(run.config) if round_of(n)[0] == name]
    return [run.stages[n] for n in names if n in run.stages]


def _last(run: Run, name: str) -> dict:
    return (of_rounds(run, name) or [{}])[-1]


def whole_loop(run: Run) -> tuple[list[dict], list[dict]]:
    """(history, probes) of LOOP over all rounds; a probe's iteration counts from the first."""
    history: list[dict] = []
    probes: list[dict] = []
    for stage in of_rounds(run, "rl"):
        for probe in stage.get("probes", []):
            probes.append(probe | {"iteration": probe["iteration"] + len(history)})
        history += stage["history"]
    return history, probes


# ----------------------------------------------------------------------------------------- sections


def _title(run: Run) -> list[str]:
    dream, real = "inside the dream", "in the real simulator (baseline)"
    where = real if run.config.rl_env == "real" else dream
    lines = [
        f"# World-Env: {plain(run.folder.resolve().name)}",
        "",
        f"{run.config.demos} demonstrations per task, seed {run.config.seed}, LOOP {where}.",
    ]
    missing = [name for name in stages_of(run.config) if name not in run.stages]
    if missing:
        lines += ["", f"**Not finished** (the same command resumes): {', '.join(missing)}."]
    return lines


def _results(run: Run) -> list[str]:
    results = run.stages.get("evaluate", {}).get("results")
    if not results:
        return []
    tasks = list(run.config.tasks)
    rows = []
    for termination in TERMINATIONS:
        for name, (label, *_) in POLICIES.items():
            result = results.get(name, {}).get(termination)
            if result is None:
                continue
            mean = {"success": result["mean"], "low": result["low"], "high": result["high"]}
            cells = [rate(row) for row in (mean, *(result["tasks"][task] for task in tasks))]
            rows.append([label, termination, *cells])
    n = next(iter(next(iter(results.values())).values()))["n"]
    header = ["policy", "stopped by", "mean", *map(plain, tasks)]
    lines = ["## Real success", "", *table(header, rows), ""]
    lines += [f"Percent of {n} test starts, {n // len(tasks)} a task, with Wilson's 95 % interval."]
    lines += [*_gains(results), ""]
    return lines + [
        f"![Real success, stopped by {name}](pictures/success_{name}.png)"
        for name in _judged(results)
    ]


def _gains(results: dict) -> list[str]:
    gains = []
    for termination in TERMINATIONS:
        pair = [results.get(name, {}).get(termination) for name in ("sft", "policy")]
        if all(pair):
            gains.append(f"{100 * (pair[1]['mean'] - pair[0]['mean']):+.1f} ({termination})")
    return [f"Post-trained minus SFT, points: {', '.join(gains)}."] if gains else []


def _cost(run: Run) -> list[str]:
    done = [(name, run.stages[name]) for name in stages_of(run.config) if name in run.stages]
    if not done:
        return []
    rows = [
        [
            name,
            f"{stage['seconds']:.0f} s",
            f"{stage['peak_gib']:.1f} GiB",
            plain(stage.get("line", "")),
        ]
        for name, stage in done
    ]
    seconds = wall_seconds(run.stages)
    peak = max(stage["peak_gib"] for _, stage in done)
    rows.append(["**all**", f"{seconds / 60:.1f} min", f"{peak:.1f} GiB", ""])
    header = ["stage", "time", "peak memory so far", "what came out"]
    return ["## Time and memory", "", *table(header, rows)]


def _ledger(run: Run) -> list[str]:
    spent = run.ledger()
    if not spent:
        return []
    rows = [[name.replace("_", " "), f"{count:,}"] for name, count in spent.items()]
    note = "Real interaction is every count of episodes and steps; a step is one environment step."
    return ["## Ledger", "", *table(["what", "count"], rows), "", note]


def _simulator(run: Run) -> list[str]:
    card = _last(run, "simulator")
    if not card:
        return []
    rows = []
    for key, label in (("sim", "simulator"), ("copy", "first frame repeated")):
        values = [card.get(f"{key}_psnr_{depth}") for depth in ("1", "5", "last")]
        rows.append([label, *(_number(value, "{:.1f} dB") for value in values)])
    header = ["open-loop PSNR after", "1 decision", "5", "all"]
    lines = ["## Simulator", "", *table(header, rows), ""]
    off, last = (_number(card.get(key), "{:.0f}") for key in ("hand_mm", "hand_mm_last"))
    lines += [f"On {card.get('episodes', '?')} held-out episodes."]
    return lines + [f"The dreamt hand is {off} mm off on average, {last} mm at the last decision."]


def _reflector(run: Run) -> list[str]:
    card = _last(run, "reflector")
    if not card:
        return []
    sides = (card, card.get("generated", {}))
    rows = [
        [label, *(_number(side.get(key), pattern) for side in sides)]
        for label, key, pattern in (
            ("AUROC over frames", "reflector_auroc", "{:.3f}"),
            ("calibration error (ECE)", "ece", "{:.3f}"),
            ("Brier score", "brier", "{:.3f}"),
            ("episodes stopped falsely", "reflector_false_stops", "{:.1%}"),
            ("... Wilson's interval, from", "false_stops_low", "{:.1%}"),
            ("... to", "false_stops_high", "{:.1%}"),
            ("recall at success", "recall_at_success", "{:.1%}"),
            ("threshold eta", "threshold", "{:.2f}"),
        )
    ]
    note = (
        f"On {card.get('episodes', '?')} held-out episodes, {card.get('frames', '?')} frames, and "
        "on dreams of their actions."
    )
    etas = _last(run, "calibrate").get("etas", {})
    if etas:
        of_tasks = ", ".join(f"{task} {eta:.2f}" for task, eta in etas.items())
        note += f" When a policy dreams, each task has an eta of its own: {of_tasks}."
    return ["## Reflector", "", *table(["measure", "real", "generated"], rows), "", note]


# What each metric of ppo.update means and where it is healthy.
RL_METRICS = {
    "return": "mean return of the rollouts; should rise",
    "success": "share of rollouts that were stopped as a success; should rise",
    "mean_policy_success": "the same for the mean policy, without noise",
    "groups_with_spread": "share of groups that teach anything; below 0.05 there is no signal",
    "mixed": "share of groups with both outcomes; below 0.05 there is hardly any signal",
    "first_ratio": "ratio before the first update; must be 1",
    "clip_fraction": "share of ratios outside 1 +- eps; above 0.5 the steps are too large",
    "kl": "approximate KL to the policy that drew the rollouts, before the last pass",
    "scale": "mean Laplace scale of the policy",
}


def _rl(run: Run) -> list[str]:
    history, _ = whole_loop(run)
    if not history:
        return []
    rows = []
    for name, meaning in RL_METRICS.items():
        values = [step[name] for step in history if known(step.get(name))]
        if values:
            rows.append([name, f"{values[0]:.3g}", f"{values[-1]:.3g}", meaning])
    lines = ["## Reinforcement learning", ""]
    lines += [*table(["metric", "first", "last", "meaning"], rows), ""]
    lines += [f"{len(history)} iterations.", ""]
    warnings = [f"- {plain(words)}." for words in warnings_words(warnings_of(history))]
    lines += [*warnings, ""] if warnings else []
    return lines + ["![RL metrics over iterations](pictures/rl.png)"]


def warnings_of(history: list[dict]) -> dict:
    """What `ppo.no_signal` says of the stored iterations of LOOP: "iterations", how many there are;
    "warned", how many had a warning; "warnings": [{"iterations": their numbers, from 1,
    "sentence"}]. Of sentences that differ in their figures alone the first stands for all."""
    said: dict[str, dict] = {}
    for number, metrics in enumerate(history, 1):
        if sentence := no_signal({name: x for name, x in metrics.items() if known(x)}):
            kind = re.sub(r"\d+", "", sentence)
            row = said.setdefault(kind, {"iterations": [], "sentence": sentence})
            row["iterations"].append(number)
    warned = sum(len(row["iterations"]) for row in said.values())
    return {"iterations": len(history), "warned": warned, "warnings": list(said.values())}


def warnings_words(found: dict) -> list[str]:
    """A line for each sentence that `warnings_of` found."""
    return [
        f"in {len(row['iterations'])} of {found['iterations']} iterations (first in "
        f"{row['iterations'][0]}): {row['sentence']}"
        for row in found["warnings"]
    ]


def _learning(run: Run) -> list[str]:
    history, probes = whole_loop(run)
    if not history:
        return []
    curves = "Success of the rollouts that LOOP learns from, which carry noise"
    if any("real" in probe for probe in probes):
        curves += " (of the tasks that the gauge has left in, so they may jump after a look), and "
        curves += "of the mean policy from the gauge's starts, imagined and real"
    elif probes:
        curves += ", and of the mean policy in the dream; no real episode was played"
    lines = ["## Learning curve", "", f"{curves}. Bars are Wilson's 95 % intervals.", ""]
    return lines + ["![Success over the iterations of LOOP](pictures/learning.png)"]


def gauge_report(run: Run) -> dict | None:
    """What the gauge saw in the last round of LOOP; None where it never looked: LOOP had no probes,
    ran in the real simulator, or has not run.

    "starts": how many each look played; "looks": [{"iteration", "imagined", where real episodes
    were played "real", "agreement", "hallucinated", "missed", and "novel" (not in runs of earlier
    versions)}], shares in [0, 1]; "kept": after which iteration the run kept the policy;
    "real_keeps", "novelty_keeps": after which either stop rule would have, None where its signal
    was not recorded.
    """
    stage = _last(run, "rl")
    probes = stage.get("probes")
    if not probes:
        return None
    real, novel = ("real" in probes[0]), ("novel" in probes[0])
    looks = []
    for probe in probes:
        rates = shares(probe) if real else {"imagined": float(np.mean(probe["imagined"]))}
        rates |= {"novel": float(np.mean(probe["novel"]))} if novel else {}
        looks.append({"iteration": probe["iteration"], **rates})
    return {
        "starts": len(probes[0]["imagined"]),
        "looks": looks,
        "kept": stage["kept"],
        "real_keeps": probes[kept(probes)]["iteration"] if real else None,
        "novelty_keeps": probes[trusted(probes)]["iteration"] if novel else None,
    }


def _gauge(run: Run) -> list[str]:
    found = gauge_report(run)
    if found is None or found["novelty_keeps"] is None:  # no gauge, or a run of an earlier version
        return []
    real = found["real_keeps"] is not None  # the stop rule "novelty" plays no real episodes
    names = ["novel", "imagined"]
    names += ["real", "agreement", "hallucinated", "missed"] if real else []
    labels = {"novel": "novel decisions", "imagined": "imagined success", "real": "real success"}
    header = ["iterations", *(labels.get(name, name) for name in names)]
    rows = [
        [str(look["iteration"]), *(f"{look[name]:.0%}" for name in names)]
        for look in found["looks"]
    ]
    lines = ["## Does the dream tell the truth?", "", *table(header, rows), ""]
    lines += [
        "Novel: the dreamt hand is farther from every recorded one than 95 % of held-out real ones "
        "are.",
    ]
    if real:
        lines += [
            f"The mean policy from the same {found['starts']} real starts in the dream and in "
            "reality; hallucinated: success in the dream only; missed: in reality only. By novelty "
            f"alone, without real episodes, the policy after {found['novelty_keeps']} iterations "
            "would have been kept."
        ]
    lines += [f"The policy after {found['kept']} iterations was kept."]
    if warning := _last(run, "rl").get("warning"):
        lines += ["", f"**Warning: {plain(warning)}.**"]
    agreed = kept_agreement(run)
    where = "the test starts" if final_agreement(run) else "the gauge's starts"
    title = f"The kept policy, from {where}"
    return lines + (["", *_agreement(title, agreed)] if agreed else [])


def final_agreement(run: Run) -> dict | None:
    """`evaluate.agreement` of the policy that LOOP kept, at the test starts: of nothing that
    training saw. None before the evaluation, and in runs of earlier versions."""
    return run.stages.get("evaluate", {}).get("agreement")


def kept_agreement(run: Run) -> dict | None:
    """`final_agreement`, or as long as there is none that at the gauge's starts, by which the
    policy was chosen; None where the gauge played no real episodes."""
    if found := final_agreement(run):
        return found
    stage = _last(run, "rl")
    kept = [p for p in stage.get("probes", []) if p["iteration"] == stage["kept"] and "real" in p]
    if not kept:
        return None
    # gauge.probe_starts: as many starts of every task, the tasks in order
    each = len(kept[0]["real"]) // len(run.config.tasks)
    tasks = [task for task in run.config.tasks for _ in range(each)]
    return agreement(np.array(kept[0]["imagined"]), np.array(kept[0]["real"]), tasks)


def _agreement(policy: str, found: dict) -> list[str]:
    """`evaluate.agreement` as the table of counts, the rows per task and a sentence."""
    counts = found["table"]
    lines = table(
        ["starts", "real success", "real failure"],
        [
            ["dream success", f"{counts['both']}", f"{counts['hallucinated']} (hallucinated)"],
            ["dream failure", f"{counts['missed']} (missed)", f"{counts['neither']}"],
        ],
    )
    kinds = ("imagined", "real", "agreement")
    rows = [
        [plain(task), *(with_interval(row[kind]) for kind in kinds), str(row["n"])]
        for task, row in found["tasks"].items()
    ]
    header = ["task", "imagined success", "real success", "agreement", "starts"]
    lines += ["", *table(header, rows), "", f"{agreement_words(policy, found)}."]
    rank = f"Rank correlation of imagined and real success over tasks: {rank_words(found)}."
    return [*lines, rank]


def _trust(run: Run) -> list[str]:
    path = run.folder / "trust" / "trust.json"
    if not path.is_file():
        return []
    try:
        found = parse_json(path.read_bytes())
        about = f"{found['starts_per_task']} starts a task of the {found['split']} split"
        lines = ["## Held against reality", "", f"`python cli.py trust`, {about}.", ""]
        told = {agreement_words(*item) for item in found["agreement"].items()}  # below, with tables
        lines += [f"- {plain(words)}" for words in found["words"] if words not in told]
        for policy, report in found["agreement"].items():
            label = POLICIES[policy][0]
            lines += ["", f"### {label}", "", *_agreement(label, report)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRun(
            f"{path}: not readable ({error!r}); make it again: python cli.py trust {run.folder}"
        ) from error
    # Not gauge.png: it is the learning curve above.
    charts = {"agreement": "Agreement per task", "reflector": "Reflector card"}
    charts["counterfactual"] = "Dreams that follow their actions"
    for name, alt in charts.items():
        if (path.parent / f"{name}.png").is_file():
            lines += ["", f"![{alt}](trust/{name}.png)"]
    return lines


def _films(run: Run) -> list[str]:
    if run.config.rl_env == "real":  # no dream
        return []
    words = _last(run, "rl").get("films", {})
    shown = [
        (f"pictures/film_{name}.gif", f"{label}. {plain(words[name])}.")
        for name, label in (("success", "A success"), ("lie", "The worst lie"))
        if name in words
    ]
    worst = (
        "The worst lies: framed in vermillion success in the dream only, in blue in reality only."
    )
    other = (
        "Other actions from one start: real above, dream below; expert, shuffled, zero, mirrored."
    )
    shown += [("trust/worst.gif", worst), ("trust/counterfactual.gif", other)]
    for task in run.config.tasks:
        about = f"{plain(task)}: a held-out exploration episode and the dream of its actions."
        shown.append((f"pictures/dream_{task}.gif", about))
    shown = [(name, about) for name, about in shown if (run.folder / name).is_file()]
    lines = ["## Films: reality left, dream right"]
    for name, about in shown:
        lines += ["", about, "", f"![{about.split('.')[0]}]({name})"]
    if "rl" in run.stages and "lie" not in words and not (run.folder / "trust").is_dir():
        lines += ["", "No lie was filmed; `python cli.py trust` with this run looks for some."]
    return lines if len(lines) > 1 else []


def _pictures(run: Run) -> list[str]:
    if not (run.folder / "pictures" / "demonstrations.png").is_file():
        return []
    about = "One of each task; frames of success are framed in green."
    picture = "![Demonstrations](pictures/demonstrations.png)"
    return ["## Demonstrations", "", about, "", picture]


def _settings(run: Run) -> list[str]:
    config, env, loop = run.config, run.config.env, run.config.rl
    fits = {"SFT": config.sft, "simulator": config.simulator_fit, "reflector": config.reflector_fit}
    exploration = f"{config.exploration} episodes per task, noise x {config.exploration_noise:g}"
    rows = [
        ["tasks", plain(", ".join(config.tasks))],
        ["camera, time", f"{env.size} px, {env.chunk} steps a decision, horizon {env.horizon}"],
        ["exploration", exploration],
        *([name, f"{fit.steps} steps of {fit.batch}"] for name, fit in fits.items()),
        ["LOOP", f"{loop.iterations} iterations of {loop.groups} groups x {loop.rollouts}"],
        ["exploring in LOOP", f"branch {loop.branch}, noise x {loop.noise:g}, clip {loop.clip:g}"],
    ]
    parts: dict[str, list[str]] = {}  # config.json, a row per part
    for name, value in flat_settings(config).items():
        part, _, field = name.rpartition(".")
        parts.setdefault(part or "run", []).append(f"{field} {value}")
    everything = [[part, plain(", ".join(values))] for part, values in parts.items()]
    lines = ["## Settings", "", *table(["what", "value"], rows), "", "All of them:", ""]
    return lines + table(["part", "settings (config.json)"], everything)


def flat_settings(config: RunConfig) -> dict[str, str]:
    """Every setting as text, those of parts with a dot: {"demos": "5", "loop.groups": "16"}."""

    def flatten(values: dict, prefix: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, value in values.items():
            inside = flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else None
            found |= {f"{prefix}{name}": _setting(value)} if inside is None else inside
        return found

    return flatten(asdict(config), "")


def _setting(value) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(str(entry) for entry in value)
    return "(none)" if value == "" else str(value)


def _versions(run: Run) -> list[str]:
    stage = run.stages.get("evaluate", {})
    recorded = stage.get("versions")  # runs of an earlier version did not record them
    packages = recorded or f"{versions()} (installed now; the run did not record its own)"
    hardware = plain(stage.get("hardware", "recorded by the evaluate stage"))
    return ["## Versions and hardware", "", f"{plain(packages)}.", "", f"Hardware: {hardware}."]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def rate(row: dict) -> str:
    """{"success", "low", "high"} in percent, with the interval."""
    return f"{100 * row['success']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def _number(value, pattern: str) -> str:
    return pattern.format(value) if known(value) else "not measurable"


# ------------------------------------------------------------------------------------------ imagine


def real_and_dream(run: Run, simulator, reflector, policy, task: str, seed: int):
    """(the real episode, the dream's frames (T+1, H, W, 3), {"real", "dream"}: R (T,) of each).

    policy: None lets the scripted expert act. The real episode goes on for two decisions after its
    first success, so that the curve shows what the reflector says then.
    """
    starts = test_starts((task,), 1, "dev", seed)
    env = VecRealEnv(1, run.config.env)
    try:
        act = None if policy is None else policy.act
        (episode,) = play(env, starts, act, "evaluation", after_success=2)
    finally:
        env.close()
    world = WorldEnv(
        simulator, reflector, start_frames([episode]), 1, run.config.env, run.config.seed
    )
    (dream,) = dream_along(world, [episode])
    real_curve, dream_curve = judge_episodes(reflector, [episode, dream])
    return episode, dream.image, {"real": real_curve, "dream": dream_curve}


def imagine_numbers(episode: Episode, dream, curves: dict, eta: float) -> str:
    """What the pictures show, in two lines."""
    length = len(episode)
    depths = {str(t): t for t in (1, 5) if t < length} | {f"{length} (last)": length}
    decibels = ", ".join(
        f"{psnr(episode.image[t], dream[t]):.1f} dB after {name}" for name, t in depths.items()
    )
    end = stop_at(curves["dream"], eta)
    real = f"success at decision {episode.first_success}" if episode.succeeded else "no success"
    imagined = f"success at decision {end}" if end else "no success"
    return f"PSNR {decibels}\nreal: {real}; dream (reflector above {eta:.2f}): {imagined}"

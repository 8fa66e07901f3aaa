"""report.md and the charts: what a run did, told from stages.json alone.

Nothing is measured here: `write_report` only formats what the stages recorded, so a report can be
rewritten at any time and of a run that is only half done. Colours are those of Okabe and Ito,
which colour-blind readers tell apart.
"""

from __future__ import annotations

import io
import math
from importlib import metadata
from pathlib import Path

import numpy as np

from demos import Episode, write_atomically
from evaluate import TERMINATIONS, psnr, wilson
from gauge import shares
from novelty import trusted
from runs import Run
from train import stages_of

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
PACKAGES = ("torch", "diffusers", "transformers", "gymnasium", "metaworld", "mujoco", "numpy")


def write_report(run: Run) -> Path:
    """Write report.md (and pictures/rl.png) into the run folder; return the report's path."""
    history = run.stages.get("rl", {}).get("history", [])
    if history:
        (run.folder / "pictures").mkdir(exist_ok=True)
        write_atomically(run.folder / "pictures" / "rl.png", rl_chart(history))
    probes = run.stages.get("rl", {}).get("probes", [])
    if probes:
        write_atomically(run.folder / "pictures" / "gauge.png", gauge_chart(probes))
    sections = [_title, _results, _cost, _ledger, _simulator, _reflector, _rl, _gauge]
    sections += [_pictures, _settings, _versions]
    path = run.folder / "report.md"
    written = ["\n".join(section(run)) for section in sections]  # "" where a stage has not run yet
    text = "\n\n".join(part for part in written if part) + "\n"
    write_atomically(path, text.encode())
    return path


# ----------------------------------------------------------------------------------------- sections


def _title(run: Run) -> list[str]:
    dream, real = "inside the dream", "in the real simulator (baseline)"
    where = real if run.config.rl_env == "real" else dream
    lines = [
        f"# World-Env: {run.folder.name}",
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
        for name, label in (
            ("sft", "SFT"), ("filtered_bc", "filtered BC"), ("policy", "post-trained"),
        ):  # fmt: skip
            result = results.get(name, {}).get(termination)
            if result is None:
                continue
            mean = {"success": result["mean"], "low": result["low"], "high": result["high"]}
            cells = [_rate(row) for row in (mean, *(result["tasks"][task] for task in tasks))]
            rows.append([label, termination, *cells])
    n = next(iter(next(iter(results.values())).values()))["n"]
    lines = ["## Real success", "", *_table(["policy", "stopped by", "mean", *tasks], rows), ""]
    lines += [f"Percent of {n} test starts, {n // len(tasks)} a task, with Wilson's 95 % interval."]
    return lines + _gains(results)


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
        [name, f"{stage['seconds']:.0f} s", f"{stage['peak_gib']:.1f} GiB", stage.get("line", "")]
        for name, stage in done
    ]
    seconds = sum(stage["seconds"] for _, stage in done)
    peak = max(stage["peak_gib"] for _, stage in done)
    rows.append(["**all**", f"{seconds / 60:.1f} min", f"{peak:.1f} GiB", ""])
    header = ["stage", "time", "peak memory so far", "what came out"]
    return ["## Time and memory", "", *_table(header, rows)]


def _ledger(run: Run) -> list[str]:
    spent = run.ledger()
    if not spent:
        return []
    rows = [[name.replace("_", " "), f"{count:,}"] for name, count in spent.items()]
    note = "Real interaction is everything except imagined frames; a step is one environment step."
    return ["## Ledger", "", *_table(["what", "count"], rows), "", note]


def _simulator(run: Run) -> list[str]:
    card = run.stages.get("simulator")
    if not card:
        return []
    rows = []
    for key, label in (("sim", "simulator"), ("copy", "first frame repeated")):
        values = [card.get(f"{key}_psnr_{depth}") for depth in ("1", "5", "last")]
        rows.append([label, *(_number(value, "{:.1f} dB") for value in values)])
    header = ["open-loop PSNR after", "1 decision", "5", "all"]
    lines = ["## Simulator", "", *_table(header, rows), ""]
    off, last = (_number(card.get(key), "{:.0f}") for key in ("hand_mm", "hand_mm_last"))
    lines += [f"On {card.get('episodes', '?')} held-out episodes."]
    return lines + [f"The dreamt hand is {off} mm off on average, {last} mm at the last decision."]


def _reflector(run: Run) -> list[str]:
    card = run.stages.get("reflector")
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
        )
    ]
    note = (
        f"On {card.get('episodes', '?')} held-out episodes, {card.get('frames', '?')} frames, and "
        f"on dreams of their actions; threshold eta {_number(card.get('threshold'), '{:.2f}')}."
    )
    return ["## Reflector", "", *_table(["measure", "real", "generated"], rows), "", note]


# What each metric of ppo.update means and where it is healthy.
RL_METRICS = {
    "return": "mean return of the rollouts; should rise",
    "success": "share of rollouts that were stopped as a success; should rise",
    "mean_policy_success": "the same for the mean policy, without noise",
    "groups_with_spread": "share of groups that teach anything; below 0.05 there is no signal",
    "first_ratio": "ratio before the first update; must be 1",
    "clip_fraction": "share of ratios outside 1 +- eps; above 0.5 the steps are too large",
    "kl": "approximate KL to the policy that drew the rollouts",
    "scale": "mean Laplace scale of the policy",
}


def _rl(run: Run) -> list[str]:
    history = run.stages.get("rl", {}).get("history", [])
    if not history:
        return []
    rows = []
    for name, meaning in RL_METRICS.items():
        values = [step[name] for step in history if _known(step.get(name))]
        if values:
            rows.append([name, f"{values[0]:.3g}", f"{values[-1]:.3g}", meaning])
    lines = ["## Reinforcement learning", ""]
    lines += [*_table(["metric", "first", "last", "meaning"], rows), ""]
    lines += [f"{len(history)} iterations.", ""]
    return lines + ["![RL metrics over iterations](pictures/rl.png)"]


def _gauge(run: Run) -> list[str]:
    stage = run.stages.get("rl", {})
    probes = stage.get("probes")
    if not probes or "novel" not in probes[0]:  # no gauge, or a run of an earlier version
        return []
    real = "real" in probes[0]  # the stop rule "novelty" plays no real episodes
    header = ["iterations", "novel decisions", "imagined success"]
    header += ["real success", "agreement", "hallucinated", "missed"] if real else []
    rows = []
    for probe in probes:
        rates = shares(probe) if real else {"imagined": float(np.mean(probe["imagined"]))}
        rates = {"novel": float(np.mean(probe["novel"])), **rates}
        rows.append([str(probe["iteration"]), *(f"{share:.0%}" for share in rates.values())])
    lines = ["## Does the dream tell the truth?", "", *_table(header, rows), ""]
    lines += [
        "Novel: the dreamt hand is farther from every recorded one than 95 % of held-out real ones "
        "are.",
    ]
    if real:
        lines += [
            f"The mean policy from the same {len(probes[0]['real'])} real starts in the dream and "
            "in reality; hallucinated: success in the dream only; missed: in reality only. By "
            "novelty alone, without real episodes, the policy after "
            f"{probes[trusted(probes)]['iteration']} iterations would have been kept."
        ]
    lines += [f"The policy after {stage['kept']} iterations was kept."]
    if stage.get("warning"):
        lines += ["", f"**{stage['warning']}.**"]
    return lines + ["", "![Imagined and real success](pictures/gauge.png)"]


def _pictures(run: Run) -> list[str]:
    names = sorted(
        path.name for path in (run.folder / "pictures").glob("*") if path.suffix in (".png", ".gif")
    )
    stills = [
        name for name in names if name.endswith(".png") and name not in ("rl.png", "gauge.png")
    ]
    films = [name for name in names if name.endswith(".gif")]
    if not stills and not films:
        return []
    lines = ["## Pictures", ""]
    if any(name.startswith("dream_") for name in stills):
        lines += ["Dream strips: above the real episode, below the dream of the same actions.", ""]
    for name in stills:
        lines += [f"![{Path(name).stem}](pictures/{name})", ""]
    if films:
        links = ", ".join(f"[{name}](pictures/{name})" for name in films)
        lines += [f"Films (real left, dream right): {links}."]
    return lines


def _settings(run: Run) -> list[str]:
    config, env, loop = run.config, run.config.env, run.config.rl
    fits = {"SFT": config.sft, "simulator": config.simulator_fit, "reflector": config.reflector_fit}
    exploration = f"{config.exploration} episodes per task, noise x {config.exploration_noise:g}"
    rows = [
        ["tasks", ", ".join(config.tasks)],
        ["camera, time", f"{env.size} px, {env.chunk} steps a decision, horizon {env.horizon}"],
        ["exploration", exploration],
        *([name, f"{fit.steps} steps of {fit.batch}"] for name, fit in fits.items()),
        ["LOOP", f"{loop.iterations} iterations of {loop.groups} groups x {loop.rollouts}"],
        ["exploring in LOOP", f"branch {loop.branch}, noise x {loop.noise:g}, clip {loop.clip:g}"],
    ]
    note = "All of them: [config.json](config.json)."
    return ["## Settings", "", *_table(["what", "value"], rows), "", note]


def _versions(run: Run) -> list[str]:
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    hardware = run.stages.get("evaluate", {}).get("hardware", "recorded by the evaluate stage")
    return ["## Versions and hardware", "", f"{', '.join(versions)}.", "", f"Hardware: {hardware}."]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _rate(row: dict) -> str:
    return f"{100 * row['success']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def _known(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _number(value, pattern: str) -> str:
    return pattern.format(value) if _known(value) else "not measurable"


# ------------------------------------------------------------------------------------------- charts


def rl_chart(history: list[dict]) -> bytes:
    """A PNG with one small chart per RL metric over iterations."""
    from matplotlib.figure import Figure

    names = ("return", "success", "groups_with_spread", "clip_fraction", "kl")
    figure = Figure(figsize=(12, 2.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        steps = [i + 1 for i, step in enumerate(history) if _known(step.get(name))]
        axes.plot(steps, [history[i - 1][name] for i in steps], color=BLUE, marker=".")
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set_xlabel("iteration")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if name not in ("return", "kl"):
            axes.set_ylim(-0.03, 1.03)
    return png(figure)


def gauge_chart(probes: list[dict]) -> bytes:
    """A PNG: imagined and, where it was played, real success of the mean policy over LOOP's
    iterations, with Wilson's 95 % intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    steps = np.array([probe["iteration"] for probe in probes])
    for name, colour, style, aside in (("real", BLUE, "o-", -1), ("imagined", ORANGE, "s--", 1)):
        if name not in probes[0]:
            continue
        rates = np.array([np.mean(probe[name]) for probe in probes])
        ends = np.array([wilson(sum(probe[name]), len(probe[name])) for probe in probes])
        errors = np.abs(ends.T - rates)
        axes.errorbar(
            steps + 0.05 * aside, rates, errors, fmt=style, color=colour, capsize=3, label=name
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="iteration of LOOP", ylabel="success of the mean policy", ylim=(-0.03, 1.03))
    axes.legend(fontsize=8)
    return png(figure)


def reward_curves(curves: dict, eta: float, first_success: int | None) -> bytes:
    """A PNG of the reflector's R over decisions on real and on dreamed frames of the same actions.

    curves: {"real": (T,), "dream": (T,)}; first_success: the decision that succeeded, or None.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, colour, style in (("real", BLUE, "o-"), ("dream", ORANGE, "s-")):
        decisions = np.arange(1, len(curves[name]) + 1)
        label = f"{name} frames"
        axes.plot(decisions, curves[name], style, color=colour, markersize=4, label=label)
    axes.axhline(eta, color=GREY, linestyle="--", label=f"stop above {eta:.2f}")
    if first_success is not None:
        axes.axvline(first_success, color=GREEN, linestyle=":", label="real success")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="decision", ylabel="reward R", ylim=(-0.03, 1.03))
    axes.legend(fontsize=8)
    return png(figure)


def png(figure) -> bytes:
    """A matplotlib figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def side_by_side(films: list[np.ndarray]) -> np.ndarray:
    """Films (T, H, W, 3) next to each other; shorter ones rest on their last frame."""
    length = max(len(film) for film in films)
    padded = [
        np.concatenate([film, film[-1:].repeat(length - len(film), axis=0)]) for film in films
    ]
    return np.concatenate(padded, axis=2)


def strip(films: list[np.ndarray], columns: int = 10, scale: int = 2) -> np.ndarray:
    """Films of equal length as a picture: a row each, `columns` frames from first to last."""
    picks = np.linspace(0, len(films[0]) - 1, columns).round().astype(int)
    rows = [np.concatenate(list(film[picks]), axis=1) for film in films]
    return np.concatenate(rows, axis=0).repeat(scale, axis=0).repeat(scale, axis=1)


# ------------------------------------------------------------------------------------------ imagine


def real_and_dream(run: Run, simulator, reflector, policy, task: str, seed: int):
    """(the real episode, the dream's frames (T+1, H, W, 3), {"real", "dream"}: R (T,) of each).

    policy: None lets the scripted expert act. The real episode goes on for two decisions after its
    first success, so that the curve shows what the reflector says then.
    """
    from demos import play
    from dreams import dream_along
    from evaluate import test_starts
    from reflector import judge_episodes
    from vecenv import VecRealEnv
    from worldenv import WorldEnv, start_frames

    starts = test_starts((task,), 1, "dev", seed)
    env = VecRealEnv(1, run.config.env)
    try:
        (episode,) = play(env, starts, policy and policy.act, "evaluation", after_success=2)
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
    depths = {"1": 1, "5": min(5, length), f"{length} (last)": length}
    decibels = ", ".join(
        f"{psnr(episode.image[t], dream[t]):.1f} dB after {name}" for name, t in depths.items()
    )
    stops = [t + 1 for t, value in enumerate(curves["dream"]) if value > eta]
    real = f"success at decision {episode.first_success}" if episode.succeeded else "no success"
    imagined = f"success at decision {stops[0]}" if stops else "no success"
    return f"PSNR {decibels}\nreal: {real}; dream (reflector above {eta:.2f}): {imagined}"

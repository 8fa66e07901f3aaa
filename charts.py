"""The charts of reports, as the bytes of a PNG.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; a marker and a line style
of its own also tell each curve from the others on paper without colours. Charts are about 5 inches
wide, so that their letters stay legible on a phone.
"""

from __future__ import annotations

import io

import numpy as np

from evaluate import known, wilson

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
OKABE_ITO = (BLUE, ORANGE, GREEN, "#000000", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS, LINES = "os^Dv", ("-", "--", "-.", ":")  # 7, 5 and 4: no two of many curves look the same
POLICIES = {  # checkpoint -> label, colour, marker
    "sft": ("SFT", GREY, "^"),
    "filtered_bc": ("filtered BC", ORANGE, "s"),
    "dream_bc": ("dream BC", GREEN, "v"),
    "policy": ("post-trained", BLUE, "o"),
}


def rl_chart(history: list[dict]) -> bytes:
    """A PNG with one small chart per RL metric over iterations."""
    from matplotlib.figure import Figure

    names = ("return", "success", "groups_with_spread", "clip_fraction", "kl", "scale")
    figure = Figure(figsize=(5, 5), layout="constrained")
    for axes, name in zip(figure.subplots(3, 2).flat, names, strict=True):
        steps = [i + 1 for i, step in enumerate(history) if known(step.get(name))]
        axes.plot(steps, [history[i - 1][name] for i in steps], color=BLUE, marker="o", ms=4)
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.set_xlabel("iteration", fontsize=9)
        axes.locator_params(axis="x", integer=True)
        if name in ("success", "groups_with_spread", "clip_fraction"):
            axes.set_ylim(-0.03, 1.03)
    return png(figure)


def learning_chart(history: list[dict], probes: list[dict], where: str) -> bytes:
    """A PNG: success over LOOP's iterations. Of the mean policy, imagined and, where it was played,
    real, with Wilson's 95 % intervals (the gauge's looks); and of the noisy rollouts, which LOOP
    learns from. where: "dream" or "real", where the rollouts are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    # The rollouts of an iteration are played before its update, the first by the policy that LOOP
    # began with.
    rollouts = {i: step["success"] for i, step in enumerate(history) if known(step.get("success"))}
    axes.plot(
        list(rollouts), list(rollouts.values()),
        "^:", color=GREY, markersize=5, label=f"noisy rollouts ({where})",
    )  # fmt: skip
    for name, colour, style, aside in (("real", BLUE, "o-", -1), ("imagined", ORANGE, "s--", 1)):
        looks = [probe for probe in probes if name in probe]
        if not looks:
            continue
        rates = np.array([np.mean(probe[name]) for probe in looks])
        ends = np.array([wilson(sum(probe[name]), len(probe[name])) for probe in looks])
        errors = np.maximum(0, [rates - ends[:, 0], ends[:, 1] - rates])
        steps = np.array([probe["iteration"] for probe in looks]) + 0.05 * aside
        axes.errorbar(
            steps, rates, errors, fmt=style, color=colour, capsize=3, label=f"{name}, mean policy"
        )
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="iterations of LOOP", ylabel="success", ylim=(-0.03, 1.03))
    axes.grid(axis="y", color="#DDDDDD")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return png(figure)


def curves_chart(loops: dict[str, tuple[list[dict], list[dict], str]]) -> bytes:
    """A PNG: above real, below imagined success of several runs over LOOP's iterations, each run in
    its own colour, marker and line style. loops: {name: (history, probes, "real" or "dream":
    where LOOP played)}; of a run without probes the success of its rollouts stands there."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5.4 + 0.22 * len(loops)), layout="constrained")
    panels = dict(zip(("real", "imagined"), figure.subplots(2, 1, sharex=True), strict=True))
    for number, (name, (history, probes, where)) in enumerate(loops.items()):
        played = {"real": "real", "dream": "imagined"}[where]
        look = {
            "color": OKABE_ITO[number % len(OKABE_ITO)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": LINES[number % len(LINES)],
        }
        for kind, axes in panels.items():
            curve = {p["iteration"]: float(np.mean(p[kind])) for p in probes if kind in p}
            if not probes and kind == played:
                curve = {i: s["success"] for i, s in enumerate(history) if known(s.get("success"))}
            axes.plot(list(curve), list(curve.values()), **look, markersize=5)
        panels["real"].plot([], [], **look, label=name)
    for kind, axes in panels.items():
        axes.set(ylabel=f"{kind} success", ylim=(-0.03, 1.03))
        axes.grid(axis="y", color="#DDDDDD")
    axes.set_xlabel("iterations of LOOP")
    axes.locator_params(axis="x", integer=True)
    figure.legend(loc="outside lower center", fontsize=9)
    return png(figure)


def reward_curves(curves: dict, etas: dict, first_success: int | None) -> bytes:
    """A PNG of the reflector's R over decisions on real and on dreamed frames of the same actions.

    curves: {"real": (T,), "dream": (T,)}; etas: the threshold of each; first_success: the
    decision that succeeded, or None.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, colour, style in (("real", BLUE, "o-"), ("dream", ORANGE, "s-")):
        decisions = np.arange(1, len(curves[name]) + 1)
        label = f"{name} frames"
        axes.plot(decisions, curves[name], style, color=colour, markersize=4, label=label)
        stop = f"stop: twice above {etas[name]:.2f}"
        axes.axhline(etas[name], color=colour, linestyle="--", linewidth=1, label=stop)
    if first_success is not None:
        axes.axvline(first_success, color=GREEN, linestyle=":", label="real success")
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="decision", ylabel="reward R", ylim=(-0.03, 1.03))
    axes.legend(fontsize=8)
    return png(figure)


def success_chart(results: dict, termination: str, tasks: tuple[str, ...]) -> bytes:
    """A PNG: real success under one termination with Wilson's 95 % intervals, a row for the mean
    and for each task, a mark for each policy. results: of the evaluate stage."""
    from matplotlib.figure import Figure

    rows = ["mean", *tasks]
    figure = Figure(figsize=(5, 1.1 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    played = [name for name in POLICIES if termination in results.get(name, {})]
    for number, name in enumerate(played):
        label, colour, marker = POLICIES[name]
        result = results[name][termination]
        mean = {"success": result["mean"], "low": result["low"], "high": result["high"]}
        shares = [mean, *(result["tasks"][task] for task in tasks)]
        rates, low, high = np.array([[s["success"], s["low"], s["high"]] for s in shares]).T
        ends = np.maximum(0, [rates - low, high - rates])  # 0 up to rounding at the ends
        at = np.arange(len(rows)) + 0.24 * (number - (len(played) - 1) / 2)
        axes.errorbar(
            rates, at, xerr=ends, fmt=marker, color=colour, markersize=5, capsize=2, label=label
        )
    axes.axhline(0.5, color="#BBBBBB", linewidth=0.8)
    axes.set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5))
    axes.set(xlim=(-0.03, 1.03), xlabel="real success on test starts")
    axes.set_title(f"stopped by: {termination}", fontsize=10)
    axes.grid(axis="x", color="#DDDDDD")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return png(figure)


def following_chart(following: dict) -> bytes:
    """A PNG: a bar for all dreams and for each variant of the actions, with Wilson's 95 %
    intervals, and the line of chance. following: of trust.action_following."""
    from matplotlib.figure import Figure

    shares = {"all": following["action_following"], **following["variants"]}
    rates, low, high = np.array([[s["share"], s["low"], s["high"]] for s in shares.values()]).T
    ends = np.maximum(0, [rates - low, high - rates])  # 0 up to rounding at the ends
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    colours = [GREY] + [BLUE] * (len(shares) - 1)
    axes.bar(list(shares), rates, yerr=ends, color=colours, ecolor="black", capsize=3)
    axes.axhline(following["chance"], color=ORANGE, linestyle="--", label="by chance")
    axes.set(ylabel="share of dreams that end where\ntheir own actions lead", ylim=(0, 1.03))
    axes.grid(axis="y", color="#DDDDDD")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", fontsize=9)
    return png(figure)


def png(figure) -> bytes:
    """A matplotlib figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()

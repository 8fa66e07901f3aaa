"""What `python cli.py bench` measured (bench.py), as tables in Markdown and a chart: from its JSON
and nothing else.
"""

from __future__ import annotations

import math

import numpy as np

from charts import BLUE, GREEN, GREY, ORANGE, png

GOALS = {  # of the project, on two cores at 64 pixels
    "imagined_fps_batch1": 30.0,
    "imagined_fps_batch64": 1000.0,
    "imagined_over_real_fps": 5.0,
    "denoiser_matmul_share": 0.5,
}


def growth_chart(found: dict[str, dict]) -> bytes:
    """A PNG: seconds over size, both logarithmic and relative to the smallest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.4), layout="constrained")
    axes = figure.subplots()
    looks = {"rollouts": (BLUE, "o-"), "decisions": (ORANGE, "s--"), "tasks": (GREEN, "^-.")}
    for what, (colour, style) in looks.items():
        entry = found[what]
        size = np.array(entry["size"]) / entry["size"][0]
        middle, low, high = (
            np.array([s[name] for s in entry["seconds"]]) / entry["seconds"][0]["value"]
            for name in ("value", "low", "high")
        )
        label = f"{what}, {entry['size'][0]} to {entry['size'][-1]}: slope {entry['slope']:.2f}"
        axes.errorbar(
            size, middle, [middle - low, high - middle], fmt=style, color=colour, markersize=5,
            capsize=3, label=label,
        )  # fmt: skip
    axes.plot(size, size, ":", color=GREY, label="linear")
    axes.set(xscale="log", yscale="log", xlabel="times as many", ylabel="times as long")
    axes.set_xticks(size, [f"{x:g}" for x in size])
    axes.set_yticks(size, [f"{x:g}" for x in size])
    axes.minorticks_off()
    axes.grid(color="#DDDDDD")
    figure.legend(loc="outside lower center", fontsize=9)
    return png(figure)


def markdown(result: dict, name: str) -> str:
    """The text of NAME.md, from the JSON and nothing else."""
    parts = [_headline, _frames, _denoiser, _training, _profile, _growth, _memory]
    lines = [
        "# How fast",
        "",
        f"`{result['command']}`, commit {result['commit']}; {result['hardware']}, "
        f"{result['threads']} threads of torch; weights {result['weights']}; {result['versions']}.",
        "",
        "A frame is the picture after one decision: K simulator steps and one rendering in "
        "reality, one imagined picture in the dream. Medians, with the lowest and the highest; "
        "what is compared was measured in turns. Absolute times depend on the machine and on what "
        "else it does; ratios of one run count. `bench.py` says what is on the clock.",
    ]
    for part in parts:
        lines += ["", *part(result)]
    return "\n".join(lines + ["", f"![Growth]({name}.png)", ""])


def _cell(entry: dict, scale: float = 1, unit: str = "") -> str:
    """ "41.2 (39.8 to 43.0)", with three digits that count, or all before the point."""
    shown = []
    for end in ("value", "low", "high"):
        value = scale * entry[end]
        places = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        shown.append(f"{value:.{places}f}{unit}")
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def _rows(*rows: tuple) -> list[str]:
    """A table, the first row its head."""
    head, *rest = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *rest]


def _headline(result: dict) -> list[str]:
    labels = {
        "imagined_fps_batch1": ("imagined frames/s, everything in the loop, batch 1", 1, ""),
        "imagined_fps_batch64": ("... batch 64", 1, ""),
        "real_fps": ("real frames/s, rendered in software, 2 processes", 1, ""),
        "imagined_over_real_fps": ("imagined (batch 64) over real, of the same turn", 1, ""),
        "denoiser_matmul_share": ("the denoiser's FLOP/s, of the matrix product's peak", 100, " %"),
    }
    rows = [("figure", "measured", "goal on two cores")]
    for key, (label, scale, unit) in labels.items():
        goal = f"{scale * GOALS[key]:.0f}{unit} or more" if key in GOALS else "-"
        rows.append((label, _cell(result["figures"][key], scale, unit), goal))
    return _rows(*rows)


def _frames(result: dict) -> list[str]:
    found = {(e["batch"], e["denoising_steps"]): e for e in result["imagined_fps"]}
    batches, steps = (sorted({key[i] for key in found}) for i in (0, 1))
    head = ("imagined frames/s, batch", *(f"denoising steps: {n}" for n in steps))
    rows = [(batch, *(_cell(found[batch, n]) for n in steps)) for batch in batches]
    drawn = [(entry["processes"], _cell(entry)) for entry in result["real_fps"]]
    return _rows(head, *rows) + ["", *_rows(("real frames/s, processes", "measured"), *drawn)]


def _denoiser(result: dict) -> list[str]:
    found = result["denoiser"]
    used = found["imagination"]
    rows = [("denoiser, batch 64", "GFLOP/s", "matrix product's peak, GFLOP/s", "share of it")]
    for name in ("fp32", "bf16"):
        if name in found:
            entry = found[name]
            label = f"{name}, as imagination computes" if name == used else name
            peak = f"{entry['matmul_peak_gflops']:.0f}"
            rows.append((label, _cell(entry["denoiser_gflops"]), peak,
                         _cell(entry["share"], 100, " %")))  # fmt: skip
    count = f"One denoising step of one frame is {found['gflop_per_frame']:.3g} GFLOP."
    return [count, "", *_rows(*rows)]


def _training(result: dict) -> list[str]:
    found = result["training_steps_per_second"]
    rows = [(name, _cell(entry)) for name, entry in found.items()]
    return _rows(("training of", "steps/s"), *rows)


def _profile(result: dict) -> list[str]:
    batches = list(result["profile"])
    rows = [
        (part, *(f"{100 * result['profile'][batch][part]:.1f} %" for batch in batches))
        for part in result["profile"][batches[0]]
    ]
    return _rows(("share of an imagined decision", *(f"batch {b}" for b in batches)), *rows)


def _growth(result: dict) -> list[str]:
    rows = [("imagined rollouts", "from", "to", "times as long", "slope (1: linear)")]
    for what, entry in result["growth"].items():
        longer = entry["seconds"][-1]["value"] / entry["seconds"][0]["value"]
        ends = f"{entry['size'][0]} {what}", entry["size"][-1]
        rows.append((f"more {what}", *ends, f"{longer:.1f}", f"{entry['slope']:.2f}"))
    return _rows(*rows)


def _memory(result: dict) -> list[str]:
    rows = [(item, f"{gib:.2f}") for item, gib in result["peak_gib"].items()]
    return _rows(("peak memory of a process of its own", "GiB"), *rows)

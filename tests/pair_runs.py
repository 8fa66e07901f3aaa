"""Two recipes over the same seeds, run by run: is the one as good as the other?

    python tests/pair_runs.py results/runs results/narrow/runs --out results/narrow_pairs.json

OLD and NEW are folders of records as `python cli.py summary` collects them. Runs of the same file
name are a pair. Of every figure: the mean over pairs of new minus old, with Student's 95 %
interval.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def figures(record: dict) -> dict[str, float]:
    """What is compared: shares as percentages, the areas under curves as they are."""
    stages = record["stages"]
    results, found = stages["evaluate"]["results"], stages["evaluate"]["agreement"]
    oracle = {name: 100 * results[name]["oracle"]["mean"] for name in results}
    told = {f"success, {name}": value for name, value in oracle.items()}
    stopped = {name: 100 * results[name]["reflector"]["mean"] for name in ("filtered_bc", "policy")}
    told |= {f"success with the reflector's stop, {name}": x for name, x in stopped.items()}
    told["gain over SFT"] = oracle["policy"] - oracle["sft"]
    told["gain without the oracle"] = stopped["policy"] - 100 * results["sft"]["none"]["mean"]
    told |= {name: 100 * found[name]["share"] for name in ("agreement", "hallucinated", "missed")}
    told["kappa"] = found["kappa"]
    told["AUROC"] = stages["reflector"]["reflector_auroc"]
    told["AUROC on dreams"] = stages["reflector"]["generated"]["reflector_auroc"]
    for depth in ("1", "5", "last"):
        told[f"PSNR {depth}"] = stages["simulator"][f"sim_psnr_{depth}"]
    return told


def compare(old: Path, new: Path) -> dict[str, dict]:
    """{figure: {"old", "new", "difference", "low", "high", "n", "each": differences}}"""
    from evaluate import mean_interval

    names = sorted({p.name for p in old.glob("*.json")} & {p.name for p in new.glob("*.json")})
    pairs = [
        [figures(json.loads((folder / name).read_text())) for folder in (old, new)]
        for name in names
        if name.startswith("dream-")
    ]
    rows = {}
    for what in pairs[0][0]:
        values = [[figure[what] for figure in pair] for pair in pairs]
        each = [after - before for before, after in values]
        mean, low, high = mean_interval(each)
        means = [sum(column) / len(values) for column in zip(*values, strict=True)]
        rows[what] = {
            name: round(x, 4)
            for name, x in zip(
                ("old", "new", "difference", "low", "high"), (*means, mean, low, high), strict=True
            )
        } | {"n": len(each), "each": [round(x, 4) for x in each]}
    return rows


def main() -> None:
    from demos import write_atomically
    from evaluate import current_commit

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = compare(given.old, given.new)
    command = f"python tests/pair_runs.py {given.old} {given.new} --out {given.out}"
    record = {"command": command, "commit": current_commit(), "figures": rows}
    write_atomically(given.out, json.dumps(record, indent=1).encode())
    for what, row in rows.items():
        print(f"{what}: {row['old']} -> {row['new']}, {row['difference']} "
              f"({row['low']} to {row['high']}, n = {row['n']})")  # fmt: skip


if __name__ == "__main__":
    main()

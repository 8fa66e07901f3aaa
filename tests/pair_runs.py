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
    """What a run comes to by itself, by the names of summary.json."""
    from summary import _sums

    values = {name: entry["value"] for name, entry in _sums([record]).items()}
    return {name: x for name, x in values.items() if isinstance(x, float)}  # no bound, no seeds


def compare(old: Path, new: Path) -> dict[str, dict]:
    """{figure: {"old", "new", "difference", "low", "high", "n", "each": differences}}"""
    from evaluate import mean_interval

    pairs = [
        [figures(json.loads((folder / path.name).read_text())) for folder in (old, new)]
        for path in sorted(old.glob("dream-*.json"))
        if (new / path.name).is_file()
    ]
    rows: dict[str, dict] = {}
    for what in pairs[0][0]:
        if not all(what in run for pair in pairs for run in pair):
            continue  # time and memory, which few runs had the whole machine for
        before, after = ([run[what] for run in runs] for runs in zip(*pairs, strict=True))
        each = [b - a for a, b in zip(before, after, strict=True)]
        mean, low, high = (round(x, 4) for x in mean_interval(each))
        rows[what] = {
            "old": round(sum(before) / len(before), 4),
            "new": round(sum(after) / len(after), 4),
            "difference": mean, "low": low, "high": high,
            "n": len(each), "each": [round(x, 4) for x in each],
        }  # fmt: skip
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

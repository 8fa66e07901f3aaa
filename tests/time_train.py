"""Seconds of a whole `train`, by one process with two threads and by two processes, in turns.

    python tests/time_train.py --pairs 2 --preset notebook

Each run is one of its own, made in a temporary folder with the same seed, and its seconds are those
that its stages count themselves. The figures go to results/train_processes.json, after every pair.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from records import write_pairs

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "train_processes.json"
ONE = [sys.executable, "cli.py"]
ACCELERATE = str(Path(sys.executable).with_name("accelerate"))
TWO = [ACCELERATE, "launch", "--config_file", "launch/cpu.yaml", "--num_processes", "2", "cli.py"]


def seconds(launcher: list[str], threads: int, preset: str) -> dict[str, float]:
    """Of every stage of a run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        subprocess.run(
            [*launcher, "train", "--no-beside", "--preset", preset, "--out", str(out)],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        stages = json.loads((out / "stages.json").read_text())
    return {name: round(stage["seconds"], 1) for name, stage in stages.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--preset", default="notebook")
    given = parser.parse_args()
    pairs = []
    for _ in range(given.pairs):
        one = seconds(ONE, 2, given.preset)
        two = seconds(TWO, 1, given.preset)
        ratio = {name: round(two[name] / one[name], 2) for name in one}
        whole = sum(two.values()) / sum(one.values())
        pairs.append({"one": one, "two": two, "two_over_one": {**ratio, "train": round(whole, 2)}})
        print(pairs[-1]["two_over_one"], flush=True)
        command = f"python tests/time_train.py --pairs {given.pairs} --preset {given.preset}"
        what = "seconds of every stage: one process with two threads, two processes with one"
        write_pairs(OUT, command, what, pairs)


if __name__ == "__main__":
    main()

"""Imagined frames a second of two versions of the project, in turns on the same machine.

    python tests/time_versions.py OLD NEW --out results/faster_dreams.json

OLD and NEW are clones. Each is imported by a process of its own, which imagines decisions of the
preset `cpu` with everything in the loop (`bench.imagined`: 64 rollouts, untrained parts, scripted
episodes) whenever it is its turn. What both are compared by is the ratio within each turn.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TURNS, DECISIONS, EPISODES = 9, 15, 16


def imagine(folder: str) -> None:
    """The process of one version: for each line that comes in, its frames a second go out."""
    sys.path[:0] = [folder, str(Path(folder) / "tests")]
    from scripted import random_episode

    import bench
    from camera import Camera
    from runs import preset

    config = preset("cpu")
    length = config.env.horizon
    episodes = [random_episode(seed, length, config.env.size) for seed in range(EPISODES)]
    camera = Camera((0.0, 0.0, 1.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), 42.0, config.env.size)
    parts = bench.build(config, episodes, camera)
    work = bench.imagined(parts, parts.world(bench.BATCH), config.simulator.sampling_steps)
    for _ in range(3):  # until memory has settled
        work.do(DECISIONS)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(work.each * DECISIONS / work.do(DECISIONS), flush=True)


def turn(process: subprocess.Popen) -> float:
    """Frames a second of one turn."""
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def compare(old: Path, new: Path) -> dict:
    """Both, turn by turn."""
    import numpy as np

    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--imagine", str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for folder in (old, new)
    ]  # fmt: skip
    for process in processes:  # both, before either is timed
        process.stdout.readline()
    rates = np.array([[turn(process) for process in processes] for _ in range(TURNS)])
    for process in processes:
        process.stdin.close()
    ratios = rates[:, 1] / rates[:, 0]
    return {
        "frames_per_second": {
            name: {"median": round(float(np.median(each))), "each": each.round(1).tolist()}
            for name, each in zip(("old", "new"), rates.T, strict=True)
        },
        "new_over_old": {
            "median": round(float(np.median(ratios)), 3),
            "low": round(float(ratios.min()), 3),
            "high": round(float(ratios.max()), 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", type=Path, nargs="*", metavar="OLD NEW")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--imagine", help="(the process of one version)")
    given = parser.parse_args()
    if given.imagine:
        imagine(given.imagine)
        return
    if len(given.folders) != 2 or given.out is None:
        parser.error("expected two clones and --out")
    sys.path.insert(0, str(ROOT))
    from demos import write_atomically
    from evaluate import current_commit, hardware, versions

    old, new = given.folders
    record = {
        "command": f"python tests/time_versions.py OLD NEW --out {given.out}",
        "what": "imagined frames a second, 64 rollouts, preset cpu, in turns",
        "commits": {"old": current_commit(old), "new": current_commit(new)},
        "hardware": hardware(), "threads": os.environ.get("OMP_NUM_THREADS", "torch's own"),
        "versions": versions(),
        **compare(old, new),
    }  # fmt: skip
    write_atomically(given.out, (json.dumps(record, indent=1) + "\n").encode())
    print(json.dumps(record["new_over_old"]))


if __name__ == "__main__":
    main()

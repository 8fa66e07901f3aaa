"""Kill a debug run at random moments, resume it each time, and compare it with one left in peace.

    python tests/kills.py --kills 50 --seed 0

runs `python cli.py train --preset debug` once to its end; then again and again, in fresh folders,
each time killed by SIGKILL with all its processes at a random moment and given again, until it
comes to its end. Every tensor of all checkpoints and episodes must then be the same bit by bit, all
pictures too, and metrics.jsonl and stages.json but for times and memory. The counts go to
results/kills.json after each run; the exit code is 1 where a run differed.

Kills come as a Poisson process does: seconds from one start to the next kill are drawn from an
exponential distribution of mean LIFE, so that no moment is more likely than another.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trees import tree

from resume import checksum

ROOT = Path(__file__).resolve().parent.parent
TIMES = {"time", "seconds", "cpu_seconds", "peak_gib"}
COMMAND = "python cli.py train --preset debug --out RUN"


def train(folder: Path, life: float | None = None) -> tuple[bool, str]:
    """The command, killed after `life` seconds with all its processes unless it has ended before:
    (whether it was killed, its output). AssertionError where it fails by itself."""
    words = [sys.executable, str(ROOT / "cli.py"), "train", "--preset", "debug"]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*words, "--out", str(folder)], stdout=output, stderr=output, start_new_session=True
        )
        try:
            process.wait(life)
            killed = False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            killed = process.wait() == -signal.SIGKILL
        output.seek(0)
        text = output.read()
    assert killed or process.returncode == 0, text
    return killed, text


def without_times(value):
    """JSON without what is a time or an amount of memory, also where it stands in a sentence."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    if isinstance(value, list):
        return [without_times(v) for v in value]
    return re.sub(r"\d+ decisions/s", "", value) if isinstance(value, str) else value


def contents(folder: Path) -> dict[str, tuple]:
    """Of every safetensors file its header's words, and a hash over the bits of all its tensors.
    (The file itself has the words in an order that changes from one writing to the next.)"""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found[path.name] = (file.metadata(), checksum("", tensors))
    return found


def outcome(folder: Path) -> dict:
    """All that a run leaves and that must not depend on interruptions."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {
        "checkpoints": contents(folder / "checkpoints"),
        "episodes": contents(folder / "episodes"),
        "pictures": tree(folder / "pictures"),
        "metrics": [without_times(json.loads(line)) for line in lines],
        "stages": without_times(json.loads((folder / "stages.json").read_text())),
        "left over": sorted(p.name for p in folder.rglob("*.tmp")) + sorted(
            p.name for p in folder.glob("resume")
        ),
    }  # fmt: skip


def killed_run(folder: Path, rng: np.random.Generator, mean: float, left: int) -> list[float]:
    """A run that is killed at most `left` times; returns the seconds it lived each time."""
    lives = []
    while True:
        life = float(rng.exponential(mean)) if len(lives) < left else None
        killed, _ = train(folder, life)
        if not killed:
            return lives
        lives.append(life)


def main() -> None:
    from evaluate import hardware
    from studies import current_commit

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--life", type=float, default=20.0, help="mean seconds to a kill")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "kills.json")
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as place:
        peace = Path(place) / "peace"
        started = time.time()
        train(peace)
        expected, seconds = outcome(peace), time.time() - started
        result = {
            "kills": 0, "bit_equal": 0, "runs": 0, "runs_bit_equal": 0, "differences": [],
            "command": f"python tests/kills.py --kills {options.kills} --seed {options.seed}",
            "killed": COMMAND, "commit": current_commit(), "seed": options.seed,
            "hardware": hardware(),
            "uninterrupted_seconds": round(seconds), "mean_life": options.life, "lives": [],
        }  # fmt: skip
        while result["kills"] < options.kills:
            folder = Path(place) / f"run{result['runs']}"
            lives = killed_run(folder, rng, options.life, options.kills - result["kills"])
            found = outcome(folder)
            different = [what for what in expected if found[what] != expected[what]]
            result["runs"] += 1
            result["kills"] += len(lives)
            result["lives"].append([round(life, 1) for life in lives])
            if different:
                result["differences"].append({"run": result["runs"], "what": different})
                shutil.copytree(folder, options.out.parent / f"kills_run{result['runs']}")
            else:
                result["runs_bit_equal"] += 1
                result["bit_equal"] += len(lives)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
            print(
                f"{result['kills']} kills, {result['bit_equal']} bit-equal; {different or 'same'}"
            )
            shutil.rmtree(folder)
    sys.exit(result["bit_equal"] < result["kills"])


if __name__ == "__main__":
    main()

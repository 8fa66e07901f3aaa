"""Kill a debug run at random moments, resume it each time, and compare it with one left in peace.

    python tests/kills.py --kills 50 --seed 0

runs `python cli.py train --preset debug --beside` (two processes) once to its end; then again and
again, in fresh folders, each time killed by SIGKILL with all its processes at a random moment and
given again, until it comes to its end. Every tensor of all checkpoints and episodes must then be
the same bit by bit, all pictures too, and metrics.jsonl and stages.json but for times and memory.
The counts go to results/kills.json after each run; the exit code is 1 where a run differed.

Kills come as a Poisson process does: seconds of training to the next kill are drawn from an
exponential distribution, so that no moment is more likely than another; its mean is a share (LIFE)
of what a run takes on this machine. The clock starts where the training takes its folder: before
it, Python only imports, and there is nothing to lose. With each kill stand the stages that were
finished and the newest state in resume/, so that one can see what was hit. A run that was never
killed is not counted.

Each run has random numbers of its own: the same command, given again after an interruption, goes on
with the counts of its --out.
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
import psutil
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trees import tree

from resume import checksum

ROOT = Path(__file__).resolve().parent.parent
TIMES = {"time", "seconds", "cpu_seconds", "peak_gib", "beside_seconds"}
LIFE = 0.5  # of the time that a run left in peace takes
COMMAND = "python cli.py train --preset debug --beside --out RUN"


def train(folder: Path, life: float | None = None) -> tuple[bool, str]:
    """The command, killed with all its processes after `life` seconds of training, unless it has
    ended before: (whether it was killed, its output). AssertionError where it fails by itself."""
    words = [sys.executable, str(ROOT / "cli.py"), *COMMAND.split()[2:-2]]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*words, "--out", str(folder)], stdout=output, stderr=output, start_new_session=True
        )
        while life is not None and process.poll() is None and not at_work(process.pid, folder):
            time.sleep(0.02)
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


def at_work(pid: int, folder: Path) -> bool:
    """Whether a process trains in a run folder: it holds config.json open (`only_training`)."""
    try:
        opened = psutil.Process(pid).open_files()
    except psutil.Error:  # it has just ended
        return False
    return os.path.realpath(folder / "config.json") in {file.path for file in opened}


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
            p.name for p in folder.iterdir() if p.name in ("resume", "beside")
        ),
    }  # fmt: skip


def killed_run(folder: Path, rng: np.random.Generator, mean: float, left: int) -> list[dict]:
    """A run that is killed at most `left` times; returns of each kill how many "seconds" the
    training had been at work, the stages that were "finished", and the "newest_state" in resume/,
    from which the next one may go on (None: there was none)."""
    kills: list[dict] = []
    while True:
        life = float(rng.exponential(mean)) if len(kills) < left else None
        killed, _ = train(folder, life)
        if not killed:
            return kills
        books = [folder / "stages.json", folder / "beside" / "stages.json"]
        finished = [
            name for path in books if path.is_file() for name in json.loads(path.read_text())
        ]
        states = [*folder.glob("resume/*.safetensors"), *folder.glob("beside/resume/*.safetensors")]
        states.sort(key=lambda path: path.stat().st_mtime)
        kills.append(
            {
                "seconds": round(life, 1),
                "finished": list(dict.fromkeys(finished)),
                "newest_state": states[-1].name if states else None,
            }
        )


def count(result: dict, kills: list[dict], different: list[str]) -> None:
    """Enter a run into the counts. One that was never killed shows nothing about kills: it has been
    begun, and is in no other count, unless it differs."""
    result["begun"] += 1
    result["kills"] += len(kills)
    result["runs"] += bool(kills)
    result["killed_at"].append(kills)
    if different:
        result["differences"].append({"run": result["begun"], "what": different})
    else:
        result["bit_equal"] += len(kills)
        result["runs_bit_equal"] += bool(kills)


def begun(path: Path, about: dict) -> dict:
    """The counts so far of the same command and commit; or none yet, of both."""
    if path.is_file():
        found = json.loads(path.read_text())
        if all(found.get(name) == value for name, value in about.items()) and "begun" in found:
            return found
    counts = dict.fromkeys(("kills", "bit_equal", "runs", "runs_bit_equal", "begun"), 0)
    return counts | {"differences": []} | about | {"killed_at": []}


def main() -> None:
    from evaluate import current_commit, hardware

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--life", type=float, default=LIFE, help="mean time to a kill, in times of a run in peace"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "kills.json")
    options = parser.parse_args()
    command = f"python tests/kills.py --kills {options.kills} --seed {options.seed}"
    command += f" --life {options.life}" if options.life != LIFE else ""
    about = {
        "command": command,
        "killed": COMMAND, "commit": current_commit(), "seed": options.seed,
        "hardware": hardware(),
    }  # fmt: skip
    result = begun(options.out, about)
    with tempfile.TemporaryDirectory() as place:
        peace = Path(place) / "peace"
        started = time.time()
        train(peace)
        expected, seconds = outcome(peace), time.time() - started
        life = options.life * seconds
        result |= {"uninterrupted_seconds": round(seconds), "mean_life": round(life, 1)}
        while result["kills"] < options.kills:
            number = result["begun"] + 1
            folder = Path(place) / f"run{number}"
            rng = np.random.default_rng([options.seed, number])
            kills = killed_run(folder, rng, life, options.kills - result["kills"])
            found = outcome(folder)
            different = [what for what in expected if found[what] != expected[what]]
            if different:
                shutil.copytree(folder, options.out.parent / f"kills_run{number}")
            count(result, kills, different)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
            print(
                f"{result['kills']} kills, {result['bit_equal']} bit-equal; {different or 'same'}",
                flush=True,
            )
            shutil.rmtree(folder)
    sys.exit(bool(result["differences"]))


if __name__ == "__main__":
    main()

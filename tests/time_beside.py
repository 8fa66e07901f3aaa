"""Seconds of the branches of a run, from filtered BC to dream BC: by one process on all cores, and
by two side by side, in turns.

    python tests/time_beside.py RUN --pairs 1 --part 4

RUN has explored; copies of it go on from there, each in a process of its own, and it stays as it
is. The figures go to results/beside.json, after every pair.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from records import write_pairs

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "beside.json"


def explored(run: Path, folder: Path, part: int) -> None:
    """A copy of a run as it was after exploration, with a `part`-th of the steps ahead."""
    from order import STAGES
    from runs import Run, config_to_json

    shutil.copytree(run / "episodes", folder / "episodes")
    shutil.copytree(run / "checkpoints", folder / "checkpoints")
    config = Run.open(run).config
    for name in ("filtered_bc", "simulator_fit", "kinematics_fit", "reflector_fit"):
        fit = getattr(config, name)
        config = replace(config, **{name: replace(fit, steps=fit.steps // part)})
    (folder / "config.json").write_text(config_to_json(config))
    (folder / "pictures").mkdir()
    stages = json.loads((run / "stages.json").read_text())
    kept = {name: stages[name] for name in STAGES[: STAGES.index("explore") + 1]}
    (folder / "stages.json").write_text(json.dumps(kept))


def go_on(folder: Path, beside: bool) -> None:
    """Train that copy to the end of both branches."""
    import pipeline
    from runs import Run

    run = Run.open(folder)
    pipeline.train(run, print, lambda *step: None, until="dream_bc", beside=beside)


def timed(run: Path, beside: bool, part: int) -> dict:
    """What the stages took of both branches took: seconds each, on the wall together, memory."""
    from order import STAGES, wall_seconds

    with tempfile.TemporaryDirectory() as place:
        explored(run, Path(place), part)
        words = [sys.executable, __file__, place, "--beside" if beside else "--one-by-one"]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        stages = json.loads((Path(place) / "stages.json").read_text())
    stages = {
        name: stages[name] for name in STAGES[STAGES.index("filtered_bc") :] if name in stages
    }
    found = {name: round(stage["seconds"], 1) for name, stage in stages.items()}
    peak = max(stage["peak_gib"] for stage in stages.values())
    return {**found, "wall": round(wall_seconds(stages), 1), "peak_gib": peak}


def main() -> None:
    from runs import Run

    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--part", type=int, default=1, help="4: a quarter of all steps")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--beside", action="store_true", help="only go on in RUN itself, so ...")
    way.add_argument("--one-by-one", action="store_true", help="... or so")
    given = parser.parse_args()
    if given.beside or given.one_by_one:
        go_on(given.run, given.beside)
        return
    config, pairs = Run.open(given.run).config, []
    for _ in range(given.pairs):
        one, two = (timed(given.run, beside, given.part) for beside in (False, True))
        pairs.append({"one": one, "beside": two, "wall": round(two["wall"] / one["wall"], 2)})
        print(pairs[-1], flush=True)
        command = f"python tests/time_beside.py RUN --pairs {given.pairs} --part {given.part}"
        what = "seconds of the branches: one process on all cores, two on half of them each"
        steps = config.filtered_bc.steps // given.part
        run = {
            "seed": config.seed,
            "exploration": config.exploration,
            "steps_of_filtered_bc": steps,
        }
        write_pairs(OUT, command, what, pairs, run=run)


if __name__ == "__main__":
    main()

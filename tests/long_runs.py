"""Many iterations of LOOP, and after each what the run holds: memory, handles, processes, threads.

    python tests/long_runs.py --iterations 200

plays as `train` does, with a keeper that writes a state after every iteration and a gauge that
now and then plays its starts in real workers too; the dream is one of the debug preset's size, an
untrained one of short episodes: what an iteration leaves behind does not depend on either. The
figures go to results/long_runs.json. (`test_long_runs.py` asks that nothing grows.)
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import psutil

# Nothing heavy at the top: the workers of the real environment import this file again.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROOT = Path(__file__).resolve().parent.parent
SHOWN = (10, 50, 200)  # iterations after which the figures are stored


def dream(folder: Path, real, config):
    """(run, WorldEnv, policy, draw, gauge) of a configuration, with parts that were never trained.
    The gauge looks every few iterations, from a start a task."""
    import numpy as np
    from scripted import random_episode

    from camera import Camera
    from gauge import Gauge, known_starts, probe_starts
    from novelty import Novelty
    from policy import Policy
    from reflector import Reflector
    from runs import Run
    from simulator import Simulator
    from worldenv import WorldEnv, start_frames

    camera = Camera((0.0, 0.0, 1.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), 42.0, config.env.size)
    size = config.env.size
    episodes = [random_episode(n, 3, size, task) for n, task in enumerate(config.tasks)]
    simulator = Simulator(config.simulator, camera).eval()
    simulator.album.fill(episodes)
    simulator.kinematics.set_range(np.concatenate([e.state for e in episodes]))
    parts, known = (simulator, Reflector(config.reflector).eval()), start_frames(episodes)
    env = WorldEnv(*parts, known, config.slots, config.env, 0)
    starts = probe_starts(config.tasks, 1, 0)
    novelty = Novelty(episodes, episodes)
    gauge = Gauge(*parts, real.open(), starts, config.env, config.probe_every, novelty)
    draw = known_starts(config.tasks, 0, known)
    return Run.create(folder, config), env, Policy(config.policy), draw, gauge


def held() -> dict[str, int]:
    """What this process and its children hold now; resident memory in bytes, of it and of them."""
    me = psutil.Process()
    children = me.children(recursive=True)
    return {
        "main_bytes": me.memory_info().rss,
        "workers_bytes": sum(child.memory_info().rss for child in children),
        "handles": sum(process.num_fds() for process in (me, *children)),
        "threads": sum(process.num_threads() for process in (me, *children)),
        "processes": len(children),
    }


def iterate(folder: Path, iterations: int, probe_every: int = 4) -> tuple[list[dict], object]:
    """(what is held after each iteration, the run) of LOOP with keeper, log and gauge as
    `train.stage_rl` has them; but it goes on when the gauge would end it."""
    from ppo import loop
    from runs import preset
    from vecenv import RealWorkers

    debug = preset("debug")
    config = replace(
        debug, slots=8, probe_every=probe_every, env=replace(debug.env, horizon=6),
        loop=replace(debug.loop, iterations=iterations, noise=3.0),
    )  # fmt: skip
    figures: list[dict] = []
    with RealWorkers(config) as real:
        run, env, policy, draw, gauge = dream(folder, real, config)
        keeper = run.keeper("rl", 1, {"real": real, "env": env, "gauge": gauge})
        gauge.look(policy, 0)

        def on_iteration(iteration: int, metrics: dict) -> None:
            run.log(stage="rl", round=1, iteration=iteration, **metrics)
            gauge.look(policy, iteration + 1)
            figures.append(held())

        loop(env, policy, draw, config.loop, 0, on_iteration, keeper)
    assert len(gauge.probes) == 1 + iterations // probe_every
    return figures, run


def main() -> None:
    from evaluate import current_commit, hardware

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "long_runs.json")
    options = parser.parse_args()
    record = {
        "command": f"python tests/long_runs.py --iterations {options.iterations}",
        "commit": current_commit(), "hardware": hardware(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        figures, _ = iterate(Path(place) / "run", options.iterations)
    shown = {}
    for number in (n for n in SHOWN if n <= options.iterations):
        now = figures[number - 1]
        mib = {
            f"{who}_mib": round(now.pop(f"{who}_bytes") / 2**20, 1) for who in ("main", "workers")
        }
        shown[str(number)] = mib | now
    record["after_iterations"] = shown
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()

"""What many iterations leave behind: nothing. Memory, file handles, processes, lines of the log.

LOOP plays in a dream of the debug preset's size, an untrained one of short episodes: what an
iteration leaves behind does not depend on either.
"""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_cli import make_episode

import runs
import tasks
from ppo import loop
from vecenv import VecRealEnv
from worldenv import WorldEnv

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
LINE = 2000  # bytes: an iteration's line in metrics.jsonl is a few hundred


def dream(folder: Path):
    """(run, WorldEnv, policy, draw) of the debug preset with parts that were never trained."""
    from camera import Camera
    from policy import Policy
    from reflector import Reflector
    from simulator import Simulator
    from tasks import Start
    from worldenv import start_frames

    config = runs.preset("debug")
    camera = Camera((0.0, 0.0, 1.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), 42.0, config.env.size)
    episodes = [make_episode(task, seed=n) for n, task in enumerate(config.tasks)]
    simulator = Simulator(config.simulator, camera).eval()
    simulator.album.fill(episodes)
    simulator.kinematics.set_range(np.concatenate([e.state for e in episodes]))
    run = runs.Run.create(folder, config)
    known, short = start_frames(episodes), replace(config.env, horizon=6)
    env = WorldEnv(simulator, Reflector(config.reflector).eval(), known, config.slots, short, 0)
    draw = lambda iteration, groups: [list(known)[g % len(known)] for g in range(groups)]  # noqa: E731
    assert all(isinstance(start, Start) for start in known)
    return run, env, Policy(config.policy), draw


def resources() -> dict[str, int]:
    """What this process holds now."""
    me = psutil.Process()
    return {
        "handles": me.num_fds(),
        "processes": len(me.children(recursive=True)),
        "renderers": len(tasks._ALL_RENDERERS),
        "threads": me.num_threads(),
    }


def iterate(folder: Path, iterations: int) -> tuple[list[dict], list[int], Path]:
    """Iterations of LOOP, logged as stage_rl logs them: (resources, resident bytes) after each."""
    run, env, policy, draw = dream(folder)
    held, resident = [], []

    def on_iteration(iteration: int, metrics: dict) -> None:
        run.log(stage="rl", round=1, iteration=iteration, **metrics)
        held.append(resources())
        resident.append(psutil.Process().memory_info().rss)

    config = replace(run.config.loop, iterations=iterations, noise=3.0)
    loop(env, policy, draw, config, 0, on_iteration)
    return held, resident, run.folder / "metrics.jsonl"


def assert_bounded(path: Path, iterations: int) -> None:
    """A line an iteration, each of a few hundred bytes."""
    lines = path.read_text().splitlines()
    assert len(lines) == iterations and max(map(len, lines)) < LINE
    assert [json.loads(line)["iteration"] for line in lines] == list(range(iterations))


@linux_only
def test_few_iterations_leave_nothing(tmp_path):
    held, _, log = iterate(tmp_path / "run", 6)
    assert held[-1] == held[1]
    assert_bounded(log, 6)


@linux_only
def test_environments_leave_nothing():
    """Workers and their pipes are gone when an environment is closed, also after a failure."""
    before = resources()
    for task in ("reach", "no such task", "reach"):
        if task == "no such task":  # the first one brings what multiprocessing itself keeps
            before = resources()
        env = VecRealEnv(2, tasks.EnvConfig(size=32), workers=2)
        try:
            env.reset(options={"starts": [tasks.Start(task, 1), tasks.Start(task, 2)]})
        except RuntimeError as error:
            assert "no such task" in str(error)
        env.close()
        del env
        gc.collect()
    assert resources() == before


@linux_only
@pytest.mark.slow
def test_memory_is_flat_over_200_iterations(tmp_path, capsys):
    """Between iterations 50 and 200 nothing grows: less than 32 MiB, a fraction of one batch."""
    held, resident, log = iterate(tmp_path / "run", 200)
    growth = (max(resident[190:]) - max(resident[40:50])) / 2**20
    with capsys.disabled():
        mib = [round(resident[n] / 2**20) for n in (9, 49, 99, 149, 199)]
        print(f"\nMiB after 10, 50, 100, 150, 200 iterations: {mib}; {held[49]} -> {held[-1]}")
    assert growth < 32
    assert held[-1] == held[49]
    assert_bounded(log, 200)

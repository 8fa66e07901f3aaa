"""What many iterations leave behind: nothing. Memory, file handles, processes, threads of the run
and its workers, states on the disk, lines of the log. `long_runs.py` plays them.
"""

import gc
import json
import sys

import pytest
from long_runs import ROOT, held, iterate

import tasks
from resume import KEPT
from vecenv import VecRealEnv

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
LINE = 2000  # bytes: an iteration's line in metrics.jsonl is a few hundred
COUNTED = ("handles", "threads", "processes")


def counts(figures: dict) -> dict[str, int]:
    """All that is held but memory."""
    return {name: figures[name] for name in COUNTED}


def assert_bounded(run, iterations: int) -> None:
    """A line an iteration, each of a few hundred bytes; the last two states."""
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == iterations and max(map(len, lines)) < LINE
    assert [json.loads(line)["iteration"] for line in lines] == list(range(iterations))
    states = sorted(path.name for path in (run.folder / "resume").iterdir())
    assert states == sorted(f"rl-{iterations - n}.safetensors" for n in range(KEPT))


@linux_only
def test_few_iterations_leave_nothing(tmp_path):
    """With a look of the gauge at every second one."""
    figures, run = iterate(tmp_path / "run", 6, probe_every=2)
    assert counts(figures[-1]) == counts(figures[1])
    assert figures[-1]["processes"] > 0 and figures[-1]["workers_bytes"] > 2**24
    assert_bounded(run, 6)


@linux_only
def test_environments_leave_nothing():
    """Workers and their pipes are gone when an environment is closed, also after a failure."""
    before = counts(held())
    for task in ("reach", "no such task", "reach"):
        if task == "no such task":  # the first one brings what multiprocessing itself keeps
            before = counts(held())
        env = VecRealEnv(2, tasks.EnvConfig(size=32), workers=2)
        try:
            env.reset(options={"starts": [tasks.Start(task, 1), tasks.Start(task, 2)]})
        except RuntimeError as error:
            assert "no such task" in str(error)
        env.close()
        del env
        gc.collect()
    assert counts(held()) == before


@linux_only
@pytest.mark.slow
def test_memory_is_flat_over_200_iterations(tmp_path, capsys):
    """Between iterations 50 and 200 nothing grows, in the run or in its workers: less than 32 MiB,
    a fraction of one batch."""
    figures, run = iterate(tmp_path / "run", 200)
    memory = [now["main_bytes"] + now["workers_bytes"] for now in figures]
    with capsys.disabled():
        mib = [round(memory[n] / 2**20) for n in (9, 49, 99, 149, 199)]
        print(f"\nMiB after 10, 50, 100, 150, 200 iterations: {mib}")
    assert max(memory[190:]) - max(memory[40:50]) < 32 * 2**20
    assert counts(figures[-1]) == counts(figures[49])
    assert_bounded(run, 200)


def test_the_stored_figures_are_of_200_iterations():
    """results/long_runs.json holds what the slow test asks for."""
    record = json.loads((ROOT / "results" / "long_runs.json").read_text())
    after = record["after_iterations"]
    assert set(after) == {"10", "50", "200"}
    grown = sum(after["200"][name] - after["50"][name] for name in ("main_mib", "workers_mib"))
    assert grown < 32 and counts(after["200"]) == counts(after["50"])

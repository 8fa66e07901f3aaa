"""What breaks in the middle of a run, each fault really caused: one clear line, exit code 2, what
is finished stays, and the same command goes on.

A run of the debug preset has its demonstrations and its SFT policy. Copies of it are continued by
the real command in a child process (faulty.py), and the fault comes while it explores or imitates.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from test_cli import assert_one_line, in_process
from test_ppo import SIZE as WALK_SIZE
from test_ppo import Walk

import demos
import errors
import ppo
import runs
import vecenv
from fit import FitConfig, fit
from policy import Policy, PolicyConfig
from tasks import EnvConfig, Start

FAULTY = str(Path(__file__).with_name("faulty.py"))
PATIENCE = 300  # seconds for a stage; it takes a few on a free core
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc, mount")


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A run after its second stage."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    train(folder, "sft")
    return folder


@pytest.fixture
def run(begun, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(begun, tmp_path / "run"))


def train(folder: Path, until: str):
    """The command in this process, to its end."""
    result = in_process("train", "--preset", "debug", "--out", folder, "--until", until)
    assert result.exit_code == 0, result.stderr or result.exception
    return result


class Faulty:
    """The same command in a child with a fault."""

    def __init__(self, fault: str, folder: Path, until: str = "explore"):
        command = [
            sys.executable,
            FAULTY,
            fault,
            "train",
            "--preset",
            "debug",
            "--out",
            str(folder),
        ]
        self.process = subprocess.Popen(
            [*command, "--until", until], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=os.environ | {"FAULT": fault},
        )  # fmt: skip

    def ready(self) -> psutil.Process:
        """Wait until it plays, in the middle of a stage."""
        lines = iter(self.process.stdout.readline, "")
        if "READY\n" not in lines:
            pytest.fail(self.process.stderr.read())
        return psutil.Process(self.process.pid)

    def end(self) -> SimpleNamespace:
        """Let it go on, to its end; what it left as `assert_one_line` wants it, but for the lines
        of finished stages."""
        _, stderr = self.process.communicate("\n", timeout=PATIENCE)
        return SimpleNamespace(stdout="", stderr=stderr, exit_code=self.process.returncode)


def assert_kept(folder: Path, *stages: str) -> None:
    """These stages are finished, and what they left can be read."""
    run = runs.Run.open(folder)
    assert tuple(run.stages) == stages
    assert len(demos.load(run.episodes_folder, run.config.env)[0]) >= 4
    assert torch.isfinite(next(run.policy("sft").parameters())).all()
    assert not list(folder.rglob("*.tmp"))


def assert_resumes(folder: Path, until: str = "explore") -> None:
    """The same command goes on behind the finished stages and ends well."""
    result = train(folder, until)
    assert "sft: done already" in result.stdout
    assert until in runs.Run.open(folder).stages


# ----------------------------------------------------------------------------------------- the disk


@contextmanager
def small_disk(place: Path, megabytes: int = 700):
    """A file system of its own; skips where nobody may mount one."""
    place.mkdir()
    options = f"size={megabytes}m"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(path: Path) -> None:
    """A file that takes all the space that is left."""
    with open(path, "wb") as file, pytest.raises(OSError, match="No space left"):
        while True:
            os.write(file.fileno(), bytes(2**20))


@contextmanager
def paused_on_a_small_disk(begun: Path, place: Path):
    """(the disk, a begun run on it, the child that pauses while it goes on with the run)."""
    with small_disk(place) as disk:
        folder = Path(shutil.copytree(begun, disk / "run"))
        child = Faulty("pause", folder)
        child.ready()
        yield disk, folder, child


@linux_only
def test_disk_that_fills_up(begun, tmp_path):
    with paused_on_a_small_disk(begun, tmp_path / "disk") as (disk, folder, child):
        fill(disk / "ballast")
        assert_one_line(child.end(), "No space left on device", "free some space")
        assert_kept(folder, "demos", "sft")
        (disk / "ballast").unlink()
        assert_resumes(folder)


@linux_only
def test_disk_that_becomes_read_only(begun, tmp_path):
    with paused_on_a_small_disk(begun, tmp_path / "disk") as (disk, folder, child):
        # The same place mounted over itself: the run holds a file of it open, its lock.
        subprocess.run(["mount", "--bind", disk, disk], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
        assert_one_line(child.end(), "Read-only file system", "permissions")
        assert_kept(folder, "demos", "sft")
        again = in_process("train", "--preset", "debug", "--out", folder, "--until", "explore")
        assert_one_line(again, "cannot write", "choose another --out")
        subprocess.run(["umount", disk], check=True)
        assert_resumes(folder)


def test_folder_that_vanishes(run):
    """It is not made again in parts, of which nobody could go on; the same command begins anew."""
    child = Faulty("pause", run)
    child.ready()
    shutil.rmtree(run)
    assert_one_line(child.end(), "No such file or directory", "check the path")
    assert not run.exists()
    train(run, "demos")


def test_line_that_was_cut_short(run):
    """A full disk or a kill leaves half a line in metrics.jsonl: the next one begins behind it."""
    path = run / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"b"')
    runs.Run.open(run).log(c=3)
    lines = path.read_text().splitlines()
    assert lines[:2] == ['{"a": 1}', '{"b"'] and lines[2].endswith('"c": 3}')
    runs.Run.open(run).log(c=4)
    assert len(path.read_text().splitlines()) == 4


# ----------------------------------------------------------------------------- workers and renderer


def test_worker_that_is_killed(run):
    """It is noticed at once, and no other worker stays behind."""
    child = Faulty("pause", run)
    workers = [p for p in child.ready().children() if "spawn_main" in " ".join(p.cmdline())]
    workers[0].send_signal(signal.SIGKILL)
    started = time.time()
    assert_one_line(child.end(), "a worker process of the real environment died", "to resume")
    assert time.time() - started < 60
    psutil.wait_procs(workers, timeout=20)
    assert not any(worker.is_running() for worker in workers)
    assert_kept(run, "demos", "sft")
    assert_resumes(run)


def test_renderer_that_is_lost(run):
    child = Faulty("renderer", run)
    assert_one_line(child.end(), "worker", "OpenGL context lost", "doctor", "to resume")
    assert_kept(run, "demos", "sft")
    assert_resumes(run)


def test_worker_that_hangs(monkeypatch):
    """Stopped, not dead: an end after PATIENCE, no wait for ever; closing ends it."""
    env = vecenv.VecRealEnv(1, EnvConfig(size=32), workers=1)
    env.reset(options={"starts": [Start("reach", 1)]})
    worker = env._processes[0]
    monkeypatch.setattr(vecenv, "PATIENCE", 0.5)
    monkeypatch.setattr(vecenv, "LOOK", 0.1)
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(RuntimeError, match="gave no answer.*expected.*to resume") as caught:
        env.step(np.zeros(env.action_space.shape, np.float32))
    assert errors.explain(caught.value) == str(caught.value)
    env.close()
    assert not worker.is_alive()


def test_workers_end_with_their_main_process(run):
    """Even when that is killed."""
    child = Faulty("pause", run)
    workers = child.ready().children(recursive=True)
    assert workers
    child.process.kill()
    child.process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert_kept(run, "demos", "sft")


# ----------------------------------------------------------------------------------- NaN and memory


def test_loss_that_is_no_number(run):
    child = Faulty("nan", run, "filtered_bc")
    assert_one_line(child.end(), "Policy, step 2: the loss is nan", "to resume", "a new --out")
    assert_kept(run, "demos", "sft", "explore")
    assert not (run / "checkpoints" / "filtered_bc.safetensors").exists()
    assert_resumes(run, "filtered_bc")


def test_loss_of_loop_that_is_no_number():
    """LOOP says so before a step is made: no weight becomes NaN."""
    policy = Policy(PolicyConfig(size=WALK_SIZE, chunk=2, width=8, hidden=16))
    policy.distribution = lambda *parts, real=policy.distribution: tuple(
        x * (float("nan") if torch.is_grad_enabled() else 1.0) for x in real(*parts)
    )
    config = ppo.LoopConfig(iterations=1, groups=4, rollouts=4, branch=2, noise=4.0)
    draw = lambda iteration, groups: [Start("reach", g) for g in range(groups)]  # noqa: E731
    with pytest.raises(FloatingPointError, match="LOOP: the loss is nan, .*; expected.*resume"):
        ppo.loop(Walk(16, horizon=6), policy, draw, config, 3)
    assert all(torch.isfinite(p).all() for p in policy.parameters())


def test_gradient_that_is_no_number_under_a_loss_that_is_one():
    """The slope of the root is infinite at 0, and 0 times that is no number."""

    class Root(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2))

        def forward(self, batch):
            return (0 * self.weight).sqrt().sum(), {}

    part = Root()
    with pytest.raises(FloatingPointError, match="Root, step 0: the loss is 0.0, its gradient nan"):
        fit(part, lambda step: {"x": torch.zeros(1)}, FitConfig(steps=2))
    assert (part.weight == 0).all()


@linux_only
@pytest.mark.parametrize("fault", ["memory", pytest.param("greedy", marks=pytest.mark.slow)])
def test_memory_that_does_not_suffice(run, fault):
    """torch and numpy ask for more than the limit of the process."""
    child = Faulty(fault, run, "filtered_bc")
    assert_one_line(child.end(), "out of memory", "smaller preset", "to resume")
    assert_kept(run, "demos", "sft", "explore")
    assert_resumes(run, "filtered_bc")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 50.9 TiB for an array"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory"
        ),
        RuntimeError("could not create a primitive"),  # oneDNN
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    ],
)
def test_how_libraries_say_that_memory_is_short(error):
    try:
        raise error
    except Exception as caught:
        line = errors.explain(caught)
    assert line.startswith("out of memory (") and "\n" not in line
    assert "expected" in line and "resume" in line

"""A second process beside the first: the same numbers, and neither loses what the other one had."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from kills import outcome
from test_cli import in_process

import beside
import cli
import order
import pipeline
import processes
import resume
import runs
import train
from beside import Beside, SideRun, put_together, tidy
from pretrained import PretrainedConfig

DEBUG = runs.preset("debug")
CLI = [sys.executable, str(Path(cli.__file__))]
PATIENCE = 300  # seconds for a command; it takes some on a free core


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A run after exploration: where the branches part."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    result = in_process("train", "--preset", "debug", "--out", folder, "--until", "explore")
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture
def run(begun, tmp_path) -> runs.Run:
    """A copy of it."""
    return runs.Run.open(shutil.copytree(begun, tmp_path / "run"))


def command(folder: Path, *words: str, until: str = "dream_bc") -> subprocess.Popen:
    """`train` on one thread a process, in a session of its own."""
    return subprocess.Popen(
        [*CLI, "train", "--preset", "debug", "--out", str(folder), "--until", until, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command."""
    stdout, stderr = process.communicate(timeout=PATIENCE)
    return process.returncode, stdout, stderr


def second_of(process: subprocess.Popen, folder: Path, at_work: str) -> psutil.Process:
    """The second process of a command, as soon as its books have a file of such a name."""
    began = time.monotonic()
    while not list((folder / beside.FOLDER).glob(at_work)):
        assert process.poll() is None and time.monotonic() - began < PATIENCE, ended(process)
        time.sleep(0.02)
    for child in psutil.Process(process.pid).children():
        if any("spawn_main" in word for word in child.cmdline()):
            return child
    raise AssertionError("no second process")


def numbers(folder: Path) -> dict:
    """What a run has come to; metrics.jsonl in the order of its stages."""
    found = outcome(folder)
    names = order.STAGES
    found["metrics"].sort(key=lambda line: names.index(line["stage"]))
    return found


@pytest.fixture(scope="module")
def peace(begun, tmp_path_factory) -> Path:
    """The run in one process."""
    folder = Path(shutil.copytree(begun, tmp_path_factory.mktemp("peace") / "run"))
    code, _, stderr = ended(command(folder, "--no-beside"))
    assert code == 0, stderr
    return folder


def test_two_processes_come_to_the_numbers_of_one(run, peace):
    """Weights, pictures, metrics and entries, bit by bit; the books are one again."""
    code, stdout, stderr = ended(command(run.folder, "--beside"))
    assert code == 0, stderr
    assert numbers(run.folder) == numbers(peace)
    assert not (run.folder / beside.FOLDER).exists()
    told = [line.split(":")[0] for line in stdout.splitlines() if line.endswith("beside")]
    assert told == list(order.BESIDE)
    stages = json.loads((run.folder / "stages.json").read_text())
    assert list(stages) == list(order.STAGES[:7])
    assert all(0 <= stages[name]["beside_seconds"] <= stages[name]["seconds"] for name in told)
    assert order.wall_seconds(stages) < sum(stage["seconds"] for stage in stages.values())


def test_either_may_be_killed(run, peace):
    """First the second, then the first: one line or none, nobody stays behind, and the same command
    comes to the same numbers."""
    process = command(run.folder, "--beside")
    second_of(process, run.folder, "resume/filtered_bc-*").kill()
    code, _, stderr = ended(process)
    assert code == 2 and stderr.splitlines()[-1] == f"error: {beside.GONE}; {processes.AGAIN}"
    process = command(run.folder, "--beside")
    second = second_of(process, run.folder, "stages.json")
    process.kill()
    process.communicate()
    psutil.wait_procs([second], timeout=10)
    assert not second.is_running()
    assert "filtered_bc" not in runs.Run.open(run.folder).stages  # only the second's books have it
    code, _, stderr = ended(command(run.folder, "--beside"))
    assert code == 0, stderr
    assert numbers(run.folder) == numbers(peace)


def test_ctrl_c_ends_both_after_their_steps(run, peace):
    """The terminal sends it to both; a run that was begun by two processes goes on in one."""
    process = command(run.folder, "--beside")
    second = second_of(process, run.folder, "stages.json")
    os.killpg(process.pid, signal.SIGINT)
    code, _, stderr = ended(process)
    assert code == 130 and stderr.splitlines()[-1].startswith("interrupted; run the same command")
    assert "Traceback" not in stderr and not second.is_running()
    code, stdout, stderr = ended(command(run.folder, "--no-beside"))
    assert code == 0, stderr
    assert "filtered_bc: done already" in stdout and numbers(run.folder) == numbers(peace)


# ------------------------------------------------------------------------------- a second's work


def tells(run: SideRun, names, say, progress) -> None:
    """Work that has finished two stages, with a line in the log and one to show."""
    for name in names:
        run.clock = runs.Clock()
        train.log_step(run, name, 0, 1, {"loss": 0.5})
        progress(name, 0, 1, {"loss": 0.5})
        run.finish_stage(name, 8.0, 4.0, {"line": "done", "ledger": {"imagined_frames": 3}})
        say(f"{name}: done (8 s)")


def refuses(*_arguments) -> None:
    """Work that meets a user's mistake."""
    runs.Run.open(Path("nowhere"))


def slips(*_arguments) -> None:
    """Work with a mistake of ours."""
    raise TypeError(1 + len([]))


def fills_the_disk(*_arguments) -> None:
    """Work that has no room."""
    raise OSError(28, "No space left on device", "/full/place")


def needs_too_much(*_arguments) -> None:
    """Work that gets no memory from torch."""
    import torch

    torch.empty(2**55)


def hears(run: SideRun, names, say, progress) -> None:
    """Work that ends when it is asked to, and says so."""
    say("at work")
    while not resume.asked_to_stop():
        time.sleep(0.01)
    (run.folder / "asked").touch()
    raise KeyboardInterrupt


def new_run(tmp_path) -> runs.Run:
    """A run with an entry of its first stage."""
    run = runs.Run.create(tmp_path / "run", DEBUG)
    train.log_step(run, "demos", 0, 1, {"loss": 1.0})
    run.finish_stage("demos", 2.0, 1.0, {"line": "made", "ledger": {"demonstrations": 4}})
    return run


def test_books_are_put_together(tmp_path):
    """Entries in the order of the stages, lines behind ours; nothing twice, whenever it was
    killed."""
    run, shown = new_run(tmp_path), []
    second = Beside(run, ["filtered_bc", "dream_bc"], tells, lambda *a: shown.append(a))
    try:
        run.finish_stage("simulator", 5.0, 1.0, {"line": "made"})
        assert second.join() == ["filtered_bc: done (8 s)", "dream_bc: done (8 s)"]
    finally:
        second.close()
    assert ("filtered_bc", 0, 1, {"loss": 0.5}) in shown
    assert list(run.stages) == ["demos", "filtered_bc", "simulator", "dream_bc"]
    assert json.loads((run.folder / "stages.json").read_text()) == run.stages
    assert run.ledger()["imagined_frames"] == 6 and not (run.folder / beside.FOLDER).exists()
    logged = [json.loads(line)["stage"] for line in run.lines()]
    assert logged == ["demos", "filtered_bc", "dream_bc"]
    assert order.wall_seconds(run.stages) < 2 + 5 + 16


def test_a_kill_while_they_are_put_together(tmp_path, monkeypatch):
    """Before the entries are written the lines are forgotten; after it only the folder is left."""
    run = new_run(tmp_path)
    (run.folder / beside.FOLDER).mkdir()
    tells(SideRun(run.folder, DEBUG), ["filtered_bc"], lambda line: None, lambda *a: None)

    def killed(*_arguments):
        raise KeyboardInterrupt

    for place in (runs.Run, "write_stages"), (shutil, "rmtree"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(*place, killed)
            put_together(run)
        run = runs.Run.open(run.folder)
        run.forget_unfinished()
        tidy(run, beside=True)
    assert list(run.stages) == ["demos", "filtered_bc"]
    assert [json.loads(line)["stage"] for line in run.lines()] == ["demos", "filtered_bc"]
    assert not (run.folder / beside.FOLDER).exists()


def test_time_that_was_waited_is_not_beside(tmp_path):
    """The last ten of sixteen seconds: eight of the last stage, two of the one before."""
    run = new_run(tmp_path)
    (run.folder / beside.FOLDER).mkdir()
    tells(SideRun(run.folder, DEBUG), list(order.BESIDE), lambda line: None, lambda *a: None)
    put_together(run, waited=10.0)
    assert [run.stages[name]["beside_seconds"] for name in order.BESIDE] == [6.0, 0.0]
    assert order.wall_seconds(run.stages) == 2 + 10


@pytest.mark.parametrize(
    "work, kind, words",
    [
        (refuses, runs.BadRun, "nowhere: not a run folder"),
        (fills_the_disk, OSError, "/full/place"),
        (needs_too_much, MemoryError, "allocate"),
        (slips, SystemError, "in slips"),
    ],
)
def test_what_goes_wrong_there_is_told_here(tmp_path, work, kind, words):
    """A user's mistake as it is, one of ours with the place where it was made."""
    second = Beside(new_run(tmp_path), ["filtered_bc"], work, lambda *a: None)
    try:
        with pytest.raises(kind) as caught:
            second.join()
    finally:
        second.close()
    assert words in str(caught.value)
    if kind is OSError:
        assert caught.value.errno == 28


def test_it_is_asked_to_end(tmp_path):
    """`close` lets it write its state; it is gone then."""
    run = new_run(tmp_path)
    second = Beside(run, ["filtered_bc"], hears, lambda *a: None)
    while not second.lines:
        second.look(1.0)
    assert second.process.pid in processes.apart
    second.close()
    assert (run.folder / "asked").exists() and not second.process.is_alive()
    assert second.process.pid not in processes.apart


def waits(run: SideRun, *_arguments) -> None:
    """Work that needs a stage which the first process never finishes."""
    run.wait_for("simulator")


def talks(run: SideRun, names, say, progress) -> None:
    """Work that says more than a pipe holds."""
    for number in range(100):
        say(str(number) * 10_000)
    (run.folder / "said").touch()


@pytest.mark.parametrize("work", [waits, refuses, talks])
def test_its_end_is_not_waited_for_in_vain(tmp_path, work):
    """One that waits, that has met an error, or whose words nobody has read."""
    run = new_run(tmp_path)
    second = Beside(run, ["filtered_bc"], work, lambda *a: None)
    while not (run.folder / beside.FOLDER).is_dir():  # its imports take a while
        time.sleep(0.05)
    time.sleep(1)
    began = time.monotonic()
    second.close()
    assert time.monotonic() - began < beside.LAST_STEP - 5 and not second.process.is_alive()
    assert (run.folder / "said").exists() == (work is talks)


def test_ctrl_c_while_it_is_started(tmp_path, monkeypatch):
    """It was kept back, comes when the process is there, and leaves none."""
    started = []

    @contextmanager
    def kept_back():
        yield
        started.extend(multiprocessing.active_children())
        raise KeyboardInterrupt

    monkeypatch.setattr(beside, "_signals_kept_back", kept_back)
    with pytest.raises(KeyboardInterrupt):
        Beside(new_run(tmp_path), ["filtered_bc"], tells, lambda *a: None)
    assert started and not any(child.is_alive() for child in started)


def state_of(run: runs.Run, name: str) -> None:
    """Leave a state of a stage."""
    run.clock = runs.Clock()
    run.keeper(name, 1).write(1, {})


def states(run: runs.Run) -> list[str]:
    """Where the states of a run are."""
    found = run.folder.rglob("resume/*.safetensors")
    return sorted(path.relative_to(run.folder).as_posix() for path in found)


def test_states_are_kept_when_one_process_takes_over_from_two(tmp_path):
    """And the other way round; a stage that ends takes no other one's states along."""
    run = new_run(tmp_path)
    (run.folder / beside.FOLDER).mkdir()
    side = SideRun(run.folder, DEBUG)
    tells(side, ["filtered_bc"], lambda line: None, lambda *a: None)
    state_of(side, "dream_bc")
    state_of(run, "kinematics")
    state_of(run, "simulator")
    ours = [f"resume/{name}-1.safetensors" for name in ("dream_bc", "kinematics", "simulator")]
    tidy(run, beside=True)
    assert states(run) == ["beside/resume/dream_bc-1.safetensors", *ours[1:]]
    tidy(run, beside=False)
    assert states(run) == ours and "filtered_bc" in run.stages
    second = Beside(run, ["dream_bc"], hears, lambda *a: None)
    assert states(run) == ["beside/resume/dream_bc-1.safetensors", *ours[1:]]
    second.close()
    run.finish_stage("simulator", 1.0, 1.0, {"line": "made"})
    put_together(run)
    assert states(run) == ours[:1]
    run.finish_stage("dream_bc", 1.0, 1.0, {"line": "made"})
    assert not (run.folder / "resume").exists()


def test_all_processes_of_a_launched_run_know_what_is_finished(run, monkeypatch):
    """The main one puts the books together after the others have read theirs."""
    (run.folder / beside.FOLDER).mkdir()
    tells(SideRun(run.folder, DEBUG), ["filtered_bc"], lambda line: None, lambda *a: None)
    other, said = runs.Run.open(run.folder), []
    monkeypatch.setattr(processes, "is_main", lambda: False)
    monkeypatch.setattr(processes, "wait", lambda: put_together(run))
    pipeline.train(other, said.append, lambda *a: None, until="filtered_bc")
    assert len(said) == 4 and all("done already" in line for line in said)


def test_a_stage_that_a_person_took_out_stays_out(tmp_path):
    """The second's books hold its own stages only."""
    run = new_run(tmp_path)
    (run.folder / beside.FOLDER).mkdir()
    tells(SideRun(run.folder, DEBUG), ["filtered_bc"], lambda line: None, lambda *a: None)
    books = json.loads((run.folder / beside.FOLDER / "stages.json").read_text())
    assert list(books) == ["filtered_bc"]
    (run.folder / "stages.json").write_text("{}")
    run = runs.Run.open(run.folder)
    put_together(run)
    assert list(run.stages) == ["filtered_bc"]


# ------------------------------------------------------------------------------------ when it pays


def test_where_a_second_process_pays(monkeypatch):
    """Two cores, a processor, a policy that takes a while; never two copies of a large model."""
    cpu = runs.preset("cpu")
    monkeypatch.setattr(processes, "own_cores", lambda: 2)
    assert order.side_by_side(cpu) and not order.side_by_side(DEBUG)
    assert not order.side_by_side(cpu, "cuda")
    large = PretrainedConfig(checkpoint="some/model")
    assert not order.side_by_side(replace(cpu, reflector=replace(cpu.reflector, pretrained=large)))
    monkeypatch.setattr(processes, "own_cores", lambda: 1)
    assert not order.side_by_side(cpu)
    monkeypatch.setattr(processes, "own_cores", lambda: 2)
    monkeypatch.setattr(processes, "launched", lambda: 2)
    assert not order.side_by_side(cpu)
    with pytest.raises(ValueError, match="--beside: got it in a run of 2 processes"):
        order.check_beside(True)
    order.check_beside(False)


def test_the_order_of_their_lines():
    """What a second process did is told when both are there, in every round."""
    two = replace(DEBUG, rounds=2)
    names = order.as_they_end(two, True)
    assert sorted(names) == sorted(order.stages_of(two))
    assert names[3:8] == ["simulator", "reflector", "filtered_bc", "dream_bc", "calibrate"]
    assert names[10:15] == ["simulator_2", "reflector_2", "filtered_bc_2", "dream_bc_2",
                            "calibrate_2"]  # fmt: skip
    real = replace(DEBUG, rl_env="real")
    assert order.as_they_end(real, True) == list(order.stages_of(real))
    assert order.as_they_end(two, False) == list(order.stages_of(two))


def test_a_stage_before_the_branches_needs_no_second(run, monkeypatch):
    """Nothing is started for what is done already."""

    def started(*_arguments):
        raise AssertionError("a second process")

    monkeypatch.setattr(pipeline, "Beside", started)
    said = []
    pipeline.train(run, said.append, lambda *a: None, until="explore", beside=True)
    assert len(said) == 3 and all("done already" in line for line in said)

"""Two processes against one: the same losses, rollouts and weights; refusals; a process that dies.

TOLERANCES. Losses, returns, KL: a ten-thousandth of their size. Weights: at most one in a hundred
is off by more than 1e-4. Two halves of a batch add up to the whole but for the rounding of floats;
where a gradient is nothing but rounding (a bias ahead of a normalisation), Adam makes a full step
of it, in either direction.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from scripted import random_episode
from test_pretrained import save_tiny

import cli
import demos
import order
import processes
import runs
import terminal
import train
from films import write_strips, write_telling

ROOT = Path(cli.__file__).resolve().parent
LAUNCH = [
    sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
]  # fmt: skip
TIMEOUT = 600  # seconds


def environment() -> dict:
    """Without what another launcher, or the tests' own settings, may have left."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "WORLDENV"))}


def command(count: int, *words, config: str = "cpu.yaml") -> list[str]:
    return [*LAUNCH, str(ROOT / "launch" / config), "--num_processes", str(count), *map(str, words)]


def launch(count: int, *words, config: str = "cpu.yaml") -> subprocess.CompletedProcess:
    """A program and its arguments in `count` processes, as a user starts them."""
    return subprocess.run(
        command(count, *words, config=config),
        capture_output=True, text=True, timeout=TIMEOUT, env=environment(),
    )  # fmt: skip


def error_lines(result: subprocess.CompletedProcess) -> list[str]:
    """What this program says of an error, without the report that the launcher adds."""
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


# ------------------------------------------------------------------------------ dividing, by itself


@pytest.fixture
def as_process(monkeypatch):
    """as_process(r, W): from now on this process takes itself for number r of W."""

    def pretend(rank: int, world: int) -> None:
        monkeypatch.setattr(processes, "rank", lambda: rank)
        monkeypatch.setattr(processes, "world", lambda: world)

    return pretend


def test_one_process_is_alone():
    """Nothing is divided, and nothing is connected."""
    items = list(range(5))
    assert processes.world() == 1 and processes.rank() == 0 and processes.is_main()
    assert processes.share(items) == processes.gather(items) == items
    assert processes.total(3) == 3 and processes.add_up([], {"loss": 2.5}) == {"loss": 2.5}
    assert processes.slots_of(0, 4, 2).tolist() == [0, 1, 2, 3]
    processes.wait()
    assert not torch.distributed.is_initialized()


def test_only_the_main_process_writes_films(as_process, tmp_path):
    """All hold the same films, and all would write them under the same temporary name."""
    episode = random_episode(0, 2, 16)
    found = {"success": ("reach, start 0", episode.image)}
    as_process(1, 2)
    assert write_telling(tmp_path, found) == {"success": "reach, start 0"}
    write_strips(tmp_path, [episode], [episode])
    assert list(tmp_path.iterdir()) == []
    as_process(0, 2)
    write_telling(tmp_path, found)
    write_strips(tmp_path, [episode], [episode])
    written = {path.name for path in tmp_path.iterdir()}
    assert "film_success.gif" in written and len(written) == 3


@pytest.mark.parametrize("count, world", [(7, 2), (8, 4), (1, 3), (0, 2)])
def test_shares_make_up_the_whole(as_process, monkeypatch, count, world):
    """Every item has one owner, and gathering puts all back in order."""
    parts = []
    for rank in range(world):
        as_process(rank, world)
        parts.append(processes.share(list(range(count))))
    assert sorted(sum(parts, [])) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    monkeypatch.setattr(processes, "each", lambda thing: parts)
    assert processes.gather(parts[0]) == list(range(count))


@pytest.mark.parametrize("count, together", [(12, 4), (10, 4), (6, 1), (3, 5)])
def test_slots_of_all_processes_are_those_of_one(as_process, count, together):
    """Groups stay whole, group g is the (g // W)-th of process g % W, and no slot has two owners
    (slots that make no whole group stand at the end)."""
    world = 3
    as_process(0, world)
    owned = [processes.slots_of(rank, count, together) for rank in range(world)]
    assert sorted(np.concatenate(owned)) == list(range(world * count))
    for rank, slots in enumerate(owned):
        for group in range(count // together):
            first = (group * world + rank) * together
            own = slots[group * together : (group + 1) * together]
            assert own.tolist() == list(range(first, first + together))


def test_numbers_for_all_rows_lie_as_torch_would_draw_them(as_process):
    """Also where the rows are pictures whose channels come last in memory."""
    rows = torch.zeros(6, 5, 5, 3).movedim(-1, 1)
    expected = torch.rand_like(rows, generator=torch.Generator().manual_seed(0))
    for rank in range(2):
        as_process(rank, 2)
        own = processes.share(rows)
        dense = torch.empty_like(own, memory_format=torch.preserve_format)
        drawn = processes.all_rows_like(dense).uniform_(generator=torch.Generator().manual_seed(0))
        assert torch.equal(processes.share(drawn), expected[rank::2])


def test_cores_are_divided_among_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert processes.own_cores() == 8
    for name, value in (("LOCAL_RANK", "1"), ("WORLD_SIZE", "6"), ("LOCAL_WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    assert processes.own_cores() == 2


# ---------------------------------------------------------------------------------- two against one


@pytest.fixture(scope="module")
def shared_work(tmp_path_factory) -> tuple[dict, dict, dict]:
    """(one process, the first of two, the second of two): what `shared_work.py` ends with."""
    return worked(tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two"))


def worked(alone: Path, both: Path, *words, config: str = "cpu.yaml") -> tuple[dict, dict, dict]:
    """What one process left in `alone`, and two in `both`."""
    script = str(ROOT / "tests" / "shared_work.py")
    one = subprocess.run(
        [sys.executable, script, str(alone), *map(str, words)],
        capture_output=True, text=True, timeout=TIMEOUT, env=environment(),
    )  # fmt: skip
    assert one.returncode == 0, one.stderr
    two = launch(2, script, both, *words, config=config)
    assert two.returncode == 0, two.stderr
    paths = alone / "0.pt", both / "0.pt", both / "1.pt"
    return tuple(torch.load(path, weights_only=False) for path in paths)


FITTED = ("policy", "kinematics", "simulator", "reflector")
LOOPS = ("plain", "branch", "held")


def test_only_several_processes_are_connected(shared_work):
    assert [result["world"] for result in shared_work] == [1, 2, 2]
    assert [result["connected"] for result in shared_work] == [False, True, True]


@pytest.mark.parametrize("part", FITTED)
def test_losses_of_a_fit(shared_work, part):
    """At every step, with the augmentations on: the same random numbers reach the same rows."""
    one, two, _ = (result[part]["losses"] for result in shared_work)
    assert two == pytest.approx(one, rel=1e-4)
    assert len(set(one)) == len(one)  # it really trains


@pytest.mark.parametrize("name", LOOPS)
def test_iterations_of_loop(shared_work, name):
    """Return, success, KL, clip fraction, decisions: over the groups of all processes."""
    one, two, _ = (result[name]["history"] for result in shared_work)
    assert [set(metrics) for metrics in two] == [set(metrics) for metrics in one]
    for before, after in zip(one, two, strict=True):
        assert after == pytest.approx(before, rel=1e-3, abs=1e-4, nan_ok=True)
    assert one[0]["groups_with_spread"] > 0 and one[0]["kl"] > 0


@pytest.mark.parametrize("name", FITTED + LOOPS)
def test_final_weights(shared_work, name):
    one, two, other = (result[name]["weights"] for result in shared_work)
    assert torch.equal(two, other)  # bit by bit on every process
    moved = (one - shared_work[0][name]["first"]).abs()
    assert (moved > 1e-4).float().mean() > 0.5
    assert ((one - two).abs() > 1e-4).float().mean() < 0.01


def test_explored_episodes(shared_work):
    """In the order of their starts, with the same noise, and counted once."""
    one, two, other = (result["episodes"] for result in shared_work)
    assert one["seeds"] == two["seeds"] == other["seeds"] == list(range(7))
    assert one["resets"] == two["resets"] == other["resets"] == 7
    for before, after in zip(one["actions"], two["actions"], strict=True):
        assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("width", ["float32", "bfloat16"])
def test_fsdp_by_configuration(tmp_path, width):
    """launch/fsdp.yaml, here on the processor: a pretrained policy of which each process holds half
    trains as a whole one does, and its checkpoint is whole. In bfloat16, as in the preset paper, a
    part in 2^8 is rounding: where a gradient is no more than that, Adam steps either way, so only
    the losses are compared."""
    folders = [tmp_path / name for name in ("hub", "one", "two")]
    for folder in folders:
        folder.mkdir()
    hub, alone, both = folders
    save_tiny(hub, "llava")
    one, two, other = worked(alone, both, hub, width, config="fsdp.yaml")
    rounding = 1e-4 if width == "float32" else 2**-8
    assert two["losses"] == pytest.approx(one["losses"], rel=rounding)
    assert two["weights held"] + other["weights held"] == one["weights held"]
    assert two["weights held"] < 0.6 * one["weights held"]
    before, after = (load_file(folder / "policy.safetensors") for folder in (alone, both))
    assert before.keys() == after.keys()
    for name, weight in before.items() if width == "float32" else ():
        assert ((weight - after[name]).abs() > 1e-4).float().mean() < 0.05, name


# ---------------------------------------------------------------------------------------- refusals


def test_a_number_of_processes_that_does_not_divide_the_work(tmp_path):
    """One line, once, that names the numbers that do; exit code 2 on all; nothing on the disk."""
    result = launch(3, ROOT / "cli.py", "train", "--preset", "debug", "--out", tmp_path / "run")
    assert result.returncode != 0
    (line,) = error_lines(result)
    for words in ("--num_processes: got 3", "groups 2", "1, 2; start so many"):
        assert words in line
    assert "exitcode: 2" in result.stderr and "Traceback" not in result.stderr.split("error: ")[0]
    assert result.stdout == "" and list(tmp_path.iterdir()) == []


def test_every_preset_says_what_divides_it():
    """Two processes share any; the eight of the documented commands the large ones."""
    for name in ("cpu", "debug", "gpu", "paper"):
        sizes = runs.preset(name).shared
        assert math.gcd(*sizes.values()) % {"gpu": 8, "paper": 8}.get(name, 2) == 0, sizes


@pytest.mark.parametrize("said", ["", "abc", "0", "-1", "1.5"])
def test_a_launcher_that_says_nonsense(monkeypatch, said):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", said)
    with pytest.raises(ValueError, match=f"WORLD_SIZE: got '{said}'; expected.*unset it"):
        processes.launched()


@pytest.mark.parametrize("command", ["imagine", "compare", "demos"])
def test_commands_that_are_not_shared_refuse(monkeypatch, command):
    for name, value in (("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{command}: got 2 processes; expected one"):
        processes.check_command(command)
    processes.check_command("train")
    processes.check_command("evaluate")


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    """A numbered one would be that of all of them."""
    for name, value in (("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--device: got cuda:1, and 2 processes.*--device cuda"):
        terminal.check_device("cuda:1")


def test_a_process_may_have_no_demonstration_to_play(tmp_path, monkeypatch):
    """As the seventh of eight with five a task: it has seen no camera either, and needs none."""
    config = runs.preset("debug")
    given = [random_episode(s, 3, 64, task) for task in config.tasks for s in range(config.demos)]
    for episode in given:
        episode.success[-1] = 1
    monkeypatch.setattr(processes, "world", lambda: 8)
    monkeypatch.setattr(processes, "rank", lambda: 6)
    own: list[list] = []  # of each task

    def gather(part: list) -> list:
        own.append(part)
        return [episode for episode in given if episode.task == config.tasks[len(own) - 1]]

    monkeypatch.setattr(processes, "gather", gather)
    with train.RealWorkers(config) as real:
        done = train.stage_demos(runs.Run(tmp_path, config), real, None)
    assert own == [[], []] and done["ledger"]["demonstrations"] == len(given)
    assert not any(tmp_path.iterdir())  # the main process writes


def test_accelerate_that_started_one_process_of_two(monkeypatch):
    """As `accelerate launch --cpu --num_processes 2` does."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    processes.check_command("train")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="started one process"):
        processes.check_command("train")


# -------------------------------------------------------------------------------- the whole command


def sft_is_done(folder: Path) -> bool:
    stages = folder / "stages.json"
    return stages.is_file() and "sft" in stages.read_text()


def in_the_middle_of_the_simulator(folder: Path) -> bool:
    return any((folder / "resume").glob("*simulator*"))


@pytest.mark.slow
@pytest.mark.parametrize("rank, moment", [(1, sft_is_done), (0, in_the_middle_of_the_simulator)])
def test_a_killed_process_ends_the_run_which_then_resumes(tmp_path, rank, moment):
    """The real command: one of two processes is killed, be it the one that writes, between stages
    or inside one; the other says so in one line; the same command again skips what was finished and
    comes to the end."""
    folder = tmp_path / "run"
    words = [ROOT / "cli.py", "train", "--preset", "debug", "--out", folder]
    first = subprocess.Popen(
        command(2, *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(),
    )  # fmt: skip
    deadline = time.time() + TIMEOUT
    while not moment(folder):
        assert first.poll() is None and time.time() < deadline, first.communicate()
        time.sleep(0.05)
    (chosen,) = (
        child
        for child in psutil.Process(first.pid).children()
        if child.environ().get("RANK") == str(rank)
    )
    os.kill(chosen.pid, signal.SIGKILL)
    output, errors = first.communicate(timeout=120)
    assert first.returncode != 0
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    speaker = "process 1 of 2: " if rank == 0 else ""
    assert lines == [f"error: {speaker}{processes.GONE}"], errors
    done = list(json.loads((folder / "stages.json").read_text()))
    assert "sft" in done and "evaluate" not in done

    again = launch(2, *words)
    assert again.returncode == 0, again.stderr
    shown = again.stdout.splitlines()
    assert [line.split(":")[0] for line in shown if "done already" in line] == done
    assert shown[-1] == f"report: {folder / 'report.html'}" and again.stdout.count("report:") == 1
    config = runs.preset("debug")
    found, _, _ = demos.load(folder / "episodes", config.env, config.tasks)
    assert len(found) == len(config.tasks) * (config.demos + config.exploration)
    ledger = runs.Run.open(folder).ledger()
    assert ledger["exploration_episodes"] == len(config.tasks) * config.exploration
    assert len({p.name for p in folder.rglob("*") if ".tmp" in p.name}) == 0
    evaluated = launch(2, ROOT / "cli.py", "evaluate", folder, "--starts", 1, "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["n"] == len(config.tasks)
    shutil.rmtree(folder)


@pytest.mark.slow
def test_two_processes_train_adapters_of_a_pretrained_model(tmp_path):
    """The real command to its end: LoRA in imitation and in LOOP, and a frozen reader of pictures,
    shared by two processes. SFT's adapters are those of one process; all stages are there."""
    pytest.importorskip("peft", reason="peft is in requirements-gpu.txt")
    (tmp_path / "hub").mkdir()
    save_tiny(tmp_path / "hub", "smolvlm")
    words = [ROOT / "cli.py", "train", "--preset", "debug", "--tasks", "handle-press"]
    words += ["--starts", "2", "--pretrained", tmp_path / "hub", "--out"]
    both = launch(2, *words, tmp_path / "two")
    assert both.returncode == 0, both.stderr
    run = runs.Run.open(tmp_path / "two")
    assert list(run.stages) == list(order.STAGES) and run.reflector().frozen
    alone = subprocess.run(
        [sys.executable, *map(str, words), str(tmp_path / "one"), "--until", "sft"],
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    policies = (runs.Run.open(tmp_path / name).policy("sft") for name in ("one", "two"))
    one, two = (policy.state_dict() for policy in policies)
    adapters = [name for name in one if "lora_" in name]
    assert adapters
    for name in adapters:  # TOLERANCES
        assert ((one[name] - two[name]).abs() > 1e-4).float().mean() < 0.01, name

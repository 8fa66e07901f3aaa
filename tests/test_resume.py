"""Interrupted and resumed: the same bits as if it had not been; one training a folder; Ctrl-C.

What is interrupted in-process is so by an exception before the state of its step is written, which
leaves on the disk what SIGKILL would. The slow test really kills; `kills.py` does so fifty times.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from kills import killed_run, outcome
from kills import train as train_command
from safetensors.torch import save as to_bytes
from shared_work import CAMERA, EPISODES, SIZE, AnySlot, small_policy, weights
from test_ppo import SIZE as WALK_SIZE

import resume
from checkpoints import BadRun, load_part, same_parts, save_part
from dreams import OwnRollouts
from fit import FitConfig, fit
from gauge import Gauge
from kinematics import Kinematics, episode_batches
from policy import imitation_batches
from ppo import LoopConfig, loop
from reflector import Reflector, ReflectorConfig, frame_batches
from resume import Keeper, finishing_steps, only_training, set_training_state, training_state
from runs import Clock, Run, preset
from simulator import Simulator, SimulatorConfig, transition_batches
from tasks import EnvConfig, Start
from vecenv import VecRealEnv
from worldenv import NoReflector, WorldEnv

ROOT = Path(resume.__file__).resolve().parent
FIT = FitConfig(steps=11, batch=6, warmup=3, ema=0.9)


class Killed(Exception):
    """Stands for SIGKILL."""


# ------------------------------------------------------------------------------------ fits and LOOP


def simulator_and_dreams():
    """A simulator that, from step 2 on, also learns from its own dreams; several denoising steps,
    so that these draw noise."""
    torch.manual_seed(0)
    config = SimulatorConfig(size=SIZE, channels=(32, 32, 32), album=8, sampling_steps=2)
    simulator = Simulator(config, CAMERA)
    world = WorldEnv(simulator, NoReflector(), {}, 2, EnvConfig(size=SIZE), 0)
    own = OwnRollouts(world, EPISODES, after=2, every=3)
    return simulator, transition_batches(EPISODES, 6, 0, own), {"own_rollouts": own}


def part_of(name: str):
    """(a part as a stage begins with it, its batches, what else its keeper keeps)."""
    torch.manual_seed(0)
    if name == "simulator":
        return simulator_and_dreams()
    if name == "policy":
        return small_policy(), imitation_batches(EPISODES, 6, 0), {}
    if name == "kinematics":
        return Kinematics(4), episode_batches(EPISODES, 6, 0), {}
    reflector = Reflector(ReflectorConfig(size=SIZE, width=32))
    return reflector, frame_batches(EPISODES, 6, 0), {}


def fitted(name: str, folder: Path, every: int = 4, killed_at: int | None = None):
    """One try at a fit: ({step: loss} of this try, the part, what `fit` returned)."""
    part, sample, also = part_of(name)
    if name == "simulator":
        part.album.fill(EPISODES)
    keeper, losses = Keeper(folder, name, every, also), {}
    torch.manual_seed(1)

    def on_step(step: int, loss: float, metrics: dict) -> None:
        losses[step] = loss
        if step == killed_at:
            raise Killed

    try:
        return losses, part, fit(part, sample, FIT, on_step, keeper)
    except Killed:
        return losses, part, None


@pytest.mark.parametrize("name", ["policy", "kinematics", "simulator", "reflector"])
def test_a_fit_that_is_killed_three_times(name, tmp_path):
    """Killed at steps 2, 6 and 9 with a state every four: goes on from 0, 4 and 8, and losses,
    means and weights are those of a fit in peace, to the bit."""
    expected, part, result = fitted(name, tmp_path / "peace")
    seen = {}
    for step, first in ((2, 0), (6, 0), (9, 4)):
        losses, _, _ = fitted(name, tmp_path / "killed", killed_at=step)
        assert min(losses) == first
        seen |= losses
    losses, again, found = fitted(name, tmp_path / "killed")
    assert min(losses) == 8
    assert seen | losses == expected and len(set(expected.values())) == FIT.steps
    assert {**found, "seconds": 0} == {**result, "seconds": 0}
    assert torch.equal(weights(again), weights(part))
    losses, again, found = fitted(name, tmp_path / "killed")  # the stage died after its fit
    assert losses == {} and torch.equal(weights(again), weights(part))
    assert {**found, "seconds": 0} == {**result, "seconds": 0}


def test_dreams_are_kept_with_the_simulator(tmp_path):
    """The pool and the count of imagined frames: as in a fit in peace."""
    pools = {}
    for folder, steps in ((tmp_path / "peace", [None]), (tmp_path / "killed", [6, None])):
        for step in steps:
            simulator, sample, also = simulator_and_dreams()
            simulator.album.fill(EPISODES)
            keeper = Keeper(folder, "simulator", 4, also)
            torch.manual_seed(1)

            def kill(now: int, loss: float, metrics: dict, step=step) -> None:
                if now == step:
                    raise Killed

            try:
                fit(simulator, sample, FIT, kill, keeper)
            except Killed:
                continue
            pools[folder] = also["own_rollouts"].state()
    peace, killed = pools.values()
    assert killed["picks"] == peace["picks"] and len(peace["picks"]) == 6
    assert killed["imagined_frames"] == peace["imagined_frames"] > 0
    assert all(torch.equal(killed[f"image{i}"], peace[f"image{i}"]) for i in range(6))
    assert all(torch.equal(killed[f"state{i}"], peace[f"state{i}"]) for i in range(6))


@pytest.mark.parametrize("branch", [0, 2])
def test_a_loop_that_is_killed_twice(branch, tmp_path):
    """LOOP that really learns, with Adam's moments: history and weights to the bit."""
    config = LoopConfig(
        iterations=4, groups=4, rollouts=4, branch=branch, noise=4.0, epochs=2, minibatch=7,
        decisions=40, learning_rate=1e-3,
    )  # fmt: skip
    draw = lambda iteration, groups: [Start("reach", 10 * iteration + g) for g in range(groups)]  # noqa: E731

    def tried(folder: Path, killed_at: int | None = None):
        policy, begun = small_policy(WALK_SIZE, chunk=2), []

        def on_iteration(iteration: int, metrics: dict) -> None:
            begun.append(iteration)
            if iteration == killed_at:
                raise Killed

        try:
            history = loop(
                AnySlot(16, horizon=6), policy, draw, config, 3, on_iteration,
                Keeper(folder, "rl", 1),
            )  # fmt: skip
        except Killed:
            history = None
        return history, weights(policy), begun

    expected, final, _ = tried(tmp_path / "peace")
    assert expected[0]["groups_with_spread"] > 0 and len(expected) == 4
    assert tried(tmp_path / "killed", killed_at=1)[2] == [0, 1]
    assert tried(tmp_path / "killed", killed_at=3)[2] == [1, 2, 3]
    history, again, begun = tried(tmp_path / "killed")
    assert begun == [3] and torch.equal(again, final)
    np.testing.assert_equal(history, expected)  # nan equals nan


def test_a_loop_that_had_ended_does_not_go_on(tmp_path):
    """The gauge ended it after its second iteration; killed after that, it stays ended."""
    config = LoopConfig(iterations=4, groups=2, rollouts=4, branch=2)
    draw = lambda iteration, groups: [Start("reach", g) for g in range(groups)]  # noqa: E731
    lengths = []
    for _ in range(2):
        policy, keeper = small_policy(WALK_SIZE, chunk=2), Keeper(tmp_path, "rl", 1)
        end = lambda iteration, metrics: iteration == 1  # noqa: E731
        lengths.append(len(loop(AnySlot(8, horizon=4), policy, draw, config, 3, end, keeper)))
    assert lengths == [2, 2]


def test_what_the_gauge_remembers(tmp_path):
    """Probes, count, weights and films come back from a file as they were."""
    gauge, policy = Gauge(None, None, None, [], EnvConfig(), 2, None), torch.nn.Linear(2, 1)
    gauge.probes = [{"iteration": 0, "real": [0, 1], "imagined": [1, 1], "novel": [0.1, 1 / 3]}]
    gauge.imagined_frames, gauge._weights = 7, dict(policy.state_dict())
    gauge.films = {"lie": ("reach, start 3", np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3))}
    Keeper(tmp_path, "rl", 1, {"gauge": gauge}).write(1, {})
    again, other = Gauge(None, None, None, [], EnvConfig(), 2, None), torch.nn.Linear(2, 1)
    Keeper(tmp_path, "rl", 1, {"gauge": again}).restore()
    assert again.probes == gauge.probes and again.imagined_frames == 7
    assert again.films["lie"][0] == "reach, start 3"
    assert (again.films["lie"][1] == gauge.films["lie"][1]).all()
    assert again.restore(other) == 0 and torch.equal(weights(other), weights(policy))


# -------------------------------------------------------------------------------------------- files


def damage(path: Path) -> None:
    """One bit in the middle of the tensors."""
    data = bytearray(path.read_bytes())
    data[-len(data) // 3] ^= 1
    path.write_bytes(data)


def test_the_last_two_states_and_a_damaged_one(tmp_path, capsys):
    """A damaged newest state: the one before it, and a line that says so; none left: anew."""
    fitted("policy", tmp_path)
    assert [path.name for path in Keeper(tmp_path, "policy", 4)._files()] == [
        "policy-8.safetensors", "policy-11.safetensors",
    ]  # fmt: skip
    capsys.readouterr()
    damage(tmp_path / "policy-11.safetensors")
    assert Keeper(tmp_path, "policy", 4).steps == 8
    said = capsys.readouterr().err.splitlines()
    assert "policy-11.safetensors: damaged (its checksum is another)" in said[0]
    assert said[1] == "policy goes on after step 8"
    (tmp_path / "policy-8.safetensors").write_bytes(b"half of a fi")
    anew = Keeper(tmp_path, "policy", 4)
    assert anew.steps == 0
    anew.write(4, {})  # takes the place of what was passed over
    assert [path.name for path in anew._files()] == ["policy-4.safetensors"]
    (tmp_path / "policy-4.safetensors").unlink()
    assert Keeper(tmp_path, "pol", 4).steps == 0  # that of another
    (tmp_path / "rl-1.safetensors").write_bytes(b"of another stage")
    resume.forget(tmp_path, lambda name: name == "policy")
    assert [path.name for path in tmp_path.iterdir()] == ["rl-1.safetensors"]
    resume.forget(tmp_path, lambda name: name == "rl")
    assert not tmp_path.exists()


@pytest.mark.parametrize(
    "text",
    ["null", "[]", "{}", "5", "[" * 100_000, '{"own": 1}', '{"own": {}}', '{"own": {"steps": "x"}}',
     '{"own": {"steps": Infinity}}'],
)  # fmt: skip
@pytest.mark.parametrize("checked", [True, False])
def test_a_state_that_is_none(text, checked, tmp_path, capsys):
    """Whether its checksum is right or it has none: the one before it."""
    fitted("policy", tmp_path)
    path = tmp_path / "policy-11.safetensors"
    tensors = {"own/random": torch.get_rng_state()} if "own" in text else {}
    about = {"description": text}
    about |= {"sha256": resume.checksum(text, tensors)} if checked else {}
    path.write_bytes(to_bytes(tensors, metadata=about))
    capsys.readouterr()
    assert Keeper(tmp_path, "policy", 4).steps == 8
    assert "policy-11.safetensors: damaged (" in capsys.readouterr().err


def test_a_state_without_its_checksum(tmp_path):
    """Nobody knows whether it is whole."""
    fitted("policy", tmp_path)
    path = tmp_path / "policy-11.safetensors"
    tensors, text = resume.read_tensors(path)
    path.write_bytes(to_bytes(tensors, metadata={"description": text}))
    assert resume.read_tensors(path)[1] == text  # as a checkpoint of an earlier version is read
    assert Keeper(tmp_path, "policy", 4).steps == 8


def test_a_state_of_another_version_is_passed_over(tmp_path, capsys):
    """Its checksum is right, and something that goes on with the part is missing."""
    keeper = Keeper(tmp_path, "policy", 4)
    keeper.write(4, {"x": 1})
    again = Keeper(tmp_path, "policy", 4, {"clock": Clock()})
    assert again.steps == 0 and "without clock" in capsys.readouterr().err
    assert Keeper(tmp_path, "policy", 4).steps == 4


def test_a_checkpoint_with_one_wrong_bit(tmp_path):
    part, path = torch.nn.Linear(30, 30), tmp_path / "part.safetensors"
    save_part(path, part, {"width": 30})
    load_part(path, part, {"width": 30})
    damage(path)
    with pytest.raises(BadRun, match="damaged or truncated .its checksum is another.; delete it"):
        load_part(path, part, {"width": 30})


def test_a_checkpoint_with_numbers_that_are_not_finite(tmp_path):
    part, path = torch.nn.Linear(3, 3), tmp_path / "part.safetensors"
    part.bias.data[1] = float("nan")
    save_part(path, part, {"width": 3})
    with pytest.raises(BadRun, match="part.safetensors: bias has numbers that are not finite"):
        load_part(path, torch.nn.Linear(3, 3), {"width": 3})


def test_equal_parts_are_told_by_their_weights(tmp_path):
    """Not by their files, in which a header's words come in any order."""
    part = torch.nn.Linear(3, 3)
    paths = [tmp_path / "checkpoints" / f"{i}.safetensors" for i in range(20)]
    for path in paths:
        save_part(path, part, {"width": 3})
    assert len({path.read_bytes() for path in paths}) > 1
    assert all(same_parts(paths[0], path) for path in paths)
    with torch.no_grad():
        part.bias[0] += 1e-3
    save_part(paths[1], part, {"width": 3})
    assert not same_parts(paths[0], paths[1])
    with pytest.raises(BadRun, match="no such checkpoint"):
        same_parts(paths[0], tmp_path / "missing.safetensors")


def test_metrics_are_set_back(tmp_path):
    """Lines of a stage that was killed go, those of a resumed state come back, none is doubled."""
    run = Run.create(tmp_path / "run", preset("debug"))
    path = run.folder / "metrics.jsonl"
    run.log(stage="sft", step=0, loss=1.0)
    run.finish_stage("sft", 1.0, 1.0, {"line": "made by the test"})
    run.log(stage="rl", round=1, iteration=0)
    run.log(stage="gauge", round=1, iteration=1)
    run.keeper("rl", 1).write(1, {})
    kept = path.read_text()
    run.log(stage="rl", round=1, iteration=1)
    path.write_bytes(path.read_bytes() + b'{"stage": "sft", "x": "\xff"}\n{"time": 1, "sta')
    half = run.folder / "resume" / ".rl-2.safetensors.123.tmp"  # the disk was written to
    half.write_bytes(b"half of a file")
    run = Run.create(tmp_path / "run", preset("debug"))
    run.forget_unfinished()
    assert [json.loads(line)["stage"] for line in path.read_text().splitlines()] == ["sft"]
    assert not half.exists()
    time.sleep(0.1)
    keeper = run.keeper("rl", 1)
    keeper.restore()
    assert path.read_text() == kept
    run.log(stage="filtered_bc", step=0, loss=1.0)  # by a second process, and put to the others
    keeper = run.keeper("rl", 1)
    keeper.restore()
    stages = [json.loads(line)["stage"] for line in path.read_text().splitlines()]
    assert stages == ["sft", "filtered_bc", "rl", "gauge"]
    assert run.clock.state()["seconds"] > 0.1 + run.clock.before["seconds"] > 0.1
    run.finish_stage("rl", 1.0, 1.0, {"line": "made by the test"})
    assert not (run.folder / "resume").exists()


# ------------------------------------------------------------------------ one a folder, and signals


def test_two_trainings_in_one_folder(tmp_path):
    """The second is refused in one line, and harms nothing; one that was killed is no hindrance."""
    run = Run.create(tmp_path / "run", preset("debug"))
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time, resume, pathlib\n"
         "with resume.only_training(pathlib.Path(sys.argv[1])):\n"
         "    print('held', flush=True); time.sleep(600)", str(run.folder)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        refused = pytest.raises(ValueError, match="another training is at work there")
        with refused, only_training(run.folder):
            pass
        words = [sys.executable, "cli.py", "train", "--preset", "debug", "--out", str(run.folder)]
        second = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert second.returncode == 2 and second.stdout == ""
        assert second.stderr.count("\n") == 1 and "choose another --out" in second.stderr
        assert [path.name for path in run.folder.iterdir()] == ["config.json"]
    finally:
        holder.kill()
        holder.wait()
    with only_training(run.folder):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end(number, tmp_path, capfd):
    """The state after the step is written, then comes the interruption; what follows is the same to
    the bit, and the handlers of before are back."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    _, part, _ = fitted("policy", tmp_path / "peace")
    policy, sample, _ = part_of("policy")
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt), finishing_steps():
        fit(policy, sample, FIT, lambda step, *_: step == 5 and os.kill(os.getpid(), number),
            Keeper(tmp_path / "run", "policy", 100))  # fmt: skip
    assert "ending after this step; once more ends at once" in capfd.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    losses, again, _ = fitted("policy", tmp_path / "run", every=100)
    assert min(losses) == 6 and torch.equal(weights(again), weights(part))


def test_a_second_signal_ends_at_once(tmp_path):
    policy, sample, _ = part_of("policy")

    def twice(step: int, *_) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt), finishing_steps():
        fit(policy, sample, FIT, twice, Keeper(tmp_path, "policy", 100))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_ignore_endings_while_they_start(number):
    """Ctrl-C reaches every process of a terminal, and `timeout` sends SIGTERM to a whole group."""
    env = VecRealEnv(1, preset("debug").env, workers=1)
    try:
        for _ in range(20):
            os.kill(env._processes[0].pid, number)
            time.sleep(0.05)
        env.reset(options={"starts": [Start("reach", 0)]})
    finally:
        env.close()


# -------------------------------------------------------------------------------- the whole command


@pytest.mark.slow
def test_ctrl_c_and_killed_at_random(tmp_path):
    """A debug run that is interrupted once by Ctrl-C and killed four times leaves what one in peace
    leaves; so the same seed gives the same run, too."""
    train_command(tmp_path / "peace")
    folder = tmp_path / "run"
    words = [sys.executable, "cli.py", "train", "--preset", "debug", "--out", str(folder)]
    first = subprocess.Popen(
        words, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not list(folder.glob("resume/sft-*.safetensors")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does: workers get it as well
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 130
    assert errors.splitlines()[-1] == "interrupted; run the same command again to resume"
    assert "Traceback" not in errors
    killed_run(folder, np.random.default_rng(0), 15.0, 4)
    assert outcome(folder) == outcome(tmp_path / "peace")


def test_a_state_of_other_code_is_refused_in_a_line():
    """A part that has another weight than the one whose state was written."""
    written, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 4)
    state = training_state(written, torch.optim.AdamW(written.parameters()))
    with pytest.raises(ValueError, match="not of this Linear .*; expected .*; go back") as raised:
        set_training_state(state, other, torch.optim.AdamW(other.parameters()))
    assert "\n" not in str(raised.value)


def test_a_folder_that_two_begin_at_once_belongs_to_one(tmp_path, monkeypatch):
    """The lock of the first is on a file that the second has put its own in the place of."""
    run = Run.create(tmp_path / "run", preset("debug"))
    path = run.folder / "config.json"
    lock = resume.fcntl.flock

    def replaced_meanwhile(file, how):
        lock(file, how)
        other = path.with_name("other")
        other.write_bytes(path.read_bytes())
        other.replace(path)

    monkeypatch.setattr(resume.fcntl, "flock", replaced_meanwhile)
    refused = pytest.raises(ValueError, match="another training is at work there")
    with refused, only_training(run.folder):
        raise AssertionError("both would train")

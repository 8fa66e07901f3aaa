"""LIBERO's recorded demonstrations: read, and, where LIBERO is installed, played anew."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_cli import assert_one_line, in_process
from test_libero import DRAWER, MILK, ROOM, needs_libero
from trees import tree

import demos
import libero_env
import replay
from demos import BadEpisodes
from libero_tasks import LIBERO_INSTRUCTIONS, own_name
from replay import places_of, read, tasks_of, without_pauses
from runs import RunConfig, with_tasks
from tasks import split_seeds

h5py = pytest.importorskip("h5py", reason="needs requirements-data.txt")

MODEL = '<mujoco><body name="a" pos="1 2 3"><body name="b" quat="0 1 0 0"/></body></mujoco>'


def write(path: Path, states=None, actions=None, xml: str | None = MODEL, numbers=(0,)) -> Path:
    """A file in LIBERO's layout, as far as a replay needs it."""
    actions = np.full((5, 7), 0.5) if actions is None else actions
    states = np.zeros((len(actions), 12)) if states is None else states
    with h5py.File(path, "w") as file:
        for number in numbers:
            demo = file.create_group(f"data/demo_{number}")
            demo["states"], demo["actions"] = states, actions
            if xml is not None:
                demo.attrs["model_file"] = xml
    return path


# ------------------------------------------------------------------------------------------ reading


def test_a_files_name_is_its_task(tmp_path):
    """All forty names are different, and each is found again."""
    assert len({own_name(task) for task in LIBERO_INSTRUCTIONS}) == 40
    for task in (MILK, ROOM):
        write(tmp_path / f"{own_name(task)}_demo.hdf5")
    assert set(tasks_of(tmp_path)) == {MILK, ROOM}
    one = tmp_path / f"{own_name(MILK)}_demo.hdf5"
    assert tasks_of(one) == {MILK: one}


def test_what_is_read(tmp_path):
    """The first state, all actions, where bodies stood; demo_2 before demo_10."""
    states, actions = np.arange(60.0).reshape(5, 12), np.linspace(-1, 1, 35).reshape(5, 7)
    path = write(tmp_path / "x.hdf5", states, actions, numbers=(10, 2))
    two, ten = read(path, MILK)
    assert (two.number, ten.number, two.task) == (2, 10, MILK)
    assert (two.state == states[0]).all() and (ten.action == actions).all()
    assert two.places["a"].tolist() == [1, 2, 3, 1, 0, 0, 0]
    assert two.places["b"].tolist() == [0, 0, 0, 0, 1, 0, 0]
    assert places_of('<a><body name="c" euler="0 0 1"/></a>', "") == {} == places_of("", "")


def test_pauses_are_left_out():
    """Steps that neither move nor grip; not the first, not one in which the gripper turns."""
    action = np.zeros((6, 7))
    action[:, 6] = [-1, -1, 1, 1, 1, 1]
    action[4, 2] = 0.3
    assert without_pauses(action)[:, 6].tolist() == [-1, 1, 1]
    assert without_pauses(action)[2, 2] == 0.3


SPOILED = {
    "no such file": (lambda p: p.unlink(), "no HDF5 file there"),
    "another name": (
        lambda p: p.rename(p.with_name("stack_demo.hdf5")),
        "no task of LIBERO's four",
    ),
    "no HDF5": (lambda p: p.write_bytes(b"x" * 99), "not an HDF5 file"),
    "no demonstration": (lambda p: write(p, numbers=()), "no data in it"),
    "short": (lambda p: write(p, actions=np.zeros((1, 7))), "M of 2 or more"),
    "other actions": (lambda p: write(p, actions=np.zeros((5, 4))), "actions [5, 4]"),
    "lengths": (lambda p: write(p, states=np.zeros((4, 12))), "states [4, 12]"),
    "NaN": (lambda p: write(p, actions=np.full((5, 7), np.nan)), "NaN or infinite"),
    "no XML": (lambda p: write(p, xml="<body"), "model_file is not readable"),
    "no numbers": (lambda p: write(p, xml='<body pos="x"/>'), "model_file is not readable"),
    "two numbers": (lambda p: write(p, xml='<body pos="1 2"/>'), "model_file is not readable"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_files_cost_one_line(tmp_path, name):
    """And say which file, and what was wrong."""
    path = write(tmp_path / f"{own_name(MILK)}_demo.hdf5")
    spoil, told = SPOILED[name]
    spoil(path)
    with pytest.raises(BadEpisodes) as error:
        for task, file in tasks_of(tmp_path).items():
            list(read(file, task))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_the_command_needs_libero(tmp_path, monkeypatch):
    """One line, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(libero_env.importlib.util, "find_spec", lambda name: None)
    path = write(tmp_path / f"{own_name(MILK)}_demo.hdf5")
    before = tree(tmp_path)
    result = in_process("demos", "replay", path, "--out", "new")
    assert_one_line(result, "requirements-libero.txt")
    assert tree(tmp_path) == before


# --------------------------------------------------------------------------- played anew, in LIBERO


def recorded(task: str, folder: Path) -> tuple[Path, np.ndarray]:
    """A file with one recording: the expert's, from a start of the development split, with pauses;
    and where the bodies of the model stood."""
    env = libero_env.LiberoEnv(task)
    env.reset(seed=split_seeds("dev", 1)[0])
    state, xml = env._sim.get_state().flatten(), env._sim.model.get_xml()
    stood = env._model.body_pos.copy()
    chunks, solved = [], False
    while not solved:
        chunk, _, _, solved, _, info = env.expert_step()
        chunks.append(chunk[: info["steps"]])
    actions = np.concatenate(chunks)
    actions = np.insert(actions, 20, np.append(np.zeros(6), actions[19, 6]), axis=0)
    states = np.repeat(state[None], len(actions), axis=0)
    return write(folder / f"{own_name(task)}_demo.hdf5", states, actions, xml), stood


@needs_libero
@pytest.mark.slow
def test_furniture_stands_where_it_stood(tmp_path):
    """It is drawn anew at each start: without the file's model it stands elsewhere."""
    path, stood = recorded(DRAWER, tmp_path)
    env = libero_env.LiberoEnv(DRAWER)
    (one,) = read(path, DRAWER)
    free = env._model.body_dofnum == 6  # what flies says where it is in the state
    env.reset_to(one.state, one.places)
    assert np.abs(env._model.body_pos - stood)[~free].max() < 1e-4
    env.reset_to(one.state, {})
    assert np.abs(env._model.body_pos - stood)[~free].max() > 1e-3
    with pytest.raises(ValueError, match="a state of 3 numbers; expected"):
        env.reset_to(np.zeros(3), {})


@needs_libero
@pytest.mark.slow
def test_recordings_of_two_rooms_become_a_run(tmp_path, monkeypatch):
    """`demos replay`, then `train --from`: imitation of what people did, in the common frame."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    for task in (DRAWER, ROOM):
        recorded(task, tmp_path / "files")
    result = in_process("demos", "replay", "files", "--out", "again")
    assert result.exit_code == 0, result.output
    for task in (DRAWER, ROOM):
        assert f"{task}: 1 of 1 recordings succeed again" in result.output
    episodes, config, camera = demos.load(tmp_path / "again")
    assert config.robot.frame == "table" and config.chunk == 8
    assert {(e.task, e.seed, e.source) for e in episodes} == {
        (DRAWER, 0, "expert"), (ROOM, 0, "expert")
    }  # fmt: skip
    room = next(e for e in episodes if e.task == ROOM)
    assert (
        np.abs(room.state[0, :3] - [0.03, 0, 1.25]).max() < 0.05
    )  # at its camera, not in its room
    words = ["--preset", "debug", "--tasks", f"{DRAWER},{ROOM}", "--demos", "1", "--until", "sft"]
    result = in_process("train", *words, "--from", "again", "--out", "run")
    assert result.exit_code == 0, result.output
    ours, _, seen = demos.load(tmp_path / "run" / "episodes")
    assert seen == camera and all(
        (a.image == b.image).all() and (a.action == b.action).all()
        for a, b in zip(ours, sorted(episodes, key=lambda e: e.task != DRAWER), strict=True)
    )


@needs_libero
@pytest.mark.slow
def test_what_does_not_succeed_again_is_left_out(tmp_path, monkeypatch):
    """Half of the way, or a recording longer than the benchmark allows."""
    path, _ = recorded(MILK, tmp_path)
    env = libero_env.LiberoEnv(MILK, with_tasks(RunConfig(), (MILK,)).env, stop_on_success=False)
    (one,) = read(path, MILK)
    assert replay.played(one, env) is not None
    half = replace(one, action=one.action[: len(one.action) // 2])
    assert replay.played(half, env) is None
    long = replace(one, action=np.tile(one.action, (9, 1)))
    assert replay.played(long, env) is None

"""Every reader against damaged and hostile input (fuzzing.py): a few cases here, 1000 for each in
the slow test; `python tests/fuzz_count.py` counts them into results/fuzz.json.

Behind them stand single cases that were found, or that chance would hardly find.
"""

import json
import multiprocessing
import os
import shutil
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer

pytest.importorskip("hypothesis", reason="needs hypothesis (requirements.txt)")

import fuzzing  # noqa: E402 (needs hypothesis)
from fuzzing import READERS, fuzz, missing  # noqa: E402

import cli  # noqa: E402
import formats  # noqa: E402
import recordings  # noqa: E402
import runs  # noqa: E402
from checkpoints import BadRun, from_values, save_part  # noqa: E402
from demos import BadEpisodes, parse_json  # noqa: E402
from policy import PolicyConfig  # noqa: E402
from pretrained import BadCheckpoint, weight_files  # noqa: E402
from runs import Run, RunConfig  # noqa: E402

FEW, MANY = 20, 1000


def run_cases(name: str, cases: int, folder: Path) -> None:
    if missing(name):
        pytest.skip(missing(name))
    counts = fuzz(name, cases, 0, folder)
    assert counts["read"] + counts["refused"] >= cases
    assert counts["refused"] > 0  # what is drawn does do harm


@pytest.mark.parametrize("name", READERS)
def test_a_few_spoiled_inputs(name, tmp_path):
    run_cases(name, FEW, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_spoiled_inputs(name, tmp_path):
    run_cases(name, MANY, tmp_path)


# ------------------------------------------------------------------------------------- single cases


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, b"\xff\xfe\xff", "9" * 5000, ""]
)
def test_json_that_python_gives_up_on(text):
    """Nested without end, of other bytes, with a number without end: ValueError, nothing else."""
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize(
    "name, value",
    [
        ("demos", "5"), ("demos", 5.0), ("seed", True), ("demos", None), ("tasks", "reach"),
        ("tasks", [1, 2]), ("exploration_noise", float("nan")), ("exploration_noise", 10**400),
        ("loop", {"iterations": "four"}), ("loop", [1]), ("policy", {"robot": {"low": [None] * 3}}),
        ("env", {"robot": {"low": "abc"}}), ("nonsense", 1), ("x" * 10_000, 1),
    ],
)  # fmt: skip
def test_settings_of_another_type(name, value):
    """Told when config.json is read, and not by a traceback in the middle of a stage."""
    with pytest.raises(ValueError) as caught:
        from_values(RunConfig, {name: value})
    assert len(str(caught.value)) < 300


def test_whole_numbers_may_stand_for_others():
    assert from_values(RunConfig, {"exploration_noise": 2}).exploration_noise == 2


def test_spoiled_settings_are_refused_before_anything_is_built(tmp_path, monkeypatch):
    """A width of 10^9 would ask for more memory than there is."""
    fuzzing.make_run(tmp_path / "run")
    config = Run.open(tmp_path / "run").config
    spoiled = replace(config, policy=replace(config.policy, width=10**9))
    (tmp_path / "run" / "config.json").write_text(runs.config_to_json(spoiled))
    monkeypatch.setattr(runs, "Policy", lambda config: pytest.fail("it was built"))
    with pytest.raises(BadRun, match="width: saved 8, expected 1000000000"):
        Run.open(tmp_path / "run").policy("sft")


@pytest.mark.parametrize(
    "stages",
    [
        [], {"sft": None}, {"sft": {}}, {"sft": {"seconds": "1", "peak_gib": 1, "ledger": {}}},
        {"sft": {"seconds": 1, "peak_gib": 1, "ledger": {"demonstrations": None}}},
        {"calibrate": {"seconds": 1, "peak_gib": 1, "ledger": {}, "etas": {"reach-wall": "high"}}},
        {"calibrate": {"seconds": 1, "peak_gib": 1, "ledger": {}, "etas": {"no such task": 0.5}}},
    ],
)  # fmt: skip
def test_stages_that_are_none(tmp_path, stages):
    fuzzing.make_run(tmp_path / "run")
    (tmp_path / "run" / "stages.json").write_text(json.dumps(stages))
    with pytest.raises(BadRun, match="stages.json: not readable.*delete it"):
        Run.open(tmp_path / "run")


@pytest.mark.parametrize("named", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_weights_outside_a_checkpoint(tmp_path, named):
    """The index of a pretrained model names files of its own folder, or nothing is read."""
    folder = tmp_path / "hub"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    index = {"weight_map": {"x": named}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadCheckpoint, match="expected files of this folder"):
        weight_files(folder)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": ["x"]}, {"weight_map": None}])
def test_index_that_is_none(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadCheckpoint):
        weight_files(tmp_path)


def test_no_checkpoint_is_called_damaged_because_it_may_not_be_read(tmp_path, monkeypatch):
    """Whoever lacks the permission, or memory, must not be told to delete it."""
    import safetensors

    part = fuzzing.tiny_policy()
    description = {"size": 1}
    save_part(tmp_path / "policy.safetensors", part, description)

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(arguments[0]))

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    with pytest.raises(PermissionError):
        from checkpoints import read_settings

        read_settings(tmp_path / "policy.safetensors")


def test_default_settings_are_read_back():
    """No default has a type that `from_values` would refuse."""
    for name in ("cpu", "debug", "notebook", "gpu", "paper", "libero"):
        config = runs.preset(name)
        assert runs.config_from_json(runs.config_to_json(config)) == config
    assert PolicyConfig() == from_values(PolicyConfig, {})


# --- data sets of others -------------------------------------------------------------------------

foreign = pytest.mark.skipif(
    bool(missing("hdf5") or missing("lerobot")), reason="needs requirements-data.txt"
)


@foreign
@pytest.mark.parametrize("shape", fuzzing.HUGE)
@pytest.mark.parametrize("member", ["actions", "obs/agentview_rgb", "obs/ee_pos"])
def test_few_bytes_that_stand_for_terabytes(tmp_path, member, shape):
    """HDF5 stores no chunk that was never written: a file of some kB claims any size."""
    import h5py

    fuzzing.make_hdf5(tmp_path)
    path = tmp_path / "turn_on_the_stove_demo.hdf5"
    with h5py.File(path, "a") as file:
        del file[f"data/demo_0/{member}"]
        file["data/demo_0"].create_dataset(member, shape, "u1", chunks=True)
    assert path.stat().st_size < 100_000
    with pytest.raises(BadEpisodes, match="claims|expected uint8"):
        formats.read(path, size=16)


@foreign
def test_many_demonstrations_that_stand_for_too_much(tmp_path, monkeypatch):
    """Each within bounds, together beyond all of them. (The bound is lowered: what is within it is
    read, and half a GiB takes a minute.)"""
    import h5py

    fuzzing.make_hdf5(tmp_path)
    path = tmp_path / "turn_on_the_stove_demo.hdf5"
    with h5py.File(path, "a") as file:
        for number in range(2, 12):
            file.copy("data/demo_0", f"data/demo_{number}")
            demo = file[f"data/demo_{number}"]
            del demo["obs/agentview_rgb"]
            shape = (fuzzing.STEPS, 1000, 1000, 3)
            demo.create_dataset("obs/agentview_rgb", shape, "u1", chunks=(1, 500, 500, 3))
        del file["data/demo_0"], file["data/demo_1"]  # of another size, which is told first
    monkeypatch.setattr(recordings, "MOST_PICTURES", 2**25)
    with pytest.raises(BadEpisodes, match="claims"):
        formats.read(path, size=16)


@foreign
def test_equal_rows_that_stand_for_gigabytes(tmp_path):
    """Parquet stores equal rows once."""
    import pyarrow as arrow
    import pyarrow.parquet as arrow_parquet

    fuzzing.make_lerobot(tmp_path)
    path = tmp_path / "theirs" / "meta" / "tasks.parquet"
    count = 20_000
    words = arrow.DictionaryArray.from_arrays(np.zeros(count, np.int32), ["x" * 100_000])
    table = arrow.table({"task_index": np.zeros(count, np.int64), "task": words})
    arrow_parquet.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 2**20
    with pytest.raises(BadEpisodes, match="unfolds to far more"):
        formats.read(tmp_path / "theirs", size=16)


@foreign
def test_one_cell_that_unfolds_is_refused_before_it_does(tmp_path, monkeypatch):
    """The footer says how large a column is; a page is unfolded whole, whatever is asked of it."""
    import pyarrow as arrow
    import pyarrow.parquet as arrow_parquet

    fuzzing.make_lerobot(tmp_path)
    path = tmp_path / "theirs" / "meta" / "tasks.parquet"
    table = arrow.table({"task_index": [0], "task": ["x" * 10**6]})
    arrow_parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    monkeypatch.setattr(formats, "MOST_BYTES", 10**5)
    monkeypatch.setattr(arrow_parquet.ParquetFile, "iter_batches", None)  # would fail if used
    with pytest.raises(BadEpisodes, match="says that it unfolds to far more"):
        formats.read(tmp_path / "theirs", size=16)


@foreign
def test_a_list_of_equal_numbers_is_refused_before_it_unfolds(tmp_path, monkeypatch):
    """One row, and a few bytes for any number of equal values."""
    import pyarrow as arrow
    import pyarrow.parquet as arrow_parquet

    path = tmp_path / "long.parquet"
    arrow_parquet.write_table(arrow.table({"state": [[0.5] * 10**6]}), path, compression="zstd")
    assert path.stat().st_size < 10**5
    monkeypatch.setattr(formats, "MOST_BYTES", 5 * 10**5)
    with pytest.raises(BadEpisodes, match="says that it unfolds to far more"):
        formats.parquet(path, ["state"])


def _read_with_every_byte_changed(path: Path) -> None:
    """A process's work: a parquet file's footer, each of its bytes changed one after another."""
    healthy = path.read_bytes()
    length = int.from_bytes(healthy[-8:-4], "little")
    for place in range(len(healthy) - 8 - length, len(healthy)):
        for change in (0x01, 0x80, 0xFF):
            spoiled = bytearray(healthy)
            spoiled[place] ^= change
            path.write_bytes(spoiled)
            with suppress(BadEpisodes, MemoryError):
                formats.parquet(path, ["task"])


@foreign
def test_a_footer_with_any_byte_changed_ends_no_process(tmp_path):
    """Some libraries abort where they should raise: nobody would be told anything."""
    import pyarrow as arrow
    import pyarrow.parquet as arrow_parquet

    path = tmp_path / "tasks.parquet"
    arrow_parquet.write_table(arrow.table({"task": ["reach"]}), path, store_schema=False)
    child = multiprocessing.get_context("spawn").Process(
        target=_read_with_every_byte_changed, args=(path,)
    )
    child.start()
    child.join()
    assert child.exitcode == 0


@foreign
@pytest.mark.parametrize(
    "template",
    ["../../etc/passwd", "/etc/passwd", "data/../../x", "{chunk_index.__class__}", "a\\b", "c:x"],
)
@pytest.mark.parametrize("kind", ["data_path", "video_path"])
def test_paths_outside_a_data_set(tmp_path, kind, template):
    fuzzing.make_lerobot(tmp_path)
    folder = tmp_path / ("films" if kind == "video_path" else "theirs")
    path = folder / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {kind: template}))
    with pytest.raises(BadEpisodes, match="expected one inside the folder"):
        formats.read(folder, size=16)


@foreign
def test_film_of_another_size_than_it_says(tmp_path):
    """Its pictures are not read at all: they could be of any size."""
    fuzzing.make_lerobot(tmp_path)
    path = tmp_path / "films" / "meta" / "info.json"
    info = json.loads(path.read_text())
    info["features"]["observation.images.image"]["shape"] = [8, 8, 3]
    path.write_text(json.dumps(info))
    with pytest.raises(BadEpisodes, match=r"pictures of 16 x 16, \(8, 8, 3\)"):
        formats.read(tmp_path / "films", size=16)


# --- the test itself -----------------------------------------------------------------------------


def test_every_command_and_option_is_drawn():
    """`play` only where it can be imported."""
    app = typer.main.get_command(cli.app)
    commands, options = set(), set()
    for name, command in app.commands.items():
        inner = {f"{name} {sub}": c for sub, c in getattr(command, "commands", {}).items()}
        for words, leaf in (inner or {name: command}).items():
            commands.add(words)
            options |= {o for p in leaf.params for o in (*p.opts, *p.secondary_opts) if o[0] == "-"}
    assert commands - {"play"} <= set(fuzzing.COMMANDS)
    assert options <= set(fuzzing.OPTIONS)


def spoiled_by(monkeypatch, read) -> None:
    """The reader `export` replaced by one with a fault (in the child: `fork` keeps the patch)."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(fuzzing.multiprocessing, "get_context", lambda _: context)
    reader = fuzzing.Reader(lambda folder: (folder / "x").write_text("x"), lambda *_: [], read)
    monkeypatch.setitem(fuzzing.READERS, "episodes", reader)


def slip(folder: Path, words: list[str]) -> None:
    return 1 / 0


def sleep(folder: Path, words: list[str]) -> None:
    import time

    time.sleep(8)


def die(folder: Path, words: list[str]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def harm(folder: Path, words: list[str]) -> None:
    (folder / "x").write_text("y")


def devour(folder: Path, words: list[str]) -> None:
    assert np.ones(2**30 + 2**26, np.uint8).any()


def ask_for_too_much(folder: Path, words: list[str]) -> None:
    np.ones(2**33, np.uint8)


def ask_and_tell(folder: Path, words: list[str]) -> None:
    """As the command line does it."""
    raise fuzzing.Refused("error: out of memory (Unable to allocate 8.00 GiB)")


@pytest.mark.parametrize(
    "fault, words",
    [
        (slip, "ZeroDivisionError"), (sleep, "hang"), (die, "exit code -9"),
        (harm, "files changed"), (devour, "took 1"), (ask_for_too_much, "memory\nout of memory"),
        (ask_and_tell, "memory\nerror: out of memory"),
    ],
)  # fmt: skip
def test_the_fuzzing_notices(monkeypatch, tmp_path, fault, words):
    """A traceback, a hang, a crash, a changed file, a gigabyte of memory, and eight that nobody
    would get."""
    spoiled_by(monkeypatch, lambda folder, said: folder.name == "healthy" or fault(folder, said))
    monkeypatch.setattr(fuzzing, "SECONDS", 3.0 if fault is sleep else 60.0)
    with pytest.raises(AssertionError, match=words):
        fuzz("episodes", 2, 0, tmp_path)
    shutil.rmtree(tmp_path / "spoiled", ignore_errors=True)

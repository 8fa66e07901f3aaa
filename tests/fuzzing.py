"""Damaged and hostile input for every reader, drawn by Hypothesis and read in a child process.

    episodes     a folder of episodes: dataset.json and safetensors files
    checkpoints  policy, simulator and reflector of a run, their settings in the header
    config       what else a run holds: settings, stages, metrics, camera, findings of `trust`;
                 opened, resumed (a copy of it) and reported
    exports      a policy as `export_policy` leaves it
    hdf5         LIBERO's or robomimic's file         (needs requirements-data.txt)
    lerobot      a LeRobotDataset v3 folder           (needs requirements-data.txt)
    arguments    the words of a command line

A case spoils a copy of a healthy folder: by the byte (flip, overwrite, cut, insert, splice, numbers
that lie about a length) or by what the format means (a value of another type, a shape of 10^12, a
link to another file). It passes where the child answers within SECONDS, with a result or an error
that the command line tells in one line, has taken at most MEMORY beyond the size of the files, has
not asked for more than there is, and left every file as it was.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
for place in (ROOT, ROOT / "tests"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

from trees import tree  # noqa: E402 (needs the path)

SECONDS = 5.0  # a case may take so long
MEMORY = 2**30  # bytes beyond the size of the files
CEILING = 6 * 2**30  # bytes of addresses: a case that asks for more fails, not the machine


OUT_OF_MEMORY = "error: out of memory"  # how the command line tells it


# ---------------------------------------------------------------------------------------- the child


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is no such file."""
    if not Path("/proc/self/status").exists():
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _serve(pipe, name: str) -> None:
    """The child: reads what it is told to, answers (outcome, text, bytes of memory it took)."""
    import resource

    import errors

    read = READERS[name].read
    os.environ["OMP_NUM_THREADS"] = "1"
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + CEILING, resource.RLIM_INFINITY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say of the damage
    while (request := pipe.recv()) is not None:
        folder, words = request
        if Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        try:
            read(Path(folder), words)
            outcome, text = "read", ""
        except Exception as error:
            line = str(error) if isinstance(error, Refused) else errors.explain(error)
            if isinstance(error, ImportError):
                line = None  # nothing that is needed may be missing here
            outcome, text = ("refused", line) if line is not None else ("traceback", "")
            if errors.is_out_of_memory(error) or (line or "").startswith(OUT_OF_MEMORY):
                outcome = "memory"  # however well it is told
            text = text or "".join(traceback.format_exception(error)[-6:])
        pipe.send((outcome, text, max(0, _status("VmHWM") - before)))


class Child:
    """A process that reads; a new one takes over where one hangs or dies."""

    def __init__(self, name: str, healthy: Path):
        self.name, self.healthy, self.process = name, healthy, None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.name), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.send((str(self.healthy), []))  # a first case, in which it imports what it needs
        assert self.pipe.poll(120), "nothing was imported within two minutes"
        self.pipe.recv()

    def ask(self, folder: Path, words: list[str]) -> tuple[str, str, int]:
        if self.process is None:
            self.start()
        self.pipe.send((str(folder), words))
        if not self.pipe.poll(SECONDS):
            self.close()
            return "hang", f"no answer in {SECONDS} s", 0
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            self.close()
            return "crash", f"the process died with exit code {code}", 0

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None


# ---------------------------------------------------------------------------------------- mutations

LIES = [
    0,
    1,
    7,
    0x7F,
    0xFF,
    0x7FFF,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**64 - 1,
]
DEEP = 100_000
ODD = [
    None, True, False, -1, 0, 1, 3.5, 1e308, -1e308, 10**30, 2**31, 2**63, 2**64, float("nan"),
    float("inf"), "", "x", "x" * 10_000, "0", "../../etc/passwd", "/etc/passwd", "..", "a\x00b",
    "\ud800", "{chunk_index:03d}", "{0.__class__}", [], {}, [[]], [None], [0], [-1], [2**62, 2**62],
    [2**31] * 3, [1, "a"], {"a": 1}, {"": None}, [[[[[[[[]]]]]]]],
]  # fmt: skip
TEXTS = [
    b"", b"\x00", b"\xff\xfe", b"null", b"[]", b"{}", b"1", b'"x"', b"[" * DEEP, b'{"a":' * DEEP,
    b"9" * 5000, b"[" + b"9" * 5000 + b"]", b'"' + b"x" * 1_000_000 + b'"', b"NaN", b"-Infinity",
    b"\xef\xbb\xbf{}",
]  # fmt: skip


def bytes_mutated(data: st.DataObject, raw: bytes) -> bytes:
    """One to four changes by the byte; half of them in the first 256, where headers are."""
    raw = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        end = max(0, len(raw) - 1)
        at = data.draw(st.integers(0, min(255, end)) | st.integers(0, end))
        kind = data.draw(st.sampled_from(("flip", "write", "lie", "cut", "insert", "splice")))
        if kind == "flip" and raw:
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "write":
            some = data.draw(st.binary(min_size=1, max_size=16))
            raw[at : at + len(some)] = some
        elif kind == "lie":
            size, number = (
                data.draw(st.sampled_from((1, 2, 4, 8))),
                data.draw(st.sampled_from(LIES)),
            )
            number = min(number, 2 ** (8 * size) - 1)
            raw[at : at + size] = number.to_bytes(
                size, data.draw(st.sampled_from(("little", "big")))
            )
        elif kind == "cut":
            del raw[at:]
        elif kind == "insert":
            raw[at:at] = data.draw(st.binary(max_size=64))
        else:
            other, length = data.draw(st.integers(0, end)), data.draw(st.integers(1, 256))
            raw[at : at + length] = raw[other : other + length]
    return bytes(raw)


def places(value, path: tuple = ()) -> list[tuple]:
    """The path to every value in parsed JSON."""
    found = [path]
    if isinstance(value, dict):
        for key in value:
            found += places(value[key], (*path, key))
    if isinstance(value, list):
        for i in range(min(len(value), 4)):
            found += places(value[i], (*path, i))
    return found


def json_mutated(data: st.DataObject, value):
    """Parsed JSON with one to three values replaced, removed, added or swapped."""
    value = json.loads(json.dumps(value))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(value)))
        odd = data.draw(st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8))
        if not path:
            if data.draw(st.integers(0, 9)) == 0:
                return odd
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        kind = data.draw(
            st.sampled_from(("replace", "replace", "replace", "remove", "add", "grow"))
        )
        if kind == "remove":
            del parent[path[-1]]
        elif kind == "add" and isinstance(parent, dict):
            parent[data.draw(st.sampled_from(["", "x", "__class__", "size"]))] = odd
        elif kind == "grow" and isinstance(parent[path[-1]], int | float):
            parent[path[-1]] *= data.draw(st.sampled_from([-1, 2, 1000, 10**9, 10**18]))
        else:
            parent[path[-1]] = odd
    return value


def json_file_mutated(data: st.DataObject, path: Path) -> None:
    """A JSON file, spoiled as a text, by the byte or in its values."""
    raw = path.read_bytes()
    kind = data.draw(st.sampled_from(("values", "values", "values", "bytes", "text")))
    if kind == "text":
        raw = data.draw(st.sampled_from(TEXTS))
    elif kind == "bytes":
        raw = bytes_mutated(data, raw)
    else:
        raw = json.dumps(json_mutated(data, json.loads(raw))).encode("utf-8", "surrogatepass")
    path.write_bytes(raw)


def safetensors_mutated(data: st.DataObject, path: Path) -> None:
    """A safetensors file, spoiled by the byte or in its header, whose length may lie."""
    raw = path.read_bytes()
    if data.draw(st.booleans()):
        path.write_bytes(bytes_mutated(data, raw))
        return
    (length,) = struct.unpack("<Q", raw[:8])
    header, rest = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    inner = header.get("__metadata__", {}).get("description")
    if inner and data.draw(st.booleans()):  # JSON within JSON: the settings of a checkpoint
        changed = json.dumps(json_mutated(data, json.loads(inner)))
        header["__metadata__"]["description"] = data.draw(
            st.sampled_from([changed] * 6 + ["", "[" * DEEP, "null", "[]", "9" * 5000])
        )
    else:
        header = json_mutated(data, header)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    if data.draw(st.integers(0, 9)) == 0:
        text = data.draw(st.sampled_from(TEXTS))
    said = data.draw(st.sampled_from([len(text)] * 8 + LIES))
    path.write_bytes(struct.pack("<Q", said) + text + rest)


# ------------------------------------------------------------------------------------------ readers


@dataclass(frozen=True)
class Reader:
    """What is fuzzed: `make` a healthy folder, `spoil` a copy of it (and draw words), `read` it."""

    make: Callable[[Path], None]
    spoil: Callable[[st.DataObject, Path], list[str]]
    read: Callable[[Path, list[str]], None]
    needs: str = ""  # a package besides requirements.txt


def tiny_episode(length: int = 3, size: int = 16, number: int = 7):
    """An episode of random pictures; nothing real is needed."""
    from scripted import random_episode

    return random_episode(number, length, size)


def make_episodes(folder: Path) -> None:
    import demos
    from camera import Camera
    from tasks import EnvConfig

    camera = Camera((0.0, 0.0, 1.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), 42.0, 16)
    episodes = [tiny_episode(number=number) for number in (7, 8)]
    demos.save(folder, episodes, EnvConfig(size=16), camera)


def spoil_episodes(data: st.DataObject, folder: Path) -> list[str]:
    if data.draw(st.booleans()):
        json_file_mutated(data, folder / "dataset.json")
    else:
        safetensors_mutated(data, folder / "episode_00001.safetensors")
    return []


def used_later(episodes: list, about) -> None:
    """What commands do with episodes once they are read; whatever was let in bears it."""
    import demos
    from tasks import spaces

    spaces(about.env)
    json.dumps(demos._described(about)).encode()
    about.robot.encode()
    if about.camera is not None:
        assert about.camera.size == about.env.size
        assert np.isfinite(about.camera.project(np.eye(3))).all()
    for episode in episodes:
        (episode.task + episode.instruction).encode()
        assert np.array([episode.seed]).dtype == np.int64 and set(episode.success) <= {0, 1}


def read_episodes(folder: Path, words: list[str]) -> None:
    import demos_cli

    episodes, about = demos_cli.read_episodes(folder)
    used_later(episodes, about)


def tiny_policy():
    from policy import Policy, PolicyConfig

    return Policy(PolicyConfig(width=8, hidden=8))


def make_run(folder: Path) -> None:
    """A run that has begun: a checkpoint and two finished stages."""
    from checkpoints import save_part
    from runs import Run, preset
    from tasks import DEFAULT_SUITE

    policy = tiny_policy()
    config = replace(preset("debug"), policy=policy.config, tasks=DEFAULT_SUITE)
    run = Run.create(folder, config)
    save_part(run.checkpoint("sft"), policy, asdict(policy.config))
    result = {"line": "made by a test", "ledger": {"demonstrations": 4}}
    run.finish_stage("demos", 1.0, 1.0, result)
    run.finish_stage("sft", 1.0, 1.0, result)
    run.log(stage="sft", step=0, loss=1.0)


def make_finished_run(folder: Path) -> None:
    """The same with all checkpoints, untrained, and the stages of a run that is in results/."""
    from checkpoints import save_part
    from demos import camera_of
    from reflector import Reflector
    from runs import Run
    from simulator import Simulator

    make_run(folder)
    (folder / "episodes").mkdir()
    make_episodes(folder / "episodes")
    run = Run.open(folder)
    simulator = Simulator(run.config.simulator, camera_of(run.episodes_folder))
    for name, part in (("simulator", simulator), ("reflector", Reflector(run.config.reflector))):
        save_part(run.checkpoint(name), part, part.description())
    record = json.loads((ROOT / "results" / "runs" / "dream-0.json").read_text())
    stages = record["stages"]
    (folder / "stages.json").write_text(json.dumps(stages))
    found = {"starts_per_task": 3, "split": "dev", "words": ["made by a test"]}
    found["agreement"] = {"policy": stages["evaluate"]["agreement"]}
    (folder / "trust").mkdir()
    (folder / "trust" / "trust.json").write_text(json.dumps(found))


def spoil_checkpoint(data: st.DataObject, folder: Path) -> list[str]:
    name = data.draw(st.sampled_from(("sft", "simulator", "reflector")))
    safetensors_mutated(data, folder / "checkpoints" / f"{name}.safetensors")
    return []


SPOILED = (
    "config.json", "config.json", "stages.json", "stages.json", "metrics.jsonl",
    "episodes/dataset.json", "trust/trust.json",
)  # fmt: skip


def spoil_config(data: st.DataObject, folder: Path) -> list[str]:
    name = data.draw(st.sampled_from(SPOILED))
    path = folder / name
    if name == "metrics.jsonl":
        path.write_bytes(bytes_mutated(data, path.read_bytes()))
    else:
        json_file_mutated(data, path)
    return []


def read_run(folder: Path, words: list[str]) -> None:
    """What commands do with a run: open it, sum up its ledger, go on with it, report it, load its
    parts."""
    import report
    from demos import camera_of
    from runs import Run

    run = Run.open(folder)
    run.ledger()
    with tempfile.TemporaryDirectory() as place:  # a copy, since its metrics.jsonl is mended
        parts = shutil.ignore_patterns("checkpoints")
        copy = Path(shutil.copytree(folder, Path(place) / "run", ignore=parts))
        before = tree(copy)
        Run.create(copy, run.config).forget_unfinished()
        left = tree(copy) | {"metrics.jsonl": before["metrics.jsonl"]}
        assert left == before, "more than metrics.jsonl was changed"
        for line in (copy / "metrics.jsonl").read_text().splitlines():
            json.loads(line)
    with report.what_is_missing([folder]):
        report.report_text(run, pictures=False).encode()
    run.policy("sft")
    run.reflector()
    run.simulator(camera_of(run.episodes_folder))


def make_export(folder: Path) -> None:
    from test_pretrained import save_tiny

    from checkpoints import export_policy
    from policy import Policy, PolicyConfig
    from pretrained import PretrainedConfig

    hub = folder.with_name("hub")
    hub.mkdir()
    save_tiny(hub, "llava")
    model = PretrainedConfig(checkpoint=str(hub), bf16=False)
    policy = Policy(PolicyConfig(backbone="pretrained", size=32, hidden=8, pretrained=model))
    export_policy(policy, folder)


def spoil_export(data: st.DataObject, folder: Path) -> list[str]:
    safetensors_mutated(data, folder / "policy.safetensors")
    return []


def read_export(folder: Path, words: list[str]) -> None:
    from checkpoints import exported_policy

    exported_policy(folder)


# --- HDF5 ----------------------------------------------------------------------------------------

STEPS = 6


MODEL = '<mujoco><body name="stove" pos="1 2 3"><body name="knob" quat="1 0 0 0"/></body></mujoco>'


def make_hdf5(folder: Path) -> None:
    import h5py

    steps = np.arange(STEPS, dtype=np.float64)
    arrays = {
        "actions": np.repeat(steps[:, None] / 100, 7, axis=1),
        "rewards": (steps == STEPS - 1).astype(np.uint8),
        "dones": (steps == STEPS - 1).astype(np.uint8),
        "obs/agentview_rgb": np.zeros((STEPS, 16, 16, 3), np.uint8),
        "obs/ee_pos": np.repeat(steps[:, None], 3, axis=1),
        "obs/ee_ori": np.repeat(steps[:, None], 3, axis=1),
        "obs/gripper_states": np.repeat(steps[:, None], 2, axis=1),
        "states": np.repeat(steps[:, None], 9, axis=1),
    }
    with h5py.File(folder / "turn_on_the_stove_demo.hdf5", "w") as file:
        for number in (0, 1):
            for name, values in arrays.items():
                packed = {"compression": "gzip"} if number else {}
                file.create_dataset(f"data/demo_{number}/{name}", data=values, **packed)
            file[f"data/demo_{number}"].attrs["model_file"] = MODEL
    np.zeros(1000).tofile(folder / "other.bin")
    with h5py.File(folder / "other.h5x", "w") as file:
        file["x"] = np.zeros((STEPS, 7))


HUGE = [(10**12, 7), (STEPS, 10**11), (10**8, 64, 64, 3), (STEPS, 2**17, 2**17, 3), (2**40,)]


def replaced_in_hdf5(data: st.DataObject, file) -> None:
    """A member of a demonstration, replaced by something that is legal HDF5 and no recording."""
    import h5py

    demo = file[f"data/demo_{data.draw(st.integers(0, 1))}"]
    inner = demo["obs"] if isinstance(demo["obs"], h5py.Group) else []  # an earlier change
    names = ["actions", "rewards", "dones", "states", "obs", *(f"obs/{name}" for name in inner)]
    name = data.draw(st.sampled_from(names))
    shape = demo[name].shape if name != "obs" else (STEPS,)
    shape = shape if np.prod(shape or (0,), dtype=float) < 1e6 else (STEPS,)  # of an earlier change
    del demo[name]
    kinds = ("huge", "huge chunks", "outside", "soft", "self", "raw", "virtual", "text", "compound")
    kinds += ("empty", "scalar", "odd values", "odd shape", "odd type", "ragged", "group", "gone")
    kind = data.draw(st.sampled_from(kinds))
    if kind == "huge":
        demo.create_dataset(name, data.draw(st.sampled_from(HUGE)), "f8", chunks=True)
    elif kind == "huge chunks":
        demo.create_dataset(name, (2**30, 3), "u1", chunks=(2**30, 3), compression="gzip")
    elif kind == "outside":
        where = data.draw(st.sampled_from(["other.h5x", "/etc/passwd", "../other.h5x", "missing"]))
        demo[name] = h5py.ExternalLink(where, data.draw(st.sampled_from(["x", "/"])))
    elif kind == "soft":
        demo[name] = h5py.SoftLink(data.draw(st.sampled_from(["/data", "/missing", name, "/"])))
    elif kind == "self":
        demo[name] = file["data"]
    elif kind == "raw":
        demo.create_dataset(name, (STEPS, 7), "f8", external=[("other.bin", 0, STEPS * 56)])
    elif kind == "virtual":
        layout = h5py.VirtualLayout((STEPS, 7), "f8")
        layout[:] = h5py.VirtualSource("other.h5x", "x", (STEPS, 7))
        demo.create_virtual_dataset(name, layout)
    elif kind == "text":
        demo[name] = data.draw(st.sampled_from(["text", np.array([b"a"] * STEPS)]))
    elif kind == "compound":
        demo[name] = np.zeros(STEPS, [("a", "i4"), ("b", "f8", (3,))])
    elif kind == "empty":
        demo[name] = h5py.Empty("f8")
    elif kind == "scalar":
        demo[name] = data.draw(st.sampled_from([0, 1.5, True]))
    elif kind == "odd values":
        odd = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 1e308, -1e308, 5e-324, 2, -1]))
        demo[name] = np.full(shape, odd)
    elif kind == "odd shape":
        sides = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
        demo[name] = np.zeros(sides, data.draw(st.sampled_from(["f8", "u1", "?"])))
    elif kind == "odd type":
        types = ["f2", "f4", "i1", "i8", "u8", "?", "c16", ">f8", ">u4", "V7"]
        demo[name] = np.zeros(shape, data.draw(st.sampled_from(types)))
    elif kind == "ragged":
        demo.create_dataset(name, (STEPS,), h5py.vlen_dtype("f8"))
    elif kind == "group":
        demo.create_group(name)


def spoil_hdf5(data: st.DataObject, folder: Path) -> list[str]:
    import h5py

    path = folder / "turn_on_the_stove_demo.hdf5"
    if data.draw(st.booleans()):
        path.write_bytes(bytes_mutated(data, path.read_bytes()))
        return []
    with h5py.File(path, "a") as file:
        for _ in range(data.draw(st.integers(1, 2))):
            if "obs" in file["data/demo_0"] and "obs" in file["data/demo_1"]:
                try:
                    replaced_in_hdf5(data, file)
                except (KeyError, ValueError, TypeError, OSError, AttributeError, RuntimeError):
                    break  # the second change met the first; what is there is spoiled enough
        if data.draw(st.integers(0, 4)) == 0:
            name = data.draw(st.sampled_from(["demo_" + "9" * 30, "demo_-1", "demo_٣", "demo_7"]))
            file["data"][name] = file["data/demo_1"]
    return []


def spoil_recordings(data: st.DataObject, folder: Path) -> list[str]:
    """As above, or what the file says of its model."""
    import h5py

    if data.draw(st.booleans()):
        return spoil_hdf5(data, folder)
    bomb = '<!DOCTYPE a [<!ENTITY x0 "xxxxxxxxxx">' + "".join(
        f'<!ENTITY x{n} "{f"&x{n - 1};" * 10}">' for n in range(1, 10)
    )
    odd = (
        bomb + "]><a>&x9;</a>", "<body>" * 20_000, "<body>" * 20_000 + "</body>" * 20_000,
        '<body pos="nan 0 0"/>', '<body pos="1e999 0 0"/>', '<body pos="1 2"/>', "<a/>", "", "x",
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><body name="&x;"/>',
    )  # fmt: skip
    spoilt = bytes_mutated(data, MODEL.encode())
    value = data.draw(st.sampled_from([*odd, spoilt, 1.5, np.zeros(7), h5py.Empty("f8")]))
    with h5py.File(folder / "turn_on_the_stove_demo.hdf5", "a") as file:
        try:
            file["data/demo_0"].attrs["model_file"] = value
        except (ValueError, TypeError, OSError):
            file["data/demo_0"].attrs.pop("model_file", None)  # HDF5 has no such text
    return []


def read_recordings(folder: Path, words: list[str]) -> None:
    """As `demos replay SOURCE` reads it, all but the playing."""
    import replay

    for task, path in replay.tasks_of(folder).items():
        list(replay.read(path, task))


def read_foreign(folder: Path, words: list[str]) -> None:
    """As `demos load SOURCE --out ...` reads it, all but the writing."""
    import formats

    used_later(*formats.read(folder, size=16))


# --- LeRobot -------------------------------------------------------------------------------------


def make_lerobot(folder: Path) -> None:
    """Two episodes exported by ours; the same without our own entry, as LeRobot's are; as films."""
    import export
    from demos import Description
    from tasks import EnvConfig

    about = Description(EnvConfig(size=16), None)
    (folder / "ours").mkdir()
    episodes = [tiny_episode(number=number) for number in (7, 8)]
    export.export_lerobot(episodes, about, folder / "ours", 20, False)
    shutil.copytree(folder / "ours", folder / "theirs")
    path = folder / "theirs" / "meta" / "info.json"
    info = json.loads(path.read_text())
    del info["world_env"]
    path.write_text(json.dumps(info))
    (folder / "films").mkdir()
    export.export_lerobot(episodes, about, folder / "films", 20, True)


FILES = (".parquet", ".mp4")


def odd_column(data: st.DataObject, arrow, count: int):
    """A column of a parquet file that holds what nobody expects there."""
    odd = [
        [None] * count, ["x"] * count, [2**63 - 1] * count, [-1] * count, [float("nan")] * count,
        [True] * count, [[]] * count, [[0.0] * n for n in range(count)], [[None, 1.0]] * count,
        [{"bytes": b"x", "path": "../../etc/passwd"}] * count, [b"\xff"] * count, [1e308] * count,
        [{"bytes": None, "path": None}] * count, [[[1.0]]] * count, list(range(count)),
        [{"a": 1}] * count, [[2.0, 3.0, 4.0, 5.0]] * count, [[float("inf")] * 4] * count,
    ]  # fmt: skip
    late, us = 2**62, arrow.timestamp("us")  # long after the year 9999, the last that Python knows
    typed = [
        ([2**31 - 1], arrow.date32()), ([late], us), ([1], arrow.timestamp("ns")),
        ([late], arrow.duration("us")), ([2**64 - 1], arrow.uint64()), ([1], arrow.decimal128(38)),
    ]  # fmt: skip
    drawn = data.draw(st.sampled_from([(values, None) for values in odd] + typed))
    return arrow.array(drawn[0] * (count if drawn[1] else 1), drawn[1])


def table_mutated(data: st.DataObject, path: Path) -> None:
    """A parquet file, written anew: a column replaced, removed or renamed, or other rows."""
    import pyarrow as arrow
    import pyarrow.parquet as arrow_parquet

    table = arrow_parquet.ParquetFile(path).read()
    number = data.draw(st.integers(0, table.num_columns - 1))
    name = table.column_names[number]
    kind = data.draw(st.sampled_from(("replace", "replace", "drop", "rename", "rows", "twice")))
    if kind == "replace":
        table = table.set_column(number, name, odd_column(data, arrow, len(table)))
    elif kind == "drop":
        table = table.drop_columns([name])
    elif kind == "rename":
        table = table.rename_columns([n if n != name else "x" for n in table.column_names])
    elif kind == "rows":
        table = table.slice(data.draw(st.integers(0, 2)), data.draw(st.integers(0, 3)))
    else:
        table = table.append_column(name, table[name])
    arrow_parquet.write_table(table, path)


def spoil_lerobot(data: st.DataObject, folder: Path) -> list[str]:
    kept = data.draw(st.sampled_from(("ours", "theirs", "theirs", "films")))
    kind = data.draw(st.sampled_from(("info", "info", "bytes", "table")))
    path = folder / kept / "meta" / "info.json"
    if kind == "info":
        json_file_mutated(data, path)
        return [kept]
    files = [path for path in sorted((folder / kept).rglob("*")) if path.suffix in FILES]
    path = data.draw(st.sampled_from(files))
    if kind == "bytes" or path.suffix == ".mp4":
        path.write_bytes(bytes_mutated(data, path.read_bytes()))
    else:
        table_mutated(data, path)
    return [kept]


def read_lerobot(folder: Path, words: list[str]) -> None:
    import formats

    used_later(*formats.read(folder / words[0]))


# --- arguments -----------------------------------------------------------------------------------

COMMANDS = (
    "train", "imagine", "evaluate", "report", "trust", "expert", "screen", "summary",
    "compare", "ship", "bench", "config", "demos collect", "demos load", "demos inspect",
    "demos export", "demos replay", "doctor", "demos", "", "nonsense",
    *["play"] * (importlib.util.find_spec("nicegui") is not None),
)  # fmt: skip
OPTIONS = (
    "--demos", "--preset", "--tasks", "--suite", "--seed", "--out", "--env", "--device",
    "--iterations", "--rounds", "--starts", "--plain", "--stop-rule", "--until", "--pretrained",
    "--beside", "--no-beside",
    "--simulator-models", "--task", "--actions", "--policy", "--split", "--skip", "--termination",
    "--json", "--host", "--port", "--size", "--chunk", "--horizon", "--recorded",
    "--upside-down", "--film", "--upright", "--mirrored", "--image", "--instruction", "--fps",
    "--video", "--seeds", "--methods", "--help", "--nonsense", "-x", "--", "--browser",
    "--no-browser", "--ensure-renderer", "--run", "--quick", "--from",
)  # fmt: skip
WORDS = (
    "0", "1", "-1", "2", "5", "64", "63", "100", "99", "1e3", "1.5", "nan", "inf", "0x10",
    "9999999999999999999999", "-99999999999999999999", "cpu", "cuda", "cuda:99", "mps",
    "toaster", "debug", "gpu", "paper", "libero", "notebook", "dream", "real", "novelty", "sft",
    "rl", "evaluate", "reach", "reach,push", "reach,reach", ",", "coffee-push", "handle-press",
    "metaworld", "libero_object", "libero_10", "run", "good", "missing", "file", "file/x",
    "good/episode_00000.safetensors", "/proc/new", "..", ".", "/", "test", "dev", "train",
    "none", "oracle", "reflector", "expert", "before", "after", "gif", "mp4",
    "autoencoder=missing", "autoencoder=", "unet=,clip=x", "=", "a/b", "0,1", "0,,1",
    "dream,sft", "null", "new.tar.xz", "new/run.tar.xz", "new.json", "file/x.json",
)  # fmt: skip


def make_work(folder: Path) -> None:
    (folder / "file").write_text("a file")
    (folder / "good").mkdir()
    make_episodes(folder / "good")
    make_run(folder / "run")


def spoil_words(data: st.DataObject, folder: Path) -> list[str]:
    """A command and up to six words behind it: options, likely values, and any text that a shell
    can hand over (no zero byte; what is no UTF-8 becomes lone surrogates)."""
    shell = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
    surrogate = st.just("\udcff\udc80")
    word = st.sampled_from(OPTIONS) | st.sampled_from(WORDS) | st.sampled_from(WORDS) | shell
    word |= (
        surrogate
        | st.just("x" * 5000)
        | st.builds("{}={}".format, st.sampled_from(OPTIONS), st.sampled_from(WORDS))
    )
    pair = st.tuples(st.sampled_from(OPTIONS), st.sampled_from(WORDS)).map(list)
    command = data.draw(st.sampled_from(COMMANDS)).split()
    parts = data.draw(st.lists(word.map(lambda w: [w]) | pair, max_size=4))
    return [*command, *(w for part in parts for w in part)]


class Refused(Exception):
    """The one line of a command that ended with exit code 2."""


def read_words(folder: Path, words: list[str]) -> None:
    """The command line in process, up to where the work would begin."""
    import contextlib
    import io

    os.chdir(folder)
    _stop_before_work()
    import cli

    out, err = io.StringIO(), io.StringIO()
    code = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.app([*words])
    except SystemExit as leaving:
        code = leaving.code
    finally:
        _sweep(folder)
    if code != 0:
        lines = err.getvalue().strip().splitlines()
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, lines)
        raise Refused(lines[0])


def _stop_before_work() -> None:
    """Replace what computes, plays, downloads or serves by an end with code 0."""
    import bench
    import compare
    import doctor
    import pipeline
    import pretrained
    import render
    import screening
    import summary
    import vecenv

    def reached(*_arguments, **_options):
        raise SystemExit(0)

    pipeline.train = vecenv.VecRealEnv.__init__ = doctor.main = reached
    if importlib.util.find_spec("nicegui"):
        import play

        play.serve = reached
    screening.screen = screening.measure_expert = compare.compare = summary.collect = reached
    summary.summarize_runs = bench.bench = reached
    render.choose_backend = lambda: None
    pretrained.find = reached


def _sweep(folder: Path) -> None:
    """What commands were asked to write (reports, pictures, converted folders) goes again, so that
    only a change of what had been there is seen."""
    known = {line for line in (folder / ".known").read_text().splitlines()}
    for path in sorted(folder.rglob("*"), reverse=True):
        name = str(path.relative_to(folder))
        if name not in known and name != ".known":
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


READERS = {
    "episodes": Reader(make_episodes, spoil_episodes, read_episodes),
    "checkpoints": Reader(make_finished_run, spoil_checkpoint, read_run),
    "config": Reader(make_finished_run, spoil_config, read_run),
    "exports": Reader(make_export, spoil_export, read_export),
    "hdf5": Reader(make_hdf5, spoil_hdf5, read_foreign, "h5py"),
    "recordings": Reader(make_hdf5, spoil_recordings, read_recordings, "h5py"),
    "lerobot": Reader(make_lerobot, spoil_lerobot, read_lerobot, "pyarrow"),
    "arguments": Reader(make_work, spoil_words, read_words),
}


def missing(name: str) -> str:
    """Why a reader cannot be fuzzed here; "" where it can."""
    needs = READERS[name].needs
    there = not needs or importlib.util.find_spec(needs) is not None
    return "" if there else f"{needs} is missing; needs requirements-data.txt"


# -------------------------------------------------------------------------------------------- cases


def fuzz(name: str, cases: int, number: int, folder: Path) -> dict:
    """Let a reader read `cases` spoiled inputs that Hypothesis draws with the seed `number`;
    AssertionError for the first that does not pass. Returns the counts, and the worst of time and
    memory."""
    reader = READERS[name]
    healthy, spoiled = folder / "healthy", folder / "spoiled"
    child = Child(name, healthy)
    healthy.mkdir()
    reader.make(healthy)
    (healthy / ".known").write_text("\n".join(tree(healthy)))
    counts = {"read": 0, "refused": 0, "seconds": 0.0, "mib": 0.0}

    @seed(number)
    @settings(
        max_examples=cases, deadline=None, database=None, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @given(st.data())
    def case(data):
        shutil.rmtree(spoiled, ignore_errors=True)
        shutil.copytree(healthy, spoiled)
        words = reader.spoil(data, spoiled)
        before, size = (
            tree(spoiled),
            sum(f.stat().st_size for f in spoiled.rglob("*") if f.is_file()),
        )
        started = time.time()
        outcome, text, memory = child.ask(spoiled, words)
        seconds = time.time() - started
        kept = os.environ.get("FUZZ_KEEP")
        if kept and outcome not in counts:
            shutil.copytree(spoiled, Path(kept) / name, dirs_exist_ok=True)
        assert outcome in ("read", "refused"), f"{name} {words}: {outcome}\n{text}"
        assert "\n" not in text
        assert tree(spoiled) == before, f"{name} {words}: files changed"
        assert memory <= MEMORY + size, f"{name} {words}: took {memory / 2**20:.0f} MiB"
        counts[outcome] += 1
        if counts["read"] + counts["refused"] > 1:  # the first waits for imports
            counts["seconds"] = round(max(counts["seconds"], seconds), 2)
            counts["mib"] = round(max(counts["mib"], memory / 2**20), 1)

    try:
        assert child.ask(healthy, [])[0] == "read" if name not in ("lerobot", "arguments") else True
        case()
    finally:
        child.close()
    return counts

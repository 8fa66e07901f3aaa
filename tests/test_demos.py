"""Episodes: recorded as played, bit-equal after a trip to disk, refused when they are not sound."""

import ast
import json
import os
import struct
from dataclasses import asdict, replace
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

import demos
import runs
from demos import (
    BadEpisodes,
    Episode,
    check_words,
    contact_sheet,
    load,
    play,
    save,
    statistics,
    write_atomically,
    write_film,
    write_png,
)
from instructions import INSTRUCTIONS
from tasks import METAWORLD, SPLITS, Camera, EnvConfig, Start

CONFIG = EnvConfig(size=16, chunk=2, horizon=6)
CAMERA = Camera((0.75, 0.075, 0.7), tuple(np.linspace(-1, 1, 9).tolist()), 42.0, 16)
ARRAYS = ("image", "state", "action", "success")


def episode(length: int, first_success: int | None, seed: int = 0, task: str = "reach") -> Episode:
    """An episode of random content."""
    rng = np.random.default_rng(seed)
    success = np.zeros(length + 1, np.uint8)
    if first_success is not None:
        success[first_success:] = 1
    return Episode(
        image=rng.integers(0, 256, (length + 1, 16, 16, 3), dtype=np.uint8),
        state=rng.normal(size=(length + 1, 4)).astype(np.float32),
        action=rng.uniform(-1, 1, (length, 2, 4)).astype(np.float32),
        success=success,
        task=task,
        instruction=INSTRUCTIONS[task][0],
        seed=seed,
        source="exploration",
    )


def assert_equal(a: Episode, b: Episode) -> None:
    """Every array to the last bit and type, every word."""
    for name in ARRAYS:
        mine, theirs = getattr(a, name), getattr(b, name)
        assert mine.dtype == theirs.dtype and mine.tobytes() == theirs.tobytes(), name
    for name in ("task", "instruction", "seed", "source"):
        assert getattr(a, name) == getattr(b, name), name


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sound folder of three episodes."""
    path = tmp_path / "episodes"
    save(path, [episode(3, 2), episode(5, None, 1), episode(1, 1, 2)], CONFIG, CAMERA)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ------------------------------------------------------------------------------------------ playing


class Countdown:
    """Scripted slots: slot i is a success from decision i + 1 on; the state is the time."""

    def __init__(self, num_envs: int, horizon: int = 5):
        self.num_envs, self.config = num_envs, replace(CONFIG, horizon=horizon)
        self.asked: list[dict] = []

    def reset(self, *, seed=None, options=None):
        self.asked.append(options)
        self.oracle = options["stop_on_success"]
        self.time = np.zeros(self.num_envs, np.int64)
        self.done = np.arange(self.num_envs) >= len(options["starts"])
        return self.look()

    def look(self) -> tuple[dict, dict]:
        slots = np.arange(self.num_envs)
        image = np.broadcast_to(self.time[:, None, None, None], (self.num_envs, 16, 16, 3))
        state = np.stack([self.time, slots, slots, slots], axis=1).astype(np.float32)
        observation = {"image": image.astype(np.uint8), "state": state}
        observation["instruction"] = tuple(f"slot {i}" for i in slots)
        return observation, {"success": (self.time > 0) & (self.time >= slots + 1)}

    def step(self, actions: np.ndarray):
        self.time = self.time + ~self.done
        observation, infos = self.look()
        terminations = ~self.done & infos["success"] & self.oracle
        truncations = ~self.done & ~terminations & (self.time >= self.config.horizon)
        self.done = self.done | terminations | truncations
        return observation, infos["success"].astype(np.float32), terminations, truncations, infos


def act(observation: dict, running: np.ndarray) -> np.ndarray:
    """A chunk that tells when and for whom it was chosen; 0 for resting slots."""
    chunks = np.zeros((len(running), 2, 4), np.float32)
    chunks[running, :, 0] = observation["state"][running, :1] / 10
    chunks[running, :, 1] = observation["state"][running, 1:2] / 10
    return chunks


@pytest.mark.parametrize(
    "after_success, lengths", [(0, [1, 2, 3]), (1, [2, 3, 4]), (9, [5, 5, 5]), (None, [5, 5, 5])]
)
def test_episodes_end_as_asked(after_success, lengths):
    """At the first success, some decisions later, or never before the horizon."""
    env = Countdown(3)
    starts = [Start("reach", seed) for seed in range(3)]
    episodes = play(env, starts, act, "exploration", after_success)
    assert [len(e) for e in episodes] == lengths
    assert [e.first_success for e in episodes] == [1, 2, 3]
    assert env.asked[0]["stop_on_success"] == (after_success == 0)


def test_episodes_record_what_was_seen_and_done():
    """Frame, state, action and label t belong together; starts beyond the slots come in turn."""
    starts = [Start("reach", 40 + number) for number in range(5)]
    running = []
    episodes = play(
        Countdown(2), starts, act, "evaluation", 1, on_step=lambda mask: running.append(mask.sum())
    )
    assert [e.seed for e in episodes] == [40, 41, 42, 43, 44]
    for number, one in enumerate(episodes):
        slot = number % 2
        times = np.arange(len(one) + 1)
        assert one.instruction == f"slot {slot}" and one.source == "evaluation"
        assert (one.state[:, 0] == times).all() and (one.image[:, 0, 0, 0] == times).all()
        assert (one.state[:, 1] == slot).all()
        assert np.allclose(one.action[:, :, 0], times[:-1, None] / 10)
        assert np.allclose(one.action[:, :, 1], slot / 10)
        assert one.success.tolist() == [int(t > 0 and t >= slot + 1) for t in times]
    assert running == [2, 1, 0] * 2 + [1, 0]


def test_a_failed_episode_has_no_first_success():
    """And is no success."""
    (failed,) = play(Countdown(1, horizon=1), [Start("reach", 0)], act, "exploration", None)
    assert failed.succeeded
    assert episode(3, None).first_success is None and not episode(3, None).succeeded


# ------------------------------------------------------------------------------------------ on disk


def test_round_trip_is_bit_equal(folder):
    """Episodes, settings and camera come back as they went, in order."""
    episodes, config, camera = load(folder, CONFIG, ("reach",))
    for mine, theirs in zip(
        episodes, [episode(3, 2), episode(5, None, 1), episode(1, 1, 2)], strict=True
    ):
        assert_equal(mine, theirs)
    assert config == CONFIG and camera == CAMERA
    points = np.array([[0.1, 0.6, 0.2]])
    assert (camera.project(points) == CAMERA.project(points)).all()


def test_saving_again_adds_to_what_is_there(folder):
    """Numbers go on after the highest one: where a damaged episode was deleted, nothing is lost."""
    before = contents(folder)
    (folder / "episode_00000.safetensors").unlink()
    save(folder, [episode(2, None, 7)], CONFIG, CAMERA)
    episodes, *_ = load(folder)
    assert [e.seed for e in episodes] == [1, 2, 7]
    del before["episode_00000.safetensors"]
    assert before.items() <= contents(folder).items()


def test_files_are_plain_safetensors(folder):
    """A length, a JSON header that says everything, raw numbers: readable without this project."""
    data = (folder / "episode_00000.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert set(header) == {"__metadata__", *ARRAYS}
    assert header["__metadata__"]["task"] == "reach" and header["__metadata__"]["seed"] == "0"
    begin, end = header["image"]["data_offsets"]
    frames = np.frombuffer(data[8 + length + begin : 8 + length + end], np.uint8)
    assert (frames.reshape(header["image"]["shape"]) == episode(3, 2).image).all()
    description = json.loads((folder / "dataset.json").read_text())
    assert set(description["arrays"]) == set(ARRAYS)


def test_nothing_is_pickled():
    """No module of the project can run code that a file brings along."""
    for path in Path(demos.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
                assert not names & {"pickle", "dill", "joblib", "cloudpickle", "shelve"}, path.name
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("pickle", "dill", "joblib", "cloudpickle"), path.name
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                call = f"{node.value.id}.{node.attr}"
                assert call not in ("torch.load", "torch.save", "np.load", "np.save"), path.name


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    """The new file appears whole or not at all, and nothing else is left behind."""
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(demos.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert contents(tmp_path) == {"file": b"old"}
    monkeypatch.undo()
    write_atomically(path, b"new")
    assert contents(tmp_path) == {"file": b"new"}


# ---------------------------------------------------------------------------------------- bad input


def assert_refused(folder: Path, *words: str, **expected) -> None:
    """One line that says what is wrong, and nothing on disk changes."""
    before = contents(folder) if folder.is_dir() else None
    with pytest.raises(BadEpisodes) as refusal:
        load(folder, **expected)
    message = str(refusal.value)
    assert "\n" not in message and str(folder) in message
    for word in words:
        assert word in message, message
    assert before == (contents(folder) if folder.is_dir() else None)


def test_missing_and_empty_folders_are_refused(tmp_path, folder):
    """With the command that makes one."""
    assert_refused(tmp_path / "nowhere", "no such folder", "demos collect")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(empty, "no dataset.json", "demos collect")
    for path in folder.glob("episode_*"):
        path.unlink()
    assert_refused(folder, "holds no episodes", "demos collect")


@pytest.mark.parametrize("kind", ["BF16", "F8_E4M3"])
def test_numbers_that_numpy_does_not_know_are_refused(folder, kind):
    """The file is whole; only what its header says of the states is foreign."""
    path = folder / "episode_00001.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    first, last = header["state"]["data_offsets"]
    size = {"BF16": 2, "F8_E4M3": 1}[kind]
    header["state"] |= {"dtype": kind, "shape": [(last - first) // size]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    assert_refused(folder, "episode_00001", "damaged or truncated")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_files_are_refused(folder, keep):
    """Cut at the very start, in the header, in the data, or by a single byte."""
    path = folder / "episode_00001.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(folder, "episode_00001", "damaged or truncated")


@pytest.mark.parametrize("at", [-1, -300, "reach the goal", "exploration"])
def test_a_wrong_bit_is_noticed(folder, at):
    """In a frame, a number, a word of the header: all of it is still a sound episode."""
    path = folder / "episode_00001.safetensors"
    data = bytearray(path.read_bytes())
    data[data.index(at.encode()) + 1 if isinstance(at, str) else at] ^= 2
    path.write_bytes(data)
    assert_refused(folder, "episode_00001", "damaged or truncated (its checksum is another)")


def test_episodes_without_a_checksum(folder):
    """Those of earlier versions and of others are read as they are."""
    from safetensors.numpy import load_file
    from safetensors.numpy import save as to_bytes

    before, *_ = load(folder)
    path = folder / "episode_00001.safetensors"
    header = {name: str(getattr(before[1], name)) for name in ("task", "instruction", "seed")}
    path.write_bytes(to_bytes(load_file(path), metadata=header | {"source": "exploration"}))
    assert_equal(load(folder)[0][1], before[1])


SMALLEST = '{"format": 1, "env": {}, "camera": null, "state_dim": %s}'


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 1, "env": {}, "camera": 3}', "\x00"]
    + [SMALLEST % size for size in ("Infinity", "NaN", "[]", "4.0", '"4"', "true", "0", "null")],
)
def test_a_damaged_description_is_refused(folder, text):
    """dataset.json that is not one."""
    (folder / "dataset.json").write_text(text)
    assert_refused(folder, "dataset.json", "not readable")


ROBOT = json.loads(json.dumps(asdict(METAWORLD)))


@pytest.mark.parametrize(
    "part, name, values",
    [
        ("camera", "fovy", ["x", None, np.nan, np.inf, 0, 180, 1e-300, 10**400, True, [42.0]]),
        ("camera", "position", [None, 0.5, "xyz", [], [1, 2], [1, 2, np.nan], [[1], [2], [3]]]),
        ("camera", "position", [[0, 0, 1e308], [0, 0, 10**400], ["a", 0, 0], [True, 0, 0]]),
        ("camera", "rotation", [None, [1, 2], [np.nan] * 9, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]]),
        ("camera", "size", [0, -16, 32, 16.0, "16", None, np.nan, True, 10**30]),
        ("camera", "turned", [None, 0, "x"]),
        ("camera", "lens", [1]),
        ("env", "size", [0, -16, 17, 32, 16.0, "16", None, np.nan, True, 10**30]),
        ("env", "chunk", [0, -1, 2.0, "2", None, np.nan, True, 1001, 10**30]),
        ("env", "horizon", [0, -1, 6.0, "6", None, np.nan, np.inf, True, 100_001]),
        ("env", "robot", [None, 3, "x", [], {"name": 3}, {"arms": 2}]),
        ("env", "robot", [ROBOT | {"name": "\ud800"}, ROBOT | {"frame": 1}]),
        ("env", "robot", [ROBOT | {"metres": x} for x in (None, "x", 0, -1, np.nan, [1])]),
        ("env", "robot", [ROBOT | {"from_hand": x} for x in (None, 0, "x")]),
        ("env", "robot", [ROBOT | {"state_dim": x} for x in (None, 4.0, True, 3, 5, [])]),
        ("env", "robot", [ROBOT | {"low": x} for x in (None, 3, [0, 0], [np.nan] * 3, [9] * 3)]),
        ("env", "robot", [ROBOT | {"spread": x} for x in (None, 3, [1] * 3, [0] * 4, ["x"] * 4)]),
        ("env", "robot", [ROBOT | {"middle": x} for x in (None, "abcd", [np.nan] * 4)]),
        (None, "robot", [None, 3, [], "\ud800"]),
        (None, "env", [None, 3, [], {"colour": 1}]),
        (None, "camera", [3, "x", [], {}]),
    ],
)
def test_a_description_of_other_types_is_refused(folder, part, name, values):
    """One field at a time: not of its type, no number, beyond all sense, not that of the frames."""
    path = folder / "dataset.json"
    sound = json.loads(path.read_text())
    for value in values:
        changed = json.loads(json.dumps(sound))
        (changed[part] if part else changed)[name] = value
        path.write_text(json.dumps(changed))
        assert_refused(folder, "dataset.json: not readable (", "collect the episodes anew")
    path.write_text(json.dumps(sound))
    assert load(folder)[2] == CAMERA


def test_whole_numbers_stand_where_others_do(folder):
    """JSON of other programs writes 0.0 as 0."""
    path = folder / "dataset.json"
    about = json.loads(path.read_text())
    about["camera"] |= {"position": [0, 0, 1], "fovy": 42}
    path.write_text(json.dumps(about))
    assert load(folder, CONFIG)[2] == replace(CAMERA, position=(0.0, 0.0, 1.0))


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nowhere"])
def test_what_is_no_file_is_refused(folder, kind):
    """A pipe above all, which one could wait for without end."""
    path = folder / "episode_00099.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(BadEpisodes, match="episode_00099.* [(]not a file[)]; delete it"):
        load(folder)
    assert len(list(folder.iterdir())) == 5


def test_a_run_s_episodes_name_their_camera(folder):
    """Episodes of others may not, but nothing can be dreamt without it."""
    assert demos.camera_of(folder) == CAMERA
    (folder / "dataset.json").write_text(SMALLEST % 4)
    assert demos.describe(folder).camera is None
    with pytest.raises(BadEpisodes, match="dataset.json: names no camera; expected.*--out"):
        demos.camera_of(folder)


def test_another_format_is_refused(folder):
    """A folder of a later version says so."""
    text = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(text.replace('"format": 1', '"format": 2'))
    assert_refused(folder, "format 2, expected 1")


def write_spoiled(folder: Path, **changes) -> None:
    """Add one episode with changed arrays or words to a sound folder."""
    save(folder, [replace(episode(3, 2, 9), **changes)], CONFIG, CAMERA)


@pytest.mark.parametrize("name", ["state", "action"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(folder, name, value):
    """A single NaN or infinity."""
    array = getattr(episode(3, 2, 9), name).copy()
    array.flat[5] = value
    write_spoiled(folder, **{name: array})
    assert_refused(folder, "episode_00003", "NaN")


def test_wrong_shapes_types_and_ranges_are_refused(folder):
    """One field at a time."""
    sound = episode(3, 2, 9)
    wrong = [
        ({"image": sound.image[:-1]}, "image"),
        ({"image": sound.image[:, :8, :8]}, "image"),
        ({"image": sound.image.astype(np.float32)}, "image"),
        ({"state": sound.state[:, :3]}, "state"),
        ({"action": sound.action[:, :1]}, "action"),
        ({"action": sound.action[:0]}, "expected"),
        ({"success": sound.success[1:]}, "success"),
        ({"action": 2 * sound.action}, "[-1, 1]"),
        ({"source": "dreamt"}, "source"),
        ({"seed": "five"}, "episode_00003"),
        ({"seed": 2**63}, "seed is 9223372036854775808, expected a whole number of 64 bits"),
        ({"seed": -(2**63) - 1}, "64 bits"),
        ({"success": sound.success * 255}, "success is not only 0 and 1"),
        ({"success": sound.success * 2}, "success is not only 0 and 1"),
    ]
    for changes, word in wrong:
        write_spoiled(folder, **changes)
        assert_refused(folder, word)
        (folder / "episode_00003.safetensors").unlink()
    assert len(load(folder)[0]) == 3


@pytest.mark.parametrize(
    "wrong",
    [{"task": x} for x in ("\ud800", None, 5)]
    + [{"instruction": x} for x in ("push \udcff it", None, b"x")]
    + [{"seed": x} for x in (1.0, None, "7", True, 2**63)]
    + [{"source": x} for x in (None, "", [])],
)
def test_words_that_could_not_be_written_again(wrong):
    """Half a surrogate pair, a number too large, no text at all: refused where they are read."""
    sound = {"task": "tâche", "instruction": "推す 🙂", "seed": -(2**63), "source": "expert"}
    check_words("here", **sound)
    with pytest.raises(
        BadEpisodes, match=f"^here: {next(iter(wrong))} is .*expected.*leave it out"
    ):
        check_words("here", **(sound | wrong))


def test_another_size_chunk_or_task_is_refused(folder):
    """A folder that is sound but not this run's."""
    assert_refused(folder, "size 16", "expects 32", expected=replace(CONFIG, size=32))
    assert_refused(folder, "chunk 2", "expects 4", expected=replace(CONFIG, chunk=4))
    assert_refused(folder, "task 'reach'", "push", tasks=("push",))
    with pytest.raises(BadEpisodes, match="expects 32"):
        save(folder, [episode(2, None)], replace(CONFIG, size=32), replace(CAMERA, size=32))
    assert len(load(folder)[0]) == 3


def test_old_folders_have_four_dimensions(folder):
    """dataset.json once had neither robot nor dimensions: they were always Meta-World's."""
    path = folder / "dataset.json"
    text = json.loads(path.read_text())
    for name in ("robot", "state_dim", "action_dim"):
        del text[name]
    path.write_text(json.dumps(text))
    about = demos.describe(folder)
    assert (about.robot, about.state_dim, about.action_dim) == (demos.ROBOT, 4, 4)
    assert len(load(folder, CONFIG)[0]) == 3


def test_another_robot_is_kept_but_not_for_a_run(tmp_path):
    """Its folder says its dimensions and is held to them; who expects Meta-World is told."""
    path = tmp_path / "theirs"
    other = replace(
        episode(3, 2), state=np.zeros((4, 8), np.float32), action=np.zeros((3, 2, 7), np.float32)
    )
    save(path, [other], CONFIG, None, robot="panda")
    save(path, [other], CONFIG, None, robot="panda")
    episodes, config, camera = load(path)
    assert len(episodes) == 2 and config == CONFIG and camera is None
    assert_equal(episodes[1], other)
    assert demos.describe(path) == demos.Description(CONFIG, None, "panda", 8, 7)
    words = ("another robot (panda, state 8, action 7)", "metaworld", "demos collect")
    assert_refused(path, *words, expected=CONFIG)
    write_spoiled(path, state=np.zeros((4, 4), np.float32))
    assert_refused(path, "episode_00002", "state")


# ------------------------------------------------------------------------------------------ looking


def test_statistics_count_by_task_and_source():
    """Episodes, successes, decisions, positive frames, split."""
    dev = SPLITS["dev"].start
    episodes = [episode(3, 2), episode(5, None, 1), episode(4, 4, dev, "push")]
    assert statistics(episodes) == {
        "reach / exploration": {
            "episodes": 2,
            "successes": 1,
            "decisions": 8,
            "positive_frames": 2,
            "split": "demo",
        },
        "push / exploration": {
            "episodes": 1,
            "successes": 1,
            "decisions": 4,
            "positive_frames": 1,
            "split": "dev",
        },
    }


def test_contact_sheet_shows_first_to_last_frame():
    """One row per episode, evenly spread frames enlarged two times, successes framed in green."""
    episodes = [episode(7, 4), episode(3, None, 1)]
    sheet = contact_sheet(episodes, columns=4, scale=2)
    side = 16 * 2 + 4
    assert sheet.shape == (2 * side, 4 * side, 3) and sheet.dtype == np.uint8
    tiles = sheet.reshape(2, side, 4, side, 3).swapaxes(1, 2)
    for row, one in enumerate(episodes):
        picks = np.linspace(0, len(one), 4).round().astype(int)
        assert picks[0] == 0 and picks[-1] == len(one)
        for column, t in enumerate(picks):
            tile = tiles[row, column]
            assert (tile[2:-2:2, 2:-2:2] == one.image[t]).all()
            assert (tile[3:-2:2, 3:-2:2] == one.image[t]).all()
            border = (0, 158, 115) if one.success[t] else (255, 255, 255)
            assert (tile[:2] == border).all() and (tile[:, -2:] == border).all()


def test_pictures_are_read_back(tmp_path):
    """PNG keeps every pixel."""
    image = contact_sheet([episode(3, 2)])
    write_png(tmp_path / "sheet.png", image)
    assert (imageio.imread(tmp_path / "sheet.png")[..., :3] == image).all()


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_films_can_be_played(tmp_path, suffix):
    """All frames, in order, enlarged, in the right colours; no temporary file stays."""
    frames = np.zeros((5, 16, 32, 3), np.uint8)
    for t in range(5):
        frames[t, :, :, 0] = 50 * t  # ever more red
    path = tmp_path / f"film{suffix}"
    write_film(path, frames, scale=4)
    film = np.stack(list(imageio.imiter(path)))[..., :3].astype(int)
    assert film.shape == (5, 64, 128, 3)
    for t in range(5):
        assert abs(film[t, :, :, 0].mean() - 50 * t) < 8 and film[t, :, :, 1:].mean() < 8
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_film_that_was_cut_off_is_removed(tmp_path, monkeypatch):
    """Killed between writing and renaming: the next `train` finds what is left by its name."""
    run = runs.Run.create(tmp_path / "run", runs.preset("debug"))
    monkeypatch.setattr(demos.os, "replace", lambda *_: None)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    write_film(run.folder / "film.gif", np.zeros((2, 16, 16, 3), np.uint8))
    monkeypatch.undo()
    assert len(list(run.folder.iterdir())) == 2
    run.forget_unfinished()
    assert [path.name for path in run.folder.iterdir()] == ["config.json"]


def test_a_film_of_another_kind_is_refused(tmp_path):
    """With the kinds that there are, and without a trace."""
    with pytest.raises(ValueError, match=r"\.gif or \.mp4"):
        write_film(tmp_path / "film.avi", np.zeros((2, 16, 16, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []

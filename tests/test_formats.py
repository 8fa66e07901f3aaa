"""Data sets of others: small real files written here, read back by the real commands.

HDF5 as LIBERO and robomimic have it, LeRobotDataset v3 as its documentation and its own reader have
it; what is damaged, foreign or hostile costs one line and leaves the disk as it was.
"""

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_cli import assert_one_line, in_process, make_episode, make_episodes
from trees import tree

import demos
import export
import formats
from demos import BadEpisodes
from tasks import EnvConfig

REASON = "needs requirements-data.txt"
h5py = pytest.importorskip("h5py", reason=REASON)
pa = pytest.importorskip("pyarrow", reason=REASON)
pq = pytest.importorskip("pyarrow.parquet", reason=REASON)

N = 11  # steps of a recorded episode: 10 actions between frames, so 3 decisions of 4


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pictures(count: int = N, size: int = 32, width: int | None = None) -> np.ndarray:
    """Frames (N, H, W, 3) that tell number, top from bottom and left from right: the upper left
    quarter is red, the whole grows lighter by 16 a frame."""
    image = np.zeros((count, size, width or size, 3), np.uint8)
    image[:] = 16 * np.arange(count)[:, None, None, None]
    image[:, : size // 2, : (width or size) // 2, 0] = 255
    return image


def write_hdf5(path: Path, numbers=(0,), image=None, drop=(), robomimic=False, **changes) -> Path:
    """A file in LIBERO's (or robomimic's) layout: state n and action n / 100 say their number."""
    image = pictures()[:, ::-1] if image is None else image
    count = len(image)
    steps = np.arange(count, dtype=np.float64)
    names = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
    names = names if robomimic else ("ee_pos", "ee_ori", "gripper_states")
    widths = (3, 4, 2) if robomimic else (3, 3, 2)
    arrays = {
        "actions": np.repeat(steps[:, None] / 100, 7, axis=1),
        "rewards": (steps == count - 1).astype(np.uint8),
        "dones": (steps == count - 1).astype(np.uint8),
        "obs/agentview_image" if robomimic else "obs/agentview_rgb": image,
    }
    arrays |= {f"obs/{n}": np.repeat(steps[:, None], w, axis=1) for n, w in zip(names, widths)}
    arrays = {k: v for k, v in (arrays | changes).items() if k not in drop}
    with h5py.File(path, "w") as file:
        file.create_group("data")
        for number in numbers:
            for name, values in arrays.items():
                file[f"data/demo_{number}/{name}"] = values
    return path


def convert(source, *options, out="out") -> list[demos.Episode]:
    """`demos load SOURCE --out OUT` and the episodes that it wrote."""
    result = in_process("demos", "load", source, "--out", out, *options)
    assert result.exit_code == 0, result.stderr or result.exception
    assert result.stdout.startswith("OK: "), result.stdout
    return demos.load(Path(out))[0]


def assert_same(ours: list[demos.Episode], theirs: list[demos.Episode], tolerance: int = 0) -> None:
    """Equal in every array and word; images within `tolerance` grey levels on average."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        for name in ("state", "action", "success", "task", "instruction", "seed", "source"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name
        assert a.image.shape == b.image.shape
        assert np.abs(a.image.astype(int) - b.image).mean() <= tolerance


# --------------------------------------------------------------------------------------------- HDF5


def test_libero_as_published(here):
    """Image after its action, upside down: a_1 leads from o_0 to o_1; 8-D state, 7-D action."""
    write_hdf5(here / "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5")
    (episode,) = convert("KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5", "--size", 32)
    assert episode.state[:, 0].tolist() == [0, 4, 8, 10] and episode.state.shape == (4, 8)
    assert episode.action.shape == (3, 4, 7)
    expected = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 10, 10]]) / 100
    assert np.allclose(episode.action[:, :, 0], expected)
    assert episode.success.tolist() == [0, 0, 0, 1] and episode.source == "expert"
    assert np.array_equal(episode.image, pictures()[[0, 4, 8, 10]])
    assert episode.task == "KITCHEN_SCENE3_turn_on_the_stove"
    assert episode.instruction == "turn on the stove"
    about = demos.describe(Path("out"))
    assert about.camera is None and about.robot == "hdf5" and about.env.horizon == 3
    assert (about.state_dim, about.action_dim) == (8, 7)
    described = json.loads(Path("out/dataset.json").read_text())
    assert described["arrays"]["action"].startswith("(T, K, 7)")


def test_image_before_its_action(here):
    """a_0 leads from o_0 to o_1; the flag of the last action goes to the last frame."""
    write_hdf5(here / "pick_demo.hdf5")
    (episode,) = convert("pick_demo.hdf5", "--recorded", "before", "--size", 32, "--chunk", 5)
    expected = np.arange(10).reshape(2, 5) / 100
    assert np.allclose(episode.action[:, :, 0], expected)
    assert episode.success.tolist() == [0, 0, 1]


def test_orientations(here):
    """Upside down is the default; upright and mirrored are options."""
    write_hdf5(here / "a.hdf5")
    (turned,) = convert("a.hdf5", "--size", 32)
    (mirrored,) = convert("a.hdf5", "--size", 32, "--mirrored", out="mirrored")
    (kept,) = convert("a.hdf5", "--size", 32, "--upright", out="kept")
    assert np.array_equal(mirrored.image, turned.image[:, :, ::-1])
    assert np.array_equal(kept.image, turned.image[:, ::-1])


def test_robomimic(here):
    write_hdf5(here / "lift.hdf5", robomimic=True, image=pictures())
    (episode,) = convert("lift.hdf5", "--recorded", "before", "--upright", "--size", 32)
    assert episode.state.shape == (4, 9) and np.array_equal(
        episode.image, pictures()[[0, 4, 8, 10]]
    )


def test_demos_with_gaps_come_in_numerical_order(here):
    (here / "files").mkdir()
    write_hdf5(here / "files" / "b.hdf5", numbers=(10, 2, 7))
    write_hdf5(here / "files" / "a.hdf5", numbers=(3,))
    episodes = convert("files", "--size", 32)
    assert [(e.task, e.seed) for e in episodes] == [("a", 3), ("b", 2), ("b", 7), ("b", 10)]


def test_pictures_are_averaged_and_cut_to_the_middle(here):
    """64 x 96 -> the middle 64 x 64 -> 32 x 32, each pixel the mean of four."""
    image = np.random.default_rng(0).integers(0, 256, (N, 64, 96, 3), dtype=np.uint8)
    write_hdf5(here / "a.hdf5", image=image)
    (episode,) = convert("a.hdf5", "--size", 32, "--upright")
    mean = image[0, :, 16:80].reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(episode.image[0] - mean).max() <= 1  # rounded once a side


def test_success_without_labels_and_failures(here):
    """No flags: the last frame. All zero: a failure, which is no demonstration."""
    write_hdf5(here / "a.hdf5", drop=("rewards", "dones"))
    write_hdf5(here / "b.hdf5", rewards=np.zeros(N))
    (episode,) = convert("a.hdf5", out="a")
    assert episode.success.tolist() == [0, 0, 0, 1] and episode.source == "expert"
    (episode,) = convert("b.hdf5", "--instruction", "fail well", out="b")
    assert not episode.success.any() and episode.source == "exploration"
    assert episode.instruction == "fail well"


def test_a_run_refuses_another_robot(here):
    """Its episodes can be checked and exported; whoever wants to train with them is told."""
    write_hdf5(here / "a.hdf5")
    convert("a.hdf5")
    with pytest.raises(BadEpisodes, match=r"another robot \(hdf5, state 8, action 7\).*metaworld"):
        demos.load(Path("out"), EnvConfig())
    assert in_process("demos", "load", "out").exit_code == 0
    assert in_process("demos", "inspect", "out", "--out", "pictures").exit_code == 0
    result = in_process("demos", "export", "out", "--out", "lr", "--fps", 5)
    assert result.exit_code == 0, result.stderr
    convert("lr", out="again")
    assert_same(demos.load(Path("out"))[0], demos.load(Path("again"))[0])


def link_outside(path: Path) -> Path:
    """A file whose actions lie in another file."""
    write_hdf5(path, drop=("actions",))
    write_hdf5(path.with_name("secret.h5"))
    with h5py.File(path, "a") as file:
        file["data/demo_0/actions"] = h5py.ExternalLink("secret.h5", "data/demo_0/actions")
    return path


def raw_outside(path: Path) -> Path:
    """A file whose actions are the bytes of another file."""
    write_hdf5(path, drop=("actions",))
    path.with_name("secret.bin").write_bytes(bytes(N * 7 * 8))
    with h5py.File(path, "a") as file:
        secret = [("secret.bin", 0, N * 7 * 8)]
        file["data/demo_0"].create_dataset("actions", (N, 7), "f8", external=secret)
    return path


def cut(path: Path, keep: float = 0.5) -> Path:
    """The first part of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    return path


def empty(path: Path) -> Path:
    return write_hdf5(path, numbers=())


def no_hdf5(path: Path) -> Path:
    path.write_text("not this")
    return path


BAD_HDF5 = {
    "not HDF5": (no_hdf5, ["bad.hdf5", "not an HDF5 file"]),
    "truncated": (lambda p: cut(write_hdf5(p)), ["bad.hdf5", "truncated"]),
    "no demonstrations": (empty, ["no demonstrations", "demo_0"]),
    "no data": (lambda p: h5py.File(p, "w").close() or p, ["no data"]),
    "no actions": (lambda p: write_hdf5(p, drop=["actions"]), ["demo_0", "no actions"]),
    "no images": (lambda p: write_hdf5(p, drop=["obs/agentview_rgb"]), ["no agentview_rgb"]),
    "no state": (lambda p: write_hdf5(p, drop=["obs/ee_ori"]), ["no ee_pos+ee_ori"]),
    "lengths": (lambda p: write_hdf5(p, actions=np.zeros((N - 1, 7))), ["length [10, 11]"]),
    "one step": (lambda p: write_hdf5(p, image=pictures(1)), ["N of 2 or more"]),
    "floats": (lambda p: write_hdf5(p, image=pictures() / 255), ["float64", "expected uint8"]),
    "words": (lambda p: write_hdf5(p, actions=np.array([b"a"] * N)), ["actions is"]),
    "NaN": (lambda p: write_hdf5(p, actions=np.full((N, 7), np.nan)), ["NaN"]),
    "wild": (lambda p: write_hdf5(p, actions=np.full((N, 7), 3.0)), ["reach 3", "[-1, 1]"]),
    "linked": (link_outside, ["actions points elsewhere"]),
    "raw": (raw_outside, ["actions points elsewhere"]),
}


@pytest.mark.parametrize("name", BAD_HDF5)
def test_bad_hdf5(here, name):
    damage, words = BAD_HDF5[name]
    damage(here / "bad.hdf5")
    before = tree(here)
    assert_one_line(in_process("demos", "load", "bad.hdf5", "--out", "out"), *words)
    assert tree(here) == before


def test_words_that_are_no_unicode(here):
    """Of a file's name, of an option: a shell hands over any bytes."""
    write_hdf5(here / "a.hdf5")
    name = os.fsdecode(b"turn_\xff_demo.hdf5")
    try:
        shutil.copy(here / "a.hdf5", here / name)
    except OSError:
        pytest.skip("this file system knows only names that are Unicode")
    before = tree(here)
    words = ["turn_\\udcff_demo.hdf5", "not UTF-8", "rename it"]
    assert_one_line(in_process("demos", "load", name, "--out", "out"), *words)
    options = ("--out", "out", "--instruction", "push \udcff")
    result = in_process("demos", "load", "a.hdf5", *options)
    assert_one_line(result, "push \\udcff", "not UTF-8", "type it anew")
    assert tree(here) == before


def test_pipes_are_not_waited_for(here):
    """In the place of a file of any format."""
    for name in ("pipes", "lr/meta"):
        (here / name).mkdir(parents=True)
    os.mkfifo(here / "pipes" / "a.hdf5")
    os.mkfifo(here / "lr" / "meta" / "info.json")
    result = in_process("demos", "load", "pipes", "--out", "out")
    assert_one_line(result, "pipes: nothing to convert")
    assert_one_line(in_process("demos", "load", "lr", "--out", "out"), "info.json", "no such file")
    make_episodes(here / "good")
    os.mkfifo(here / "good" / "episode_00099.safetensors")
    assert_one_line(in_process("demos", "load", "good"), "episode_00099", "not a file")


def test_episodes_beyond_any_horizon(here, monkeypatch):
    """Larger chunks make fewer decisions of the same recording."""
    write_hdf5(here / "a.hdf5", image=pictures(35))
    monkeypatch.setitem(formats.LARGEST, "horizon", 30)
    before = tree(here)
    result = in_process("demos", "load", "a.hdf5", "--out", "out", "--chunk", 1)
    assert_one_line(result, "a.hdf5: an episode of 34 decisions", "at most 30", "--chunk")
    assert tree(here) == before
    convert("a.hdf5", "--chunk", 2)


def test_mixed_image_sizes(here):
    (here / "files").mkdir()
    write_hdf5(here / "files" / "a.hdf5")
    write_hdf5(here / "files" / "b.hdf5", image=pictures(size=48))
    before = tree(here)
    result = in_process("demos", "load", "files", "--out", "out")
    assert_one_line(result, "b.hdf5", "48 x 48", "32 x 32", "one size")
    assert tree(here) == before


@pytest.mark.parametrize("option", ["--recorded before", "--upright", "--mirrored", "--image x"])
def test_options_of_converting_need_out(here, option):
    make_episodes(here / "good")
    assert_one_line(in_process("demos", "load", "good", *option.split()), "--out")


def test_bad_uses_of_out(here):
    """Nothing is overwritten, and nothing impossible is begun."""
    write_hdf5(here / "a.hdf5")
    make_episodes(here / "full")
    (here / "nothing").mkdir()
    before = tree(here)
    for words, command in (
        (["full: not empty", "new folder"], "load a.hdf5 --out full"),
        (["full: not empty", "new folder"], "export full --out full"),
        (["a.hdf5", "is a file"], "load a.hdf5 --out a.hdf5/x"),
        (["full: nothing to convert", "without --out"], "load full --out new"),
        (["nothing: nothing to convert", "LeRobotDataset v3"], "load nothing --out new"),
        (["nowhere: nothing to convert"], "load nowhere --out new"),
        (["'later'", "before, after"], "load a.hdf5 --out new --recorded later"),
        (["no wrist", "agentview_rgb"], "load a.hdf5 --out new --image wrist"),
        (["63", "multiple of 16"], "load a.hdf5 --out new --size 63"),
        (["got 0", "1 or more"], "load a.hdf5 --out new --chunk 0"),
        (["at most 1000"], "load a.hdf5 --out new --chunk 100000000"),
        (["chunk", "at most 1000"], f"load a.hdf5 --out new --chunk {'9' * 30}"),
        (["size", "at most 1024"], f"load a.hdf5 --out new --size {'9' * 30}"),
        (["chunk", "at most 1000"], f"collect new --chunk {'9' * 30}"),
        (["horizon", "at most 100000"], f"collect new --horizon {'9' * 30}"),
        (["size", "at most 1024"], f"collect new --size {16 * 10**30}"),
        (["--tasks"], "load a.hdf5 --out new --tasks reach"),
        (["got 0", "--fps"], "export full --out new --fps 0"),
        (["a.hdf5", "no such folder", "--out"], "load a.hdf5"),
        (["nothing", "no dataset.json", "--out"], "export nothing --out new"),
    ):
        assert_one_line(in_process("demos", *command.split()), *words)
        assert tree(here) == before, command


def test_the_example_of_the_page_runs(here):
    """docs/data.md as it stands: the file that it writes, then its commands in their order."""
    page = (Path(demos.__file__).parent / "docs" / "data.md").read_text()
    example, commands, _ = re.findall(r"^```(?:python)?\n(.*?)^```", page, re.M | re.S)
    exec(compile(example, "docs/data.md", "exec"), {})
    for line in commands.splitlines():
        result = in_process(*shlex.split(line.removeprefix("python cli.py ")))
        assert result.exit_code == 0, (line, result.stderr)
    first, again = (demos.load(Path(name))[0] for name in ("data/stove", "data/stove_again"))
    assert_same(first, again)
    assert first[0].succeeded and first[0].instruction == "turn on the stove"


# ---------------------------------------------------------------------------------- LeRobotDataset


def exported(here: Path, *options) -> Path:
    """An export of three episodes of two tasks, one of which is a success from the start."""
    good, failed = make_episode(length=5), make_episode("push", length=2, seed=100_000)
    failed.success[:], failed.source, failed.instruction = 0, "exploration", "push it"
    begun = make_episode(seed=9)
    begun.success[:] = [1, 0, 1, 1]
    for episode in (good, failed, begun):
        episode.image = pictures(len(episode) + 1, 64)
    make_episodes(here / "mine", good, failed, begun)
    result = in_process("demos", "export", "mine", "--out", "lr", *options)
    assert result.exit_code == 0, result.stderr or result.exception
    return here / "lr"


@pytest.mark.parametrize("options, tolerance", [((), 0), (("--video",), 4)])
def test_export_and_load_give_the_same_episodes(here, options, tolerance):
    """To the last bit with PNG columns; a film may be off by a few grey levels (frames differ by
    16, so a film that is off by one frame would fail)."""
    exported(here, *options)
    assert_same(demos.load(here / "mine")[0], convert("lr"), tolerance)
    assert demos.describe(here / "mine") == demos.describe(here / "out")
    demos.load(here / "out", EnvConfig())  # fit for training, with their camera


def test_episodes_in_two_files(here):
    """Large data sets of LeRobot have many; here the first episode has a file of its own."""
    folder = exported(here)
    table, (place,) = pq.read_table(folder / DATA), (folder / "meta/episodes").glob("*/*.parquet")
    pq.write_table(table.slice(0, 6), folder / DATA)
    pq.write_table(table.slice(6), folder / DATA.replace("file-000", "file-001"))
    lines = pq.read_table(place)
    column = lines.column_names.index("data/file_index")
    pq.write_table(lines.set_column(column, "data/file_index", pa.array([0, 1, 1])), place)
    assert_same(demos.load(here / "mine")[0], convert("lr"))


def test_a_film_in_av1(here):
    """What LeRobot itself writes; ours are H.264."""
    from imageio_ffmpeg import get_ffmpeg_exe

    ffmpeg = [get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error"]
    known = subprocess.run([ffmpeg[0], "-encoders"], capture_output=True, text=True).stdout
    encoder = next((name for name in ("libsvtav1", "libaom-av1") if name in known), None)
    if encoder is None:
        pytest.skip("this ffmpeg writes no AV1")
    folder = exported(here, "--video")
    ours = (folder / FILM).rename(here / "h264.mp4")
    words = ["-i", ours, "-c:v", encoder, "-g", "2", "-crf", "10", folder / FILM]
    subprocess.run([*ffmpeg, *map(str, words)], check=True)
    assert_same(demos.load(here / "mine")[0], convert("lr"), 4)


FEATURES = {
    "observation.images.image": ("image", [64, 64, 3]),
    "observation.state": ("float32", [4]),
    "action": ("float32", [16]),
    "next.reward": ("float32", [1]),
    "next.done": ("bool", [1]),
    "next.success": ("bool", [1]),
    "timestamp": ("float32", [1]),
    "frame_index": ("int64", [1]),
    "episode_index": ("int64", [1]),
    "index": ("int64", [1]),
    "task_index": ("int64", [1]),
}


def test_layout_of_an_export(here):
    """The files, fields and columns that LeRobotDataset v3 documents."""
    folder = exported(here)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    episodes, data = "meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"
    meta = {"meta/info.json", "meta/stats.json", "meta/tasks.parquet"}
    assert files == meta | {episodes, data}
    info = json.loads((folder / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["fps"] == 20
    assert [info[f"total_{name}"] for name in ("episodes", "frames", "tasks")] == [3, 13, 2]
    assert info["splits"] == {"train": "0:3"} and info["video_path"] is None
    assert info["data_path"] == "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    assert {k: (f["dtype"], f["shape"]) for k, f in info["features"].items()} == FEATURES

    table = pq.read_table(folder / data)
    assert set(table.column_names) == set(FEATURES)
    assert table.schema.field("action").type == pa.list_(pa.float32(), 16)
    assert table["index"].to_pylist() == list(range(13))
    assert pq.ParquetFile(folder / data).num_row_groups == 3
    rows = pq.read_table(folder / episodes).to_pylist()
    assert [(r["dataset_from_index"], r["dataset_to_index"]) for r in rows] == [
        (0, 6), (6, 9), (9, 13),
    ]  # fmt: skip
    assert [(r["episode_index"], r["length"], r["tasks"]) for r in rows] == [
        (0, 6, ["reach the goal"]), (1, 3, ["push it"]), (2, 4, ["reach the goal"]),
    ]  # fmt: skip
    assert {f"stats/{key}/q99" for key in FEATURES} <= rows[0].keys()
    tasks = pq.read_table(folder / "meta/tasks.parquet")
    assert tasks.to_pydict() == {"task_index": [0, 1], "task": ["push it", "reach the goal"]}
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]


def test_statistics_against_numpy(here):
    """Over every row; pictures per channel in [0, 1]."""
    folder = exported(here)
    stats = json.loads((folder / "meta/stats.json").read_text())
    table = pq.read_table(folder / "data/chunk-000/file-000.parquet")
    action = np.array(table["action"].to_pylist())
    for name, expected in (
        ("min", action.min(0)), ("max", action.max(0)), ("mean", action.mean(0)),
        ("std", action.std(0)), ("q10", np.quantile(action, 0.1, axis=0)), ("count", [13]),
    ):  # fmt: skip
        assert np.allclose(stats["action"][name], expected), name
    image = np.concatenate([e.image for e in demos.load(here / "mine")[0]]) / 255
    assert np.allclose(np.ravel(stats["observation.images.image"]["mean"]), image.mean((0, 1, 2)))
    assert np.shape(stats["observation.images.image"]["q99"]) == (3, 1, 1)


def test_layout_of_a_film(here):
    """Every episode's place in the film, in seconds."""
    folder = exported(here, "--video")
    film = "videos/observation.images.image/chunk-000/file-000.mp4"
    assert (folder / film).is_file()
    info = json.loads((folder / "meta/info.json").read_text())
    assert info["features"]["observation.images.image"]["dtype"] == "video"
    assert info["features"]["observation.images.image"]["info"]["video.codec"] == "h264"
    key = "videos/observation.images.image"
    rows = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    times = [(r[f"{key}/from_timestamp"], r[f"{key}/to_timestamp"]) for r in rows]
    assert np.allclose(times, np.array([(0, 6), (6, 9), (9, 13)]) / 20)
    table = pq.read_table(folder / "data/chunk-000/file-000.parquet")
    assert "observation.images.image" not in table.column_names


@pytest.mark.parametrize("options, tolerance", [((), 0), (("--video",), 4)])
def test_lerobots_own_reader_agrees(here, monkeypatch, options, tolerance):
    """The `lerobot` package, where it is installed, reads an export: pictures, states, actions,
    sentences, windows over time, and statistics that its own merging gives as well."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(here / "cache"))
    reason = "needs lerobot with torchvision"
    lerobot = pytest.importorskip("lerobot.datasets.lerobot_dataset", reason=reason)
    exported(here, *options)
    data = lerobot.LeRobotDataset("local/test", root=here / "lr")
    rows = [(e, t) for e in demos.load(here / "mine")[0] for t in range(len(e) + 1)]
    assert len(data) == len(rows) and data.num_episodes == 3
    for row, (episode, t) in zip((data[n] for n in range(len(rows))), rows):
        image = (255 * row["observation.images.image"].numpy()).round().transpose(1, 2, 0)
        assert np.abs(image - episode.image[t]).mean() <= tolerance
        assert np.array_equal(row["observation.state"].numpy(), episode.state[t])
        assert row["task"] == episode.instruction
        assert bool(row["next.done"]) == (t == len(episode))
        if t < len(episode):
            assert np.array_equal(row["action"].numpy(), episode.action[t].ravel())
    windows = {"action": [0, 1 / 20]}
    data = lerobot.LeRobotDataset("local/test", root=here / "lr", delta_timestamps=windows)
    assert data[3]["action"].shape == (2, 16)


def foreign(here: Path, count: int = N, drop=(), **columns) -> Path:
    """A data set that somebody else wrote: one action a step, none of our own fields, the sentence
    as an index without a name, two cameras."""
    image = pictures(count, 48, 64)
    values = {
        "observation.images.front": [{"bytes": as_png(i), "path": "x.png"} for i in image],
        "observation.images.wrist": [{"bytes": as_png(255 - i), "path": ""} for i in image],
        "observation.state": [[float(n)] * 8 for n in range(count)],
        "action": [[n / 100] * 7 for n in range(count)],
        "episode_index": [0] * count,
        "frame_index": list(range(count)),
        "task_index": [4] * count,
    } | columns
    camera = {"dtype": "image", "shape": [48, 64, 3]}
    info = {
        "codebase_version": "v3.0",
        "robot_type": "panda",
        "fps": 10,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "features": {
            "observation.images.front": camera,
            "observation.images.wrist": camera,
            "observation.state": {"dtype": "float32", "shape": [8]},
            "action": {"dtype": "float32", "shape": [7]},
        },
    }
    lines = {"episode_index": [0], "length": [count], "data/chunk_index": [0]}
    lines |= {"data/file_index": [0]}
    folder = here / "theirs"
    for name, table in (
        ("data/chunk-000/file-000", {k: v for k, v in values.items() if k not in drop}),
        ("meta/episodes/chunk-000/file-000", lines),
        ("meta/tasks", {"task_index": [4], "__index_level_0__": ["Put it in, please!"]}),
    ):
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), path)
    (folder / "meta/info.json").write_text(json.dumps(info))
    return folder


def as_png(image: np.ndarray) -> bytes:
    import imageio.v3 as imageio

    return imageio.imwrite("<bytes>", image, extension=".png")


def test_a_foreign_data_set(here):
    """a_0 leads from o_0 to o_1, pictures are cut to the middle, the first camera is taken."""
    foreign(here)
    (episode,) = convert("theirs", "--size", 48)
    assert episode.state[:, 0].tolist() == [0, 4, 8, 10]
    expected = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]) / 100
    assert np.allclose(episode.action[:, :, 0], expected)
    assert np.array_equal(episode.image, pictures(N, 48, 64)[[0, 4, 8, 10], :, 8:56])
    assert episode.success.tolist() == [0, 0, 0, 1]
    assert (episode.instruction, episode.task) == ("Put it in, please!", "put-it-in-please")
    assert demos.describe(here / "out").robot == "lerobot:panda"
    wrist, *_ = convert("theirs", "--size", 48, "--image", "observation.images.wrist", out="wrist")
    assert np.array_equal(wrist.image, 255 - episode.image)


def test_a_camera_of_distances_is_passed_over(here):
    """The first camera that sees colours is taken."""
    path = foreign(here) / "meta/info.json"
    info = json.loads(path.read_text())
    front = info["features"]["observation.images.front"]
    info["features"]["observation.images.front"] = front | {"info": {"is_depth_map": True}}
    path.write_text(json.dumps(info))
    (episode,) = convert("theirs", "--size", 48)
    assert np.array_equal(episode.image, 255 - pictures(N, 48, 64)[[0, 4, 8, 10], :, 8:56])


def test_an_export_knows_the_rate_of_its_robot(here):
    """80 steps a second by K, LIBERO's 20; of another robot it has to be told."""
    for robot, chunk, rate in (("metaworld", 4, 20), ("libero", 8, 2), ("libero", 40, 1)):
        about = demos.Description(EnvConfig(chunk=chunk), None, robot)
        assert export.decisions_per_second(about) == rate
    foreign(here)
    convert("theirs")
    before = tree(here)
    result = in_process("demos", "export", "out", "--out", "again")
    assert_one_line(result, "--fps: not given", "lerobot:panda", "add --fps")
    assert tree(here) == before


def test_labels_of_a_foreign_data_set(here):
    """next.success before a sparse reward before next.done; a dense reward is passed over."""
    done = [n == N - 1 for n in range(N)]
    for number, (columns, expected) in enumerate((
        ({"next.success": [False] * N, "next.done": done}, [0, 0, 0, 0]),
        ({"next.reward": [float(n in (7, 8)) for n in range(N)]}, [0, 0, 1, 0]),
        ({"next.reward": [n / 10 for n in range(N)], "next.done": done}, [0, 0, 0, 1]),
    )):  # fmt: skip
        foreign(here, **columns)
        (episode,) = convert("theirs", out=f"out{number}")
        assert episode.success.tolist() == expected


def change_info(**values):
    """Damage that changes info.json; a value of None takes the field away."""

    def damage(folder: Path) -> None:
        path = folder / "meta/info.json"
        info = json.loads(path.read_text()) | values
        path.write_text(json.dumps({k: v for k, v in info.items() if v is not None}))

    return damage


def without(name: str):
    return lambda folder: (folder / name).unlink()


def drop_column(name: str, file: str = "data/chunk-000/file-000.parquet"):
    def damage(folder: Path) -> None:
        pq.write_table(pq.read_table(folder / file).drop_columns(name), folder / file)

    return damage


EPISODES = "meta/episodes/chunk-000/file-000.parquet"


def change_column(name: str, value, file: str = "data/chunk-000/file-000.parquet"):
    """Damage that writes one value into every row of a column, which may be a new one."""

    def damage(folder: Path) -> None:
        table = pq.read_table(folder / file)
        if name in table.column_names:
            table = table.drop_columns(name)
        pq.write_table(table.append_column(name, pa.array([value] * len(table))), folder / file)

    return damage


def words_of_no_unicode(folder: Path) -> None:
    """Parquet says that it is text, and does not look."""
    offsets, content = np.array([0, 2], np.int32), b"\xff\xfe"
    words = pa.StringArray.from_buffers(1, pa.py_buffer(offsets), pa.py_buffer(content))
    table = pa.table({"task_index": [4], "task": words})
    pq.write_table(table, folder / "meta/tasks.parquet")


def cut_rows(folder: Path) -> None:
    path = folder / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).slice(0, 5), path)


def words_for_indices(folder: Path) -> None:
    table = pq.read_table(folder / DATA)
    index = table.column_names.index("episode_index")
    words = pa.array([["zero"]] * len(table))
    pq.write_table(table.set_column(index, "episode_index", words), folder / DATA)


def no_episodes(folder: Path) -> None:
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)


def no_pictures(folder: Path) -> None:
    path = folder / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    cells = pa.array([{"bytes": b"GIF89a", "path": "/etc/passwd"}] * len(table))
    index = table.column_names.index("observation.images.front")
    pq.write_table(table.set_column(index, "observation.images.front", cells), path)


DATA = "data/chunk-000/file-000.parquet"
BAD_LEROBOT = {
    "version": (change_info(codebase_version="v2.1"), ["v2.1", "expected v3.0", "convert"]),
    "no info": (without("meta/info.json"), ["info.json", "not readable"]),
    "broken info": (lambda f: (f / "meta/info.json").write_text("["), ["info.json", "readable"]),
    "no features": (change_info(features=None), ["info.json", "features"]),
    "no cameras": (change_info(features={
        "observation.state": {"dtype": "float32", "shape": [8]},
        "action": {"dtype": "float32", "shape": [7]},
    }), ["no camera"]),
    "no action": (change_info(features={}), ["no feature observation.state and action"]),
    "no rate": (change_info(fps=0), ["fps 0"]),
    "no tasks": (without("meta/tasks.parquet"), ["tasks.parquet", "no such file"]),
    "no episode list": (lambda f: shutil.rmtree(f / "meta/episodes"), ["no episodes"]),
    "no episodes": (no_episodes, ["no episodes"]),
    "no data": (without(DATA), [DATA, "no such file"]),
    "truncated data": (lambda f: cut(f / DATA), [DATA, "not readable"]),
    "no state column": (drop_column("observation.state"), ["no column observation.state"]),
    "no picture column": (drop_column("observation.images.front"), ["no column observation.im"]),
    "no length": (drop_column("length", "meta/episodes/chunk-000/file-000.parquet"), ["length"]),
    "indices in words": (words_for_indices, ["episode 0", "no numbers"]),
    "too few rows": (cut_rows, ["episode 0", "5 rows", "expected 11"]),
    "no pictures": (no_pictures, ["picture is not readable"]),
    "two flags": (change_column("next.success", [0.0, 1.0]),
                  ["next.success has the shape [11, 2]", "expected one number a row, [11]"]),
    "no flags": (change_column("next.done", []),
                 ["next.done", "[11, 0]", "one number a row"]),
    "flags of flags": (change_column("next.reward", [[1.0], [0.0]]), ["[11, 2, 1]"]),
    "words as flags": (change_column("next.success", "yes"), ["next.success is not numeric"]),
    "empty states": (change_column("observation.state", []), ["states [11, 0]"]),
    "empty actions": (change_column("action", []), ["actions [11, 0]"]),
    "endless index": (change_column("data/file_index", np.inf, EPISODES), ["not numbers"]),
    "a rate without end": (change_info(fps=10**400), ["info.json", "not readable"]),
    "robot of no Unicode": (change_info(robot_type="\ud800"), ["info.json", "robot_type"]),
    "words of no Unicode": (words_of_no_unicode, ["tasks.parquet", "not readable", "utf-8"]),
    "absolute path": (change_info(data_path="/etc/passwd"), ["/etc/passwd", "inside the folder"]),
    "path upwards": (change_info(data_path="data/../../x"), ["'data/../../x'", "inside"]),
    "path with code": (change_info(data_path="{chunk_index.real}"), ["inside the folder"]),
    "hostile ours": (change_info(world_env={"env": 3}), ["world_env", "not readable"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LEROBOT)
def test_bad_lerobot(here, name):
    damage, words = BAD_LEROBOT[name]
    damage(foreign(here))
    before = tree(here)
    assert_one_line(in_process("demos", "load", "theirs", "--out", "out"), *words)
    assert tree(here) == before


def change_ours(part: str | None, **values):
    """Damage that changes what only we write into info.json."""

    def damage(folder: Path) -> None:
        path = folder / "meta/info.json"
        info = json.loads(path.read_text())
        ours = info["world_env"]
        (ours[part] if part else ours).update(values)
        path.write_text(json.dumps(info))

    return damage


BAD_EXPORT = {
    "no lens": (change_ours("camera", fovy="x"), ["world_env", "Camera.fovy", "expected"]),
    "NaN": (change_ours("camera", position=[0, 0, np.nan]), ["Camera.position"]),
    "half a camera": (change_ours("camera", rotation=[1, 2]), ["Camera.rotation"]),
    "other pictures": (change_ours("camera", size=128), ["camera.size: got 128, expected 64"]),
    "half a chunk": (change_ours("env", chunk=4.0), ["EnvConfig.chunk"]),
    "no horizon": (change_ours("env", horizon=np.nan), ["EnvConfig.horizon"]),
    "no dimension": (change_ours(None, state_dim=0), ["dimensions (0, 4)"]),
    "no robot": (change_ours(None, robot=3), ["robot 3"]),
    "task": (change_column("world_env/task", 5, EPISODES), ["task is 5", "expected Unicode text"]),
    "seed": (change_column("world_env/seed", 1.5, EPISODES), ["seed is 1.5", "64 bits"]),
    "large seed": (change_column("world_env/seed", np.uint64(2**63), EPISODES), ["64 bits"]),
    "source": (change_column("world_env/source", "x", EPISODES), ["source is 'x'", "expert"]),
    "success": (change_column("world_env/start_success", 255, EPISODES), ["is 255", "0 or 1"]),
    "no success": (change_column("world_env/start_success", None, EPISODES), ["is None"]),
}


@pytest.mark.parametrize("name", BAD_EXPORT)
def test_bad_exports(here, name):
    """What we wrote ourselves may have been through other hands."""
    damage, words = BAD_EXPORT[name]
    damage(exported(here))
    before = tree(here)
    assert_one_line(in_process("demos", "load", "lr", "--out", "out"), *words)
    assert tree(here) == before


def test_a_flag_may_be_a_list_of_one(here):
    """As info.json says of it: shape [1]."""
    change_column("next.success", [0.0])(foreign(here))
    (episode,) = convert("theirs")
    assert not episode.success.any()


def make_playlist(folder: Path) -> None:
    """A text that ffmpeg would take for a list of other films, and one of them beside it."""
    shutil.copy(folder / FILM, folder / "other.mp4")
    (folder / FILM).write_text(f"ffconcat version 1.0\nfile '{'../' * 3}other.mp4'\n")


FILM = "videos/observation.images.image/chunk-000/file-000.mp4"


@pytest.mark.parametrize(
    "damage, words",
    [
        (without(FILM), [FILM, "no such file"]),
        (lambda folder: cut(folder / FILM), [FILM, "film"]),
        (lambda folder: (folder / FILM).write_text("no film"), [FILM, "film"]),
        (make_playlist, [FILM, "film"]),
        (change_info(video_path="../{video_key}.mp4"), ["inside the folder"]),
    ],
)
def test_bad_films(here, damage, words):
    damage(exported(here, "--video"))
    before = tree(here)
    assert_one_line(in_process("demos", "load", "lr", "--out", "out"), *words)
    assert tree(here) == before


def test_an_export_keeps_its_size_and_chunk(here):
    exported(here)
    before = tree(here)
    for option in ("--size 32", "--chunk 2"):
        result = in_process("demos", "load", "lr", "--out", "out", *option.split())
        assert_one_line(result, "exported with", option.split()[0])
    assert tree(here) == before


def test_a_failing_conversion_leaves_nothing(here, monkeypatch):
    """The disk fills up while writing: the new folder does not appear."""
    write_hdf5(here / "a.hdf5")
    before = tree(here)

    def fail(path, data):
        if path.suffix == ".safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        path.write_bytes(data)

    monkeypatch.setattr(demos, "write_atomically", fail)
    assert_one_line(in_process("demos", "load", "a.hdf5", "--out", "new/out"), "No space left")
    assert tree(here) == before

"""Data sets of others: which format a path holds; LeRobotDataset v3 read (written: export.py).

Paper's section: "Evaluation" (LIBERO; see recordings.py, which also reads its HDF5 files).

    meta/info.json                              version, rate, shape and type of every column
    meta/stats.json                             their means, quantiles and so on: not needed here
    meta/tasks.parquet                          task_index <-> instruction
    meta/episodes/chunk-000/file-000.parquet    where each episode is in the files below
    data/chunk-000/file-000.parquet             a row per frame: state, action, picture (PNG) ...
    videos/CAMERA/chunk-000/file-000.mp4        ... unless the pictures are films

A row is an observation and the action that follows it; `next.*` is what that action led to.

Legend: N rows of an episode, K, A, S, H, W as in tasks.py.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from demos import UNREADABLE, BadEpisodes, Description, Episode, camera_from, env_from, parse_json
from recordings import (
    CONVENTIONS,
    RECORDED,
    Recording,
    package,
    read_hdf5,
    room,
    success_flags,
    to_episode,
)
from tasks import LARGEST, EnvConfig, is_text

LEROBOT_VERSION = "v3.0"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
CAMERA_KEY = "observation.images.image"
OURS = "world_env"  # what only we write into a LeRobot folder; their readers pass over it
ANEW = "fetch or export the data set anew"
MOST_SIDE = 4096  # pixels of a picture
# What a parquet file may unfold to beyond its own size, and its rows: numbers pack well, pictures
# do not.
MOST_BYTES, MOST_ROWS, MOST_EPISODES = 2**27, 10_000_000, 1_000_000


def kind_of(source: Path) -> str | None:
    """ "hdf5" (a file, or a folder of them), "lerobot", or None: nothing that this file reads."""
    if source.is_file():
        return "hdf5"
    if (source / "dataset.json").exists():  # our own
        return None
    if (source / "meta").is_dir():
        return "lerobot"
    return "hdf5" if hdf5_files(source) else None


def hdf5_files(source: Path) -> list[Path]:
    """The HDF5 files that a path stands for, sorted."""
    if source.is_file():
        return [source]
    found = (path for path in source.glob("*") if path.suffix in (".hdf5", ".h5"))
    return sorted(path for path in found if path.is_file())


def read(source: Path, **given) -> tuple[list[Episode], Description]:
    """All episodes of a source and what dataset.json has to say of them.

    given: fields of Recording; None leaves a field at the convention of the source's format.
    Raises BadEpisodes (one line) for whatever cannot be read; nothing is written.
    """
    source, kind = Path(source), kind_of(Path(source))
    given = {name: value for name, value in given.items() if value is not None}
    if kind is None:
        raise BadEpisodes(
            f"{source}: nothing to convert; expected an .hdf5 file, a folder of them or a folder "
            "of LeRobotDataset v3; our own episodes are checked without --out"
        )
    ours = None
    if kind == "lerobot":
        ours = our_description(source, given)
        if ours is not None:
            given |= {"size": ours.env.size, "chunk": ours.env.chunk, "recorded": "before"}
    how = Recording(**(CONVENTIONS[kind] | given))
    if how.recorded not in RECORDED:
        raise ValueError(f"recorded: got {how.recorded!r}; expected one of {', '.join(RECORDED)}")
    EnvConfig(how.size, how.chunk)  # complains of impossible values before anything is read
    if kind == "hdf5":
        files, robot = hdf5_files(source), "hdf5"
        episodes = within(room(files), source, read_hdf5(files, how))
    else:
        files, robot = list(source.rglob("*")), f"lerobot:{lerobot_info(source).get('robot_type')}"
        episodes = within(room(files), source, read_lerobot(source, how, ours, room(files)))
    if ours is not None:
        return episodes, ours
    dims = {(e.state.shape[-1], e.action.shape[-1]) for e in episodes}
    if len(dims) != 1:
        raise BadEpisodes(
            f"{source}: (state, action) dimensions {sorted(dims)}; expected those of one robot; "
            "convert each robot's files alone"
        )
    longest, most = max(len(e) for e in episodes), LARGEST["horizon"]
    if longest > most:
        raise BadEpisodes(
            f"{source}: an episode of {longest} decisions; expected at most {most}; choose a "
            "larger --chunk, or leave it out"
        )
    env = EnvConfig(how.size, how.chunk, longest)
    return episodes, Description(env, None, robot, *dims.pop())


def within(most: int, source: Path, found: Iterator[Episode]) -> list[Episode]:
    """The episodes, as long as their pictures together take at most `most` bytes."""
    episodes = []
    for episode in found:
        most -= episode.image.nbytes
        if most < 0:
            raise BadEpisodes(
                f"{source}: its pictures unfold to far more than its files have; expected "
                "recordings; convert some of them, or choose a smaller --size"
            )
        episodes.append(episode)
    return episodes


# ------------------------------------------------------------------------------- LeRobotDataset v3


def lerobot_info(folder: Path) -> dict:
    """meta/info.json, checked as far as this file relies on it."""
    path = folder / "meta" / "info.json"
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError("no such file")
        info = parse_json(path.read_bytes())
        version, features = str(info["codebase_version"]), dict(info["features"])
        for name in features:  # both are relied on below
            kind, shape = features[name]["dtype"], features[name]["shape"]
            if not all(type(side) is int for side in shape):
                raise ValueError(f"{name} has the shape {shape!r:.80}")
            if kind in ("image", "video") and max(shape, default=0) > MOST_SIDE:
                raise ValueError(f"{name} has more than {MOST_SIDE} pixels a side")
        fps = float(info["fps"])
        if not is_text(str(info.get("robot_type"))):
            raise ValueError(f"robot_type is {info['robot_type']!r:.80}")
    except (OSError, *UNREADABLE) as error:
        raise BadEpisodes(f"{path}: not readable ({error!r}); {ANEW}") from error
    if not version.startswith("v3."):
        raise BadEpisodes(
            f"{path}: codebase_version {version}; expected {LEROBOT_VERSION}; convert it with "
            "lerobot's convert_dataset_v21_to_v30"
        )
    missing = [name for name in ("observation.state", "action") if name not in features]
    if missing or not fps > 0:
        raise BadEpisodes(
            f"{path}: fps {fps:g}, no feature {' and '.join(missing) or 'missing'}; expected "
            "observation.state, action and a rate; choose another data set"
        )
    return info


def our_description(folder: Path, given: dict) -> Description | None:
    """What `export_lerobot` kept of dataset.json; None for a data set that is not ours."""
    info = lerobot_info(folder)
    if OURS not in info:
        return None
    try:
        fields = dict(info[OURS])
        fields |= {"env": env_from(fields["env"]), "camera": camera_from(fields["camera"])}
        about = Description(**fields)
    except UNREADABLE as error:
        raise BadEpisodes(
            f"{folder / 'meta' / 'info.json'}: its {OURS} is not readable ({error}); {ANEW}"
        ) from error
    for name in ("size", "chunk"):
        if given.get(name, getattr(about.env, name)) != getattr(about.env, name):
            raise BadEpisodes(
                f"{folder}: exported with {name} {getattr(about.env, name)}, asked for "
                f"{given[name]}; leave out --{name}"
            )
    return about


def inside(folder: Path, template: str, **values) -> Path:
    """A file that info.json's path template names. Only the documented fields are filled in, and
    only a path below the folder is accepted: info.json may come from anywhere."""
    text = str(template)
    for name, value in values.items():
        number = f"{value:03d}" if isinstance(value, int) else value
        text = text.replace(f"{{{name}:03d}}", number).replace(f"{{{name}}}", str(value))
    path = PurePosixPath(text)
    if re.search(r"[{}\\:\0]", text) or path.is_absolute() or ".." in path.parts:
        raise BadEpisodes(
            f"{folder / 'meta' / 'info.json'}: names the file {text!r}; expected one inside the "
            f"folder, as {DATA_PATH!r}; do not use this data set"
        )
    return folder / path


def parquet(path: Path, columns: list[str], optional: tuple[str, ...] = (), most: int = MOST_ROWS):
    """The named columns of a parquet file, at most so many rows, as an arrow table. Read bit by
    bit: a few bytes can stand for any number of equal rows."""
    arrow, arrow_parquet = package("pyarrow"), package("pyarrow.parquet")
    if not path.is_file():
        raise BadEpisodes(f"{path}: no such file; expected it in LeRobotDataset v3; {ANEW}")
    try:
        there = arrow_parquet.read_schema(path).names
        if len(set(there)) < len(there):
            raise OSError("two columns of one name")
        missing = [name for name in columns if name not in there]
        if not missing:
            wanted = columns + [name for name in optional if name in there]
            file, batches = arrow_parquet.ParquetFile(path), []
            left = MOST_BYTES + path.stat().st_size
            # pyarrow ends the whole process where it is asked of a column with damaged statistics.
            if not survived(partial(unfolded, file.metadata, wanted)):
                raise OSError("what it says of its columns is damaged")
            if unfolded(file.metadata, wanted) > left:  # a page is unfolded whole
                raise OSError("it says that it unfolds to far more than its size")
            for batch in file.iter_batches(64, columns=wanted):
                left, most = left - batch.nbytes, most - len(batch)
                if left < 0 or most < 0:
                    raise OSError("it unfolds to far more than its size")
                batches.append(batch)
            if not batches:
                return file.schema_arrow.empty_table().select(wanted)
            return arrow.Table.from_batches(batches).combine_chunks()
    except (arrow.ArrowException, OSError, ValueError) as error:  # also names that are no UTF-8
        raise BadEpisodes(f"{path}: not readable ({error}); {ANEW}") from error
    raise BadEpisodes(
        f"{path}: no column {', '.join(missing)}; expected it beside {', '.join(there)}; {ANEW}"
    )


def unfolded(metadata, wanted: list[str]) -> int:
    """Bytes of the wanted columns as the file's own footer tells them, a byte a value at least."""
    size, starts = 0, tuple(f"{name}." for name in wanted)
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if f"{column.path_in_schema}.".startswith(starts):  # a list's is name.list.element
                size += max(column.total_uncompressed_size, column.num_values, 0)
    return size


def survived(work: Callable[[], object]) -> bool:
    """Whether a copy of this process comes through `work`, or ends in it as a library aborts."""
    copy = os.fork()
    if not copy:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # its last words
            work()
        finally:  # what was raised will be raised here again
            os._exit(0)
    return os.waitpid(copy, 0)[1] == 0


def values(column, where: str | Path) -> list:
    """What an arrow column, or a whole table, holds, as Python has it; BadEpisodes where Python has
    no such thing: text that is no UTF-8, a day after the year 9999."""
    try:
        return column.to_pylist()
    except (ValueError, TypeError, OverflowError, package("pyarrow").ArrowException) as error:
        raise BadEpisodes(f"{where}: not readable ({error}); {ANEW}") from error


def numbers(table, name: str, where: str) -> np.ndarray:
    """A column of numbers, or of lists of equal length, as float64 (N,) or (N, D)."""
    cells = values(table[name], where)
    try:
        return np.array(cells, np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise BadEpisodes(f"{where}: {name} is not numeric ({error}); {ANEW}") from error


def lerobot_tasks(folder: Path) -> dict[str, str]:
    """task_index -> instruction, the index as text: damage makes anything of a number. The sentence
    is the index of a pandas table, which parquet keeps as a column `task`, or `__index_level_0__`
    where the index had no name."""
    path = folder / "meta" / "tasks.parquet"
    table = parquet(path, ["task_index"], ("task", "__index_level_0__"))
    names = [name for name in table.column_names if name != "task_index"]
    if not names:
        raise BadEpisodes(f"{path}: no column task; expected the instructions; {ANEW}")
    return dict(zip(*(map(str, values(table[name], path)) for name in ("task_index", names[0]))))


def lerobot_camera(folder: Path, info: dict, how: Recording) -> str:
    """The feature that holds the pictures: the one asked for, or the first."""
    features = info["features"]
    cameras = [name for name, f in features.items() if f["dtype"] in ("image", "video")]
    cameras = [name for name in cameras if not is_depth(features[name])]
    if (how.image and how.image not in cameras) or not cameras:
        raise BadEpisodes(
            f"{folder}: no camera {how.image or 'at all'}; expected --image to be one of "
            f"{', '.join(cameras) or 'its features'}; choose another"
        )
    return how.image or (CAMERA_KEY if CAMERA_KEY in cameras else cameras[0])


def is_depth(feature: dict) -> bool:
    """Whether a feature holds distances and no colours."""
    about = feature.get("info")
    names = ("is_depth_map", "video.is_depth_map")
    return isinstance(about, dict) and any(about.get(name) for name in names)


def lerobot_episodes(folder: Path, video: str) -> list[dict]:
    """The rows of meta/episodes, in order; with `video` also where its film has each episode."""
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    if video:
        columns += [f"videos/{video}/{name}" for name in ("chunk_index", "file_index")]
        columns += [f"videos/{video}/from_timestamp"]
    optional = tuple(f"{OURS}/{name}" for name in ("task", "seed", "source", "start_success"))
    files = sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
    rows = []
    for path in files:
        rows += values(parquet(path, columns, optional, MOST_EPISODES), path)
    if not rows or any(row[name] is None for row in rows for name in columns):
        raise BadEpisodes(
            f"{folder / 'meta' / 'episodes'}: no episodes, or incomplete ones; expected "
            f"{EPISODES_PATH}; {ANEW}"
        )
    try:
        for row in rows:
            row |= {name: (float if "timestamp" in name else int)(row[name]) for name in columns}
    except (ValueError, TypeError, OverflowError) as error:
        raise BadEpisodes(
            f"{folder / 'meta' / 'episodes'}: not numbers ({error}); {ANEW}"
        ) from error
    numbered = [row["episode_index"] for row in rows]
    if len(set(numbered)) < len(rows):
        raise BadEpisodes(
            f"{folder / 'meta' / 'episodes'}: an episode stands there twice; expected each once; "
            f"{ANEW}"
        )
    return sorted(rows, key=lambda row: row["episode_index"])


def read_lerobot(
    folder: Path, how: Recording, ours: Description | None, left: int
) -> Iterator[Episode]:
    """The episodes of a LeRobotDataset v3 folder.

    ours: of an export of ours, whose rows are decisions, their K actions side by side.
    left: bytes that its pictures may take, all together and as they are in the source. (A film is
    read picture by picture, and only those that are kept are ever held.)"""
    info = lerobot_info(folder)
    camera = lerobot_camera(folder, info, how)
    video = camera if info["features"][camera]["dtype"] == "video" else ""
    tasks = lerobot_tasks(folder)
    columns = ["episode_index", "frame_index", "task_index", "observation.state", "action"]
    loaded = table = None
    for row in lerobot_episodes(folder, video):
        where = f"{folder}: episode {row['episode_index']}"
        indices = {name: row[f"data/{name}"] for name in ("chunk_index", "file_index")}
        path = inside(folder, info.get("data_path", DATA_PATH), **indices)
        if path != loaded:  # one file holds many episodes
            optional = ("next.success", "next.reward", "next.done")
            table = parquet(path, columns + [camera] * (not video), optional)
            loaded = path
        rows = rows_of(table, row, f"{where}, {path}")
        left -= 0 if video else len(rows) * math.prod(info["features"][camera]["shape"])
        if left < 0:
            raise BadEpisodes(
                f"{where}: its pictures unfold to far more than the files have; expected "
                "recordings; do not use this data set"
            )
        frames = picture_source(folder, info, camera, row, rows)
        text = how.instruction or tasks.get(str(values(rows["task_index"][:1], where)[0]))
        if text is None:
            raise BadEpisodes(f"{where}: its task is not in meta/tasks.parquet; {ANEW}")
        yield lerobot_episode(where, rows, frames, text, row, how, ours)


def rows_of(table, row: dict, where: str):
    """The rows of one episode in a file that holds many, in the order of their frames."""
    arrow, compute = package("pyarrow"), package("pyarrow.compute")
    try:
        rows = table.filter(compute.equal(table["episode_index"], row["episode_index"]))
        rows = rows.sort_by("frame_index")
    except (arrow.ArrowException, TypeError, OverflowError) as error:
        raise BadEpisodes(f"{where}: its indices are no numbers ({error}); {ANEW}") from error
    if len(rows) != row["length"] or not len(rows):
        raise BadEpisodes(f"{where}: {len(rows)} rows; expected {row['length']}; {ANEW}")
    return rows


def lerobot_episode(where, rows, frames, instruction: str, row: dict, how: Recording, ours):
    """One episode from its rows (an arrow table); `row` is its line in meta/episodes."""
    count = len(rows)
    state = numbers(rows, "observation.state", where).reshape(count, -1)
    action = numbers(rows, "action", where).reshape(count, -1)
    columns = ("next.success", "next.reward", "next.done")
    found = {name: numbers(rows, name, where) for name in columns if name in rows.column_names}
    for name, values in found.items():
        if values.size != count:
            raise BadEpisodes(
                f"{where}: {name} has the shape {list(values.shape)}; expected one number a row, "
                f"[{count}]; {ANEW}"
            )
    words = {"task": re.sub(r"\W+", "-", instruction).strip("-").lower()}
    words |= {"seed": row["episode_index"]}
    words |= {k: row[f"{OURS}/{k}"] for k in ("task", "seed", "source") if f"{OURS}/{k}" in row}
    steps = replace(how, chunk=1) if ours else how
    episode = to_episode(
        where, frames, state, action, success_flags(found), steps, instruction=instruction, **words
    )
    if ours:
        if action.shape[1] != how.chunk * ours.action_dim or state.shape[1] != ours.state_dim:
            raise BadEpisodes(f"{where}: other dimensions than under {OURS} in info.json; {ANEW}")
        episode.action = episode.action.reshape(len(episode), how.chunk, -1)
        begun = row.get(f"{OURS}/start_success", 0)
        if begun not in (0, 1):
            raise BadEpisodes(f"{where}: start_success is {begun!r:.80}; expected 0 or 1; {ANEW}")
        episode.success[0] = begun
    return episode


def picture_source(folder: Path, info: dict, camera: str, row: dict, rows):
    """frames(positions) -> pictures (H, W, 3) uint8 of one episode, from its film or its rows."""
    feature = info["features"][camera]
    shape = tuple(feature["shape"])
    if feature["dtype"] == "image":
        cells, where = rows[camera], f"{folder}: {camera}"
        return lambda at: (png(values(cells[n : n + 1], where)[0], shape, where) for n in at)
    indices = {name: row[f"videos/{camera}/{name}"] for name in ("chunk_index", "file_index")}
    path = inside(folder, info.get("video_path") or VIDEO_PATH, video_key=camera, **indices)
    start, fps = row[f"videos/{camera}/from_timestamp"], float(info["fps"])
    return lambda at: film(path, start, fps, at, shape)


def png(cell: Any, shape: tuple, where: str) -> np.ndarray:
    """A picture from an image column: a struct of bytes (PNG or JPEG) and a path, left unused; or
    whatever else the file has there."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(cell["bytes"]), formats=("PNG", "JPEG")) as picture:
            got = (picture.height, picture.width, 3)
            if got in (shape, (*shape[1:], 3)):  # some data sets give channels first
                return np.asarray(picture.convert("RGB"))
    except (
        OSError, KeyError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError
    ) as error:  # fmt: skip
        raise BadEpisodes(f"{where}: a picture is not readable ({error}); {ANEW}") from error
    raise BadEpisodes(f"{where}: a picture of {got}; expected {shape} as in info.json; {ANEW}")


def film(path: Path, start: float, fps: float, at: list[int], shape: tuple) -> Iterator[np.ndarray]:
    """Pictures number `at` (rising) of the episode that begins `start` seconds into a film.

    ffmpeg seeks to half a frame before, so that rounding cannot skip the first picture. It may read
    this one file and only as mp4: it would follow a playlist of that name to wherever it leads."""
    from imageio_ffmpeg import read_frames

    if not path.is_file():
        raise BadEpisodes(f"{path}: no such file; expected it in LeRobotDataset v3; {ANEW}")
    seek = ["-f", "mp4", "-protocol_whitelist", "file"]
    seek += ["-ss", f"{max(0.0, start - 0.5 / fps):.6f}"]
    only = ["-frames:v", str(at[-1] + 1), "-fps_mode", "passthrough"]
    found = 0
    try:
        reader = read_frames(str(path.absolute()), "rgb24", input_params=seek, output_params=only)
        width, height = next(reader)["size"]
        if (height, width, 3) not in (shape, (*shape[1:], 3)):
            raise OSError(f"pictures of {height} x {width}, {shape} in info.json")
        for number, data in enumerate(reader):
            if number in at:
                found += 1
                yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
    except (OSError, RuntimeError, KeyError, StopIteration) as error:
        cause = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise BadEpisodes(f"{path}: not readable as a film ({cause[0]}); {ANEW}") from error
    if found < len(at):
        raise BadEpisodes(
            f"{path}: the film ends early, {found} of {len(at)} pictures found; {ANEW}"
        )

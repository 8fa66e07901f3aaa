"""Our episodes as a LeRobotDataset v3 folder, for LeRobot and all that reads it.

Paper's section: none; the paper publishes no data. The layout is in formats.py.

We write a row per *decision*: its frame and state, its K actions side by side (K A numbers), and in
`next.*` what it led to. Frames inside a chunk were never recorded, so no finer rows exist; episodes
with K = 1 give the usual row per step. The last frame has no decision: its row repeats the last
action with `next.done`, because a data set that ends one frame early would lose the success. What
LeRobot has no place for (task name, seed, source, camera) stands under `world_env`, which its
readers pass over, so that loading an export gives back the same episodes to the last bit (films:
within their compression).

Legend: N = T + 1 rows of an episode of T decisions, K, A, S, H, W as in tasks.py.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from demos import Description, Episode
from formats import CAMERA_KEY, DATA_PATH, EPISODES_PATH, LEROBOT_VERSION, OURS, VIDEO_PATH
from recordings import package
from tasks import STEPS_PER_SECOND

FIRST = {"chunk_index": 0, "file_index": 0}  # all we write is in the first file of its kind
MOST_FRAMES = 500  # as many say enough of the colours


def export_lerobot(
    episodes: list[Episode], about: Description, folder: Path, fps: int, video: bool
) -> None:
    """Write episodes as LeRobotDataset v3 into an empty folder (docstring of the file).

    fps: decisions per second. video: H.264 films, which lose a little, instead of PNG columns."""
    arrow, arrow_parquet = package("pyarrow"), package("pyarrow.parquet")
    instructions = sorted({episode.instruction for episode in episodes})
    features = lerobot_features(about, fps, video)
    columns = [name for name in features if features[name]["dtype"] != "video"]
    data, lines, first = folder / DATA_PATH.format(**FIRST), [], 0
    writer: Any = None  # pyarrow's; it needs the first table's schema
    data.parent.mkdir(parents=True)
    for number, episode in enumerate(episodes):
        rows = lerobot_rows(episode, number, first, instructions.index(episode.instruction), fps)
        table = arrow.table({name: arrow_column(arrow, rows[name]) for name in columns})
        writer = writer or arrow_parquet.ParquetWriter(data, table.schema)
        writer.write_table(table)  # a row group per episode, as LeRobot writes them
        lines.append(episode_line(episode, number, first, fps, video) | flat_stats(rows))
        first += len(table)
    writer.close()
    if video:
        write_lerobot_film(folder / VIDEO_PATH.format(video_key=CAMERA_KEY, **FIRST), episodes, fps)
    (folder / EPISODES_PATH).parent.mkdir(parents=True)
    arrow_parquet.write_table(arrow.Table.from_pylist(lines), folder / EPISODES_PATH)
    arrow_parquet.write_table(tasks_table(arrow, instructions), folder / "meta" / "tasks.parquet")
    info = {
        "codebase_version": LEROBOT_VERSION,
        "robot_type": about.robot,
        "total_episodes": len(episodes),
        "total_frames": first,
        "total_tasks": len(instructions),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": fps,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if video else None,
        "features": features,
        OURS: asdict(about),
    }
    (folder / "meta" / "info.json").write_text(json.dumps(info, indent=4))
    stats = all_stats(episodes, features, instructions, fps)
    (folder / "meta" / "stats.json").write_text(json.dumps(stats, indent=4))


def decisions_per_second(about: Description) -> int:
    """Of a robot that is known, rounded, 1 or more; ValueError for another."""
    if about.robot not in STEPS_PER_SECOND:
        raise ValueError(
            f"--fps: not given; expected how many decisions a second the robot {about.robot!r} "
            "takes: its steps per second over K; add --fps"
        )
    return max(1, round(STEPS_PER_SECOND[about.robot] / about.env.chunk))


def lerobot_features(about: Description, fps: int, video: bool) -> dict:
    """info.json's `features`: type, shape and names of every column."""
    size, chunk, dims = about.env.size, about.env.chunk, about.action_dim
    picture: dict = {"dtype": "image", "shape": [size, size, 3]}
    picture["names"] = ["height", "width", "channels"]
    if video:
        picture |= {"dtype": "video", "info": {
            "video.height": size, "video.width": size, "video.codec": "h264",
            "video.pix_fmt": "yuv420p", "video.is_depth_map": False, "video.fps": fps,
            "video.channels": 3, "has_audio": False,
        }}  # fmt: skip
    vectors = {
        "observation.state": [f"state_{i}" for i in range(about.state_dim)],
        "action": [f"step_{k}.action_{i}" for k in range(chunk) for i in range(dims)],
    }
    numbers = {"next.reward": "float32", "next.done": "bool", "next.success": "bool"}
    numbers |= {"timestamp": "float32"}
    numbers |= dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
    return (
        {CAMERA_KEY: picture}
        | {k: {"dtype": "float32", "shape": [len(v)], "names": v} for k, v in vectors.items()}
        | {k: {"dtype": v, "shape": [1], "names": None} for k, v in numbers.items()}
    )


def lerobot_rows(episode: Episode, number: int, first: int, task: int, fps: int) -> dict:
    """The N = T + 1 rows of an episode as columns: arrays, and (N, H, W, 3) uint8 pictures."""
    count = len(episode) + 1
    last = np.repeat(episode.action[-1:, -1:], episode.action.shape[1], axis=1)  # (1, K, A)
    after = np.append(episode.success[1:], episode.success[-1]).astype(bool)
    frame = np.arange(count)
    return {
        CAMERA_KEY: episode.image,
        "observation.state": episode.state,
        "action": np.concatenate([episode.action, last]).reshape(count, -1),
        "next.reward": after.astype(np.float32),
        "next.done": frame == count - 1,
        "next.success": after,
        "timestamp": (frame / fps).astype(np.float32),
        "frame_index": frame,
        "episode_index": np.full(count, number),
        "index": first + frame,
        "task_index": np.full(count, task),
    }


def arrow_column(arrow, values: np.ndarray):
    """Numbers (N,), vectors (N, D) as lists of fixed length, pictures as {bytes (PNG), path}."""
    if values.ndim == 4:
        cells = [{"bytes": as_png(image), "path": None} for image in values]
        return arrow.array(cells, arrow.struct({"bytes": arrow.binary(), "path": arrow.string()}))
    if values.ndim == 1 or values.shape[1] == 1:  # LeRobot keeps a vector of one as a number
        return arrow.array(values.reshape(-1))
    return arrow.FixedSizeListArray.from_arrays(arrow.array(values.reshape(-1)), values.shape[1])


def as_png(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def episode_line(episode: Episode, number: int, first: int, fps: int, video: bool) -> dict:
    """One line of meta/episodes: where rows and film of an episode are, and what is only ours."""
    count = len(episode) + 1
    line = {
        "episode_index": number,
        "tasks": [episode.instruction],
        "length": count,
        "data/chunk_index": 0,
        "data/file_index": 0,
        "dataset_from_index": first,
        "dataset_to_index": first + count,
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    }
    if video:
        line |= {f"videos/{CAMERA_KEY}/{name}": 0 for name in ("chunk_index", "file_index")}
        line[f"videos/{CAMERA_KEY}/from_timestamp"] = first / fps
        line[f"videos/{CAMERA_KEY}/to_timestamp"] = (first + count) / fps
    ours = {name: getattr(episode, name) for name in ("task", "seed", "source")}
    ours["start_success"] = int(episode.success[0])
    return line | {f"{OURS}/{name}": value for name, value in ours.items()}


def tasks_table(arrow, instructions: list[str]):
    """meta/tasks.parquet: LeRobot reads it with pandas and expects the sentences as its index,
    which pandas finds in the metadata it keeps in the schema."""
    index: dict = {"name": "task", "field_name": "task", "pandas_type": "unicode"}
    number: dict = {"name": "task_index", "field_name": "task_index", "pandas_type": "int64"}
    index |= {"numpy_type": "object", "metadata": None}
    number |= {"numpy_type": "int64", "metadata": None}
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": [number, index]}
    table = arrow.table({"task_index": list(range(len(instructions))), "task": instructions})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def stats_of(values: np.ndarray) -> dict:
    """LeRobot's statistics over the first axis: lists (D,); pictures (3, 1, 1), in [0, 1]."""
    values = np.asarray(values, np.float64)
    shape: tuple[int, ...] = (-1,)
    count = len(values)
    if values.ndim == 4:
        shape, values = (3, 1, 1), values[:: -(-count // MOST_FRAMES)] / 255
        count = len(values)
    values = values.reshape(-1, values.shape[-1] if values.ndim > 1 else 1)
    found = {name: getattr(values, name)(0) for name in ("min", "max", "mean", "std")}
    for percent in (1, 10, 50, 90, 99):
        found[f"q{percent:02d}"] = np.quantile(values, percent / 100, axis=0)
    return {name: value.reshape(shape).tolist() for name, value in found.items()} | {
        "count": [count]
    }


def flat_stats(rows: dict) -> dict:
    """An episode's statistics as the columns of meta/episodes."""
    return {
        f"stats/{key}/{name}": value
        for key, values in rows.items()
        for name, value in stats_of(values).items()
    }


def all_stats(episodes: list[Episode], features: dict, instructions: list[str], fps: int) -> dict:
    """meta/stats.json: every column over all episodes."""
    images = [image for episode in episodes for image in episode.image]
    frames = np.stack(images[:: -(-len(images) // MOST_FRAMES)])
    rows, first = [], 0
    for number, episode in enumerate(episodes):
        task = instructions.index(episode.instruction)
        rows.append(lerobot_rows(episode, number, first, task, fps))
        first += len(episode) + 1
    rest = [key for key in features if key != CAMERA_KEY]
    return {CAMERA_KEY: stats_of(frames)} | {
        key: stats_of(np.concatenate([r[key] for r in rows])) for key in rest
    }


def write_lerobot_film(path: Path, episodes: list[Episode], fps: int) -> None:
    """All frames of all episodes one after the other, H.264; a key frame every second frame, as
    LeRobot has it, makes any frame quick to find."""
    from imageio_ffmpeg import write_frames

    path.parent.mkdir(parents=True)
    size = episodes[0].image.shape[1]
    fine = ["-crf", "12", "-g", "2", "-bf", "0"]
    writer = write_frames(
        str(path.absolute()), (size, size), fps=fps, codec="libx264", quality=None,
        pix_fmt_out="yuv420p", macro_block_size=1, output_params=fine,
    )  # fmt: skip
    writer.send(None)
    for episode in episodes:
        for image in episode.image:
            writer.send(np.ascontiguousarray(image))
    writer.close()

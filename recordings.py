"""What others record, as our episodes: order of steps, chunks, success; HDF5 read.

Paper's section: "Evaluation" (LIBERO's demonstrations are what the paper imitates). Here they can
be read, looked at and handed on; a run needs the robot and the pictures of its own environment
(replay.py).

Others record N observations o and N actions a, one of each per environment step, in one of two
orders, and either way N - 1 actions have an observation on both sides; the odd one is dropped:

    before    o_0 a_0 o_1 a_1 ... o_{N-1} a_{N-1}     LeRobot, robomimic, OpenVLA's LIBERO files
    after     a_0 o_0 a_1 o_1 ... a_{N-1} o_{N-1}     the original LIBERO files

Our decision t is a chunk of K actions, and our frames are those between the chunks: o_0, o_K,
o_2K ... and always the last one, because success is there. A last chunk that is not full repeats
its last action, as RealEnv.expert_step fills a chunk in which the task is solved.

Success follows an action in all formats: the flag of a_n belongs to the frame after it. Where that
frame was not recorded (order "before", last action) the last frame takes the flag, a step early.
The flags are the first of `next.success`, `next.reward` (HDF5: `rewards`) and `next.done` (`dones`)
that is there and holds only 0 and 1; without any, the last frame of an episode is its success. An
episode in which nothing succeeds is not a demonstration: its source is "exploration".

Images are upside down in the original LIBERO files: rows are reversed. OpenVLA's and LeRobot's
LIBERO are turned by 180 degrees instead: upright, but mirrored. `mirrored` reverses the columns.

Legend: N observations of a source, M = N - 1 actions between them, T decisions, K, A, S, H, W as in
tasks.py. Files are read as plain numbers and pictures: no pickle, and no path outside the source.
What they claim to hold is compared with their own size before it is unpacked (`room`): a few bytes
can stand for terabytes of zeros.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demos import BadEpisodes, Episode, check_words

RECORDED = ("before", "after")
# What holds unless the caller says otherwise: the original LIBERO files, and LeRobot's definition.
CONVENTIONS: dict[str, dict[str, Any]] = {
    "hdf5": {"recorded": "after", "upside_down": True},
    "lerobot": {"recorded": "before", "upside_down": False},
}
# Names in HDF5 files: LIBERO's first, then robomimic's. The state of LIBERO is the 8-D one that
# OpenVLA uses: position in metres, axis-angle in radians, the two fingers in metres.
HDF5_IMAGES = ("agentview_rgb", "agentview_image")
# What h5py raises for damage, by where it meets it.
HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError)
HDF5_STATES = (
    ("ee_pos", "ee_ori", "gripper_states"),
    ("ee_states", "gripper_states"),
    ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"),
)


# No array of numbers of one demonstration takes more than that, packed or not: 10^5 steps of 20.
MOST_NUMBERS = 2**24  # bytes
MOST_PICTURES = 2**29  # bytes, of one demonstration
UNPACKED = 128  # times their size in the file: pictures of plain colours pack to a fiftieth


@dataclass(frozen=True)
class Recording:
    """How a source was recorded, and what is made of it."""

    recorded: str  # observation "before" or "after" the action of the same number
    upside_down: bool  # reverse the rows
    mirrored: bool = False  # reverse the columns
    size: int = 64  # H and W in pixels afterwards; cut to the middle square, then averaged
    chunk: int = 4  # K
    image: str = ""  # which camera; "" takes the format's usual one
    instruction: str = ""  # "" takes the source's own words (HDF5: those of the file's name)


def package(name: str):
    """An optional package; ValueError that names what to install where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{error}; expected the packages of requirements-data.txt; "
            "run: pip install -r requirements-data.txt"
        ) from error


def room(files: list[Path]) -> int:
    """Bytes of pictures that may come out of these files; what claims more is no recording."""
    return MOST_PICTURES + UNPACKED * sum(path.stat().st_size for path in files if path.is_file())


# -------------------------------------------------------------------------------- steps to episodes


def aligned(action: np.ndarray, flags: np.ndarray | None, recorded: str):
    """N actions and their flags -> the actions (N-1, A) between N frames, the labels (N,) uint8.

    before: frame n follows action n - 1, so label_n = flag_{n-1}, and the last frame takes the last
    flag as well. after: frame n follows action n, so label_n = flag_n. Docstring of the file."""
    count = len(action)
    if flags is None:
        flags = np.arange(count) == count - 1
    flags = np.asarray(flags).reshape(count).astype(bool)
    if recorded == "after":
        return action[1:], flags.astype(np.uint8)
    labels = np.concatenate([[False], flags[:-1]])
    labels[-1] |= flags[-1]
    return action[:-1], labels.astype(np.uint8)


def in_chunks(action: np.ndarray, chunk: int) -> tuple[np.ndarray, list[int]]:
    """Actions (M, A) -> chunks (T, K, A) with T = ceil(M / K), and the T + 1 frames around them.

    K = 4, M = 6:  a0 a1 a2 a3 | a4 a5 a5 a5,  frames 0, 4, 6."""
    count = len(action)
    filled = np.concatenate([action, np.repeat(action[-1:], -count % chunk, axis=0)])
    return filled.reshape(-1, chunk, action.shape[1]), [*range(0, count, chunk), count]


def success_flags(columns: dict[str, np.ndarray]) -> np.ndarray | None:
    """The first column that holds only 0 and 1, in the order given; None when there is none.
    A dense reward says nothing of success, so it is passed over."""
    for values in columns.values():
        if np.isin(values, (0, 1)).all():
            return values
    return None


def fitted(image: np.ndarray, how: Recording) -> np.ndarray:
    """A picture of the source (H, W, 3) uint8 -> upright, square, (size, size, 3) uint8.
    A picture that has the size already keeps every bit."""
    from PIL import Image

    image = image[::-1] if how.upside_down else image
    image = image[:, ::-1] if how.mirrored else image
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = np.ascontiguousarray(image[top : top + side, left : left + side])
    if side == how.size:
        return square
    return np.asarray(Image.fromarray(square).resize((how.size, how.size), Image.Resampling.BOX))


def to_episode(
    where: str,
    frames: Callable[[list[int]], Iterable[np.ndarray]],
    state: np.ndarray,
    action: np.ndarray,
    flags: np.ndarray | None,
    how: Recording,
    **words,
) -> Episode:
    """N recorded steps -> an Episode. `where` names them in errors; `frames(positions)` gives
    pictures (H, W, 3) of the source; state (N, S), action (N, A), flags (N,): `aligned`."""
    rows = len(state) == len(action) >= 2 and state.ndim == action.ndim == 2
    if not (rows and state.size and action.size):
        raise BadEpisodes(
            f"{where}: states {list(state.shape)}, actions {list(action.shape)}; expected (N, S) "
            "and (N, A) with N of 2 or more, S and A of 1 or more; leave this episode out"
        )
    with np.errstate(over="ignore"):  # a number that float32 cannot hold is infinite in it
        finite = np.isfinite(np.float32(state)).all() and np.isfinite(np.float32(action)).all()
    if not finite:
        raise BadEpisodes(f"{where}: NaN or infinite values; expected numbers; leave it out")
    if np.abs(action).max() > 1.0:
        raise BadEpisodes(
            f"{where}: actions reach {np.abs(action).max():.3g}; expected values in [-1, 1], as of "
            "an end-effector controller; scale them first"
        )
    action, labels = aligned(action, flags, how.recorded)
    chunks, at = in_chunks(action, how.chunk)
    if 3 * len(at) * how.size**2 > MOST_PICTURES:
        raise BadEpisodes(
            f"{where}: {len(at)} pictures of {how.size} x {how.size}; expected at most "
            f"{MOST_PICTURES} bytes of them in an episode; choose a smaller --size, or leave it out"
        )
    words = {"source": "expert" if labels[at].any() else "exploration"} | words
    check_words(where, **words)
    image = np.empty((len(at), how.size, how.size, 3), np.uint8)
    for place, frame in enumerate(frames(at)):
        image[place] = fitted(frame, how)
    return Episode(
        image=image,
        state=state[at].astype(np.float32),
        action=chunks.astype(np.float32),
        success=labels[at],
        **words,
    )


# --------------------------------------------------------------------------------------------- HDF5


def read_hdf5(paths: list[Path], how: Recording) -> Iterator[Episode]:
    """The episodes of LIBERO's or robomimic's files: `data/demo_i/{actions, rewards, dones, obs}`.

    demo_2 comes before demo_10, and numbers may be missing; the number becomes the seed."""
    size: tuple[int, ...] | None = None  # (H, W) of all pictures
    left = room(paths)  # bytes that may still come
    for path in paths:
        for number, where, demo in hdf5_demos(path):
            words = words_of(path, how) | {"seed": number}
            with undamaged(where):
                episode, shape = hdf5_episode(demo, where, words, how, left)
            if size is not None and shape[1:] != size:
                raise BadEpisodes(
                    f"{where}: pictures of {shape[1]} x {shape[2]}, those before have "
                    f"{size[0]} x {size[1]}; expected one size; convert each alone"
                )
            size, left = shape[1:], left - 3 * math.prod(shape)
            yield episode


@contextmanager
def undamaged(where) -> Iterator[None]:
    """BadEpisodes for damage that only reading finds."""
    try:
        yield
    except BadEpisodes:
        raise
    except HDF5_ERRORS as error:
        raise BadEpisodes(f"{where}: damaged ({error}); fetch the file anew") from error


def hdf5_demos(path: Path) -> Iterator[tuple[int, str, Any]]:
    """The `demo_i` groups of a file, in the order of their numbers: number, words that name it in
    errors, group. The file is closed after the last one."""
    h5py = package("h5py")
    try:
        file = h5py.File(path, "r")
    except HDF5_ERRORS as error:
        raise BadEpisodes(
            f"{path}: not an HDF5 file, or a truncated one ({error}); expected LIBERO's or "
            "robomimic's demonstrations; fetch it anew"
        ) from error
    with file:
        with undamaged(path):
            names = list(member(file, "data", path, "Group"))
        for number, name in numbered(names, path):
            where = f"{path}: {name}"
            with undamaged(where):
                demo = member(file["data"], name, path, "Group")
            yield number, where, demo


def numbered(names: list[str], path: Path) -> list[tuple[int, str]]:
    """Numbers and names of a file's demonstrations, in the order of their numbers."""
    found = [(int(m[1]), m[0]) for m in (re.fullmatch(r"demo_(\d{1,9})", n) for n in names) if m]
    if not found:
        raise BadEpisodes(
            f"{path}: no demonstrations in it; expected data/demo_0 and so on; leave it out"
        )
    return sorted(found)


def hdf5_episode(demo, where: str, words: dict, how: Recording, left: int):
    """(Episode, (N, H, W) of its pictures) of one `demo_i` group; left: bytes they may take."""
    observed = member(demo, "obs", where, "Group")
    images = (how.image,) if how.image else HDF5_IMAGES
    key = next((name for name in images if name in observed), None)
    names = next((s for s in HDF5_STATES if all(name in observed for name in s)), None)
    needed = {
        " or ".join(images): key,
        " or ".join("+".join(s) for s in HDF5_STATES): names,
        "actions": "actions" in demo,
    }
    for name, found in needed.items():
        if not found:
            there = ", ".join(sorted({*demo, *observed}))
            raise BadEpisodes(f"{where}: no {name}; expected it among {there}; leave it out")
    assert key is not None and names is not None  # or the loop has raised
    pictures = member(observed, key, where, most=min(left, MOST_PICTURES))
    states = [member(observed, name, where)[()] for name in names]
    action = np.asarray(member(demo, "actions", where)[()], np.float64)
    columns = {k: member(demo, k, where)[()] for k in ("rewards", "dones") if k in demo}
    lengths = {len(pictures), len(action), *map(len, states), *map(len, columns.values())}
    if len(lengths) != 1 or pictures.dtype != np.uint8 or pictures.shape[3:] != (3,):
        raise BadEpisodes(
            f"{where}: pictures {pictures.dtype}{list(pictures.shape)}, arrays of length "
            f"{sorted(lengths)}; expected uint8 (N, H, W, 3) and one length; fetch it anew"
        )
    state = np.concatenate([s.reshape(len(s), -1) for s in states], axis=1)
    flags = success_flags(columns)
    # `at` is every K-th frame and the last one. (Asked for by a list, HDF5 is slow.)
    frames = lambda at: [*pictures[: at[-1] : how.chunk], pictures[at[-1]]]  # noqa: E731
    return to_episode(where, frames, state, action, flags, how, **words), pictures.shape[:3]


def member(group, name: str, where, kind: str = "Dataset", most: int = MOST_NUMBERS):
    """A group, or an array of numbers, that lies in this very file. One that lies in another file
    is refused: data from elsewhere could then read whatever is on this disk. So is one of more than
    `most` bytes, or of which a single packed chunk has more."""
    h5py = package("h5py")
    if name not in group:
        raise BadEpisodes(f"{where}: no {name} in it; expected LIBERO's layout; leave it out")
    part = group[name] if isinstance(group.get(name, getlink=True), h5py.HardLink) else None
    if part is None or (isinstance(part, h5py.Dataset) and (part.external or part.is_virtual)):
        raise BadEpisodes(
            f"{where}: {name} points elsewhere; expected plain data inside the file; leave it out"
        )
    right = isinstance(part, getattr(h5py, kind))
    if not right or (kind == "Dataset" and (not part.ndim or part.dtype.kind not in "fiub")):
        raise BadEpisodes(f"{where}: {name} is {part}; expected LIBERO's layout; leave it out")
    if kind == "Dataset":
        size = part.dtype.itemsize * max(math.prod(part.shape), math.prod(part.chunks or (0,)))
        if size > most:
            raise BadEpisodes(
                f"{where}: {name} claims {size} bytes, {list(part.shape)}; expected at most {most} "
                "in a file of this size; leave it out"
            )
    return part


def words_of(path: Path, how: Recording) -> dict:
    """Task and instruction from a file's name, as LIBERO builds them:
    KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5 -> "turn on the stove"."""
    task = path.stem.removesuffix("_demo")
    words = re.sub(r"^[A-Z_]+SCENE\d+_", "", task).replace("_", " ")
    return {"task": task, "instruction": how.instruction or words}

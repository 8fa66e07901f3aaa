"""Episodes: played in any environment, kept on disk, looked at by people.

Paper's section: "RL post-training" needs 5 demonstrations per task; "Exploration data" adds
successes and failures of the SFT policy. Both are the same thing here, an `Episode`, and both live
in a folder:

    episodes/
        dataset.json             format version, image size, K, horizon, camera, robot and its
                                 dimensions S and A, meaning and units of every array
        episode_00000.safetensors
        ...

One safetensors file per episode (no pickle anywhere: loading a stranger's folder runs no code)
holds, for T decisions,

    image    (T+1, H, W, 3) uint8     the frame before each decision, and the last one
    state    (T+1, S)       float32   the hand: x, y, z in metres, gripper opening in [0, 1]
                                      (S = 4: Meta-World; with LIBERO three more); another
                                      robot's as it was recorded
    action   (T, K, A)      float32   the chunk as sent, in [-1, 1]; A = 4 or 7
    success  (T+1,)         uint8     1 where the true simulator calls the frame a success:
                                      the reflector's label y_t

and, in the file's own header, task, instruction, seed, source ("expert", "exploration" or
"evaluation"), and a checksum of all this. Where there is none (earlier versions, files of others),
none is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

import processes
from camera import Camera
from tasks import LIBERO, METAWORLD, EnvConfig, Robot, Start, is_text, split_of, split_seeds

FORMAT = 1
ROBOT = METAWORLD.name  # of folders that do not name theirs
SOURCES = ("expert", "exploration", "evaluation")
_ARRAYS = {"image": np.uint8, "state": np.float32, "action": np.float32, "success": np.uint8}
_WORDS = ("task", "instruction", "seed", "source")
DIMENSIONS = ("robot", "state_dim", "action_dim")  # of dataset.json; not of the first folders'
# Raised by JSON that is not as expected, or nested too deeply to be shown.
UNREADABLE = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError)


class BadEpisodes(ValueError):
    """A folder of episodes that cannot be used; the message is one line:
    what, what was expected, what to do."""


@dataclass
class Episode:
    """One episode of T decisions (shapes in the file's docstring)."""

    image: np.ndarray
    state: np.ndarray
    action: np.ndarray
    success: np.ndarray
    task: str
    instruction: str
    seed: int
    source: str
    # Decisions after which the oracle would have stopped it; None: never, or not known. A success
    # within a chunk may be over at its end. Not stored.
    oracle_stop: int | None = None

    def __len__(self) -> int:
        return len(self.action)

    @property
    def first_success(self) -> int | None:
        """Index of the first successful frame, or None."""
        frames = np.flatnonzero(self.success)
        return int(frames[0]) if len(frames) else None

    @property
    def until_success(self) -> int:
        """Decisions before the first success; all of them where there is none."""
        return len(self) if self.first_success is None else self.first_success

    @property
    def succeeded(self) -> bool:
        return self.first_success is not None


@dataclass(frozen=True)
class Description:
    """What dataset.json says of a folder: how it was recorded, and by which robot."""

    env: EnvConfig
    camera: Camera | None  # None where it is not known: episodes that came from elsewhere
    robot: str = ROBOT
    state_dim: int = METAWORLD.state_dim  # S
    action_dim: int = METAWORLD.action_dim  # A

    def __post_init__(self) -> None:
        dims = (self.state_dim, self.action_dim)
        if not (is_text(self.robot) and all(type(dim) is int and dim > 0 for dim in dims)):
            raise ValueError(
                f"robot {self.robot!r:.40} of dimensions {dims!r:.40}, expected text and two whole "
                "numbers, 1 or more"
            )
        if self.camera is not None and self.camera.size != self.env.size:
            got, expected = self.camera.size, self.env.size
            raise ValueError(f"camera.size: got {got}, expected {expected}, that of the frames")


# ------------------------------------------------------------------------------------------ playing


def play(
    env,
    starts: list[Start],
    act: Callable[[dict, np.ndarray], np.ndarray] | None,
    source: str,
    after_success: int | None = 0,
    on_step: Callable[[np.ndarray], None] | None = None,
) -> list[Episode]:
    """Play one episode from every start and record it:
    the rollout of demonstrations, exploration and evaluation. Several processes share the starts,
    and all of them get every episode.

    env: vecenv.VecRealEnv or worldenv.WorldEnv (B slots; the starts are taken B at a time).
    act: (observations, (B,) mask of running slots) -> action chunks (B, K, A);
         None lets the scripted expert play (real environment only).
    after_success: decisions still played after the first success. 0 stops there (the oracle's
         termination); None never stops early: the episode runs to the horizon whatever happens.
    on_step: called after every decision with the (B,) mask of slots that are still running.
    """
    episodes, own = [], processes.share(starts)
    for first in range(0, len(own), env.num_envs):
        some = own[first : first + env.num_envs]
        episodes += _play_batch(env, some, act, source, after_success, on_step)
    return processes.gather(episodes)


def _play_batch(env, starts, act, source, after_success, on_step) -> list[Episode]:
    """`play` of at most as many starts as the env has slots, side by side."""
    count = len(starts)
    observation, infos = env.reset(
        options={"starts": starts, "stop_on_success": after_success == 0}
    )
    frames = [observation["image"][:count]]  # lists over time of arrays over slots
    states = [observation["state"][:count]]
    success = [infos["success"][:count]]
    actions = []
    length = np.zeros(count, np.int64)
    reached, passed = np.full((2, count), -1)  # decision of the first success: after it, within it
    while not env.done.all():
        running = ~env.done[:count]
        if act is None:
            chunks, observation, _, _, _, infos = env.expert_step()
        else:
            chunks = act(observation, ~env.done)
            observation, _, _, _, infos = env.step(chunks)
        actions.append(chunks[:count])
        frames.append(observation["image"][:count])
        states.append(observation["state"][:count])
        success.append(infos["success"][:count])
        length[running] += 1
        reached[running & (reached < 0) & success[-1]] = len(actions)
        within = infos.get("passed", infos["success"])[:count]
        passed[running & (passed < 0) & within] = len(actions)
        if after_success is not None:
            env.done[:count] |= (reached >= 0) & (length >= reached + after_success)
        if on_step is not None:
            on_step(~env.done)
    text = observation["instruction"]
    return [
        Episode(
            image=np.stack([f[i] for f in frames[: length[i] + 1]]),
            state=np.stack([s[i] for s in states[: length[i] + 1]]),
            action=np.stack([a[i] for a in actions[: length[i]]]).astype(np.float32),
            success=np.array([s[i] for s in success[: length[i] + 1]], np.uint8),
            task=start.task,
            instruction=text[i],
            seed=start.seed,
            source=source,
            oracle_stop=int(passed[i]) if passed[i] >= 0 else None,
        )
        for i, start in enumerate(starts)
    ]


def collect_expert(
    env, task_names: Sequence[str], per_task: int, offset: int, after_success: int = 2
) -> list[Episode]:
    """`per_task` successful expert episodes of every task, from the "demo" starts from `offset` on.

    The expert fails now and then; a failed episode is dropped and the next start is tried (at most
    3 x per_task starts). Raises RuntimeError for a task that the expert cannot solve within the
    horizon.
    """
    kept: list[Episode] = []
    for task in task_names:
        seeds = split_seeds("demo", 3 * per_task, offset)
        good: list[Episode] = []
        while seeds and len(good) < per_task:
            batch, seeds = seeds[: per_task - len(good)], seeds[per_task - len(good) :]
            episodes = play(env, [Start(task, s) for s in batch], None, "expert", after_success)
            good += [e for e in episodes if e.succeeded]
        if len(good) < per_task:
            raise RuntimeError(
                f"the scripted expert solved {task} only {len(good)} of {3 * per_task} times "
                f"within {env.config.horizon} decisions; choose another task, or a "
                "longer horizon (demos collect --horizon)"
            )
        kept += good
    return kept


# ------------------------------------------------------------------------------------------ on disk


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a crash or a full disk leaves
    the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


LONGEST_JSON = 2**25  # characters; parsed it takes twenty times as much


def parse_json(text: str | bytes):
    """What JSON says; ValueError where it is none, is longer than any of ours, or nested so deeply
    that Python gives up."""
    if len(text) > LONGEST_JSON:
        raise ValueError(f"{len(text)} characters, expected at most {LONGEST_JSON}")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def checksum(text: str, arrays: dict[str, tuple[str, np.ndarray]]) -> str:
    """SHA-256 over a text and all arrays: names, types and shapes in words, bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        words, array = arrays[name]
        digest.update(f"{name} {words}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _checksum(header: dict[str, str], arrays: dict[str, np.ndarray]) -> str:
    """That of an episode: of the words in its header, and its arrays."""
    text = json.dumps([header[name] for name in _WORDS])
    told = {name: (f"{a.dtype} {a.shape}", np.ascontiguousarray(a)) for name, a in arrays.items()}
    return checksum(text, told)


def save(
    folder: Path,
    episodes: list[Episode],
    config: EnvConfig,
    camera: Camera | None,
    robot: str | None = None,
) -> None:
    """Write episodes to `folder` (made if missing), numbered after those that are there already.

    robot: default that of the config; S and A of another robot are those of its first episode."""
    from safetensors.numpy import save as to_bytes

    folder = Path(folder)
    folder.mkdir(exist_ok=True)  # not those above it: a run folder that vanished stays away
    about = played_by(config.robot, config, camera)
    if robot not in (None, config.robot.name):
        dims = {
            "robot": robot,
            "state_dim": episodes[0].state.shape[-1],
            "action_dim": episodes[0].action.shape[-1],
        }
        about = replace(about, **dims)
    if (folder / "dataset.json").exists():
        there = _read_description(folder, config)
        about = replace(there, env=config, camera=camera)
    text = json.dumps(_described(about), indent=1)
    write_atomically(folder / "dataset.json", text.encode())
    # After the highest number, not after the count: one in between may have been deleted.
    numbers = [path.stem.removeprefix("episode_") for path in folder.glob("episode_*.safetensors")]
    first = 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)
    for number, episode in enumerate(episodes, start=first):
        arrays = {name: np.ascontiguousarray(getattr(episode, name)) for name in _ARRAYS}
        header = {name: str(getattr(episode, name)) for name in _WORDS}
        header["sha256"] = _checksum(header, arrays)
        write_atomically(
            folder / f"episode_{number:05d}.safetensors", to_bytes(arrays, metadata=header)
        )


def played_by(robot: Robot, config: EnvConfig, camera: Camera | None) -> Description:
    """What dataset.json says of episodes that one of our own robots played."""
    return Description(config, camera, robot.name, robot.state_dim, robot.action_dim)


def _described(about: Description) -> dict:
    """The content of dataset.json."""
    frame = (
        f"frame of the {about.env.robot.frame}'s view" if about.env.robot.frame else "world frame"
    )
    state = f"hand x, y, z in metres ({frame}), gripper opening in [0, 1]"
    action = "hand target displacement (1.0 = 1 cm per step), gripper (+1 closes)"
    if about.robot == LIBERO.name:
        state += ", orientation (axis-angle) against fingers that point straight down"
        action = "as LIBERO's OSC_POSE: translation (3), rotation (3), gripper (+1 closes)"
    elif about.robot != ROBOT:
        state = action = "as the source has it"
    return {
        "format": FORMAT,
        **asdict(about),
        "arrays": {
            "image": "(T+1, H, W, 3) uint8, RGB, upright",
            "state": f"(T+1, {about.state_dim}) float32: {state}",
            "action": f"(T, K, {about.action_dim}) float32 in [-1, 1]: {action}",
            "success": "(T+1,) uint8: 1 where the true simulator calls the frame a success",
        },
    }


def describe(folder: Path) -> Description:
    """What a folder says of its episodes; raises BadEpisodes where it is none or says nothing."""
    return _read_description(Path(folder), None)


def camera_of(folder: Path) -> Camera:
    """The camera of a run's own episodes, without reading them; BadEpisodes where none is named."""
    camera = describe(folder).camera
    if camera is None:  # a run records its own episodes, so that one is spoiled
        raise BadEpisodes(
            f"{folder / 'dataset.json'}: names no camera; expected that of a run's own episodes; "
            "train with another --out"
        )
    return camera


def _read_description(folder: Path, expected: EnvConfig | None) -> Description:
    path = folder / "dataset.json"
    if not folder.is_dir():
        raise BadEpisodes(
            f"{folder}: no such folder; collect one with: python cli.py demos collect {folder}; "
            "data sets of others: python cli.py demos load SOURCE --out FOLDER"
        )
    if not path.is_file():
        raise BadEpisodes(
            f"{folder}: no dataset.json in it, so it is not a folder of episodes "
            "(python cli.py demos collect; data sets of others: demos load SOURCE --out FOLDER)"
        )
    try:
        description = parse_json(path.read_bytes())
        if description["format"] != FORMAT:
            raise BadEpisodes(
                f"{path}: format {description['format']!r}, expected {FORMAT}; "
                "collect the episodes anew"
            )
        about = Description(
            env=env_from(description["env"]),
            camera=camera_from(description["camera"]),
            **{name: description[name] for name in DIMENSIONS if name in description},
        )
    except BadEpisodes:
        raise
    except UNREADABLE as error:
        raise BadEpisodes(f"{path}: not readable ({error}); collect the episodes anew") from error
    if expected is not None:
        for name in ("size", "chunk", "robot.frame"):
            got, want = (attrgetter(name)(env) for env in (about.env, expected))
            if got != want:
                raise BadEpisodes(
                    f"{folder}: recorded with {name} {got!r}, this run expects {want!r}; "
                    f"set {name} or collect anew"
                )
    return about


def env_from(fields: dict) -> EnvConfig:
    """An EnvConfig from its JSON; folders that were made before there were two robots name none."""
    fields = dict(fields)
    robot = fields.pop("robot", {})
    return EnvConfig(**fields, robot=Robot(**_with_tuples(robot)))


def camera_from(fields: dict | None) -> Camera | None:
    """A Camera from its JSON, where tuples are lists; None where the camera is not known."""
    if fields is None:
        return None
    return Camera(**_with_tuples(fields))


def _with_tuples(fields: dict) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def load(folder: Path, expected: EnvConfig | None = None, tasks: tuple[str, ...] | None = None):
    """Read and check a folder: (episodes, EnvConfig, Camera).

    Raises BadEpisodes for a folder that is missing, empty, truncated, of another image size, chunk
    or task, or that holds NaN or actions outside [-1, 1]. Who says what to expect (a run) has one
    robot: another one is refused as well. Nothing on disk is changed.
    """
    folder = Path(folder)
    about = _read_description(folder, expected)
    robot = METAWORLD if expected is None else expected.robot
    if expected is not None and about != played_by(robot, about.env, about.camera):
        raise BadEpisodes(
            f"{folder}: episodes of another robot ({about.robot}, state {about.state_dim}, action "
            f"{about.action_dim}); a run needs {robot.name}'s (state {robot.state_dim}, action "
            f"{robot.action_dim}); collect some with: python cli.py demos collect"
        )
    files = sorted(folder.glob("episode_*.safetensors"))
    if not files:
        raise BadEpisodes(
            f"{folder}: holds no episodes; collect some with: python cli.py demos collect {folder}"
        )
    episodes = [_read_episode(path, about) for path in files]
    for path, episode in zip(files, episodes, strict=True):
        if tasks is not None and episode.task not in tasks:
            raise BadEpisodes(
                f"{path}: is of task {episode.task!r}, this run has {', '.join(tasks)}"
            )
    return episodes, about.env, about.camera


def given(folder: Path | str, config: EnvConfig, tasks: tuple[str, ...], per_task: int):
    """(`per_task` demonstrations of every task, the camera) from a folder of episodes: what
    `demos collect` and `demos replay` write. Raises BadEpisodes where they are fewer, begin where
    no demonstration may, or are longer than the horizon."""
    episodes, _, camera = load(Path(folder), config)
    kept: list[Episode] = []
    for task in tasks:
        good = [e for e in episodes if e.task == task and e.source == "expert" and e.succeeded]
        good = list({e.seed: e for e in good}.values())  # of each start one
        if len(good) < per_task:
            raise BadEpisodes(
                f"{folder}: {len(good)} demonstrations of {task} that succeed; expected {per_task} "
                "or more; ask for fewer with --demos, or for other --tasks"
            )
        kept += good[:per_task]
    splits = {split_of(episode.seed) for episode in kept}
    if splits != {"demo"} or camera is None:
        known = "known" if camera else "unknown"
        raise BadEpisodes(
            f"{folder}: starts of {', '.join(sorted(splits))}, camera {known}; "
            "expected starts of demo and the camera of the run's own environment; make a folder "
            "with: python cli.py demos collect, or demos replay"
        )
    longest = max(len(episode) for episode in kept)
    if longest > config.horizon:
        raise BadEpisodes(
            f"{folder}: a demonstration of {longest} decisions; expected at most {config.horizon}, "
            f"the run's horizon; collect with --horizon {config.horizon}"
        )
    return kept, camera


def check_words(where, task, instruction, seed, source) -> None:
    """BadEpisodes for words that no command after the one that reads them could write."""
    whole = type(seed) is int and -(2**63) <= seed < 2**63
    for name, value, right, wanted in (
        ("task", task, is_text(task), "Unicode text"),
        ("instruction", instruction, is_text(instruction), "Unicode text"),
        ("seed", seed, whole, "a whole number of 64 bits"),
        ("source", source, source in SOURCES, f"one of {', '.join(SOURCES)}"),
    ):
        if not right:
            raise BadEpisodes(f"{where}: {name} is {value!r:.80}, expected {wanted}; leave it out")


def _read_episode(path: Path, about: Description) -> Episode:
    from safetensors import SafetensorError, safe_open

    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("not a file")
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        episode = Episode(
            **arrays,
            task=header["task"],
            instruction=header["instruction"],
            seed=int(header["seed"]),
            source=header["source"],
        )
        if header.get("sha256", "") not in ("", _checksum(header, arrays)):
            raise ValueError("its checksum is another")
    except (SafetensorError, LookupError, ValueError, OSError, TypeError, AttributeError) as error:
        # The last two: numbers of a kind that numpy does not know, as bfloat16.
        raise BadEpisodes(
            f"{path}: damaged or truncated ({error}); delete it or collect it anew"
        ) from error
    length = len(episode.action)
    shapes = {
        "image": (length + 1, about.env.size, about.env.size, 3),
        "state": (length + 1, about.state_dim),
        "action": (length, about.env.chunk, about.action_dim),
        "success": (length + 1,),
    }
    for name, dtype in _ARRAYS.items():
        array = arrays[name]
        if array.shape != shapes[name] or array.dtype != dtype or length < 1:
            raise BadEpisodes(
                f"{path}: {name} is {array.dtype}{list(array.shape)}, "
                f"expected {np.dtype(dtype)}{list(shapes[name])}"
            )
    if not (np.isfinite(episode.state).all() and np.isfinite(episode.action).all()):
        raise BadEpisodes(f"{path}: holds NaN or infinite values; delete it or collect it anew")
    if np.abs(episode.action).max() > 1.0:
        raise BadEpisodes(
            f"{path}: actions reach {np.abs(episode.action).max():.3g}, expected values in [-1, 1]"
        )
    if episode.success.max() > 1:
        raise BadEpisodes(f"{path}: success is not only 0 and 1, as expected; collect it anew")
    check_words(path, **{name: getattr(episode, name) for name in _WORDS})
    return episode


# ------------------------------------------------------------------------------------------ looking


def statistics(episodes: list[Episode]) -> dict:
    """Counts a person checks first: per task and source
    the episodes, successes, decisions, positive frames, splits."""
    table: dict = {}
    for episode in episodes:
        row = table.setdefault(
            f"{episode.task} / {episode.source}",
            {
                "episodes": 0,
                "successes": 0,
                "decisions": 0,
                "positive_frames": 0,
                "split": split_of(episode.seed),
            },
        )
        row["episodes"] += 1
        row["successes"] += int(episode.succeeded)
        row["decisions"] += len(episode)
        row["positive_frames"] += int(episode.success.sum())
    return table


def contact_sheet(episodes: list[Episode], columns: int = 8, scale: int = 2) -> np.ndarray:
    """One row per episode, `columns` frames spread evenly from the first to the last;
    successes framed in green."""
    rows = []
    for episode in episodes:
        picks = np.linspace(0, len(episode), columns).round().astype(int)
        row = [_framed(episode.image[i], bool(episode.success[i]), scale) for i in picks]
        rows.append(np.concatenate(row, axis=1))
    return np.concatenate(rows, axis=0)


def _framed(image: np.ndarray, green: bool, scale: int) -> np.ndarray:
    big = image.repeat(scale, axis=0).repeat(scale, axis=1)
    framed = np.pad(big, ((2, 2), (2, 2), (0, 0)), constant_values=255)
    if green:
        border = np.pad(np.zeros(big.shape[:2], bool), 2, constant_values=True)
        framed[border] = (0, 158, 115)  # the green that colour-blind readers tell apart (Okabe-Ito)
    return framed


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an (H, W, 3) uint8 picture."""
    import imageio.v3 as imageio

    write_atomically(Path(path), imageio.imwrite("<bytes>", image, extension=".png"))


def write_film(path: Path, frames: np.ndarray, scale: int = 4, fps: int = 6) -> None:
    """Write (T, H, W, 3) uint8 frames as a film; the file's ending decides: .gif or .mp4."""
    import imageio.v3 as imageio

    path = Path(path)
    big = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    how: dict[str, Any]
    if path.suffix == ".gif":
        how = {"duration": 1000 / fps, "loop": 0}
    elif path.suffix == ".mp4":
        how = {"fps": fps, "codec": "libx264", "macro_block_size": 8}
    else:
        raise ValueError(f"{path}: a film ends in .gif or .mp4")
    write_atomically(path, imageio.imwrite("<bytes>", big, extension=path.suffix, **how))

"""LIBERO's recorded demonstrations, played anew in its simulator: then they are episodes of ours.

Paper's section: "Evaluation" (the paper imitates these demonstrations, which people gave).

    the simulator's state before the first action, all actions --> LiberoEnv --> an episode

A recording has other pictures than a run sees (shadows, larger), another state and other names. To
convert each would leave small differences between what is imitated and what is met; to play it
again leaves none. So OpenVLA regenerates them too, and as there steps in which nothing moves are
left out, and recordings that do not succeed any more. They need the file's `states`, and, where
furniture is drawn anew for each episode, its `model_file`, which says where it stood.

Needs requirements-libero.txt and requirements-data.txt. Symbols: M steps, as in recordings.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from demos import BadEpisodes, Episode
from formats import hdf5_files
from instructions import INSTRUCTIONS
from libero_tasks import LIBERO_INSTRUCTIONS, own_name
from recordings import MOST_NUMBERS, hdf5_demos, in_chunks, member, undamaged
from tasks import EnvConfig

STILL = 1e-4  # an action whose first six numbers are shorter moves nothing [as OpenVLA]


@dataclass(frozen=True)
class Recorded:
    """One demonstration of a file: what the simulator needs to play it again."""

    where: str  # for errors
    task: str
    number: int  # that of `demo_i`
    state: np.ndarray  # (1 + nq + nv,) float64: time, positions, velocities before the first action
    places: dict[str, np.ndarray]  # of each body, as `places_of`
    action: np.ndarray  # (M, 7)


def tasks_of(source: Path) -> dict[str, Path]:
    """The HDF5 files of a path by the tasks that their names say; BadEpisodes where one says none
    of LIBERO's forty, or there are none."""
    ours = {own_name(task): task for task in LIBERO_INSTRUCTIONS}
    found = {}
    for path in hdf5_files(source) if source.exists() else []:
        name = path.stem.removesuffix("_demo")
        if name not in ours:
            raise BadEpisodes(
                f"{path}: no task of LIBERO's four suites; expected a name such as "
                f"{own_name('libero-object-milk')}_demo.hdf5; rename the file, or leave it out"
            )
        found[ours[name]] = path
    if not found:
        raise BadEpisodes(
            f"{source}: no HDF5 file there; expected LIBERO's demonstrations, a file or a folder"
        )
    return found


def read(path: Path, task: str) -> Iterator[Recorded]:
    """The demonstrations of a file, in the order of their numbers; BadEpisodes for damage."""
    for number, where, demo in hdf5_demos(path):
        with undamaged(where):
            state, action = (
                np.asarray(member(demo, key, where)[()], np.float64)
                for key in ("states", "actions")
            )
            xml = demo.attrs.get("model_file", "")
        if state.ndim != 2 or action.shape != (len(state), 7) or len(state) < 2:
            raise BadEpisodes(
                f"{where}: states {list(state.shape)}, actions {list(action.shape)}; expected "
                "(M, 1 + nq + nv) and (M, 7) with M of 2 or more; leave the file out"
            )
        if not (np.isfinite(state[0]).all() and np.isfinite(action).all()):
            raise BadEpisodes(f"{where}: NaN or infinite values; expected numbers; leave it out")
        yield Recorded(where, task, number, state[0], places_of(xml, where), action)


def places_of(xml: str | bytes, where: str) -> dict[str, np.ndarray]:
    """A model's XML -> position in metres and quaternion (7,) of each body in its parent; {} for
    none. A body that is turned in another way than by a quaternion is left where it is."""
    if not isinstance(xml, (str, bytes)) or len(xml) > MOST_NUMBERS:
        raise BadEpisodes(f"{where}: model_file is no text of a model; fetch the file anew")
    if not xml:
        return {}
    others = {"euler", "axisangle", "xyaxes", "zaxis"}
    places = {}
    try:
        for body in ElementTree.fromstring(xml).iter("body"):
            if not others & set(body.attrib):
                words = body.get("pos", "0 0 0").split() + body.get("quat", "1 0 0 0").split()
                place = np.array([float(word) for word in words])
                if place.shape != (7,) or not np.isfinite(place).all():
                    raise ValueError(f"a body at {' '.join(words)!r:.80}")
                places[body.get("name", "")] = place
    except (ElementTree.ParseError, ValueError) as error:
        raise BadEpisodes(
            f"{where}: its model_file is not readable ({error}); fetch the file anew"
        ) from error
    return places


def without_pauses(action: np.ndarray) -> np.ndarray:
    """Actions (M, 7) without those that neither move the hand nor change the gripper."""
    still = np.linalg.norm(action[:, :6], axis=1) < STILL
    still[1:] &= action[1:, 6] == action[:-1, 6]
    still[0] = False
    return action[~still]


def played(recorded: Recorded, env) -> Episode | None:
    """The episode that the actions lead to in a `libero_env.LiberoEnv` of the task; None where it
    does not succeed, or takes longer than the benchmark allows."""
    from libero_env import turned_action

    action = np.stack([turned_action(a, env.turn) for a in without_pauses(recorded.action)])
    chunks, _ = in_chunks(np.clip(action, -1.0, 1.0).astype(np.float32), env.config.chunk)
    if len(chunks) > env.config.horizon:
        return None
    try:
        seen = [env.reset_to(recorded.state, recorded.places)]
    except ValueError as error:
        raise BadEpisodes(f"{recorded.where}: {error}; leave the file out") from error
    for chunk in chunks:
        observation, *_, info = env.step(chunk)
        seen.append((observation, info))
    success = np.array([info["success"] for _, info in seen], np.uint8)
    if not success.any():
        return None
    return Episode(
        image=np.stack([observation["image"] for observation, _ in seen]),
        state=np.stack([observation["state"] for observation, _ in seen]),
        action=chunks,
        success=success,
        task=recorded.task,
        instruction=INSTRUCTIONS[recorded.task][0],
        seed=recorded.number,  # in the split "demo", though no start of ours
        source="expert",
    )


def replay(files: dict[str, Path], config: EnvConfig, say: Callable[[str], None]):
    """(episodes that succeed again, the camera that saw them) of files by their tasks (`tasks_of`);
    config: for all of these together. Raises BadEpisodes; `say` hears a line for each file."""
    from libero_env import LiberoEnv

    episodes: list[Episode] = []
    for task, path in files.items():
        found = list(read(path, task))
        env = LiberoEnv(task, config, stop_on_success=False)
        again = [episode for episode in (played(one, env) for one in found) if episode]
        say(f"{task}: {len(again)} of {len(found)} recordings succeed again")
        episodes, camera = episodes + again, env.camera
    if not episodes:
        names = ", ".join(map(str, files.values()))
        raise BadEpisodes(f"{names}: nothing in it succeeds again; expected demonstrations")
    return episodes, camera

"""The commands of episodes on disk, `demos`: collect, load, replay, inspect, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from options import (
    Suite,
    Tasks,
    check_demos,
    check_playable,
    chosen_tasks,
    in_range,
    one_of,
    task_names,
)
from terminal import check_new, new_files, print_statistics

PICTURES_MB = 20  # what has to be free on the disk

demos_app = typer.Typer()


@demos_app.callback()
def about_demos() -> None:
    """Episodes on disk: collect with the scripted expert, check, convert, play anew, export."""


@demos_app.command("collect")
def demos_collect(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    tasks: Tasks = "",
    suite: Suite = "",
    demos: Annotated[int, typer.Option(help="Successful episodes per task.")] = 5,
    seed: Annotated[int, typer.Option(help="0 to 99; each owns its own start states.")] = 0,
    size: Annotated[int, typer.Option(help="Image height and width in pixels.")] = 64,
    chunk: Annotated[
        int | None, typer.Option(help="Steps per decision (K); default 4, LIBERO 8.")
    ] = None,
    horizon: Annotated[
        int | None, typer.Option(help="Decisions at most; default 30, LIBERO its own limit.")
    ] = None,
) -> None:
    """Record expert demonstrations."""
    from dataclasses import replace

    import demos as episodes_on_disk
    from runs import RunConfig, with_tasks
    from vecenv import VecRealEnv

    names = chosen_tasks(suite or ("" if tasks else "metaworld"), tasks)
    check_playable(names)
    check_demos(demos)
    in_range("--seed", seed, 0, 99, " (each owns its own start states)")
    given: dict[str, Any] = {"size": size, "chunk": chunk, "horizon": horizon}
    given = {name: value for name, value in given.items() if value is not None}
    config = replace(with_tasks(RunConfig(), names).env, **given)
    check_new(folder)
    with new_files(folder, episodes_mb(len(names) * demos, config)) as temporary:
        env = VecRealEnv(min(demos, 16), config)
        try:
            episodes = episodes_on_disk.collect_expert(env, names, demos, seed * 1000)
            episodes_on_disk.save(temporary, episodes, config, env.camera)
        finally:
            env.close()
    print(f"{len(episodes)} expert episodes of {', '.join(names)} in {folder}")


def episodes_mb(episodes: int, env) -> float:
    """Upper bound of the size on disk: the frames."""
    return episodes * (env.horizon + 1) * 3 * env.size**2 / 1e6 + 1


@demos_app.command("load")
def demos_load(
    folder: Annotated[
        Path, typer.Argument(help="Our episodes; with --out: HDF5 file(s) or a LeRobot folder.")
    ],
    tasks: Annotated[str, typer.Option(help="Accept only these tasks.")] = "",
    size: Annotated[int | None, typer.Option(help="Expect (--out: make) this image size.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Likewise the steps per decision.")] = None,
    out: Annotated[Path | None, typer.Option(help="Convert into this new folder.")] = None,
    recorded: Annotated[
        str | None, typer.Option(help="before or after its action; HDF5: after, LeRobot: before.")
    ] = None,
    upside_down: Annotated[
        bool | None,
        typer.Option("--upside-down/--upright", help="HDF5: upside down, LeRobot: upright."),
    ] = None,
    mirrored: Annotated[
        bool | None, typer.Option("--mirrored", help="Left and right are swapped: swap back.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="Which camera of the source.")] = None,
    instruction: Annotated[str | None, typer.Option(help="Instead of the source's words.")] = None,
) -> None:
    """Check a folder of episodes: one line, OK with its counts or what is wrong with it.

    With --out, first convert LIBERO's or robomimic's HDF5, or LeRobotDataset v3, to episodes.
    """
    import demos
    import formats

    how = {"recorded": recorded, "upside_down": upside_down, "mirrored": mirrored}
    how |= {"image": image, "instruction": instruction}
    given = [name for name, value in how.items() if value is not None]
    if out is None and given:
        raise ValueError(f"--{given[0].replace('_', '-')}: only for converting; add --out FOLDER")
    if out is not None and tasks:
        raise ValueError("--tasks: only for checking; expected without --out; leave it out")
    if out is None:
        episodes, about = read_episodes(folder, tasks, size, chunk)
    else:
        check_new(out)
        episodes, about = formats.read(folder, size=size, chunk=chunk, **how)
        with new_files(out, episodes_mb(len(episodes), about.env)) as temporary:
            demos.save(temporary, episodes, about.env, about.camera, about.robot)
            read_episodes(temporary)  # nothing is kept that this command would not accept
    names = sorted({episode.task for episode in episodes})
    successes = sum(episode.succeeded for episode in episodes)
    decisions = sum(len(episode) for episode in episodes)
    print(
        f"OK: {len(episodes)} episodes of {', '.join(names)}; {successes} succeed; "
        f"{decisions} decisions of {about.env.chunk} steps; {about.env.size} px"
    )


def read_episodes(folder: Path, tasks: str = "", size: int | None = None, chunk: int | None = None):
    """(episodes, demos.Description) of a folder that holds what is expected of it."""
    import demos
    from tasks import LIBERO, METAWORLD, check_tasks

    episodes, *_ = demos.load(folder, None, task_names(tasks) if tasks else None)
    about = demos.describe(folder)
    for name, want in (("size", size), ("chunk", chunk)):
        got = getattr(about.env, name)
        if want is not None and got != want:
            raise ValueError(f"{folder}: {name} is {got}; expected {want}; collect it anew")
    if about.robot in (METAWORLD.name, LIBERO.name):
        check_tasks(sorted({episode.task for episode in episodes}))
    return episodes, about


@demos_app.command("replay")
def demos_replay(
    source: Annotated[Path, typer.Argument(help="LIBERO's HDF5 file(s): one, or a folder.")],
    out: Annotated[Path, typer.Option(help="A new folder for the episodes.")],
    size: Annotated[int, typer.Option(help="Image height and width in pixels.")] = 64,
) -> None:
    """Play LIBERO's recorded demonstrations anew; keep those that succeed, for `train --from`."""
    from dataclasses import replace

    import demos
    import replay
    from runs import RunConfig, with_tasks

    files = replay.tasks_of(source)
    tasks = tuple(files)
    check_playable(tasks)
    config = replace(with_tasks(RunConfig(), tasks).env, size=size)
    check_new(out)
    with new_files(out, episodes_mb(50 * len(tasks), config)) as temporary:
        episodes, camera = replay.replay(files, config, print)
        demos.save(temporary, episodes, config, camera)
    print(f"{len(episodes)} episodes of {', '.join(tasks)} in {out}")


@demos_app.command("export")
def demos_export(
    folder: Annotated[Path, typer.Argument(help="A folder of episodes.")],
    out: Annotated[Path, typer.Option(help="A new folder for the LeRobotDataset v3.")],
    fps: Annotated[
        int | None,
        typer.Option(
            help="Decisions per second; default: 80 / K (Meta-World), 20 / K (LIBERO), rounded."
        ),
    ] = None,
    video: Annotated[bool, typer.Option("--video", help="Films (mp4), not PNG images.")] = False,
) -> None:
    """Write a folder of episodes as a LeRobotDataset v3: a row per decision."""
    import export

    if fps is not None:
        in_range("--fps", fps, 1, 1000)
    check_new(out)
    episodes, about = read_episodes(folder)
    fps = fps or export.decisions_per_second(about)
    with new_files(out, episodes_mb(len(episodes), about.env)) as temporary:
        export.export_lerobot(episodes, about, temporary, fps, video)
    print(f"{len(episodes)} episodes as LeRobotDataset v3 in {out}")


@demos_app.command("inspect")
def demos_inspect(
    folder: Annotated[Path, typer.Argument(help="A folder of episodes.")],
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("runs/inspect"),
    film: Annotated[str, typer.Option(help="gif or mp4.")] = "gif",
) -> None:
    """Show statistics; write a contact sheet (PNG) and a film (the first episode of each task)."""
    import demos
    import films

    one_of("--film", film, ("gif", "mp4"))
    episodes, _ = read_episodes(folder)
    with new_files(out, PICTURES_MB) as temporary:
        shown = []  # up to 4 of each task and source, so that the sheet stays readable
        for row in demos.statistics(episodes):
            shown += [e for e in episodes if f"{e.task} / {e.source}" == row][:4]
        demos.write_png(temporary / "contact_sheet.png", demos.contact_sheet(shown))
        first = {episode.task: episode for episode in reversed(episodes)}
        shown = [first[task].image for task in sorted(first)][:8]
        demos.write_film(temporary / f"film.{film}", films.side_by_side(shown))
    print_statistics(demos.statistics(episodes))
    print(f"{out / 'contact_sheet.png'}\n{out / f'film.{film}'}")

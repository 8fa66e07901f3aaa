"""What may stand behind an option of the command line: checked before anything is done.

Each returns the value, or raises ValueError with one line that names the option.
"""

from __future__ import annotations

from typing import Annotated

import typer

Suite = Annotated[
    str,
    typer.Option(help="metaworld, libero_spatial, libero_object, libero_goal or libero_10."),
]

Tasks = Annotated[str, typer.Option(help="Single tasks instead, separated by commas.")]

Demonstrations = Annotated[
    str,
    typer.Option("--from", help="A folder of demonstrations, by demos collect or demos replay."),
]

SimulatorModels = Annotated[
    str,
    typer.Option(help="Pretrained: autoencoder=ID_OR_FOLDER,unet=...,clip=...,geometry=..."),
]


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> str:
    """The value of an option that takes one of a few words."""
    if value not in allowed:
        raise ValueError(f"{option}: got {value!r}; expected one of {', '.join(allowed)}")
    return value


def in_range(option: str, value: int, low: int, high: int | None = None, why: str = "") -> int:
    """The value of an option that takes a number from `low` to `high`."""
    if value < low or (high is not None and value > high):
        expected = f"{low} or more" if high is None else f"{low} to {high}"
        raise ValueError(f"{option}: got {value}; expected {expected}{why}")
    return value


def check_demos(count: int) -> int:
    """3 starts are set aside for each demonstration (the expert may fail), 1000 for each seed."""
    return in_range("--demos", count, 1, 333, " per task (the paper has 5)")


def task_names(text: str) -> tuple[str, ...]:
    """ "a, b" -> ("a", "b"), known and different."""
    from tasks import check_tasks

    return check_tasks([name.strip() for name in text.split(",") if name.strip()])


def chosen_tasks(suite: str, tasks: str) -> tuple[str, ...]:
    """What --suite and --tasks choose: the suite's tasks, or those that are named; () where
    neither is given."""
    from instructions import TASKS
    from tasks import SUITES, check_tasks

    names = task_names(tasks) if tasks else ()
    if not suite:
        return names
    one_of("--suite", suite, tuple(SUITES))
    known = TASKS if suite == "metaworld" else SUITES[suite]
    others = [name for name in names if name not in known]
    if others:
        raise ValueError(
            f"--tasks: {', '.join(others)} not in {suite}; expected some of {', '.join(known)}; "
            "leave out --suite or --tasks"
        )
    return names or check_tasks(SUITES[suite])


def usual_preset(suite: str, tasks: str) -> str:
    """The one that trains what is chosen, where none is named: for LIBERO's tasks the reduced one,
    which a processor finishes."""
    return "libero" if _any_of_libero(chosen_tasks(suite, tasks)) else "cpu"


def check_playable(tasks: tuple[str, ...]) -> None:
    """Raise RuntimeError where tasks are LIBERO's and it is not installed."""
    from libero_env import check_installed

    if _any_of_libero(tasks):
        check_installed()


def _any_of_libero(tasks: tuple[str, ...]) -> bool:
    from libero_tasks import LIBERO_INSTRUCTIONS

    return any(name in LIBERO_INSTRUCTIONS for name in tasks)

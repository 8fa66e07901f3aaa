"""What every command does at the terminal: mistakes in one line, safe output, progress.

Nothing heavy is imported at the top: `python cli.py --help` loads this file.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    from rich.console import Console
    from typer.core import TyperGroup
except ImportError as missing:
    print(
        f"error: {missing}; expected the packages of requirements.txt; run: make setup",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

import processes
from errors import explain, shortened

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
RESUMED = ("train", "compare", "screen")  # commands that go on where they were; others begin anew
COPY = "copy the run to another place"  # where a command writes into the run that it reads
HEARTBEAT = 30  # seconds between progress lines where no bar can be drawn (a log file, a pipe)


# ------------------------------------------------------------------------------------------- errors


def check_words(words: list[str]) -> None:
    """What is on the command line is text. A file may have a name that is none, but libraries that
    are to open it then say that it is damaged, or that it is not there."""
    for word in words:
        if re.search(r"[\ud800-\udfff]", word):  # how Python holds bytes that are not UTF-8
            raise ValueError(
                f"{word}: not UTF-8; expected a name or a text that is; rename it, or type it anew"
            )


def tidy_when_ended() -> None:
    """`kill` and a terminal that is closed end a command as Ctrl-C does. (`nohup` has asked to be
    left alone.)"""
    for number in processes.ENDINGS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


class OneLineErrors(TyperGroup):
    """The group of all commands; turns whatever goes wrong into one line and an exit code."""

    def main(self, args=None, prog_name=None, **extra):  # type: ignore[override]  # rest in extra
        """Run a command and leave with 0, 2 (bad input) or 130 (interrupted)."""
        words = sys.argv[1:] if args is None else args
        extra["standalone_mode"] = False  # errors come here instead of being printed by Typer
        if "inline" in os.environ.get("MPLBACKEND", ""):
            # The kernel of a notebook gives its children a way to draw that only it has.
            os.environ["MPLBACKEND"] = "agg"
        for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show ends no command
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            check_words(words)
            if processes.launched() == 1:
                tidy_when_ended()
            code = super().main(args, prog_name or f"python {Path(sys.argv[0]).name}", **extra)
        except Exception as error:
            line = explain(error)
            if line is None or os.environ.get("WORLDENV_TRACEBACK") == "1":
                raise
            line = processes.last_words(shortened(" ".join(line.split())))
            print(f"error: {line}", file=sys.stderr)
            processes.leave(2)
        if code == INTERRUPTED:
            resumed = next((word for word in words if word[:1] != "-"), "") in RESUMED
            again = (
                "run the same command again to resume"
                if resumed
                else "the same command begins anew"
            )
            print(f"interrupted; {again}", file=sys.stderr)
        processes.leave(code or 0)


# ------------------------------------------------------------------------------------------- output


def check_output(folder: Path, megabytes: float, remedy: str = "choose another --out") -> Path:
    """Make sure that `folder` can be made and filled; return its deepest part that exists. remedy:
    what to do where it cannot."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{folder}: {existing} is a file; expected a folder; {remedy}")
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"{folder}: a link that leads nowhere; expected a folder; {remedy}")
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot write in {existing} ({error.strerror}); expected a folder that can "
            f"be written; {remedy}"
        ) from error
    free = shutil.disk_usage(existing).free / 1e6
    if free < megabytes:
        raise ValueError(
            f"{folder}: only {free:.0f} MB are free there; expected {megabytes:.0f} MB; free some "
            f"space or {remedy}"
        )
    return existing


def check_files(*paths: Path) -> None:
    """Files that a command is going to write: none is a folder, and none would lie among a run's
    own, which it could replace."""
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path}: got a folder; expected a file; choose another --out")
        parent, *above = path.absolute().parents
        for run in (parent, *(p for p in above if (p / "stages.json").exists())):
            if (run / "config.json").exists():
                raise ValueError(
                    f"{path}: {run} is a run's folder; expected a place where no file of a run is "
                    "replaced; choose another --out"
                )


def check_new(folder: Path) -> None:
    """Nothing that is on the disk already gets mixed with what a command writes."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty; expected a new folder; choose another or delete it")


@contextmanager
def new_files(
    folder: Path, megabytes: float, remedy: str = "choose another --out"
) -> Iterator[Path]:
    """A temporary folder whose files move to `folder` when all went well, and vanish otherwise.
    remedy: as for `check_output`."""
    place = check_output(folder, megabytes, remedy)
    temporary = Path(tempfile.mkdtemp(prefix=".worldenv-", dir=place))
    try:
        yield temporary
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(temporary.iterdir()):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def take_back(folder: Path, existing: Path) -> None:
    """Remove a new run folder that holds only its settings, and what was made to reach it."""
    if folder.is_dir() and [path.name for path in folder.iterdir()] == ["config.json"]:
        (folder / "config.json").unlink()
        for path in (folder, *folder.parents):
            if path == existing:
                break
            path.rmdir()


def check_device(name: str) -> None:
    """A device that torch can really compute on here: cpu, cuda, cuda:1, mps ..."""
    import torch

    if name.startswith("cuda:") and processes.launched() > 1:
        raise ValueError(
            f"--device: got {name}, and {processes.launched()} processes were started; expected "
            "cuda, of which each takes its own; use --device cuda"
        )
    try:
        # torch has names for others too, for which some of its parts are missing.
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
            raise RuntimeError(name)
        number = name[5:] or os.environ.get("LOCAL_RANK", "0")  # of several processes: its own
        torch.zeros(1, device=f"cuda:{number}" if name.startswith("cuda") else name)
        if name.startswith("cuda"):  # what speaks of the GPU without a number means this one
            torch.cuda.set_device(int(number))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device: torch cannot compute on {name!r} here; expected cpu, or cuda or mps where "
            "there is one; `python cli.py doctor` says which; use --device cpu"
        ) from error


def print_statistics(rows: dict) -> None:
    """demos.statistics as a table."""
    from rich.markup import escape
    from rich.table import Column, Table

    columns = [name.replace("_", " ") for name in next(iter(rows.values()))]
    table = Table(Column("task / source", overflow="fold"), *columns)
    for name, row in rows.items():
        table.add_row(escape(name), *(str(value) for value in row.values()))
    Console().print(table)


def print_result(result: dict) -> None:
    """Success per task and in the mean, as a table; its title says from which starts."""
    from rich.table import Column, Table

    first = result["skipped"] + 1
    title = f"{result['policy']}, {result['termination']} termination, {result['split']} starts"
    title += f" {first} to {result['skipped'] + result['starts_per_task']} of each task"
    task = Column("task", overflow="fold")  # two names may differ in their ends alone
    table = Table(task, "real success", "95 % interval", "episodes", title=title)
    last = list(result["tasks"])[-1]  # a line below it
    for name, row in (result["tasks"] | {"mean": result | {"success": result["mean"]}}).items():
        interval = f"{row['low']:.1%} - {row['high']:.1%}"
        table.add_row(
            name, f"{row['success']:.1%}", interval, str(row["n"]), end_section=name == last
        )
    Console().print(table)


# ----------------------------------------------------------------------------------------- progress


class StageDisplay:
    """What a person sees of `train`: a bar for the running stage, a line for all that is finished.

    One line per stage, and one per iteration of reinforcement learning. Without a terminal there is
    no bar but a line every HEARTBEAT seconds.
    """

    def __init__(self, stages: Iterable[str]):
        """stages: in the order in which they will end."""
        from rich import progress

        self.coming = list(stages)
        self.console = Console(soft_wrap=True, highlight=False, quiet=not processes.is_main())
        self.bars = progress.Progress(
            progress.TextColumn("{task.description:10}"), progress.BarColumn(),
            progress.MofNCompleteColumn(), progress.TimeElapsedColumn(),
            progress.TextColumn("left"), progress.TimeRemainingColumn(),
            console=self.console, transient=True,
            disable=self.console.quiet or not self.console.is_terminal,
        )  # fmt: skip
        self.bar: progress.TaskID | None = None
        self.last_line = time.monotonic()
        self.begun, self.step = (0, 0.0), -1  # first step of the fit and when; its latest step

    def __enter__(self) -> StageDisplay:
        self.bars.start()
        self._next_bar()
        return self

    def __exit__(self, *exception) -> None:
        self.bars.stop()

    def _next_bar(self) -> None:
        if self.bar is not None:
            self.bars.remove_task(self.bar)
            self.bar = None
        if self.coming:  # no length is known yet: the bar pulses
            self.bar = self.bars.add_task(self.coming[0], total=None)
        self.step = -1

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)
        self.last_line = time.monotonic()

    def say(self, text: str) -> None:
        """A stage is finished: the line begins with its name."""
        self.line(text)
        name = text.partition(":")[0]
        self.coming = [stage for stage in self.coming if stage != name]
        self._next_bar()

    def progress(self, stage: str, step: int, steps: int, metrics: dict) -> None:
        """Step `step` (from 0) of `steps` of a stage is done."""
        if self.bar is not None:
            self.bars.update(self.bar, completed=step + 1, total=steps, description=stage)
        if stage.startswith("rl"):
            self.line(rl_line(step, steps, metrics))
            return
        if self.step < 0 or step <= self.step:  # the stage's first fit, or its next
            self.begun = (step, time.monotonic())
        self.step = step
        first, began = self.begun
        if self.bars.disable and step > first and time.monotonic() - self.last_line > HEARTBEAT:
            # what a stage does before its fit, and steps of an earlier run, take no part
            left = (time.monotonic() - began) / (step - first) * (steps - step - 1)
            self.line(
                f"  {stage} {step + 1}/{steps}, loss {metrics['loss']:.4f}, {left:.0f} s left"
            )


def rl_line(step: int, steps: int, metrics: dict) -> str:
    """One iteration of LOOP in one line; says plainly when there was nothing to learn from."""
    from ppo import no_signal

    names = {
        "return": "return {:.3f}",
        "success": "success {:.2f}",
        "groups_with_spread": "spread in {:.0%} of groups",
        "mixed": "mixed in {:.0%}",
        "first_ratio": "first ratio {:.3f}",
        "clip_fraction": "clipped {:.0%}",
        "kl": "KL {:.4f}",
        "scale": "scale {:.2f}",
    }
    shown = [
        text.format(metrics[name]) for name, text in names.items() if metrics.get(name) is not None
    ]
    warning = no_signal(metrics)
    return f"  rl {step + 1}/{steps}: {', '.join(shown)}" + (f"; {warning}" if warning else "")

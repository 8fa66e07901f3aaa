"""A second process that works at some stages of a run while the first one does others (order.py).

    RUN/beside/stages.json, metrics.jsonl, resume/     its own books, until both are put together

Steps of networks as small as ours gain little from a second thread, half as much again at the most;
two stages on one thread each take both cores whole. The second process computes what the first
would have: weights and counts are the same, whichever process has done a stage, as long as it has
as many threads.

The first process hears from the second by a pipe: lines to show, progress, an error, the end. Each
of them notices when the other one is gone: the first raises, the second ends at once. Whatever was
finished, or has a state, stays, as for a run in one process.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.resource_tracker
import os
import select
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import torch

import errors
import processes
import resume
from demos import write_atomically
from fit import threads
from order import BESIDE, round_of, stages_of
from runs import Run, RunConfig

FOLDER = "beside"
TELLS = 1.0  # seconds from one word of progress to the next
LAST_STEP = 20.0  # seconds in which a step that is under way ends, and its state is written
GONE = "the second process of this run is gone (killed, or out of memory?); expected it to the end"


class SideRun(Run):
    """The run folder as the second process sees it: with the finished stages of the first one, and
    books of its own."""

    books_in = FOLDER

    def __init__(self, folder: Path, config: RunConfig, device: str = "cpu"):
        super().__init__(folder, config, device)
        self.books.mkdir(exist_ok=True)
        self.forget_states()
        self.forget_lines()
        self.of_the_first = Run(folder, config).stages
        self.stages = {**self.of_the_first, **self.own()}

    def own(self) -> dict[str, dict]:
        """The stages that only these books know of."""
        return {
            name: stage
            for name, stage in self.stages.items()
            if round_of(name)[0] in BESIDE and name not in self.of_the_first
        }

    def write_stages(self) -> None:
        """Of our own: what is taken out of the first one's stages.json is not put back."""
        write_atomically(self.books / "stages.json", json.dumps(self.own(), indent=1).encode())

    def wait_for(self, stage: str) -> None:
        """Until the first process has finished a stage; KeyboardInterrupt where we are asked to
        end. (Where it never will, it ends us.)"""
        while stage not in Run(self.folder, self.config).stages:
            time.sleep(TELLS / 4)
            if resume.asked_to_stop():
                raise KeyboardInterrupt


def half_the_cores() -> AbstractContextManager:
    """Stages that go side by side compute so, also where one of them is alone at the moment: then
    its floats are rounded in the same way."""
    return threads(max(1, torch.get_num_threads() // 2))


class Beside:
    """The second process, as the first one holds it. `look` now and then, `join` for its end,
    `close` in any case."""

    def __init__(self, run: Run, names: list[str], work: Callable, progress: Callable):
        """work(run: SideRun, names, say, progress), a function of a module: does the stages;
        progress(name, step, steps, metrics): shows its progress while the first one waits."""
        self.run, self.progress = run, progress
        self.lines: list[str] = []
        self.ended = False
        move_states(names, run.folder, run.folder / FOLDER)
        context = multiprocessing.get_context("spawn")  # a fork of torch's threads would hang
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, (run.folder, run.config, run.device), names, work)
        self.process = context.Process(target=_second, args=arguments, daemon=True)
        try:
            with _signals_kept_back():
                self.process.start()
        except BaseException:  # a Ctrl-C that was kept back comes here
            self._end()
            raise
        theirs.close()
        processes.apart.add(self.process.pid)  # its processor time is on its own clock

    def look(self, seconds: float = 0.0, show: bool = False) -> None:
        """Take what it has sent, waiting so long for the first word; show: its progress too. Raises
        the error that it met, and RuntimeError where it is gone."""
        while not self.ended and self.pipe.poll(seconds):
            seconds = 0.0
            try:
                kind, *content = self.pipe.recv()
            except (EOFError, OSError):
                self.ended = True
                raise RuntimeError(f"{GONE}; {processes.AGAIN}") from None
            self.ended = kind in ("end", "error")  # after either it only waits for `close`
            if kind == "error":
                error = content[0]
                raise error
            if kind == "line":
                self.lines += content
            if kind == "progress" and show:
                self.progress(*content)

    def join(self) -> list[str]:
        """Wait for its end and put its books into the run's; its lines, one a stage."""
        began = time.monotonic()
        while not self.ended:
            self.look(TELLS, show=True)
        put_together(self.run, time.monotonic() - began)
        return self.lines

    def close(self) -> None:
        """It ends after the step that it is in, or, where that takes long, at once."""
        try:
            until = time.monotonic() + LAST_STEP
            with suppress(Exception):  # an error of its own comes second to why we end
                if not self.ended:
                    self.pipe.send("stop")
                while not self.ended and time.monotonic() < until:
                    self.look(TELLS)  # it cannot end while nobody reads what it sends
        finally:
            self._end()

    def _end(self) -> None:
        """At once, if it has not ended yet."""
        if self.process.pid is not None:
            self.process.kill()
            self.process.join()
        processes.apart.discard(self.process.pid)
        self.pipe.close()


def put_together(run: Run, waited: float = 0.0) -> None:
    """The second process's finished stages, and its lines of metrics.jsonl, become the run's; its
    folder goes. waited: how many of its seconds nothing else was done in."""
    if not (run.folder / FOLDER).is_dir():
        return
    second = SideRun(run.folder, run.config)
    found = second.own()
    for stage in reversed(found.values()):
        alone = min(waited, stage["seconds"])
        stage["beside_seconds"] = round(stage["seconds"] - alone, 1)
        waited -= alone
    if found:
        # Killed between these two, the run forgets the lines when it goes on, and does both again.
        write_atomically(run.metrics, b"".join([*run.lines(), *second.lines()]))
        both = {**run.stages, **found}
        run.stages = {name: both[name] for name in stages_of(run.config) if name in both}
        run.write_stages()
    move_states(stages_of(run.config), second.books, run.folder)
    shutil.rmtree(second.books)


def move_states(names: Sequence[str], books: Path, to: Path) -> None:
    """States of stages that are not finished go from the `resume/` of one process to that of the
    other, which will look for them."""
    for path in resume.of_states(books / "resume", lambda name: name in names):
        (to / "resume").mkdir(parents=True, exist_ok=True)
        os.replace(path, to / "resume" / path.name)


def tidy(run: Run, beside: bool) -> None:
    """What an earlier training has left: books of a second process go where the run has all of them
    already, and are put together with its own where no second process comes now (`beside`)."""
    books = run.folder / FOLDER
    if not beside or (books.is_dir() and not SideRun(run.folder, run.config).own()):
        put_together(run)


@contextmanager
def _signals_kept_back() -> Iterator[None]:
    """Ctrl-C and `kill` wait here, and never reach a process that is started inside: they come to
    all processes of a terminal, and the first one says to the second when to end."""
    multiprocessing.resource_tracker.ensure_running()  # it would let them through again
    signal.pthread_sigmask(signal.SIG_BLOCK, processes.ENDINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, processes.ENDINGS)


def _second(pipe, of_the_run: tuple, names: list[str], work: Callable) -> None:
    """The second process: it works, and a thread listens to the first one. of_the_run: what a
    `SideRun` is made of."""
    listener = threading.Thread(target=_listen, args=(pipe,), daemon=True)
    listener.start()
    told = 0.0

    def progress(*content) -> None:
        nonlocal told
        # Where the first process is busy with something long, nobody reads: no word waits for it.
        if time.monotonic() - told > TELLS and select.select([], [pipe], [], 0)[1]:
            told = time.monotonic()
            pipe.send(("progress", *content))

    try:
        with half_the_cores():
            work(SideRun(*of_the_run), names, lambda line: pipe.send(("line", line)), progress)
        pipe.send(("end",))
    except KeyboardInterrupt:  # as it was asked to: the state is written
        return
    except Exception as error:
        pipe.send(("error", _sendable(error)))
    listener.join()


def _listen(pipe) -> None:
    """Asked to, the work ends after its step; when the first process is gone, at once."""
    try:
        while True:
            pipe.recv()
            resume.stop_after_step()
    except (EOFError, OSError):
        os._exit(0)


def _sendable(error: Exception) -> Exception:
    """The error as the first process is to raise it: one that `errors.explain` tells in a line as
    it is, any other with the place in our code where it came up."""
    if errors.is_out_of_memory(error):
        return MemoryError(str(error))
    if errors.explain(error) is not None:
        return error
    return SystemError(f"in the second process: {''.join(traceback.format_exception(error))}")

"""What keeps a run safe while it is under way: states inside a stage, a lock, and Ctrl-C.

    RUN/resume/sft-400.safetensors      the state after 400 steps of the stage; the last two stay
                                        until the stage is finished

A state is all that the rest of the stage depends on: weights, their average, the optimizer's
moments, torch's random numbers, what is held besides (dreams, the gauge's probes, counts of the
ledger, metrics so far). Learning rates and batches are no part of it: they follow from the number
of the step (`np.random.default_rng([seed, step])`). So a run that was killed at any moment ends
with the very numbers of one that was not.

A state is written every so many steps, not seconds: then several processes, which all hold a part
of it, do so in the same place. The file is written whole or not at all, and has a checksum; a
damaged one is passed over for the one before. Nothing is unpickled.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import demos
import processes
from demos import parse_json, write_atomically

KEPT = 2  # states of a stage

# ------------------------------------------------------------------------------ files with checksum


def checksum(text: str, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the text and all tensors: names, types, shapes, bytes."""
    arrays = {}
    for name, tensor in tensors.items():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        arrays[name] = f"{tensor.dtype} {tuple(tensor.shape)}", data
    return demos.checksum(text, arrays)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], text: str) -> None:
    """One safetensors file of these, atomically."""
    path.parent.mkdir(exist_ok=True)  # not the folder above: a run that vanished stays away
    write_atomically(path, packed_tensors(tensors, text))


def packed_tensors(tensors: dict[str, torch.Tensor], text: str) -> bytes:
    """The bytes of a safetensors file: tensors by name, and in the header {"description": text,
    "sha256": checksum of both}."""
    from safetensors.torch import save

    # Copies, because safetensors refuses tensors that share their memory.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(tensors, metadata={"description": text, "sha256": checksum(text, tensors)})


def read_tensors(path: Path, earlier: bool = True) -> tuple[dict[str, torch.Tensor], str]:
    """(tensors, text) that `write_tensors` wrote; ValueError or OSError for a file that is not
    whole. earlier: take files of earlier versions too, which have no checksum."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    text = about.get("description", "null")
    said = about.get("sha256", "")
    if not said and not earlier:
        raise ValueError("it has no checksum")
    if said and said != checksum(text, tensors):
        raise ValueError("its checksum is another")
    return tensors, text


# ---------------------------------------------------------------------------------- states of steps


class Keeper:
    """Writes the states of one fit, or of LOOP, and finds the newest when the run goes on.

    steps: how many the newest state has behind it; 0 where there is none, and all begins anew.
    A state is {name: tensor, or anything that JSON holds exactly}.
    """

    def __init__(self, folder: Path, name: str, every: int, also: dict | None = None):
        """every: steps from one state to the next; also: {name: thing}, what else changes in these
        steps, each with `state()`, which all processes call, and `set_state(state)`."""
        self.folder, self.name, self.every = folder, name, every
        self.also = also or {}
        self.steps, self._states = 0, {}
        for path in reversed(self._files()):
            try:
                states = self._read(path)
                steps = int(states["own"]["steps"])
                missing = ({"main", *self.also} - states.keys()) | ({"random"} - set(states["own"]))
                if missing:
                    raise LookupError(f"without {', '.join(sorted(missing))}")
                self.steps = steps
            except (ValueError, TypeError, LookupError, OverflowError, OSError) as error:
                tell(f"{path}: damaged ({error}); passed over, what was kept before it serves")
                continue
            self._states = states
            tell(f"{name} goes on after step {self.steps}")
            break

    def _files(self) -> list[Path]:
        """States of this name, the newest last."""
        numbered = {}
        for path in self.folder.glob(f"{self.name}-*.safetensors"):
            number = path.stem.removeprefix(f"{self.name}-")
            if number.isdigit():
                numbered[int(number)] = path
        return [numbered[number] for number in sorted(numbered)]

    def _read(self, path: Path) -> dict[str, dict]:
        tensors, text = read_tensors(path, earlier=False)
        states = parse_json(text)
        for name, tensor in tensors.items():
            whose, _, what = name.partition("/")
            states[whose][what] = tensor.clone()  # aligned as torch does it, and off the file
        return states

    def due(self, steps: int, last: bool) -> bool:
        """Whether a state is to be written, now that so many steps are done; always after the last,
        since the stage may then write over the checkpoint that it began with."""
        return steps % self.every == 0 or last or _stop.asked

    def write(self, steps: int, state: dict) -> None:
        """Write the state after so many steps; then KeyboardInterrupt, where that was asked for."""
        about = {"steps": steps, "random": torch.get_rng_state()}
        if torch.cuda.is_available():
            about["random_cuda"] = torch.cuda.get_rng_state()
        if torch.backends.mps.is_available():
            about["random_mps"] = torch.mps.get_rng_state()
        states = {"own": about, "main": state}
        states |= {name: thing.state() for name, thing in self.also.items()}
        if processes.is_main():
            tensors: dict[str, torch.Tensor] = {}
            values = {}
            for whose, content in states.items():
                is_tensor = {what: isinstance(x, torch.Tensor) for what, x in content.items()}
                tensors |= {f"{whose}/{k}": x for k, x in content.items() if is_tensor[k]}
                values[whose] = {k: x for k, x in content.items() if not is_tensor[k]}
            path = self.folder / f"{self.name}-{steps}.safetensors"
            write_tensors(path, tensors, json.dumps(values))
            files = self._files()
            ours = files.index(path) + 1  # behind it: what was passed over
            for old in files[: max(0, ours - KEPT)] + files[ours:]:
                old.unlink()
        if _stop.asked:
            raise KeyboardInterrupt

    def restore(self) -> dict:
        """Set everything back to the newest state, but for what the fit or LOOP itself holds, whose
        state is returned."""
        about = self._states["own"]
        torch.set_rng_state(about["random"])
        if "random_cuda" in about and torch.cuda.is_available():
            torch.cuda.set_rng_state(about["random_cuda"])
        if "random_mps" in about and torch.backends.mps.is_available():
            torch.mps.set_rng_state(about["random_mps"])
        for name, thing in self.also.items():
            thing.set_state(self._states[name])
        main, self._states = self._states["main"], {}  # no longer held in memory
        return main


def lines_of(path: Path) -> list[bytes]:
    """A log's lines, each with its end; none where there is no log yet."""
    return path.read_bytes().splitlines(keepends=True) if path.is_file() else []


class Lines:
    """The lines of a log that some work has added: set back with its states, and others stay."""

    def __init__(self, path: Path, ours: Callable[[bytes], bool]):
        """ours(line): whether it is of this work."""
        self.path, self.ours = path, ours

    def state(self) -> dict:
        """Ours, as text: they are ASCII."""
        ours = [line for line in lines_of(self.path) if self.ours(line)]
        return {"lines": b"".join(ours).decode(errors="replace")}

    def set_state(self, state: dict) -> None:
        """Ours are those of the state again, and come last."""
        if processes.is_main():
            others = [line for line in lines_of(self.path) if not self.ours(line)]
            write_atomically(self.path, b"".join(others) + state["lines"].encode())


def of_states(folder: Path, which: Callable[[str], bool]) -> list[Path]:
    """The files of a folder's states whose `Keeper.name` is one of those wanted."""
    return [path for path in folder.glob("*.safetensors") if which(path.stem.rpartition("-")[0])]


def forget(folder: Path, which: Callable[[str], bool]) -> None:
    """Remove such states, and the folder with the last of them: their stage is finished."""
    for path in of_states(folder, which):
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def tell(line: str) -> None:
    """A line beside what is shown on stdout, from one of the processes."""
    if processes.is_main():
        print(line, file=sys.stderr)


def training_state(
    part: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """Weights and buffers of a part, Adam's moments and counts, the averaged weights."""
    state = {f"part.{name}": tensor for name, tensor in part.state_dict().items()}
    names: dict[torch.Tensor, str] = {p: name for name, p in part.named_parameters()}
    for parameter, moments in optimizer.state.items():
        state |= {f"adam.{names[parameter]}.{kind}": x for kind, x in moments.items()}
    if average is not None:
        state |= {f"average.{name}": p for name, p in _trained(average).items()}
    return state


@torch.no_grad()
def set_training_state(
    state: dict, part: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None = None
) -> None:
    """Put back what `training_state` gave. ValueError where it was of other code: a part that has
    changed since the run was interrupted."""
    parameters = dict(part.named_parameters())
    try:
        part.load_state_dict(with_prefix(state, "part."))
        for name, tensor in with_prefix(state, "adam.").items():
            name, _, kind = name.rpartition(".")
            parameter = parameters[name]
            optimizer.state[parameter][kind] = tensor.to(parameter.device)
        if average is not None:
            for name, parameter in _trained(average).items():
                parameter.copy_(state[f"average.{name}"])
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"the state to resume from is not of this {type(part).__name__} "
            f"({str(error).strip().splitlines()[0]}); expected one of the same version of "
            "World-Env; go back to that version, or delete the run's folder resume to begin the "
            "stage anew"
        ) from error


def _trained(part: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in part.named_parameters() if p.requires_grad}


def with_prefix(state: dict, prefix: str) -> dict:
    """What stands in a state under a prefix, without it."""
    return {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}


# ---------------------------------------------------------------------------------------- one a run


@contextmanager
def only_training(folder: Path) -> Iterator[None]:
    """Raise ValueError where another training is at work in a run folder, and keep others out.
    SIGTERM ends what is inside as Ctrl-C does, by KeyboardInterrupt.

    The lock is on config.json, which a run never writes again, and ends with the process that holds
    it, however that ends. Of several processes of one run the main one holds it."""
    if not processes.is_main():
        yield
        return
    with open(folder / "config.json", "r+") as file:  # closed, it is free again
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Of two that begin a folder at once the later one has put its own file there.
            if os.fstat(file.fileno()).st_ino != os.stat(file.name).st_ino:
                raise BlockingIOError("another config.json")
        except BlockingIOError as error:
            raise ValueError(
                f"{folder}: another training is at work there; expected one at a time; wait for "
                "its end, or choose another --out"
            ) from error
        with _on_signals(signal.default_int_handler):
            yield


# ------------------------------------------------------------------------------------- interruption


class _Stop:
    """Whether the training was asked to end after the current step."""

    asked = False


_stop = _Stop()


def asked_to_stop() -> bool:
    """Whether `stop_after_step` was called, or a signal has asked for it."""
    return _stop.asked


def stop_after_step() -> None:
    """As Ctrl-C does inside `finishing_steps`, but without a signal: the state is written after the
    current step, or after the first of the next fit, and then comes the KeyboardInterrupt."""
    _stop.asked = True


@contextmanager
def finishing_steps() -> Iterator[None]:
    """Ctrl-C or SIGTERM inside: the current step is finished and its state written, then comes the
    KeyboardInterrupt. A second one ends at once. Several processes would stop at different steps,
    so they end at once too, and go on at their last state."""

    def ask(*_signal) -> None:
        if _stop.asked:
            raise KeyboardInterrupt
        _stop.asked = True
        # Not by print: the signal may have come in the middle of one.
        os.write(2, b"\nending after this step; once more ends at once\n")

    try:
        with _on_signals(ask):
            yield
        if _stop.asked:  # in the last step
            raise KeyboardInterrupt
    finally:
        _stop.asked = False


@contextmanager
def _on_signals(handler) -> Iterator[None]:
    """Handle `processes.ENDINGS` so; the handlers of before come back. Python allows that in the
    main thread; of several processes the launcher's signals mean something else (processes.py).
    A SIGHUP that is ignored (`nohup`) stays so."""
    if threading.current_thread() is not threading.main_thread() or processes.launched() > 1:
        yield
        return
    left_alone = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [n for n in processes.ENDINGS if n != signal.SIGHUP or not left_alone]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)

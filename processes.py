"""Several processes, on one machine or on many: who does which part, and how the parts meet again.

Accelerate starts and connects them: `accelerate launch ... cli.py train` (docs/processes.md).
Every process runs the same program on the same numbers; what is costly is divided, and after it all
of them hold the same again:

    fit.fit                    rows of each batch; the gradients are added up
    ppo.loop                   groups of rollouts, each of which stays whole; rows of a minibatch
    demos.play, dreams.dream_along, reflector.judge_episodes, policy.mean_chunks      episodes

Of n items process r of W takes r, r + W, r + 2 W ... Random numbers are drawn for the items of all
processes, by each of them, and each takes its own: so W processes do what one would do, up to the
rounding of floats. Only the main process writes, prints and shows progress.

With one process every function here returns what it was given, and nothing is connected.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # nothing heavy at the top: `cli.py --help` loads this file
    import numpy as np

# How long a process waits for the others before it gives up. They do their parts side by side, so
# a wait is the difference of two parts: minutes at most. A process that dies closes its connections
# and is noticed at once; this is for one that hangs, or a machine that falls off the network.
TIMEOUT = timedelta(hours=2)
Number = TypeVar("Number", int, float)
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, `kill`, a closed terminal
LAST_WORDS = 10  # seconds in which the main process would have said the same
MAIN_FIRST = 1  # seconds that it has for that where the launcher ends all at once
AGAIN = (
    "run the same command again to resume (train, compare, screen) or to begin anew (the others)"
)
GONE = (
    "a process of this run is gone (killed, or out of memory?); expected all of them to the end; "
    + AGAIN
)

_state: Any = None  # accelerate's PartialState; None where there is one process
apart: set[int | None] = set()  # processes of ours that count their own time: beside.py


# ----------------------------------------------------------------------------------------- starting


def launched() -> int:
    """How many processes a launcher has started this program in; 1 without a launcher. ValueError
    where what it has said makes no sense."""
    if "LOCAL_RANK" not in os.environ:
        return 1
    said = os.environ.get("WORLD_SIZE", "1")
    if not (said.isascii() and said.isdigit() and int(said)):
        raise ValueError(f"WORLD_SIZE: got {said!r}; expected a number of processes; unset it")
    return int(said)


def check_command(command: str | None) -> None:
    """Raise ValueError where `command` cannot be shared, or where fewer processes were started than
    were asked for."""
    if launched() > 1 and command not in ("train", "evaluate"):
        raise ValueError(
            f"{command}: got {launched()} processes; expected one, only train and evaluate can be "
            "shared; leave `accelerate launch` out"
        )
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and launched() == 1:
        raise ValueError(
            "accelerate launch --cpu: started one process, it leaves the others to MPI; expected "
            "several; use --config_file launch/cpu.yaml in the place of --cpu"
        )


def start(device: str, sizes: dict[str, int]) -> None:
    """Connect the processes that a launcher has started; nothing happens where there is one.

    device: where the networks compute, "cpu" or "cuda" (each process then has its own GPU).
    sizes: batches and groups of the work by name, which the number of processes must divide, so
    that all have equal parts; else ValueError, before anything is connected or written."""
    global _state
    if launched() == 1:
        return
    common = math.gcd(*sizes.values())
    if common % launched():
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        allowed = [str(n) for n in range(1, common + 1) if common % n == 0]
        raise ValueError(
            f"--num_processes: got {launched()}; expected a number that divides every batch and "
            f"the groups of this run ({told}): {', '.join(allowed)}; start so many"
        )
    from accelerate import PartialState

    _state = PartialState(cpu=device == "cpu", timeout=TIMEOUT)
    # The launcher ends the others when one has died: say what happened.
    signal.signal(signal.SIGTERM, _ended_by_the_launcher)


def _ended_by_the_launcher(*_signal) -> None:
    if is_main():
        raise RuntimeError(GONE)
    _stand_in(GONE)


def _stand_in(line: str) -> None:
    """End this process, by the launcher's wish; if none has said why, it does: the main process may
    be the one that was killed."""
    time.sleep(MAIN_FIRST)
    if _first_to_speak():
        # Not by print: the signal may have come in the middle of one.
        os.write(2, f"error: process {rank()} of {world()}: {line}\n".encode())
    os._exit(2)


def _first_to_speak() -> bool:
    """Whether no process has told of an error yet; from now on one has. Before they are connected
    all of them meet the same errors, and the main one tells."""
    if _state is None:
        return False
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        return _get_default_store().add("told of an error", 1) == 1
    except RuntimeError:  # the store was in a process that is gone
        return True


def last_words(line: str) -> str:
    """The line that this process prints for an error: what went wrong in all of them is said once,
    by the main process; the launcher ends the others while they wait for that. Where the main one
    was killed, one of the others says it then."""
    rank = int(os.environ.get("RANK", 0))
    if launched() == 1 or rank == 0:
        return line
    signal.signal(signal.SIGTERM, lambda *_: _stand_in(line))
    time.sleep(LAST_WORDS)
    return f"process {rank} of {launched()}: {line}"


def leave(code: int) -> None:
    """End this process. Python must not tear down a connection that is open (torch aborts then), so
    it is closed before; after an error, when nobody may be there to close it with, Python's end is
    left out."""
    if _state is not None and code:
        _first_to_speak()  # whatever there was to say has been said
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if _state is not None:
        import torch.distributed as dist

        dist.destroy_process_group()
    sys.exit(code)


# ------------------------------------------------------------------------------------ who and when


def world() -> int:
    """W, the number of processes."""
    return 1 if _state is None else _state.num_processes


def rank() -> int:
    """r, the number of this process, 0 to W - 1."""
    return 0 if _state is None else _state.process_index


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def wait() -> None:
    """Until all processes are here."""
    if world() > 1:
        with _together():
            _state.wait_for_everyone()


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the block alone, then the others do."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


@contextmanager
def _together() -> Iterator[None]:
    """Around all that needs every process: says plainly when one does not answer."""
    try:
        yield
    except RuntimeError as error:  # what torch.distributed raises
        raise RuntimeError(GONE) from error


def own_cores() -> int:
    """Processor cores of this machine for each of the processes on it."""
    able = hasattr(os, "sched_getaffinity")  # not on macOS
    cores = len(os.sched_getaffinity(0)) if able else os.cpu_count() or 1
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched() > 1 else 1
    return max(1, cores // neighbours)


# ------------------------------------------------------------------------------ dividing, gathering


def mine() -> slice:
    """Which of the items, or rows, of all processes are ours: x[mine()]."""
    return slice(rank(), None, world())


def share(items):
    """Our part of a list, or of the rows of a tensor."""
    return items[mine()]


def all_rows_like(rows):
    """Room for what is drawn for the rows of all processes, where the tensor `rows` has ours: in
    the same layout, because torch draws in the order of memory. share(...) of it is like `rows`."""
    import torch

    shape = (len(rows) * world(), *rows.shape[1:])
    return torch.empty_strided(shape, rows.stride(), dtype=rows.dtype, device=rows.device)


def gather(part: list) -> list:
    """All parts (pickled on their way) in the order of the whole, on every process:
    gather(share(items)) == items."""
    parts = each(part)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(len(some) for some in parts))]


def each(thing) -> list:
    """What every process has in this place: W things, by rank."""
    if world() == 1:
        return [thing]
    from accelerate.utils import gather_object

    with _together():
        return gather_object([thing])


def total(count: Number) -> Number:
    """The sum of a number over all processes."""
    return sum(each(count))


def slots_of(process: int, count: int, together: int) -> np.ndarray:
    """Where the `count` slots of a process stand among the slots of all, (count,) int64, when items
    of `together` neighbouring slots (the rollouts of a group) are shared out."""
    import numpy as np

    item, within = np.divmod(np.arange(count), together)
    size = np.minimum(together, count - item * together)  # the last item may be a short one
    return item * together * world() + process * size + within


def over_slots(values: np.ndarray, together: int) -> np.ndarray:
    """(count,) of our slots -> (W * count,) of the slots of all processes, as in `slots_of`."""
    import numpy as np

    everywhere = np.empty(len(values) * world(), values.dtype)
    for process, some in enumerate(each(values)):
        everywhere[slots_of(process, len(some), together)] = some
    return everywhere


# ---------------------------------------------------------------------------------------- gradients


def shard(part) -> None:
    """Split the weights of a part, their gradients and optimizer state over the processes (FSDP),
    if accelerate's configuration asks for it (launch/fsdp.yaml): of the layers of its pretrained
    model each is whole only while it computes. From then on its `forward` needs every process, so
    this is for `fit.fit`, where all take the same steps, and not for rollouts."""
    if world() == 1 or os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    asked = FullyShardedDataParallelPlugin(fsdp_version=2)  # reads what the launcher has set
    layers = set(asked.transformer_cls_names_to_wrap or ())
    if not layers:
        for module in part.modules():
            layers |= set(getattr(module, "_no_split_modules", None) or ())
    how = {
        "mesh": init_device_mesh(_state.device.type, (world(),)),
        "reshard_after_forward": asked.reshard_after_forward,
        "offload_policy": asked.cpu_offload,
    }
    sharded = [module for module in part.modules() if type(module).__name__ in layers]
    for module in [*reversed(sharded), part]:  # what is inside comes first
        fully_shard(module, **how)
        # Sums, as in `add_up`, where FSDP would take means; gloo knows no other way to sums.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def whole(tensor):
    """A tensor of a part's `state_dict`, put together where it is sharded (by all processes)."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def any_sharded(tensors: list) -> bool:
    """Whether a process holds only a part of some of these."""
    return any(_is_sharded(tensor) for tensor in tensors)


def _is_sharded(tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # torch's DTensor


def equalize(parameters: list) -> None:
    """Give every process the main one's values of these parameters (but of what is sharded)."""
    if world() == 1:
        return
    import torch.distributed as dist

    with _together():
        for parameter in parameters:
            if not _is_sharded(parameter):
                dist.broadcast(parameter.data, src=0)


def add_up(parameters: list, metrics: dict[str, float]) -> dict[str, float]:
    """Sum over processes of the gradients, in place, and of the metrics, in one message.

    grad = sum_r w_r grad L_r,   w_r = n_r / sum_r n_r

    is the gradient of the mean over all n rows if each process took that of w_r L_r, L_r the mean
    over its own n_r rows. A parameter without a gradient on any process keeps none; for one that is
    sharded FSDP has added up already."""
    if world() == 1:
        return metrics
    import torch
    import torch.distributed as dist

    device = parameters[0].device
    parameters = [p for p in parameters if not _is_sharded(p)]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    present = [float(p.grad is not None) for p in parameters]
    tail = torch.tensor([*present, *metrics.values()], device=device)
    message = torch.cat([*(g.float().flatten() for g in gradients), tail])
    with _together():
        dist.all_reduce(message)
    *sums, present, values = message.split(
        [*(p.numel() for p in parameters), len(parameters), len(metrics)]
    )
    for parameter, gradient, count in zip(parameters, sums, present.tolist(), strict=True):
        if count:
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
    return dict(zip(metrics, values.tolist(), strict=True))

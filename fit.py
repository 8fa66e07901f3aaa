"""One training loop for every part:
policy, simulator and reflector all answer `loss, metrics = part(batch)`.

Several processes share each batch: every one of them draws the whole of it, and takes its rows.

Learning rate and batch follow from the number of the step alone, so a fit that was interrupted can
go on from the state that its keeper wrote (resume.py) as if it had not been.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import processes
from resume import Keeper, set_training_state, training_state


@dataclass(frozen=True)
class FitConfig:
    """How long and how fast a part is trained."""

    steps: int = 1500
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup: int = 50  # steps of linear warm-up; a cosine to a twentieth of the rate follows
    ema: float = 0.0  # decay of the averaged weights kept in the end; 0 keeps the last weights
    bf16: bool = False  # autocast to bfloat16 where the processor has it


def fit(
    part: nn.Module,
    sample: Callable[[int], dict[str, torch.Tensor]],
    config: FitConfig,
    on_step: Callable[[int, float, dict], None] | None = None,
    keeper: Keeper | None = None,
) -> dict[str, float]:
    """Train `part` in place with AdamW on `sample(step)` batches;
    returns the mean metrics of the last tenth, and "seconds" since this process began with it.

    The loss is a mean over the rows of a batch, or over the entries of its mask "played" (B, T).
    keeper: writes a state now and then, and where it has found one training goes on there. (A part
    whose weights are sharded over processes begins anew.)
    Raises FloatingPointError as soon as a loss or a gradient is not finite.
    """
    parameters = [p for p in part.parameters() if p.requires_grad]
    # fused: many small tensors in one call, a third of the time on a processor [measured here].
    optimizer = torch.optim.AdamW(
        parameters, config.learning_rate, weight_decay=config.weight_decay, fused=True
    )

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, config.warmup))
        return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))

    average = copy.deepcopy(part) if config.ema else None
    first, tail = 0, []
    keeper = None if processes.any_sharded(parameters) else keeper
    if keeper is not None and keeper.steps:
        first, state = keeper.steps, keeper.restore()
        set_training_state(state, part, optimizer, average)
        tail = state["tail"]
    device = device_of(part)
    processes.equalize(parameters)
    part.train()
    started = time.monotonic()
    for step in range(first, config.steps):
        optimizer.param_groups[0]["lr"] = config.learning_rate * rate(step)
        batch = sample(step)  # outside the autocast: it may dream, and kinematics need all digits
        own = {name: processes.share(x).contiguous() for name, x in batch.items()}
        with bf16_autocast(device, config.bf16):
            loss, metrics = part({name: x.to(device) for name, x in own.items()})
        weight = _size(own) / _size(batch)  # of our rows in the mean over all
        optimizer.zero_grad(set_to_none=True)
        (weight * loss).backward()
        metrics = {name: weight * x for name, x in {"loss": loss.item(), **metrics}.items()}
        metrics = processes.add_up(parameters, metrics)
        clip_gradients(parameters, metrics["loss"], f"{type(part).__name__}, step {step}")
        optimizer.step()
        if average is not None:
            _average(average, part, min(config.ema, (step + 1) / (step + 10)))
        if step >= config.steps * 9 // 10:
            tail.append(metrics)
        if on_step is not None:
            on_step(step, metrics["loss"], metrics)
        if keeper is not None and keeper.due(step + 1, last=step + 1 == config.steps):
            keeper.write(step + 1, {**training_state(part, optimizer, average), "tail": tail})
    if average is not None:
        _average(part, average, 0.0)
    part.eval()
    result = {name: sum(m[name] for m in tail) / len(tail) for name in tail[0]}
    return result | {"seconds": time.monotonic() - started}


def clip_gradients(parameters: Iterable[nn.Parameter], loss: float, where: str) -> None:
    """Scale the gradients to a norm of 1 at the most. Raises FloatingPointError where the loss or a
    gradient is no number: a step with it would spoil every weight, and the states after it."""
    norm: Any = nn.utils.clip_grad_norm_(parameters, 1.0)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # of all shards
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"{where}: the loss is {loss}, its gradient {norm}; expected numbers; run the same "
            "command again to resume from the last state; if that diverges too, a new --out with "
            "another --seed or a lower learning_rate in runs.py"
        )


def _size(batch: dict[str, torch.Tensor]) -> float:
    """Over how much the loss of a batch is a mean."""
    return float(batch["played"].sum()) if "played" in batch else len(next(iter(batch.values())))


def device_of(part: nn.Module) -> torch.device:
    """Where a part computes: what goes into it is moved there, what leaves it for numpy is not."""
    return next(part.parameters()).device


def bf16_autocast(device: torch.device, wanted: bool = True) -> AbstractContextManager:
    """Autocast to bfloat16 where it is wanted and the device computes in it; else in full, also
    inside of an autocast."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    able = torch.cpu.get_capabilities()
    fast = {
        "cpu": bool(able.get("avx512_bf16") or able.get("amx_bf16")),
        "cuda": torch.cuda.is_available()
        and torch.cuda.is_bf16_supported(including_emulation=False),
    }
    return torch.autocast(
        device.type, torch.bfloat16, enabled=wanted and fast.get(device.type, False)
    )


def one_thread() -> AbstractContextManager:
    """For matrices so small that waiting for a second thread costs more than it saves: with two, a
    step of the kinematics takes a tenth longer [measured here]."""
    return threads(1)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many for torch inside; the number of before comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _average(average: nn.Module, part: nn.Module, decay: float) -> None:
    # theta_ema <- decay * theta_ema + (1 - decay) * theta
    for slow, fast in zip(average.parameters(), part.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)

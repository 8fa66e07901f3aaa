"""How fast is the dream? Frames, training steps and the denoiser's work, measured on this machine.

python cli.py bench            -> results/bench.json, .md and .png

What is timed are the real classes at the sizes of a preset, or of a finished run. Without a run
their weights are untrained; the forest of kinematics and the album are filled from a few real
demonstrations, because looking things up in them costs time too.

    imagined   policy.act -> WorldEnv.step (kinematics, simulator, reflector), all on the clock
    real       VecRealEnv.step alone, drawn in software; who acts is off the clock
    training   steps of fit.fit for every part, and of LOOP's update
    denoiser   the U-Net's own calls again, alone: counted FLOPs over seconds, beside the fastest
               matrix product that this machine does

A *frame* is the picture after one decision: K simulator steps and one rendering in reality, one
imagined picture in the dream. The two are therefore the same amount of experience. To start
episodes is off the clock in both.

Absolute times depend on what else the machine does. What is compared is therefore measured in
turns, several times in one run (`alternate`), and a ratio is taken within each turn
(but the denoiser's share, whose measure is the fastest matrix product of all turns). Every figure
is a median with the lowest and the highest.
"""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench_report import growth_chart, markdown
from camera import Camera
from demos import Episode, collect_expert, load, write_atomically
from evaluate import current_commit, hardware, peak_kib, versions
from fit import bf16_autocast, device_of, fit, one_thread
from instructions import INSTRUCTIONS
from kinematics import episode_batches
from policy import Policy, imitation_batches
from ppo import plain_rollouts, update
from reflector import Reflector, frame_batches
from runs import Run, RunConfig
from simulator import Simulator, transition_batches
from tasks import Start
from vecenv import VecRealEnv
from worldenv import WorldEnv, start_frames

BATCH = 64  # rollouts side by side where one number stands for all: goals, profile, real slots
NEVER = float("inf")  # the reflector's threshold: it judges every frame, and no slot rests
JITTER = 1e-3  # metres between copies of a recorded moment


@dataclass(frozen=True)
class Plan:
    """How much is measured; the defaults are those of the committed results."""

    repeats: int = 5  # turns
    seconds: float = 0.6  # that a piece on the clock lasts at least, where it can
    batches: tuple[int, ...] = (1, 8, BATCH, 256)  # rollouts side by side
    steps: tuple[int, ...] = (1, 2, 3, 4)  # denoising steps per frame
    matmul: tuple[int, ...] = (1024, 2304, 4096)  # sides of the square matrices, the best counts
    demos: int = 2  # demonstrations per task that are played for it
    # Growth: rollouts, decisions of an episode and rollouts of a task where the factor is 1. Fewer
    # rollouts than the world imagines at a time (worldenv.BLOCK) cost more each.
    rollouts: int = 32
    decisions: int = 2
    of_a_task: int = 32
    factors: tuple[int, ...] = (1, 2, 4, 8, 16)
    memory: tuple[str, ...] = (
        "parts", "imagine 64", "imagine 256", "policy", "kinematics", "simulator", "reflector",
        "loop update",
    )  # fmt: skip


QUICK = Plan(
    repeats=2, seconds=0.05, batches=(1, BATCH), steps=(1, 2), matmul=(256,), demos=1, rollouts=2,
    decisions=2, of_a_task=2, factors=(1, 4, 16), memory=("imagine 64",),
)  # fmt: skip


# ------------------------------------------------------------------------------------ what is timed


@dataclass
class Parts:
    """Everything in the loop, ready to imagine; nothing ever stops an episode."""

    config: RunConfig
    policy: Policy
    simulator: Simulator
    reflector: Reflector
    episodes: list[Episode]

    def world(self, batch: int, horizon: int = 0) -> WorldEnv:
        """A dream of `batch` rollouts; horizon: decisions (default: the config's)."""
        env = replace(self.config.env, horizon=horizon or self.config.env.horizon)
        return WorldEnv(self.simulator, self.reflector, start_frames(self.episodes), batch, env)


def build(
    config: RunConfig, episodes: list[Episode], camera: Camera, run: Run | None = None
) -> Parts:
    """The parts of a finished run, or untrained ones of its config, filled from the episodes."""
    torch.manual_seed(0)
    if run is not None:
        policy, simulator, reflector = run.policy(), run.simulator(camera), run.reflector()
    else:
        policy, reflector = Policy(config.policy), Reflector(config.reflector)
        policy.hand.look_through(camera)
        reflector.hand.look_through(camera)
        policy.set_state_statistics(np.concatenate([e.state for e in episodes]))
        simulator = filled_simulator(config, episodes, camera)
    reflector.dream_threshold.fill_(NEVER)
    reflector.dream_etas = {}  # nor has any task an eta of its own
    return Parts(config, policy.eval(), simulator.eval(), reflector.eval(), episodes)


def filled_simulator(config: RunConfig, episodes: list[Episode], camera: Camera) -> Simulator:
    """An untrained simulator with as many moments in its forest and its album as a run records."""
    simulator = Simulator(config.simulator, camera)
    recorded = as_many_as_a_run(config, episodes)
    simulator.kinematics.set_range(np.concatenate([e.state for e in recorded]))
    simulator.kinematics.remember(recorded)
    simulator.album.fill(recorded)
    return simulator


def as_many_as_a_run(config: RunConfig, episodes: list[Episode]) -> list[Episode]:
    """The episodes and copies of them whose hand is about a millimetre elsewhere, as many as a run
    with these settings records: how long a forest takes depends on how many moments it is grown
    from. Copies share their frames."""
    count = max(len(episodes), len(config.tasks) * (config.demos + config.exploration))
    rng = np.random.default_rng(0)
    copies = list(episodes)
    for i in range(len(episodes), count):
        episode = episodes[i % len(episodes)]
        moved = rng.normal(0, JITTER, episode.state.shape).astype(np.float32)
        copies.append(replace(episode, state=episode.state + moved))
    return copies


@dataclass
class Work:
    """A piece of work for the clock: `do(n)` does n units of it and returns the seconds."""

    do: Callable[[int], float]
    each: float = 1.0  # what one unit counts: frames, steps, FLOPs
    most: int = 100_000  # units that can be done in a row


def alternate(works: dict, repeats: int, seconds: float) -> dict[Any, list[float]]:
    """{name: Work} in turns, each as many units as take about `seconds`, after a round to warm up
    -> {name: its rate in every turn, in what the units count per second}."""
    units = {name: paced(work, seconds) for name, work in works.items()}
    rates: dict[Any, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            rates[name].append(work.each * units[name] / work.do(units[name]))
    return rates


def paced(work: Work, seconds: float) -> int:
    """How many units take about `seconds`; they are timed after a warm-up, where that is short."""
    taken = work.do(1)
    if taken < seconds:
        taken = work.do(1)
    return max(1, min(work.most, math.ceil(seconds / taken)))


def clocked(call: Callable[[], object]) -> Callable[[int], float]:
    """`Work.do` that calls so many times, all of it on the clock."""

    def do(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            call()
        return time.perf_counter() - started

    return do


def imagined(parts: Parts, world: WorldEnv, denoising: int) -> Work:
    """Decisions in a dream with the policy, the simulator and the reflector in the loop."""

    def do(decisions: int) -> float:
        parts.simulator.config = replace(parts.config.simulator, sampling_steps=denoising)
        observation, _ = world.reset()
        started = time.perf_counter()
        for _ in range(decisions):
            observation = world.step(parts.policy.act(observation, ~world.done))[0]
        taken = time.perf_counter() - started
        parts.simulator.config = parts.config.simulator
        return taken

    return Work(do, each=world.num_envs, most=world.config.horizon)


def real(parts: Parts, env: VecRealEnv) -> Work:
    """The same decisions in the real environment. Only its own step is on the clock: the ratio to
    the dream, which has the policy on the clock too, is rather too low than too high."""
    seeds = [parts.episodes[i % len(parts.episodes)] for i in range(env.num_envs)]
    starts = [Start(e.task, e.seed) for e in seeds]

    def do(decisions: int) -> float:
        observation, _ = env.reset(options={"starts": starts, "stop_on_success": False})
        seconds = 0.0
        for _ in range(decisions):
            actions = parts.policy.act(observation, ~env.done)
            started = time.perf_counter()
            observation = env.step(actions)[0]
            seconds += time.perf_counter() - started
        return seconds

    return Work(do, each=env.num_envs, most=env.config.horizon)


# ----------------------------------------------------------------------------------------- training


TRAINED = ("policy", "kinematics", "simulator", "reflector", "loop update")


def training(parts: Parts, item: str) -> Work:
    """Steps of a part's training on batches of the episodes, or of LOOP's optimizer. It trains a
    copy: what imagines stays as it was. (The simulator's own rollouts, a renewal of which comes
    every fifty steps, are imagined frames and not in its steps.) item: one of TRAINED."""
    if item == "loop update":
        return loop_update(parts)
    config = parts.config
    part, batches, settings = {
        "policy": (parts.policy, imitation_batches, config.sft),
        "kinematics": (parts.simulator.kinematics, episode_batches, config.kinematics_fit),
        "simulator": (parts.simulator, transition_batches, config.simulator_fit),
        "reflector": (parts.reflector, frame_batches, config.reflector_fit),
    }[item]
    part, sample = copy.deepcopy(part), batches(parts.episodes, settings.batch, 0)
    threads = one_thread if item == "kinematics" else nullcontext  # as in `train`

    def do(steps: int) -> float:
        with threads():
            return fit(part, sample, replace(settings, steps=steps))["seconds"]

    return Work(do)


def loop_update(parts: Parts) -> Work:
    """LOOP's optimizer steps, in the dream's settings, on rollouts that are played once, off the
    clock. Nothing stops them, so their returns are drawn: every group then has spread."""
    config = replace(parts.config.loop, branch=0, max_kl=NEVER)
    count = config.groups * config.rollouts
    horizon = min(parts.config.env.horizon, math.ceil(config.decisions / count))
    world, generator = parts.world(count, horizon), torch.Generator().manual_seed(0)
    known = list(world.starts)
    starts = [known[i % len(known)] for i in range(config.groups)]
    rollouts = plain_rollouts(world, parts.policy, starts, config, generator)
    drawn = np.random.default_rng(0).random(rollouts.returns.shape, dtype=np.float32)
    rollouts = replace(rollouts, returns=drawn)
    policy = copy.deepcopy(parts.policy)
    groups = policy.parameter_groups(config.learning_rate, config.adapter_rate)
    optimizer = torch.optim.Adam(groups, fused=True)

    call = partial(update, policy, optimizer, rollouts, config, generator)
    rows = min(len(rollouts.member), config.decisions)
    return Work(clocked(call), each=config.epochs * math.ceil(rows / config.minibatch))


# ----------------------------------------------------------------------------------------- denoiser


def denoiser_calls(parts: Parts) -> list[tuple]:
    """The U-Net's calls (arguments, keywords) in one imagined decision of BATCH rollouts."""
    calls, unet = [], parts.simulator.unet
    original = unet.forward

    def recorded(*arguments, **keywords):
        calls.append((arguments, keywords))
        return original(*arguments, **keywords)

    unet.forward = recorded
    try:
        imagined(parts, parts.world(BATCH), parts.config.simulator.sampling_steps).do(1)
    finally:
        del unet.forward
    return calls


def flops_of(module: nn.Module, calls: list[tuple]) -> int:
    """Floating-point operations of the module's calls: a multiplication and an addition are two."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for arguments, keywords in calls:
            module(*arguments, **keywords)
    return counter.get_total_flops()


def computes_bf16() -> bool:
    """Whether imagination computes in bfloat16 here."""
    with bf16_autocast(torch.device("cpu")):
        return torch.is_autocast_enabled("cpu")


def matrix_products(side: int, dtype: torch.dtype) -> dict[str, Work]:
    """The product of two square matrices, 2 n^3 FLOPs, as both libraries behind torch do it: MKL,
    and oneDNN, whose 1 x 1 convolution over n pixels of n channels is the same product. On AMD's
    processors MKL leaves half of the width of AVX-512 unused [measured here], so that alone it
    would be no peak. side: 16 times a square."""
    a, b = torch.rand(2, side, side).to(dtype)
    out = torch.empty(side, side, dtype=dtype)
    edge = math.isqrt(side // 16)
    pixels = torch.rand(16, side, edge, edge).to(dtype, memory_format=torch.channels_last)
    weight = torch.rand(side, side, 1, 1).to(dtype)
    ways = {
        "product": lambda: torch.mm(a, b, out=out),
        "convolution": lambda: F.conv2d(pixels, weight),
    }
    return {name: Work(clocked(product), each=2 * side**3) for name, product in ways.items()}


def denoiser(parts: Parts, plan: Plan) -> dict:
    """The U-Net's FLOP/s beside this machine's fastest matrix product, in every precision that it
    computes in; "imagination" names the one that dreams use."""
    unet, calls = parts.simulator.unet, denoiser_calls(parts)
    flops = flops_of(unet, calls)

    def again(bf16: bool) -> None:
        for arguments, keywords in calls:
            with torch.no_grad(), bf16_autocast(device_of(unet), bf16):
                unet(*arguments, **keywords)

    precisions = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if computes_bf16() else {})
    works: dict[tuple, Work] = {}
    for name, dtype in precisions.items():
        for side in plan.matmul:
            products = matrix_products(side, dtype)
            works |= {(name, side, way): work for way, work in products.items()}
        works[name, "denoiser"] = Work(clocked(partial(again, name == "bf16")), each=flops)
    rates = alternate(works, plan.repeats, plan.seconds / 4)
    frames = BATCH * parts.config.simulator.sampling_steps
    result: dict = {
        "gflop_per_frame": digits(flops / frames / 1e9),
        "imagination": "bf16" if "bf16" in precisions else "fp32",
    }
    for name in precisions:
        done = rates.pop((name, "denoiser"))
        peak = max(max(each) for (precision, *_), each in rates.items() if precision == name)
        result[name] = {
            "matmul_peak_gflops": digits(peak / 1e9),
            "denoiser_gflops": spread([rate / 1e9 for rate in done]),
            "share": spread([rate / peak for rate in done]),
        }
    return result


# ------------------------------------------------------------------------------------------ profile


@dataclass
class Stopwatch:
    """Seconds by part, each without those of the parts that it calls."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    inside: list[float] = field(default_factory=list)  # of running calls, what their callees took

    def around(self, original: Callable, part: str) -> Callable:
        """The same function, with its time counted for `part`."""

        def timed(*arguments, **keywords):
            self.inside.append(0.0)
            started = time.perf_counter()
            result = original(*arguments, **keywords)
            taken = time.perf_counter() - started
            self.seconds[part] += taken - self.inside.pop()
            if self.inside:
                self.inside[-1] += taken
            return result

        return timed


@contextmanager
def watched(methods: dict[str, tuple[object, str]]) -> Iterator[Stopwatch]:
    """{part: (object, name of its method)} -> a stopwatch for them while the context lasts."""
    watch = Stopwatch()
    for part, (owner, method) in methods.items():
        setattr(owner, method, watch.around(getattr(owner, method), part))
    try:
        yield watch
    finally:
        for owner, method in methods.values():
            delattr(owner, method)  # the class's own is seen again


def profile(parts: Parts, batch: int, plan: Plan) -> dict[str, float]:
    """Of the time of an imagined decision, the share of every part; they add up to 1."""
    world, simulator = parts.world(batch), parts.simulator
    work = imagined(parts, world, parts.config.simulator.sampling_steps)
    units = paced(work, plan.seconds)
    methods = {
        "policy": (parts.policy, "act"),
        "kinematics: network": (simulator.kinematics, "smooth"),
        "kinematics: forest": (simulator.kinematics, "next_state"),
        "world: memory and history": (world, "step"),
        "simulator: conditions (album, carried, folding)": (simulator, "conditions"),
        "simulator: U-Net": (simulator.unet, "forward"),
        "simulator: copying, decoding": (simulator, "next_frame"),
        "reflector": (parts.reflector, "reward"),
    }
    with watched(methods) as watch:
        for _ in range(plan.repeats):
            work.do(units)
    total = sum(watch.seconds.values())
    return {part: digits(watch.seconds[part] / total) for part in methods}


# ------------------------------------------------------------------------------------------- growth


def growth(parts: Parts, plan: Plan) -> dict[str, dict]:
    """Seconds of whole imagined rollouts, their beginning included, where there are more of them,
    where they are longer and where they are of more tasks: {what: {"size", "seconds", "slope"}}.

    seconds ~ size^slope, fitted by least squares to the logarithms: 1 is linear.

    Tasks beyond the config's begin at one of its frames, with instructions of their own: what a
    frame shows makes no difference to its cost."""
    names = [*parts.config.tasks, *(t for t in INSTRUCTIONS if t not in parts.config.tasks)]
    first = parts.episodes[0].image[0], parts.episodes[0].state[0]
    sizes, works = {}, {}
    for factor in plan.factors:
        worlds = {
            "rollouts": parts.world(factor * plan.rollouts, plan.decisions),
            "decisions": parts.world(plan.rollouts, factor * plan.decisions),
            "tasks": parts.world(factor * plan.of_a_task, plan.decisions),
        }
        worlds["tasks"].starts = {Start(name, 0): first for name in names[:factor]}
        least = {"rollouts": plan.rollouts, "decisions": plan.decisions, "tasks": 1}
        for what, world in worlds.items():
            works[what, factor] = Work(clocked(partial(whole_rollouts, parts, world)), most=1)
            sizes[what, factor] = factor * least[what]
    rates = alternate(works, plan.repeats, 0)
    result = {}
    for what in ("rollouts", "decisions", "tasks"):
        size = [sizes[what, factor] for factor in plan.factors]
        seconds = [spread([1 / r for r in rates[what, factor]]) for factor in plan.factors]
        slope = np.polyfit(np.log(size), np.log([s["value"] for s in seconds]), 1)[0]
        result[what] = {"size": size, "seconds": seconds, "slope": digits(float(slope))}
    return result


def whole_rollouts(parts: Parts, world: WorldEnv) -> None:
    """All rollouts of a world, from their start to the horizon."""
    observation, _ = world.reset()
    while not world.done.all():
        observation = world.step(parts.policy.act(observation, ~world.done))[0]


# ------------------------------------------------------------------------------------------- memory


def peak_of(item: str, config: RunConfig, folder: Path | None, episodes, camera) -> float:
    """Peak memory of this process, GiB, after it has built the parts and done one piece of work:
    "parts" (nothing more), "imagine BATCH", or a name of `training`. For a process of its own."""
    parts = build(config, episodes, camera, Run.open(folder) if folder else None)
    if item.startswith("imagine"):
        world = parts.world(int(item.split()[1]))
        imagined(parts, world, config.simulator.sampling_steps).do(2)
    elif item != "parts":
        training(parts, item).do(2)
    return peak_kib(psutil.Process()) / 2**20


def memory(plan: Plan, *parts) -> dict[str, float]:
    """Peak GiB of each item of the plan, in a new process each; parts: see `peak_of`."""
    peaks = {}
    for item in plan.memory:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peaks[item] = round(pool.submit(peak_of, item, *parts).result(), 2)
    return peaks


# ----------------------------------------------------------------------------------------- together


def measure(config: RunConfig, run: Run | None, plan: Plan, say: Callable[[str], None]) -> dict:
    """All of it, as the JSON has it, without its origin. config: the run's, where there is one."""
    slots = max(BATCH, len(config.tasks))
    envs = {workers: VecRealEnv(slots, config.env, workers) for workers in (1, 2)}
    try:
        if run is not None:
            episodes, _, camera = load(run.episodes_folder, config.env, config.tasks)
        else:
            say("demonstrations")
            episodes = collect_expert(envs[2], list(config.tasks), plan.demos, 0)
            camera = envs[2].camera
        parts = build(config, episodes, camera, run)
        say("frames, imagined and real")
        works: dict[tuple, Work] = {
            (batch, steps): imagined(parts, world, steps)
            for batch in plan.batches
            for world in [parts.world(batch)]
            for steps in sorted({*plan.steps, config.simulator.sampling_steps})
        }
        usual = BATCH, config.simulator.sampling_steps
        works[usual] = works.pop(usual)  # now last: beside the real frames that it is compared with
        works |= {("real", workers): real(parts, envs[workers]) for workers in (2, 1)}
        frames = alternate(works, plan.repeats, plan.seconds)
    finally:
        for env in envs.values():
            env.close()
    say("denoiser and matrix products")
    result = {"denoiser": denoiser(parts, plan)}
    say("profile")
    result["profile"] = {str(batch): profile(parts, batch, plan) for batch in (1, BATCH)}
    say("growth")
    result["growth"] = growth(parts, plan)
    say("training")
    trained = {item: training(parts, item) for item in TRAINED}
    steps = alternate(trained, plan.repeats, plan.seconds)
    result["training_steps_per_second"] = {name: spread(each) for name, each in steps.items()}
    say("memory, a new process for each item")
    folder = None if run is None else run.folder
    result["peak_gib"] = memory(plan, config, folder, episodes, camera)
    return figures(config, frames, result["denoiser"]) | result


def figures(config: RunConfig, frames: dict, denoised: dict) -> dict:
    """What `measure` found per turn -> the frames, and the figures for results/summary.json."""
    usual = config.simulator.sampling_steps
    dreamt, drawn = frames[BATCH, usual], frames["real", 2]
    ratio = [a / b for a, b in zip(dreamt, drawn, strict=True)]  # of the same turn
    return {
        "figures": {
            "imagined_fps_batch1": spread(frames[1, usual]),
            "imagined_fps_batch64": spread(dreamt),
            "real_fps": spread(drawn),
            "imagined_over_real_fps": spread(ratio),
            "denoiser_matmul_share": denoised[denoised["imagination"]]["share"],
        },
        "imagined_fps": [
            {"batch": batch, "denoising_steps": steps, **spread(each)}
            for (batch, steps), each in frames.items()
            if batch != "real"
        ],
        "real_fps": [{"processes": n, **spread(frames["real", n])} for n in (1, 2)],
    }


def spread(values: list[float]) -> dict:
    """{"value": the median, "low", "high", "n", "each": all of them in their order}."""
    return {
        "value": digits(float(np.median(values))),
        "low": digits(min(values)),
        "high": digits(max(values)),
        "n": len(values),
        "each": [digits(value) for value in values],
    }


def digits(value: float) -> float:
    """Five of them that count."""
    return float(f"{value:.5g}")


def bench(out: Path, config: RunConfig, run: Run | None, plan: Plan, command: str, say) -> dict:
    """Measure, and write OUT (.json), and beside it .md and .png; returns the JSON."""
    started = time.monotonic()
    result = {
        "command": command,
        "commit": current_commit(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "weights": "untrained" if run is None else f"of {run.folder.name}",
        **measure(config, run, plan, say),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out.with_suffix(".png"), growth_chart(result["growth"]))
    write_atomically(out.with_suffix(".md"), markdown(result, out.stem).encode())
    write_atomically(out, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    say(f"{time.monotonic() - started:.0f} s")
    return result

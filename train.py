"""The stages of the method, in order;
each reads what the earlier ones left in the run folder and leaves its own.

    1 demos      five expert demonstrations per task
    2 sft        imitation (L1 mean, Laplace scale head)
    3 explore    the SFT policy, with noise, collects successes and failures: real episodes,
                 counted in the ledger
    4 simulator  the world simulator learns from all episodes
    5 reflector  the instant reflector learns from all episodes
    6 rl         LOOP inside the dream (or, with rl_env="real", in the real simulator)
    7 evaluate   real success on test starts: SFT and post-trained policy, three terminations

A stage that is finished is skipped, so a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch

import demos
from demos import Episode, play
from evaluate import (
    calibrate,
    dream_along,
    evaluate,
    judge_terminations,
    reflector_card,
    simulator_card,
    test_starts,
)
from fit import fit
from policy import Policy, imitation_batches
from ppo import Explorer, loop, no_signal
from reflector import Reflector, frame_batches
from runs import Run, RunConfig, save_part
from simulator import Simulator, transition_batches
from tasks import SPLITS, Start, VecRealEnv
from worldenv import WorldEnv, start_frames

STAGES = ("demos", "sft", "explore", "simulator", "reflector", "rl", "evaluate")
EXPLORATION_ROLLOUTS_AFTER_SUCCESS = 3  # decisions, so that the reflector sees frames after success


def train(
    run: Run,
    say: Callable[[str], None],
    progress: Callable[[str, int, int, dict], None],
    until: str | None = None,
):
    """Run every stage that is not finished; `say` gets one line per stage,
    `progress` (stage, step, steps, metrics).

    until: the last stage to run (default all).
    """
    stages = {
        "demos": stage_demos,
        "sft": stage_sft,
        "explore": stage_explore,
        "simulator": stage_simulator,
        "reflector": stage_reflector,
        "rl": stage_rl,
        "evaluate": stage_evaluate,
    }
    with RealWorkers(run.config) as real:
        for name in stages_of(run.config):
            if name in run.stages:
                say(f"{name}: done already ({run.stages[name]['seconds']:.0f} s)")
            else:
                torch.manual_seed(run.config.seed * 1000 + STAGES.index(name))
                started = time.time()
                result = stages[name](run, real, lambda *a, name=name: progress(name, *a))
                run.finish_stage(name, time.time() - started, result)
                say(f"{name}: {result['line']} ({time.time() - started:.0f} s)")
            if name == until:
                break


def stages_of(config: RunConfig) -> tuple[str, ...]:
    """The stages of a run: RL in the real simulator (the baseline)
    needs no exploration, simulator or reflector."""
    return STAGES if config.rl_env == "dream" else ("demos", "sft", "rl", "evaluate")


class RealWorkers:
    """The real environment, started when it is first needed, with a ledger of what was played."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.env: VecRealEnv | None = None

    def __enter__(self) -> RealWorkers:
        return self

    def __exit__(self, *exception) -> None:
        if self.env is not None:
            self.env.close()

    def open(self) -> VecRealEnv:
        if self.env is None:
            self.env = VecRealEnv(self.config.slots, self.config.env)
        return self.env

    def count(self) -> dict[str, int]:
        """Real episodes and steps since the last call."""
        env = self.env
        if env is None:
            return {"real_episodes": 0, "real_steps": 0}
        spent = {"real_episodes": env.real_resets, "real_steps": env.real_steps}
        env.real_resets = env.real_steps = 0
        return spent


def _offset(config: RunConfig) -> int:
    """Where in the demonstration and exploration splits this seed's starts begin:
    no two seeds share a start."""
    return config.seed * 1000


def sources(run: Run) -> tuple[list[Episode], list[Episode]]:
    """(demonstrations, exploration episodes) of the run."""
    episodes, _, _ = demos.load(run.episodes_folder, run.config.env, run.config.tasks)
    by_source = {s: [e for e in episodes if e.source == s] for s in ("expert", "exploration")}
    return by_source["expert"], by_source["exploration"]


def held_out(episodes: list[Episode]) -> tuple[list[Episode], list[Episode]]:
    """Every eighth exploration episode is kept from training,
    to measure simulator and reflector: (training, held out)."""
    return [e for i, e in enumerate(episodes) if i % 8], episodes[::8]


def stage_demos(run: Run, real: RealWorkers, progress) -> dict:
    """The scripted expert plays; leaves the episodes folder and a contact sheet."""
    config = run.config
    env = real.open()
    episodes = demos.collect_expert(env, config.tasks, config.demos, _offset(config))
    if run.episodes_folder.exists():  # left by a run that was killed inside this stage
        for path in run.episodes_folder.glob("episode_*.safetensors"):
            path.unlink()
    demos.save(run.episodes_folder, episodes, config.env, env.camera)
    pictures = run.folder / "pictures"
    pictures.mkdir(exist_ok=True)
    first = [next(e for e in episodes if e.task == task) for task in config.tasks]
    demos.write_png(pictures / "demonstrations.png", demos.contact_sheet(first))
    return {
        "line": f"{len(episodes)} expert episodes of {len(config.tasks)} tasks",
        "ledger": {
            "demonstrations": len(episodes),
            "demonstration_steps": real.count()["real_steps"],
        },
    }


def stage_sft(run: Run, real: RealWorkers, progress) -> dict:
    """Imitation of the demonstrations; leaves the checkpoint "sft"."""
    config = run.config
    demonstrations, _ = sources(run)
    policy = Policy(config.policy)
    policy.set_state_statistics(np.concatenate([e.state for e in demonstrations]))
    sample = imitation_batches(demonstrations, config.sft.batch, config.seed)
    result = fit(policy, sample, config.sft, lambda s, loss, m: progress(s, config.sft.steps, m))
    save_part(run.checkpoint("sft"), policy, asdict(config.policy))
    return {"line": f"L1 error {result['l1']:.3f}, mean scale {result['scale']:.3f}", **result}


def stage_explore(run: Run, real: RealWorkers, progress) -> dict:
    """The noisy SFT policy plays real episodes;
    adds them, successes and failures, to the folder."""
    config = run.config
    policy = run.policy("sft")
    demonstrations, old = sources(run)
    if old:  # left by a run that was killed inside this stage: begin again
        for path in sorted(run.episodes_folder.glob("episode_*.safetensors"))[
            len(demonstrations) :
        ]:
            path.unlink()
    generator = torch.Generator().manual_seed(config.seed)
    explorer = Explorer(policy, config.exploration_noise, False, generator)
    starts = test_starts(config.tasks, config.exploration, "explore", _offset(config))
    episodes = play(
        real.open(), starts, explorer.act, "exploration", EXPLORATION_ROLLOUTS_AFTER_SUCCESS,
        lambda running: explorer.rows.clear(),
    )  # fmt: skip
    demos.save(run.episodes_folder, episodes, config.env, real.open().camera)
    rate = np.mean([e.succeeded for e in episodes])
    spent = real.count()
    return {
        "line": f"{len(episodes)} exploration episodes, {rate:.0%} succeed",
        "ledger": {
            "exploration_episodes": spent["real_episodes"],
            "exploration_steps": spent["real_steps"],
        },
        "success": float(rate),
    }


def stage_simulator(run: Run, real: RealWorkers, progress) -> dict:
    """Fits kinematics and next frames; measured on held-out episodes;
    leaves checkpoint and strips."""
    config = run.config
    demonstrations, exploration = sources(run)
    training, kept = held_out(exploration)
    _, _, cam = demos.load(run.episodes_folder)
    simulator = Simulator(config.simulator, cam)
    millimetres = simulator.fit_kinematics(demonstrations + training)
    settings = config.simulator_fit
    sample = transition_batches(demonstrations + training, settings.batch, config.seed)
    result = fit(simulator, sample, settings, lambda s, loss, m: progress(s, settings.steps, m))
    save_part(run.checkpoint("simulator"), simulator, simulator.description())
    world = WorldEnv(
        simulator, _NoReflector(), start_frames(kept), len(kept), config.env, config.seed
    )
    card = simulator_card(world, kept)
    _dream_strips(run, world, kept)
    line = (
        f"open-loop PSNR {card['sim_psnr_1']:.1f} / {card['sim_psnr_5']:.1f} / "
        f"{card['sim_psnr_last']:.1f} dB after 1 / 5 / all decisions "
        f"(first frame: {card['copy_psnr_1']:.1f} / {card['copy_psnr_5']:.1f} / "
        f"{card['copy_psnr_last']:.1f}), "
        f"kinematics {millimetres:.1f} mm"
    )
    return {"line": line, "kinematics_mm": millimetres, **result, **card}


class _NoReflector:
    """Stands in for the reflector where only pictures are wanted: it never stops."""

    threshold = torch.tensor(1.0)

    def reward(self, frames, tokens) -> torch.Tensor:
        return torch.zeros(len(frames))


def _dream_strips(run: Run, world: WorldEnv, episodes: list[Episode]) -> None:
    """One picture and film per task:
    above the real episode, below the dream of the same actions."""
    first = [next((e for e in episodes if e.task == task), None) for task in run.config.tasks]
    chosen = [e for e in first if e is not None]
    for episode, dream in zip(chosen, dream_along(world, chosen), strict=True):
        both = np.concatenate([episode.image, dream], axis=1)  # (T+1, 2H, W, 3)
        picks = np.linspace(0, len(both) - 1, 10).round().astype(int)
        strip = np.concatenate(list(both[picks]), axis=1)
        path = run.folder / "pictures" / f"dream_{episode.task}"
        demos.write_png(path.with_suffix(".png"), strip.repeat(2, axis=0).repeat(2, axis=1))
        demos.write_film(path.with_suffix(".gif"), np.concatenate([episode.image, dream], axis=2))


def stage_reflector(run: Run, real: RealWorkers, progress) -> dict:
    """Trains on one part of the episodes, calibrates the stop on a second,
    is measured on a third."""
    config = run.config
    demonstrations, exploration = sources(run)
    training, kept = held_out(exploration)
    fitted, calibration = held_out(training)
    settings = config.reflector_fit
    reflector = Reflector(config.reflector)
    sample = frame_batches(demonstrations + fitted, settings.batch, config.seed)
    result = fit(reflector, sample, settings, lambda s, loss, m: progress(s, settings.steps, m))
    calibrate(reflector, calibration)
    save_part(run.checkpoint("reflector"), reflector, reflector.description())
    card = reflector_card(reflector, kept)
    line = (
        f"held-out AUROC {card['reflector_auroc']:.3f}, "
        f"false stops in {card['reflector_false_stops']:.0%} of episodes, "
        f"recall {card['recall_at_success']:.0%}, threshold {card['threshold']:.2f}"
    )
    return {"line": line, **result, **card}


def stage_rl(run: Run, real: RealWorkers, progress) -> dict:
    """LOOP from the SFT policy, in the dream or in reality; leaves the checkpoint "policy"."""
    config = run.config
    demonstrations, exploration = sources(run)
    policy = run.policy("sft")
    rng = np.random.default_rng(config.seed)
    if config.rl_env == "real":
        env = real.open()

        def draw(iteration: int, groups: int) -> list[Start]:
            seeds = rng.integers(SPLITS["rl"].start, SPLITS["rl"].stop, groups)
            return [Start(config.tasks[i % len(config.tasks)], int(s)) for i, s in enumerate(seeds)]
    else:
        known = start_frames(demonstrations + exploration)
        by_task = {task: [s for s in known if s.task == task] for task in config.tasks}
        env = WorldEnv(
            run.simulator(_camera_of(run)),
            run.reflector(),
            known,
            config.slots,
            config.env,
            config.seed,
        )

        def draw(iteration: int, groups: int) -> list[Start]:
            tasks = [config.tasks[i % len(config.tasks)] for i in range(groups)]
            return [by_task[t][rng.integers(len(by_task[t]))] for t in tasks]

    history: list[dict] = []

    def on_iteration(iteration: int, metrics: dict) -> None:
        history.append(metrics)
        run.log(stage="rl", iteration=iteration, **metrics, warning=no_signal(metrics))
        progress(iteration, config.loop.iterations, metrics)

    started = time.time()
    loop(env, policy, draw, config.loop, config.seed, on_iteration)
    save_part(run.checkpoint("policy"), policy, asdict(config.policy))
    if config.rl_env == "real":
        spent = real.count()
        ledger = {"rl_real_episodes": spent["real_episodes"], "rl_real_steps": spent["real_steps"]}
    else:
        ledger = {"imagined_frames": env.imagined_frames}
    first, last = history[0], history[-1]
    line = (
        f"{config.loop.iterations} iterations in the {config.rl_env}: "
        f"success of the rollouts {first['success']:.2f} -> {last['success']:.2f}; "
        f"{sum(h['decisions'] for h in history) / (time.time() - started):.0f} decisions/s"
    )
    return {"line": line, "ledger": ledger, "history": [_finite(h) for h in history]}


def _finite(metrics: dict) -> dict:
    return {
        k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in metrics.items()
    }


def _camera_of(run: Run):
    _, _, cam = demos.load(run.episodes_folder)
    return cam


def stage_evaluate(run: Run, real: RealWorkers, progress) -> dict:
    """Real success on test starts of both policies: oracle, reflector and no termination."""
    config = run.config
    env, starts = real.open(), test_starts(config.tasks, config.test_starts)
    results: dict[str, dict] = {}
    for name in ("sft", "policy"):
        policy = run.policy(name)
        results[name] = evaluate_all(
            policy, env, starts, run.reflector() if "reflector" in run.stages else None
        )
    spent = real.count()
    gain = 100 * (results["policy"]["oracle"]["mean"] - results["sft"]["oracle"]["mean"])
    line = (
        f"real success {results['sft']['oracle']['mean']:.3f} (SFT) -> "
        f"{results['policy']['oracle']['mean']:.3f} "
        f"({gain:+.1f} points, oracle termination, {len(starts)} test starts)"
    )
    return {
        "line": line,
        "results": results,
        "ledger": {
            "evaluation_episodes": spent["real_episodes"],
            "evaluation_steps": spent["real_steps"],
        },
        "hardware": hardware(),
    }


def evaluate_all(
    policy: Policy, env: VecRealEnv, starts: list[Start], reflector
) -> dict[str, dict]:
    """Results by termination; "none" and "reflector" judge the same episodes,
    which run to the horizon."""
    oracle = evaluate(policy, env, starts, "oracle")
    unstopped = play(env, starts, policy.act, "evaluation", after_success=None)
    return {"oracle": oracle, **judge_terminations(unstopped, reflector)}


def hardware() -> str:
    """One line for results files: processor, cores, memory."""
    import os

    import psutil

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{name}, {cores} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, "
        f"{platform.system()}"
    )

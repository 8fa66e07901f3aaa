"""The stages of the method, in order; each reads what the earlier ones left in the run folder.
Paper's section: "The loop"; each part names its own.

    1 demos      five expert demonstrations per task
    2 sft        imitation (L1 mean, Laplace scale head)
    3 explore    the SFT policy, with noise, collects successes and failures, and then a policy that
                 has imitated those successes: real episodes, counted in the ledger
    4 filtered_bc  imitation goes on with those of them that succeeded
    5 simulator  the world simulator learns from all episodes but those held out
    6 reflector  the instant reflector learns from three quarters of them and dreams of these, and
                 from the demonstrations; the last quarter calibrates it
    7 dream_bc   the policy learns to act in dreams of these episodes as it does in reality
    8 calibrate  dreams get an eta for each task, by a few real episodes
    9 rl         LOOP inside the dream (or, with rl_env="real", in the real simulator)
   10 evaluate   real success on test starts: SFT, filtered BC and dream BC of the first round, and
                 the post-trained policy, each by three terminations

With `--rounds 2` or more, 3 to 9 come again before 10: the post-trained policy collects a counted
number of new episodes, and imitation, simulator, reflector and LOOP go on with all of them.

# DEVIATION: the paper's RL begins at the SFT policy; here at filtered BC that has imitated itself
#   on dreams too (below), with the same real episodes; because these are paid for in any
#   case, and LOOP's own gain then shows what the dream is worth.
# DEVIATION: the paper's policy has seen no dreamt frame before RL; here it has learned to do on
#   dreams of its real episodes what it does on them; because a small policy from scratch acts
#   otherwise on the errors of a small simulator, and the dream is then about another policy.

pipeline.py goes through them. Several processes (processes.py) go through all stages side by side
and hold the same everywhere; what fits and plays is divided inside, and the main process writes.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

import demos
import processes
from camera import Camera
from checkpoints import same_parts, save_part
from demos import Episode, play
from dreams import OwnRollouts, dream_along
from evaluate import (
    agreement_words,
    dream_agreement,
    gain_words,
    hardware,
    judge_terminations,
    reflector_card,
    reflector_words,
    simulator_card,
    simulator_words,
    test_starts,
    versions,
)
from films import write_strips, write_telling
from fit import FitConfig, fit, one_thread
from gauge import Gauge, known_starts, probe_starts, real_starts
from kinematics import episode_batches
from novelty import Novelty, NoveltyGauge
from order import IMITATION, ROUND, named, round_of, stages_of
from policy import Policy, imitation_batches, mean_chunks
from ppo import loop, no_signal
from pushes import explored
from reflector import (
    Reflector,
    calibrate,
    calibrate_probabilities,
    eta_of_each_task,
    frame_batches,
    judge_episodes,
)
from resume import Keeper, finishing_steps
from runs import BadRun, Clock, Run, RunConfig
from simulator import Simulator, transition_batches
from vecenv import RealWorkers
from worldenv import NoReflector, WorldEnv, give_back_memory, start_frames

OWN_ROLLOUTS = 16  # dreams that are added at a time while the simulator trains
DREAMS = 64  # dreams along episodes side by side: as many as fit the cache [measured here]


def do_stage(run: Run, real: RealWorkers, name: str, say, progress) -> None:
    """One stage, by its name, to its entry in stages.json and its line."""
    stages = {
        "demos": stage_demos,
        "sft": stage_sft,
        "explore": stage_explore,
        "filtered_bc": stage_filtered_bc,
        "simulator": stage_simulator,
        "reflector": stage_reflector,
        "dream_bc": stage_dream_bc,
        "calibrate": stage_calibrate,
        "rl": stage_rl,
        "evaluate": stage_evaluate,
    }
    stage, number = round_of(name)

    def shown(step: int, steps: int, metrics: dict) -> None:
        if stage != "rl":  # it writes its own lines
            log_step(run, name, step, steps, metrics)
        progress(name, step, steps, metrics)

    torch.manual_seed(run.config.seed * 1000 + stages_of(run.config).index(name))
    run.clock = Clock()
    result = stages[stage](run, real, shown, *([number] if stage in ROUND else []))
    spent = run.clock.state()
    run.finish_stage(name, spent["seconds"], spent["cpu"], result)
    give_back_memory()
    say(f"{name}: {result['line']} ({spent['seconds']:.0f} s)")


def log_step(run: Run, stage: str, step: int, steps: int, metrics: dict) -> None:
    """Log about fifty of a stage's steps, and the last."""
    if step % max(1, steps // 50) == 0 or step == steps - 1:
        run.log(stage=stage, step=step, **metrics)


def _offset(config: RunConfig) -> int:
    """Where in the demonstration and exploration splits this seed's starts begin: no two seeds
    share one, as long as a task takes no more than 1000."""
    return config.seed * 1000


def sources(run: Run) -> tuple[list[Episode], list[Episode], Camera]:
    """(demonstrations, exploration episodes, the camera that saw them) of the run. BadRun where
    there are fewer than it has recorded: what was trained on fewer would be another run."""
    episodes, _, camera = demos.load(run.episodes_folder, run.config.env, run.config.tasks)
    by_source = {s: [e for e in episodes if e.source == s] for s in ("expert", "exploration")}
    ledger, found = run.ledger(), len(episodes)
    recorded = sum(ledger.get(name, 0) for name in ("demonstrations", "exploration_episodes"))
    if found < recorded:
        raise BadRun(
            f"{run.episodes_folder}: got {found} episodes; expected the {recorded} that the run "
            "has recorded; put back what is missing, or train with another --out"
        )
    return by_source["expert"], by_source["exploration"], camera


def held_out(episodes: list[Episode], every: int = 8) -> tuple[list[Episode], list[Episode]]:
    """(training, held out). Every eighth exploration episode is kept from training, to measure
    simulator and reflector; of what is left every fourth, by a second call, to calibrate the
    reflector."""
    return [e for i, e in enumerate(episodes) if i % every], episodes[::every]


def stage_demos(run: Run, real: RealWorkers, progress) -> dict:
    """Of the scripted expert or a folder; leaves the episodes folder and a contact sheet."""
    config = run.config
    if config.demonstrations:
        episodes, camera = demos.given(
            config.demonstrations, config.env, config.tasks, config.demos
        )
    else:
        env = real.open()
        episodes = demos.collect_expert(env, config.tasks, config.demos, _offset(config))
        camera = env.camera if processes.is_main() else None  # another may have played nothing
    decisions = sum(len(episode) for episode in episodes)
    if processes.is_main():
        for path in run.episodes_folder.glob("episode_*.safetensors"):
            path.unlink()  # left by a run that was killed inside this stage
        demos.save(run.episodes_folder, episodes, config.env, camera)
        pictures = run.folder / "pictures"
        pictures.mkdir(exist_ok=True)
        first = [next(e for e in episodes if e.task == task) for task in config.tasks]
        demos.write_png(pictures / "demonstrations.png", demos.contact_sheet(first))
    return {
        "line": f"{len(episodes)} expert episodes of {len(config.tasks)} tasks",
        "ledger": {
            "demonstrations": len(episodes),
            "demonstration_steps": real.count()["real_steps"] or config.env.chunk * decisions,
        },
    }


def stage_sft(run: Run, real: RealWorkers, progress) -> dict:
    """Imitation of the demonstrations; leaves the checkpoint "sft"."""
    config = run.config
    demonstrations, _, camera = sources(run)
    policy = Policy(config.policy).to(run.device)
    policy.hand.look_through(camera)
    policy.set_state_statistics(np.concatenate([e.state for e in demonstrations]))
    sample = imitation_batches(demonstrations, config.sft.batch, config.seed)
    result = _imitate(run, policy, "sft", sample, config.sft, progress)
    return {"line": f"L1 error {result['l1']:.3f}, mean scale {result['scale']:.3f}", **result}


def stage_explore(run: Run, real: RealWorkers, progress, number: int = 1) -> dict:
    """The noisy SFT policy plays two fifths of the real episodes, and the rest a policy that has
    imitated their successes, "explorer" (in later rounds the post-trained policy plays all);
    adds them, successes and failures, to the folder.

    # DEVIATION: the paper explores with the SFT policy alone; here with a better one as soon as
    #   there is one; because it reaches what SFT never does, and filtered BC gains by that
    #   [measured here: results/attempts.md].
    """
    config = run.config
    policy = run.policy("sft" if number == 1 else "policy")
    demonstrations = sources(run)[0] if number == 1 else []
    earlier = len(config.tasks) * config.demos + sum(
        stage["ledger"]["exploration_episodes"]
        for name, stage in run.stages.items()
        if round_of(name)[0] == "explore"
    )
    count = config.exploration if number == 1 else config.round_exploration
    used = 0 if number == 1 else config.exploration + (number - 2) * config.round_exploration
    begin, first = _offset(config) + used, explored_first(count)
    generator = torch.Generator().manual_seed(100 * config.seed + number)

    def with_pushes(player: Policy, offset: int, per_task: int) -> list[Episode]:
        starts = test_starts(config.tasks, per_task, "explore", offset)
        return explored(real.open(), player, starts, config.exploration_noise, generator)

    episodes = with_pushes(policy, begin, first)
    if number == 1:
        good = [e for e in episodes if e.succeeded]
        policy = _explorer(run, policy, demonstrations + good, progress)
    episodes += with_pushes(policy, begin + first, count - first)
    if processes.is_main():
        for path in sorted(run.episodes_folder.glob("episode_*.safetensors"))[earlier:]:
            path.unlink()  # left by a run that was killed inside this stage
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


def explored_first(count: int) -> int:
    """Of `count` exploration episodes a task, how many the first policy plays."""
    return math.ceil(0.4 * count)


def _explorer(run: Run, policy: Policy, episodes: list[Episode], progress) -> Policy:
    """`policy` after a quarter of the steps of filtered BC on these episodes: the checkpoint
    "explorer"."""
    full = run.config.filtered_bc
    sample = imitation_batches(episodes, full.batch, run.config.seed + 399)
    settings = replace(full, steps=max(1, full.steps // 4))
    _imitate(run, policy, "explorer", sample, settings, progress)
    return run.policy("explorer")


def stage_filtered_bc(run: Run, real: RealWorkers, progress, number: int = 1) -> dict:
    """SFT (in later rounds the post-trained policy) goes on with the demonstrations and the
    exploration episodes that succeeded, each up to its success; leaves the checkpoint "filtered_bc"
    (filtered_bc_2, ...)."""
    config = run.config
    demonstrations, good, _ = imitated(run)
    sample = imitation_batches(
        demonstrations + good, config.filtered_bc.batch, config.seed + 499 + number
    )
    policy, name = run.policy("sft" if number == 1 else "policy"), named("filtered_bc", number)
    result = _imitate(run, policy, name, sample, config.filtered_bc, progress)
    line = f"{len(demonstrations)} demonstrations and {len(good)} successes imitated, "
    return {"line": line + f"L1 error {result['l1']:.3f}", "successes": len(good), **result}


def imitated(run: Run) -> tuple[list[Episode], list[Episode], Camera]:
    """(demonstrations, exploration episodes that succeeded, the camera): what filtered BC sees."""
    demonstrations, exploration, camera = sources(run)
    return demonstrations, [e for e in exploration if e.succeeded], camera


def _imitate(run: Run, policy: Policy, name: str, sample, settings: FitConfig, progress) -> dict:
    """The policy imitates; leaves the checkpoint `name`."""
    if run.config.policy.backbone == "pretrained":
        processes.shard(policy)
    keeper = run.keeper(name, run.config.checkpoint_every)
    result = _fit(policy, sample, settings, progress, keeper)
    save_part(run.checkpoint(name), policy, asdict(run.config.policy))
    return result


def stage_dream_bc(run: Run, real: RealWorkers, progress, number: int = 1) -> dict:
    """The policy learns to do on dreamt frames what filtered BC of the round does on the real ones,
    and there still to do it; half the steps at half the rate. Leaves "dream_bc" (dream_bc_2, ...).

        loss = |pi(frame) - mu|,  frame real or dreamt, mu = filtered BC's mean on the real one

    and 0.1 times the scale head's loss about it: the scale then says how far the two are apart.
    What the dream gets wrong, an object that fades or lags behind, is then no reason for the policy
    to act otherwise than in reality. No further real episode is needed."""
    config, full = run.config, run.config.filtered_bc
    demonstrations, good, camera = imitated(run)
    world, episodes = open_loop(run, run.simulator(camera), DREAMS), demonstrations + good
    begin, name = (named(stage, number) for stage in IMITATION[1:])
    policy = run.policy(begin)
    answers = mean_chunks(policy, episodes)
    both = zip(episodes + dream_along(world, episodes), answers + answers, strict=True)
    taught = [replace(episode, action=mean) for episode, mean in both]
    sample = imitation_batches(taught, full.batch, config.seed + 699 + number)
    settings = replace(full, steps=max(1, full.steps // 2), learning_rate=full.learning_rate / 2)
    result = _imitate(run, policy, name, sample, settings, progress)
    line = f"{len(episodes)} episodes and dreams of them, L1 error {result['l1']:.3f}"
    ledger = {"imagined_frames": processes.total(world.imagined_frames)}
    return {"line": line, "ledger": ledger, **result}


def stage_calibrate(run: Run, real: RealWorkers, progress, number: int = 1) -> dict:
    """The eta of each task in dreams (`reflector.eta_of_each_task`): the policy that LOOP begins
    with plays real starts that nothing else does, and dreams of them to the horizon. Without real
    episodes to spend (`probes` 0, or stop rule "novelty") all tasks keep the reflector's one."""
    config = run.config
    if not config.probes or config.stop_rule != "real":
        return {"line": "no real episodes: one eta for all tasks", "ledger": {}, "etas": {}}
    camera = demos.camera_of(run.episodes_folder)
    policy = run.policy(loop_begins_with(run, number))
    starts = probe_starts(config.tasks, config.probes, config.seed, skipped=number * config.probes)
    episodes = demos.play(real.open(), starts, policy.act, "evaluation", after_success=0)
    world = open_loop(run, run.simulator(camera), len(starts), start_frames(episodes))
    dreams = demos.play(world, starts, policy.act, "evaluation", after_success=None)
    curves = judge_episodes(run.reflector(), dreams)
    etas, spent = eta_of_each_task(curves, episodes), real.count()
    each = ", ".join(f"{task} {eta:.2f}" for task, eta in etas.items())
    ledger = {
        "calibration_episodes": spent["real_episodes"],
        "calibration_steps": spent["real_steps"],
        "imagined_frames": processes.total(world.imagined_frames),
    }
    return {"line": f"eta in dreams: {each}", "ledger": ledger, "etas": etas}


def _fit(part, sample, settings: FitConfig, progress, keeper: Keeper) -> dict:
    """`fit.fit` with its progress shown; Ctrl-C lets the current step end."""
    with finishing_steps():
        return fit(
            part, sample, settings, lambda s, loss, m: progress(s, settings.steps, m), keeper
        )


def stage_simulator(run: Run, real: RealWorkers, progress, number: int = 1) -> dict:
    """Fits kinematics and next frames (in later rounds it goes on from where it was);
    measured on held-out episodes; leaves checkpoint and strips."""
    config = run.config
    demonstrations, exploration, camera = sources(run)
    training, kept = held_out(exploration)
    training = training if config.extra_data else []
    if number == 1:
        simulator, settings = Simulator(config.simulator, camera), config.simulator_fit
        untrained = int(config.own_rollouts_after * settings.steps)
    else:
        simulator, settings = run.simulator(camera), _refresh(config.simulator_fit)
        untrained = 0
    simulator.to(run.device)
    world = open_loop(run, simulator, OWN_ROLLOUTS)
    episodes = demonstrations + training
    own_rollouts = OwnRollouts(world, episodes, untrained, seed=config.seed + number)
    sample = transition_batches(episodes, settings.batch, _draws(run, number), own_rollouts)
    name, also = named("simulator", number), {"own_rollouts": own_rollouts}
    keeper = run.keeper(name, config.checkpoint_every, also)
    if not keeper.steps:  # a state holds kinematics and album as well
        learn_kinematics(run, simulator, episodes, number, progress)
        simulator.album.fill(episodes)
    result = _fit(simulator, sample, settings, progress, keeper)
    save_part(run.checkpoint("simulator"), simulator, simulator.description())
    judged = open_loop(run, simulator, len(kept))
    card = simulator_card(judged, kept)
    shown = list({episode.task: episode for episode in reversed(kept)}.values())  # one a task
    write_strips(run.folder / "pictures", shown, dream_along(judged, shown))
    line = simulator_words(card)
    line += f"; {simulator.begun}" if simulator.begun and number == 1 else ""
    ledger = {"imagined_frames": processes.total(world.imagined_frames + judged.imagined_frames)}
    return {"line": line, "ledger": ledger, **result, **card}


def learn_kinematics(
    run: Run, simulator: Simulator, episodes: list[Episode], number: int, progress
) -> None:
    """Trains the simulator's kinematics on whole episodes (in later rounds it goes on), then lets
    it remember where it was wrong."""
    config = run.config
    settings = config.kinematics_fit if number == 1 else _refresh(config.kinematics_fit)
    simulator.kinematics.set_range(np.concatenate([e.state for e in episodes]))
    sample = episode_batches(episodes, settings.batch, _draws(run, number))
    keeper = run.keeper(named("kinematics", number), config.checkpoint_every)
    with one_thread():
        _fit(simulator.kinematics, sample, settings, progress, keeper)
    simulator.kinematics.remember(episodes)


def _draws(run: Run, number: int) -> int:
    """The seed of a round's batches: the first one's is the run's own, which is below 100."""
    return run.config.seed + 100 * (number - 1)


def _refresh(fit: FitConfig) -> FitConfig:
    """In later rounds: a third of the steps at half the rate."""
    return replace(fit, steps=max(1, fit.steps // 3), learning_rate=fit.learning_rate / 2)


def open_loop(run: Run, simulator: Simulator, slots: int, starts: dict | None = None) -> WorldEnv:
    """A dream that nothing stops: for `dream_along`, or from known `starts` for a policy."""
    config = run.config
    return WorldEnv(simulator, NoReflector(), starts or {}, slots, config.env, config.seed)


def stage_reflector(run: Run, real: RealWorkers, progress, number: int = 1) -> dict:
    """Trains on one part of the episodes and on dreams of them, calibrates on a second,
    is measured on a third (in later rounds it goes on from where it was). Without extra data there
    are only the demonstrations: they and dreams of them train it, and calibrate it again."""
    config = run.config
    demonstrations, exploration, camera = sources(run)
    training, kept = held_out(exploration)
    fitted, calibration = held_out(training, 4) if config.extra_data else ([], [])
    calibration = calibration or demonstrations
    if number == 1:
        reflector, settings = Reflector(config.reflector), config.reflector_fit
        reflector.hand.look_through(camera)
    else:
        reflector, settings = run.reflector(), _refresh(config.reflector_fit)
    reflector.to(run.device)
    world = open_loop(run, run.simulator(camera), DREAMS)
    dreams = dream_along(world, fitted or demonstrations)
    everything = demonstrations + fitted + dreams
    sample = frame_batches(everything, settings.batch, _draws(run, number))
    keeper = run.keeper(named("reflector", number), config.checkpoint_every)
    result = _fit(reflector, sample, settings, progress, keeper)
    dreamt = dream_along(world, calibration)
    calibrate_probabilities(reflector, calibration + dreamt)
    eta, dream_eta = calibrate(reflector, calibration, dreamt)
    save_part(run.checkpoint("reflector"), reflector, reflector.description())
    card = reflector_card(reflector, kept, eta)
    generated = reflector_card(reflector, dream_along(world, kept), dream_eta)
    line = reflector_words(card, generated)
    ledger = {"imagined_frames": processes.total(world.imagined_frames)}
    cards = {**_finite(card), "generated": _finite(generated)}
    return {"line": line, "ledger": ledger, **result, **cards}


def stage_rl(run: Run, real: RealWorkers, progress, number: int = 1) -> dict:
    """LOOP from dream BC of the same round, in the dream, or from SFT, in reality; leaves the
    checkpoint "policy"."""
    config = run.config
    policy = run.policy(loop_begins_with(run, number))
    gauge, also = None, {"real": real}
    env: Any  # VecRealEnv or WorldEnv
    if config.rl_env == "real":
        env, draw = real.open(), real_starts(config.tasks, config.seed)
    else:
        demonstrations, exploration, camera = sources(run)
        parts = run.simulator(camera), run.reflector()
        known = start_frames(demonstrations + exploration)
        env = WorldEnv(*parts, known, config.slots // processes.world(), config.env)
        if config.probes or config.stop_rule == "novelty":
            gauge = _gauge(run, parts, real, demonstrations, exploration)
        draw = known_starts(config.tasks, config.seed, known, gauge)
        also |= {"env": env} | ({"gauge": gauge} if gauge else {})
    keeper = run.keeper(named("rl", number), 1, also)
    if gauge and not keeper.steps:
        gauge.look(policy, 0)
        _log_probe(run, number, gauge)

    def on_iteration(iteration: int, metrics: dict) -> bool:
        numbers = {**_finite(metrics), "warning": no_signal(metrics)}
        run.log(stage="rl", round=number, iteration=iteration, **numbers)
        progress(iteration, config.rl.iterations, metrics)
        if gauge is None:
            return False
        parted = gauge.look(policy, iteration + 1, last=iteration + 1 == config.rl.iterations)
        if gauge.probes[-1]["iteration"] == iteration + 1:
            _log_probe(run, number, gauge)
        return parted

    started = time.monotonic()
    seed = 100 * config.seed + number
    with finishing_steps():
        history = loop(env, policy, draw, config.rl, seed, on_iteration, keeper)
    seconds = time.monotonic() - started
    result = {"history": [_finite(h) for h in history], "kept": len(history)}
    if gauge is not None:
        result |= {"kept": gauge.restore(policy), "probes": gauge.probes}
        result["warning"] = gauge.warning()
        if isinstance(gauge, Gauge):
            result["films"] = write_telling(run.folder / "pictures", gauge.films)
    save_part(run.checkpoint("policy"), policy, asdict(config.policy))
    spent = real.count()
    first, last = history[0], history[-1]
    line = (
        f"{len(history)} iterations in the {config.rl_env}, kept after {result['kept']}: "
        f"success of the rollouts {first['success']:.2f} -> {last['success']:.2f}; "
        f"{sum(h['decisions'] for h in history[keeper.steps :]) / seconds:.0f} decisions/s"
    )
    who = "rl" if config.rl_env == "real" else "gauge"
    line += f"; {result['warning']}" if result.get("warning") else ""
    ledger = {f"{who}_episodes": spent["real_episodes"], f"{who}_steps": spent["real_steps"]}
    if config.rl_env == "dream":
        looks = gauge.imagined_frames if gauge else 0
        ledger["imagined_frames"] = processes.total(env.imagined_frames) + looks
    return {"line": line, "ledger": ledger, **result}


def loop_begins_with(run: Run, number: int) -> str:
    """The policy's name: dream BC of the round; in the real simulator SFT."""
    return "sft" if run.config.rl_env == "real" else named(IMITATION[-1], number)


def _gauge(
    run: Run, parts: tuple[Simulator, Reflector], real: RealWorkers, demonstrations, exploration
):
    """What says when LOOP in the dream has to end: `RunConfig.stop_rule`."""
    config = run.config
    training, kept = held_out(exploration)
    novelty = Novelty(demonstrations + (training if config.extra_data else []), kept)
    if config.stop_rule == "novelty":
        return NoveltyGauge(*parts, novelty, kept, config.env, config.probe_every)
    starts = probe_starts(config.tasks, config.probes, config.seed)
    return Gauge(*parts, real.open(), starts, config.env, config.probe_every, novelty)


def _log_probe(run: Run, number: int, gauge: Gauge | NoveltyGauge) -> None:
    """What the gauge saw last, for whoever watches metrics.jsonl while LOOP runs."""
    probe = gauge.probes[-1]
    rates = {n: float(np.mean(probe[n])) for n in ("real", "imagined", "novel") if n in probe}
    run.log(stage="gauge", round=number, iteration=probe["iteration"], **rates,
            warning=gauge.warning())  # fmt: skip


def _finite(metrics: dict) -> dict:
    return {
        k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in metrics.items()
    }


def stage_evaluate(run: Run, real: RealWorkers, progress) -> dict:
    """Real success on test starts: the policies of the first round's imitation and the post-trained
    one, each by three terminations; whether dreams of the last agree."""
    config = run.config
    env, starts = real.open(), test_starts(config.tasks, config.test_starts)
    results, names = {}, [name for name in IMITATION if name in run.stages]
    reflector = run.reflector() if run.checkpoint("reflector").is_file() else None
    # LOOP may have kept what it began with: the same policy is not played twice.
    if not same_parts(run.checkpoint(names[-1]), run.checkpoint("policy")):
        names.append("policy")
    for name in names:
        policy = run.policy(name)
        episodes = play(env, starts, policy.act, "evaluation", after_success=None)
        results[name] = judge_terminations(episodes, reflector)
    results["policy"] = results[names[-1]]
    found, imagined = None, 0
    if config.rl_env == "dream":
        parts = run.simulator(demos.camera_of(run.episodes_folder)), reflector
        world = WorldEnv(*parts, start_frames(episodes), len(starts), config.env, config.seed)
        found, imagined = dream_agreement(world, policy, episodes), world.imagined_frames
    spent = real.count()
    line = gain_words(results) + (f"; {agreement_words('from these', found)}" if found else "")
    return {
        "line": line,
        "results": results,
        "agreement": found,
        "ledger": {
            "evaluation_episodes": spent["real_episodes"],
            "evaluation_steps": spent["real_steps"],
            "imagined_frames": processes.total(imagined),
        },
        "hardware": hardware(),
        "versions": versions(),
    }

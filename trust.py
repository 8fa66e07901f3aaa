"""How often does the world model lie? Eight instruments. 1, 3 and 4 play real episodes; 2 judges
held-out recorded ones and dreams of them; 5 dreams; the others read what the run has stored.

Paper's section: "The loop" lets simulator and reflector stand in for reality; here both are held
against it.

    1 agreement       the same policy from the same start in both worlds: do both end in success?
    2 reflector       R against the true labels, on real frames and on generated ones
    3 counterfactual  other actions from the same start: does the dream show what *these* do?
    4 branches        nearly the same actions from the same moment: does the dream rank them as
                      reality does? That ranking is all that LOOP learns from (branches.py)
    5 pushes          the exploration episodes' own noise: does it do in the dream what it did in
                      reality? The direction in which LOOP would move the policy (pushes.py)
    6 gauge           while LOOP ran, did the dream's promises come true? Which policy does either
                      stop rule keep, and would the dream have chosen the best (gauge.py)
    7 signal          in how many iterations LOOP could learn hardly anything, and why (ppo.py)
    8 ledger          what the run has spent, and what `trust` itself played: real episodes and
                      imagined frames

                       reality: success   reality: failure
    dream: success     both               hallucinated     pays LOOP for what does not work
    dream: failure     missed             neither          withholds pay from what works

Symbols: R reward in [0, 1], eta the reflector's threshold, T decisions of an episode. A *share* is
{"share", "low", "high"}: a rate in [0, 1] with Wilson's 95 % interval. What cannot be measured (a
correlation of constants, AUROC of one class) is None. Nothing here trains.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from branches import branch_truth
from camera import Camera
from charts import BLUE, GREY, ORANGE, following_chart, learning_chart
from checkpoints import same_parts
from demos import Episode, play, write_atomically, write_film
from dreams import dream_along
from evaluate import (
    REAL_EPISODES,
    agreement,
    agreement_words,
    or_undefined,
    percent,
    rank_over_checkpoints,
    rank_words,
    reliability,
    test_starts,
    wilson_share,
    with_interval,
)
from films import grid, worst_film
from gauge import play_both
from policy import Policy
from pushes import push_report
from reflector import false_stops, judge_episodes, recall, right_verdicts, stops_at
from report import gauge_report, warnings_of, warnings_words, what_is_missing, whole_loop
from runs import BadRun, Run
from tasks import Start
from terminal import COPY, new_files
from train import explored_first, held_out, loop_begins_with, sources
from vecenv import VecRealEnv
from worldenv import WorldEnv

OUTPUT_MB = 30  # to be free on the disk: two films and four charts
FILES = (
    "trust.json", "agreement.png", "reflector.png", "counterfactual.png", "gauge.png",
    "worst.gif", "counterfactual.gif",
)  # fmt: skip
MOMENTS = 8  # a task, to branch from
THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20)) + (0.98,)  # etas of the sweep


# ------------------------------------------------------------------------------------ 2. reflector


def sweep(
    curves: list[np.ndarray], episodes: list[Episode], thresholds: tuple[float, ...] = THRESHOLDS
) -> list[dict]:
    """What every eta would do: [{"eta", "recall", "false_stops", "right"}], shares in [0, 1].

    curves: R (T,) of every episode after its first frame (reflector.judge_episodes).
    recall: share of the succeeding episodes that are stopped at a successful frame (None without
    any); false_stops: share of all that are stopped at another frame; right: share of all whose
    verdict is right (reflector.right_verdicts), by which the run chose its eta on real frames.
    """
    return [
        {
            "eta": eta,
            "recall": recall(curves, episodes, eta),
            "false_stops": float(false_stops(curves, episodes, eta)),
            "right": float(right_verdicts(curves, episodes, eta)),
        }
        for eta in thresholds
    ]


def false_stops_by_decision(
    curves: list[np.ndarray], episodes: list[Episode], eta: float | list[float]
) -> list[float]:
    """Share of episodes stopped at a frame that is not a success, up to decision t = 1 .. the
    longest T, so *when* the stop goes wrong. It never falls, and ends at reflector.false_stops."""
    stopped = np.zeros(max(len(curve) for curve in curves))
    for end, episode in zip(stops_at(curves, eta), episodes, strict=True):
        if end is not None and not episode.success[end]:
            stopped[end - 1] += 1
    return (stopped.cumsum() / len(episodes)).tolist()


def reflector_report(reflector, episodes: list[Episode], eta: float | list[float]) -> dict:
    """One side of the reflector's card: `reliability` over the frames of the episodes (real ones or
    dreams, with the real labels), what eta (for all, or for each) does, and what others would."""
    if not episodes:
        raise ValueError(
            "trust: got no held-out episodes; expected some exploration; run train again"
        )
    curves = judge_episodes(reflector, episodes)
    labels = np.concatenate([episode.success[1:] for episode in episodes])
    etas = np.broadcast_to(eta, len(episodes)).tolist()
    wrong = round(false_stops(curves, episodes, etas) * len(episodes))
    return reliability(np.concatenate(curves), labels) | {
        "etas": {e.task: own for e, own in zip(episodes, etas, strict=True)},
        "episodes": len(episodes),
        "recall": recall(curves, episodes, etas),
        "false_stops": wilson_share(wrong, len(episodes)),
        "false_stops_by_decision": false_stops_by_decision(curves, episodes, etas),
        "sweep": sweep(curves, episodes),
    }


# ------------------------------------------------------------------------------- 3. counterfactual

VARIANTS = ("expert", "shuffled", "zero", "mirrored")


def alter(actions: np.ndarray, variant: str, rng: np.random.Generator) -> np.ndarray:
    """A variant of actions (T, K, A) float32: dx, dy, dz, LIBERO's turn about x, y, z, gripper.

    expert: as they are; shuffled: the T decisions in random order (the displacements add up to the
    same, so the hand ends nearly where the expert's does: only what it did to the objects differs);
    zero: all but the gripper 0; mirrored: dx, dy -> -dx, -dy, of a turn too (half a turn about the
    vertical: some experts hardly move along x alone).
    """
    altered = actions.copy()
    if variant == "shuffled":
        altered = rng.permutation(altered)
    elif variant == "zero":
        altered[..., :-1] = 0
    elif variant == "mirrored":
        altered[..., :2] *= -1
        altered[..., 3:-1][..., :2] *= -1  # nothing where A is 4
    return altered


def replay(env, starts: list[Start], sequences: list[np.ndarray]) -> list[Episode]:
    """Real episodes of given actions, (T, K, A) for every start: T is what the horizon leaves of
    it, and success does not stop it."""
    episodes = []
    for first in range(0, len(starts), env.num_envs):
        some = slice(first, first + env.num_envs)
        episodes += _replay_batch(env, starts[some], sequences[some])
    return episodes


def _replay_batch(env, starts: list[Start], sequences: list[np.ndarray]) -> list[Episode]:
    lengths = np.array([len(sequence) for sequence in sequences])
    padded = np.zeros((lengths.max(), *env.action_space.shape), np.float32)
    for slot, sequence in enumerate(sequences):
        padded[: len(sequence), slot] = sequence
    played = 0

    def act(observation: dict, running: np.ndarray) -> np.ndarray:
        return padded[played]

    def on_step(running: np.ndarray) -> None:
        nonlocal played
        played += 1
        env.done[: len(starts)] |= played >= lengths

    return play(env, starts, act, "evaluation", after_success=None, on_step=on_step)


def counterfactual(
    world: WorldEnv, env, starts: list[Start], seed: int = 0
) -> tuple[dict[str, list[Episode]], dict[str, list[Episode]]]:
    """(real, dreams): for every variant its episodes, one per start, of the same actions.

    The scripted expert plays each start up to two decisions after its success; the variants of its
    actions are replayed in the real `env` (vecenv.VecRealEnv) and dreamed in `world`, open loop.
    The four episodes of a start are of the same length. seed: of the shuffling.
    """
    rng = np.random.default_rng(seed)
    experts = play(env, starts, None, "expert", after_success=2)
    real, dreams = {}, {}
    for variant in VARIANTS:
        sequences = [alter(episode.action, variant, rng) for episode in experts]
        real[variant] = replay(env, starts, sequences)
        dreams[variant] = dream_along(world, real[variant])
    return real, dreams


def action_following(real: dict[str, list[Episode]], dreams: dict[str, list[Episode]]) -> dict:
    """Does a dream end where its own actions lead?

        v follows  <=>  |d_v - o_v|^2 < |d_v - o_w|^2 for every other variant w of the same start

    with d_v, o_v the dream's and reality's last frame. A tie counts against. A dream that ignores
    actions follows in 25 % at best. Returns "n" dreams, "action_following": their share, "chance",
    "variants": {variant: share}. (The interval takes the four dreams of a start as independent.)
    Raises ValueError without starts, or where the numbers of episodes differ.
    """
    counts = {len(episodes[variant]) for episodes in (real, dreams) for variant in VARIANTS}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"action_following: got {sorted(counts)} episodes; expected as many of every variant, "
            "at least one; play all variants of every start"
        )
    follows: dict[str, list[bool]] = {variant: [] for variant in VARIANTS}
    for start in range(counts.pop()):
        for variant in VARIANTS:
            dream = dreams[variant][start].image[-1].astype(np.float64)
            error = {w: np.mean((dream - real[w][start].image[-1]) ** 2) for w in VARIANTS}
            own = error.pop(variant)
            follows[variant].append(bool(own < min(error.values())))
    everything = sum(follows.values(), [])
    return {
        "n": len(everything),
        "action_following": wilson_share(sum(everything), len(everything)),
        "chance": 1 / len(VARIANTS),
        "variants": {variant: wilson_share(sum(f), len(f)) for variant, f in follows.items()},
    }


def counterfactual_film(
    real: dict[str, list[Episode]], dreams: dict[str, list[Episode]], start: int = 0
) -> np.ndarray:
    """One start as a film (T+1, 2 H, 4 W, 3) uint8: real above, dream below; expert, shuffled,
    zero, mirrored from left to right."""
    return grid([[episodes[v][start].image for v in VARIANTS] for episodes in (real, dreams)])


# ------------------------------------------------------------------------------------------ charts


def agreement_chart(reports: dict[str, dict], path: Path) -> None:
    """A PNG: a row per policy; left imagined and real success per task with intervals, right the
    2x2 table and the shares in words. reports: {policy: what `agreement` returns}."""
    from matplotlib.figure import Figure

    names = list(next(iter(reports.values()))["tasks"])
    figure = Figure(figsize=(10, len(reports) * (1.3 + 0.4 * len(names))), layout="constrained")
    panels = figure.subplots(len(reports), 2, squeeze=False, width_ratios=(4, 3))
    for (policy, report), (axes, words) in zip(reports.items(), panels, strict=True):
        for kind, colour, marker, lift in (
            ("real", BLUE, "o", -0.13),
            ("imagined", ORANGE, "s", 0.13),
        ):
            rows = [report["tasks"][name][kind] for name in names]
            rates, low, high = np.array([[r["share"], r["low"], r["high"]] for r in rows]).T
            ends = np.maximum(0, [rates - low, high - rates])  # 0 up to rounding at the ends
            at = np.arange(len(names)) + lift
            axes.errorbar(rates, at, xerr=ends, fmt=marker, color=colour, capsize=3, label=kind)
        axes.set(xlim=(-0.03, 1.03), xlabel="success rate", yticks=range(len(names)))
        axes.set(yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        axes.set_title(f"policy: {policy}", fontsize=10)
        axes.grid(axis="x", color="#dddddd")
        axes.legend(fontsize=8)
        words.axis("off")
        words.text(0, 0.95, _table_text(report), va="top", family="monospace", fontsize=9)
    figure.savefig(path, dpi=150)


def _table_text(report: dict) -> str:
    counts = report["table"]
    lines = [
        "                real success  real failure",
        f"dream success   {counts['both']:12d}  {counts['hallucinated']:12d}",
        f"dream failure   {counts['missed']:12d}  {counts['neither']:12d}",
        "",
        *(f"{k:13} {with_interval(report[k])}" for k in ("agreement", "hallucinated", "missed")),
        f"{'kappa':13} {or_undefined(report['kappa'])}  (0: by chance)",
        f"{'rank of tasks':13} {rank_words(report)}",
    ]
    return "\n".join(lines)


def reflector_chart(card: dict, path: Path) -> None:
    """A PNG of three: reliability, threshold sweep, false stops over decisions; real frames in
    blue, generated ones in vermillion. card: {"real", "generated"}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    diagram, swept, over_time = figure.subplots(1, 3)
    diagram.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="calibrated")
    for name, colour, marker in (("real", BLUE, "o"), ("generated", ORANGE, "s")):
        side = card[name]
        points = np.array([[b["score"], b["rate"]] for b in side["bins"]]).T
        label = f"{name}: ECE {side['ece']:.2f}, AUROC {or_undefined(side['auroc'])}"
        diagram.plot(*points, marker + "-", color=colour, markersize=5, label=label)
        etas = [row["eta"] for row in side["sweep"]]
        for key, line, fill in (("recall", "-", colour), ("false_stops", "--", "white")):
            values = [np.nan if row[key] is None else row[key] for row in side["sweep"]]
            label = f"{key.replace('_', ' ')}, {name}"
            style = {"color": colour, "markersize": 4, "markerfacecolor": fill}
            swept.plot(etas, values, line + marker, **style, label=label)
        for i, eta in enumerate(sorted(set(side["etas"].values()))):  # of its tasks
            label = "" if i else f"its eta, {name}"
            swept.axvline(eta, color=colour, linestyle=":", label=label)
        shares = side["false_stops_by_decision"]
        decisions = np.arange(1, len(shares) + 1)
        style = {"color": colour, "marker": marker, "markersize": 4}
        over_time.step(decisions, shares, where="post", **style, label=f"{name} frames")
    diagram.set(title="Reliability", xlabel="mean reward R", ylabel="true success rate")
    swept.set(title="Threshold sweep", xlabel="threshold eta", ylabel="share of episodes")
    over_time.set(title="False stops at the run's own etas", xlabel="decision")
    over_time.set(ylabel="share of episodes so far")
    over_time.xaxis.get_major_locator().set_params(integer=True)
    for axes in (diagram, swept, over_time):
        axes.set_ylim(-0.03, 1.03)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


# ----------------------------------------------------------------------------------------- together


def _explored(run: Run) -> tuple[list[Episode], Camera]:
    """The exploration episodes of a run, and the camera that saw them."""
    if run.config.rl_env == "real":
        raise BadRun(
            f"{run.folder}: LOOP ran in the real simulator, so there is no dream to hold against "
            "reality; expected a run in the dream; see what this one has: python cli.py report "
            f"{run.folder}"
        )
    if not any(run.episodes_folder.glob("episode_*")):
        raise BadRun(
            f"{run.folder}: has no episodes, as a run that was shipped; expected one that was "
            "trained here; train one: python cli.py train --out ANOTHER_FOLDER"
        )
    _, exploration, camera = sources(run)
    return exploration, camera


def trust(run: Run, starts_per_task: int, say: Callable[[str], None], split: str = "dev") -> dict:
    """Measure all eight on a run and write FILES into RUN/trust; `say` gets a line for each.

    split: "dev", or "test" for reported figures only. Plays the policies "sft" and, where they are,
    "dream_bc" and "policy" (if these are the same, only the second); worst.gif is of the last,
    branches are those of the one that LOOP begins with. Returns the
    content of trust.json: "run", "split", "starts_per_task", "seed", "agreement": {policy:
    `agreement`}, "reflector": {"real", "generated": `reflector_report`}, "counterfactual":
    `action_following`, "branches": `branches.branch_truth`, "pushes": `pushes.push_report`, what
    `stored` gives, "words": the lines.

    The files appear together when all went well; after a failure earlier ones are as they were.
    There is no worst.gif where no pair disagrees, and no gauge.png where LOOP has not run. Raises
    BadRun (ValueError) for a missing or damaged checkpoint and for a run without a dream or its
    episodes, ValueError for more starts than the split holds.
    """
    config = run.config
    starts = test_starts(config.tasks, starts_per_task, split)
    known = stored(run)  # before anything is played: it may lack something
    policies, begins = _policies(run)
    exploration, camera = _explored(run)
    _, kept = held_out(exploration)
    slots = min(config.slots, len(starts))
    # For dreams along real episodes, which bring their own starts.
    world = WorldEnv(run.simulator(camera), run.reflector(), {}, slots, config.env, config.seed)
    words: list[str] = []

    def tell(line: str) -> None:
        words.append(line)
        say(line)

    with new_files(run.folder / "trust", OUTPUT_MB, COPY) as folder:
        env = VecRealEnv(slots, config.env)
        try:
            agreements = _agreements(world, env, policies, starts, config.seed, folder, tell)
            card = _card(world, kept, folder, tell)
            following = _following(world, env, starts, config.seed, folder, tell)
            count = len(config.tasks) * min(MOMENTS, starts_per_task)
            branches = branch_truth(world, env, begins, kept, config.loop, count, config.seed)
            tell(_branches_words(branches))
        finally:
            env.close()
        pushes = _pushes(run, world, policies["sft"], exploration, tell)  # without anything real
        known["ledger"]["trust"] = {
            "real_episodes": env.real_resets,
            "real_steps": env.real_steps,
            "imagined_frames": world.imagined_frames,
        }
        _tell_stored(run, known, folder, tell)
        result = {
            "run": run.folder.name,
            "split": split,
            "starts_per_task": starts_per_task,
            "seed": config.seed,
            "agreement": agreements,
            "reflector": card,
            "counterfactual": following,
            "branches": branches,
            "pushes": pushes,
            **known,
            "words": words,
        }
        text = json.dumps(result, indent=1, allow_nan=False)
        write_atomically(folder / "trust.json", text.encode())
        written = {path.name for path in folder.iterdir()}
    for name in set(FILES) - written:  # an earlier one would be of other figures
        (run.folder / "trust" / name).unlink(missing_ok=True)
    return result


def _policies(run: Run) -> tuple[dict[str, Policy], Policy]:
    """(by name those that are played, what LOOP begins with). If LOOP kept that, it plays once."""
    files = {"sft": "sft", "dream_bc": loop_begins_with(run, run.config.rounds), "policy": "policy"}
    found = {n: x for n, x in files.items() if n == "sft" or run.checkpoint(x).is_file()}
    policies = {name: run.policy(file) for name, file in found.items()}
    begins = policies.get("dream_bc", policies["sft"])
    if len(found) == 3 and same_parts(*map(run.checkpoint, [found["dream_bc"], "policy"])):
        del policies["dream_bc"]
    return policies, begins


def stored(run: Run) -> dict:
    """What the run itself has recorded: "gauge": `report.gauge_report`, "rank_over_checkpoints":
    `evaluate.rank_over_checkpoints` of the policies that the gauge has looked at in both worlds,
    "signal": `report.warnings_of` all rounds, "ledger": {"run": `Run.ledger`}. Plays nothing.
    Raises BadRun (ValueError) where stages.json lacks something."""
    with what_is_missing([run.folder]):
        gauge = gauge_report(run)
        history, _ = whole_loop(run)
        looks = [look for look in gauge["looks"] if "real" in look] if gauge else []
        rates = [[look[kind] for look in looks] for kind in ("imagined", "real")]
        return {
            "gauge": gauge,
            "rank_over_checkpoints": rank_over_checkpoints(*rates),
            "signal": warnings_of(history),
            "ledger": {"run": run.ledger()},
        }


def _tell_stored(run: Run, known: dict, folder: Path, tell) -> None:
    tell(_gauge_words(known["gauge"]))
    tell(_rank_words(known["gauge"], known["rank_over_checkpoints"]))
    tell(_signal_words(known["signal"]))
    tell(_ledger_words(known["ledger"]))
    history, probes = whole_loop(run)
    if history:
        chart = learning_chart(history, probes, run.config.rl_env)
        write_atomically(folder / "gauge.png", chart)


def _agreements(world: WorldEnv, env, policies, starts, seed, folder, tell) -> dict[str, dict]:
    reports = {}
    for name, policy in policies.items():
        parts = world.simulator, world.reflector, policy, env
        real, dreams = play_both(*parts, starts, world.config, seed)
        world.imagined_frames += sum(map(len, dreams))  # play_both has a world of its own
        imagined, true = (np.array([e.succeeded for e in side]) for side in (dreams, real))
        reports[name] = agreement(imagined, true, [start.task for start in starts])
        tell(agreement_words(name, reports[name]))
    agreement_chart(reports, folder / "agreement.png")
    film = worst_film(world.reflector, list(zip(real, dreams, strict=True)))
    if film is not None:
        write_film(folder / "worst.gif", film, scale=2)
    return reports


def _card(world: WorldEnv, kept: list[Episode], folder: Path, tell) -> dict:
    judge, dreams = world.reflector, dream_along(world, kept)
    etas = [judge.dream_eta(dream.instruction) for dream in dreams]  # where LOOP's dreams stop
    card = {
        "real": reflector_report(judge, kept, float(judge.threshold)),
        "generated": reflector_report(judge, dreams, etas),
    }
    tell(_reflector_words(card))
    reflector_chart(card, folder / "reflector.png")
    return card


def _following(world: WorldEnv, env, starts, seed: int, folder: Path, tell) -> dict:
    real, dreams = counterfactual(world, env, starts, seed)
    following = action_following(real, dreams)
    tell(_following_words(following))
    write_atomically(folder / "counterfactual.png", following_chart(following))
    film = counterfactual_film(real, dreams)
    write_film(folder / "counterfactual.gif", film, scale=3)
    return following


def _pushes(
    run: Run, world: WorldEnv, sft: Policy, exploration: list[Episode], tell
) -> dict | None:
    # The rest are another policy's. They may be ones that the simulator learned from.
    first = exploration[: len(run.config.tasks) * explored_first(run.config.exploration)]
    report = push_report(world, sft, first)
    tell(_pushes_words(report))
    return report


# ------------------------------------------------------------------------------------------- words


def _reflector_words(card: dict) -> str:
    sides = [
        f"{name} frames AUROC {or_undefined(card[name]['auroc'])}, ECE {card[name]['ece']:.2f}, "
        f"false stops in {with_interval(card[name]['false_stops'])}"
        for name in ("real", "generated")
    ]
    return f"the reflector on {card['real']['episodes']} held-out episodes: {'; '.join(sides)}"


def _following_words(following: dict) -> str:
    parts = [f"{name} {percent(share)}" for name, share in following["variants"].items()]
    return (
        f"the dream follows its actions in {with_interval(following['action_following'])} of "
        f"{following['n']} dreams, {percent(following['chance'])} by chance: {', '.join(parts)}"
    )


def _branches_words(branches: dict) -> str:
    within = branches["within"]
    value = (
        "undefined" if within is None else "{value:.2f} ({low:.2f} to {high:.2f})".format(**within)
    )
    return (
        f"branches: dream and reality agree in {percent(branches['agreement'])} of "
        f"{branches['groups']} x {branches['rollouts']}; inside the groups, which is what LOOP "
        f"learns from, their returns correlate with {value}"
    )


def _pushes_words(report: dict | None) -> str:
    if report is None:
        return "pushes: no exploration episode holds a push of the SFT policy"
    return (
        f"pushes: {report['pushes']} recorded ones end alike in dream and reality in "
        f"{with_interval(report['agreement'])}; of {report['effects']} effects on real success "
        f"{report['clear']} are clear, {report['same_sign']} of them with the same sign in the "
        f"dream; in {report['differ']} the dream clearly differs"
    )


def _gauge_words(gauge: dict | None) -> str:
    if gauge is None:
        return (
            "gauge: it never looked, as LOOP has not run or was given no probes; neither stop rule "
            "had a say"
        )
    first, last = gauge["looks"][0], gauge["looks"][-1]
    names = ("imagined", "real", "agreement", "hallucinated", "missed", "novel")
    labels = {"imagined": "imagined success", "real": "real success", "novel": "novel decisions"}
    changes = [
        f"{labels.get(name, name)} {percent(first[name])} -> {percent(last[name])}"
        for name in names
        if name in first
    ]
    kept = "no real episode was played, so nobody knows what came true"
    if gauge["real_keeps"] is not None:
        kept = f"by real episodes the policy after {gauge['real_keeps']} is to be kept"
    alone = "novelty was not recorded"
    if gauge["novelty_keeps"] is not None:
        alone = f"by novelty alone the one after {gauge['novelty_keeps']}"
    return (
        f"gauge, {gauge['starts']} starts after {first['iteration']} to {last['iteration']} "
        f"iterations: {', '.join(changes)}; {kept}; {alone}; the run kept that after "
        f"{gauge['kept']}"
    )


def _rank_words(gauge: dict | None, rank: float | None) -> str:
    n = len(gauge["looks"]) if gauge and gauge["real_keeps"] is not None else 0
    said = "undefined, it takes three of different success" if rank is None else f"{rank:.2f}"
    return (
        "rank over checkpoints: Spearman's correlation of imagined and real success, over what the "
        f"gauge has seen in both worlds (n = {n}): {said}"
    )


def _signal_words(signal: dict) -> str:
    if not signal["iterations"]:
        return "signal: LOOP has not run"
    if not signal["warned"]:
        return f"signal: none of {signal['iterations']} iterations of LOOP had a warning"
    return f"signal: {'; '.join(warnings_words(signal))}"


def _ledger_words(ledger: dict) -> str:
    spent, own = ledger["run"], ledger["trust"]
    names = ("demonstrations", *REAL_EPISODES, "evaluation_episodes", "imagined_frames")
    counts = [f"{spent[name]:,} {name.replace('_', ' ')}" for name in names if spent.get(name)]
    return (
        f"ledger: the run has spent {', '.join(counts) or 'nothing'}; trust itself played "
        f"{own['real_episodes']:,} real episodes and dreamt {own['imagined_frames']:,} frames"
    )

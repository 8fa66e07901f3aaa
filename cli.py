"""The command line: `python cli.py --help`.

    doctor                       what works on this machine, and what to do about the rest
    demos collect|load|inspect|export
                                 episodes on disk: record, check or convert, look at, hand on
    train                        the whole method, stage by stage (train.py), into a run folder
    imagine                      a dream beside the real rollout of the same actions
    evaluate                     real success with intervals
    trust                        how often the dream lies
    compare                      the dream beside its alternatives at the same real budget
    report, config               rewrite a run's report.md; print the settings

Every command checks what it was given before it touches the disk. What a user can repair becomes
one line, `error: what is wrong; what was expected; what to do`, and exit code 2; files stay as they
were. A mistake in the code itself still shows its traceback, and WORLDENV_TRACEBACK=1 shows all.

Nothing heavy is imported at the top, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

# First, because it tells in one line where typer or rich are missing.
from terminal import HERE, OneLineErrors, StageDisplay, check_new, check_output, new_files  # isort: skip
from terminal import print_result, print_statistics, take_back  # isort: skip
import typer
from rich.console import Console

if TYPE_CHECKING:
    from runs import RunConfig

# What has to be free on the disk. A run: 50 in the cpu preset, 200 in the gpu preset, and with
# adapters for a model of 7 B weights about 1600, with Stable Diffusion's U-Net 3500 (estimates);
# and episodes.
CHECKPOINTS_MB, ADAPTERS_MB, UNET_MB = 250, 2000, 4000
PICTURES_MB = 20

app = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False, add_completion=False)
demos_app = typer.Typer()
app.add_typer(demos_app, name="demos")


@app.callback()
def about() -> None:
    """World-Env: post-train a vision-language-action policy inside a learned world."""
    # Meta-World's notice in every worker that its expert's actions get clipped, which we know.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning")


@demos_app.callback()
def about_demos() -> None:
    """Episodes on disk: collect with the scripted expert, check, convert, look at, export."""


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


# -------------------------------------------------------------------------------- doctor and config


@app.command("doctor")
def doctor_command(
    ensure_renderer: Annotated[
        bool,
        typer.Option("--ensure-renderer", help="Install an off-screen renderer if none works."),
    ] = False,
) -> None:
    """Say in a table what works here, and what to do about the rest (exit code 0 or 2)."""
    import doctor

    raise typer.Exit(doctor.main(["--ensure-renderer"] if ensure_renderer else []))


Preset = Annotated[
    str, typer.Option(help="cpu (the reported runs), debug (all tiny), gpu (larger) or paper.")
]

Device = Annotated[
    str, typer.Option(help="Where the networks compute: cpu, or cuda or mps if there is one.")
]


@app.command("config")
def config_command(preset: Preset = "cpu") -> None:
    """Print the settings of a preset as JSON (on stdout; notes on stderr)."""
    import runs

    print(runs.config_to_json(runs.preset(preset)))
    notes = Console(stderr=True, soft_wrap=True, highlight=False)
    notes.print(
        f"preset {preset}; what each setting means: the dataclasses of runs.py and the parts"
    )
    notes.print("train changes them by --tasks --demos --seed --env --iterations")


# -------------------------------------------------------------------------------------------- demos


@demos_app.command("collect")
def demos_collect(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    tasks: Annotated[
        str, typer.Option(help="Meta-World tasks, separated by commas; default: the suite.")
    ] = "",
    demos: Annotated[int, typer.Option(help="Successful episodes per task.")] = 5,
    seed: Annotated[int, typer.Option(help="0 to 99; each owns its own start states.")] = 0,
    size: Annotated[int, typer.Option(help="Image height and width in pixels.")] = 64,
    chunk: Annotated[int, typer.Option(help="Environment steps per decision (K).")] = 4,
    horizon: Annotated[int, typer.Option(help="Decisions at most.")] = 30,
) -> None:
    """Record expert demonstrations."""
    import demos as episodes_on_disk
    from tasks import DEFAULT_SUITE, EnvConfig, VecRealEnv

    names = task_names(tasks) if tasks else DEFAULT_SUITE
    check_demos(demos)
    in_range("--seed", seed, 0, 99, " (each owns its own start states)")
    config = EnvConfig(size=size, chunk=chunk, horizon=horizon)
    check_new(folder)
    with new_files(folder, episodes_mb(len(names) * demos, config)) as temporary:
        env = VecRealEnv(min(demos, 16), config)
        try:
            episodes = episodes_on_disk.collect_expert(env, names, demos, seed * 1000)
            episodes_on_disk.save(temporary, episodes, config, env.camera)
        finally:
            env.close()
    print(f"{len(episodes)} expert episodes of {', '.join(names)} in {folder}")


def episodes_mb(episodes: int, env) -> float:
    """Upper bound of the size on disk: the frames."""
    return episodes * (env.horizon + 1) * 3 * env.size**2 / 1e6 + 1


@demos_app.command("load")
def demos_load(
    folder: Annotated[
        Path, typer.Argument(help="Our episodes; with --out: HDF5 file(s) or a LeRobot folder.")
    ],
    tasks: Annotated[str, typer.Option(help="Accept only these tasks.")] = "",
    size: Annotated[int | None, typer.Option(help="Expect (--out: make) this image size.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Likewise the steps per decision.")] = None,
    out: Annotated[Path | None, typer.Option(help="Convert into this new folder.")] = None,
    recorded: Annotated[
        str | None, typer.Option(help="before or after its action; HDF5: after, LeRobot: before.")
    ] = None,
    upside_down: Annotated[
        bool | None,
        typer.Option("--upside-down/--upright", help="HDF5: upside down, LeRobot: upright."),
    ] = None,
    mirrored: Annotated[
        bool | None, typer.Option("--mirrored", help="Left and right are swapped: swap back.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="Which camera of the source.")] = None,
    instruction: Annotated[str | None, typer.Option(help="Instead of the source's words.")] = None,
) -> None:
    """Check a folder of episodes: one line, OK with its counts or what is wrong with it.

    With --out, first convert LIBERO's or robomimic's HDF5, or LeRobotDataset v3, to episodes.
    """
    import demos
    import formats

    how = {"recorded": recorded, "upside_down": upside_down, "mirrored": mirrored}
    how |= {"image": image, "instruction": instruction}
    given = [name for name, value in how.items() if value is not None]
    if out is None and given:
        raise ValueError(f"--{given[0].replace('_', '-')}: only for converting; add --out FOLDER")
    if out is not None and tasks:
        raise ValueError("--tasks: only for checking; expected without --out; leave it out")
    if out is None:
        episodes, about = read_episodes(folder, tasks, size, chunk)
    else:
        check_new(out)
        episodes, about = formats.read(folder, size=size, chunk=chunk, **how)
        with new_files(out, episodes_mb(len(episodes), about.env)) as temporary:
            demos.save(temporary, episodes, about.env, about.camera, about.robot)
            read_episodes(temporary)  # nothing is kept that this command would not accept
    names = sorted({episode.task for episode in episodes})
    successes = sum(episode.succeeded for episode in episodes)
    decisions = sum(len(episode) for episode in episodes)
    print(
        f"OK: {len(episodes)} episodes of {', '.join(names)}; {successes} succeed; "
        f"{decisions} decisions of {about.env.chunk} steps; {about.env.size} px"
    )


def read_episodes(folder: Path, tasks: str = "", size: int | None = None, chunk: int | None = None):
    """(episodes, demos.Description) of a folder that holds what is expected of it."""
    import demos
    from tasks import check_tasks

    episodes, *_ = demos.load(folder, None, task_names(tasks) if tasks else None)
    about = demos.describe(folder)
    for name, want in (("size", size), ("chunk", chunk)):
        got = getattr(about.env, name)
        if want is not None and got != want:
            raise ValueError(f"{folder}: {name} is {got}; expected {want}; collect it anew")
    if about.robot == demos.ROBOT:
        check_tasks(sorted({episode.task for episode in episodes}))
    return episodes, about


@demos_app.command("export")
def demos_export(
    folder: Annotated[Path, typer.Argument(help="A folder of episodes.")],
    out: Annotated[Path, typer.Option(help="A new folder for the LeRobotDataset v3.")],
    fps: Annotated[int, typer.Option(help="Decisions per second; Meta-World: 80 / K.")] = 20,
    video: Annotated[bool, typer.Option("--video", help="Films (mp4), not PNG images.")] = False,
) -> None:
    """Write a folder of episodes as a LeRobotDataset v3: a row per decision."""
    import export

    in_range("--fps", fps, 1, 1000)
    check_new(out)
    episodes, about = read_episodes(folder)
    with new_files(out, episodes_mb(len(episodes), about.env)) as temporary:
        export.export_lerobot(episodes, about, temporary, fps, video)
    print(f"{len(episodes)} episodes as LeRobotDataset v3 in {out}")


@demos_app.command("inspect")
def demos_inspect(
    folder: Annotated[Path, typer.Argument(help="A folder of episodes.")],
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("runs/inspect"),
    film: Annotated[str, typer.Option(help="gif or mp4.")] = "gif",
) -> None:
    """Show statistics; write a contact sheet (PNG) and a film (the first episode of each task)."""
    import demos
    import report

    one_of("--film", film, ("gif", "mp4"))
    episodes, _ = read_episodes(folder)
    with new_files(out, PICTURES_MB) as temporary:
        shown = []  # up to 4 of each task and source, so that the sheet stays readable
        for row in demos.statistics(episodes):
            shown += [e for e in episodes if f"{e.task} / {e.source}" == row][:4]
        demos.write_png(temporary / "contact_sheet.png", demos.contact_sheet(shown))
        first = {episode.task: episode for episode in reversed(episodes)}
        films = [first[task].image for task in sorted(first)][:8]
        demos.write_film(temporary / f"film.{film}", report.side_by_side(films))
    print_statistics(demos.statistics(episodes))
    print(f"{out / 'contact_sheet.png'}\n{out / f'film.{film}'}")


# -------------------------------------------------------------------------------------------- train


@app.command("train")
def train_command(
    demos: Annotated[int | None, typer.Option(help="Expert demonstrations per task.")] = None,
    preset: Preset = "cpu",
    tasks: Annotated[str, typer.Option(help="Meta-World tasks, separated by commas.")] = "",
    seed: Annotated[int, typer.Option(help="0 to 99; each owns its own start states.")] = 0,
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/default"),
    env: Annotated[
        str, typer.Option(help="Where LOOP rolls out: dream (the method) or real.")
    ] = "dream",
    device: Device = "cpu",
    iterations: Annotated[int | None, typer.Option(help="Of reinforcement learning.")] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Explore, simulator, reflector and rl that many times.")
    ] = None,
    starts: Annotated[int | None, typer.Option(help="Test starts per task.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="LOOP as in the paper: no branching, no time penalty.")
    ] = False,
    stop_rule: Annotated[
        str | None,
        typer.Option(help="What ends LOOP in the dream: real (counted episodes) or novelty."),
    ] = None,
    until: Annotated[str | None, typer.Option(help="The last stage to run.")] = None,
    pretrained: Annotated[
        str, typer.Option(help="A model for policy and reflector: hub id or folder.")
    ] = "",
    simulator_models: Annotated[
        str,
        typer.Option(help="Pretrained: autoencoder=ID_OR_FOLDER,unet=...,clip=...,geometry=..."),
    ] = "",
) -> None:
    """Train: demos, sft, explore, filtered_bc, simulator, reflector, rl, evaluate.

    Options that are left out come from the preset. Run again to resume: finished stages are
    skipped.
    """
    import render
    import report
    import train as stages
    from runs import Run

    check_device(device)
    config = build_config(
        preset, tasks, demos, seed, env, iterations, rounds, starts, plain, stop_rule, pretrained,
        simulator_models,
    )  # fmt: skip
    if until is not None:
        one_of("--until", until, stages.stages_of(config))
    explored = config.exploration + (config.rounds - 1) * config.round_exploration
    episodes = len(config.tasks) * (config.demos + explored)
    room = ADAPTERS_MB if config.policy.pretrained.checkpoint else CHECKPOINTS_MB
    room += UNET_MB if config.simulator.pretrained.unet else 0
    existing = check_output(out, room + episodes_mb(episodes, config.env))
    render.choose_backend()  # without a renderer there would be a run folder with nothing in it
    is_new = not (out / "config.json").exists()
    run = Run.create(out, config, device)
    with StageDisplay(run, stages.stages_of(config)) as display:
        if preset in ("gpu", "paper") and device == "cpu":
            display.line(f"preset {preset} on the processor: expect days; a GPU is --device cuda")
        try:
            stages.train(run, display.say, display.progress, until)
        except Exception:
            if is_new:
                take_back(out.absolute(), existing)
            raise
    print(f"report: {report.write_report(run)}")


def build_config(
    preset: str,
    tasks: str,
    demos: int | None,
    seed: int,
    env: str,
    iterations: int | None,
    rounds: int | None,
    starts: int | None,
    plain: bool,
    stop_rule: str | None = None,
    pretrained: str = "",
    simulator_models: str = "",
) -> RunConfig:
    """The preset with what was given on the command line; ValueError for anything impossible."""
    from dataclasses import replace

    import runs

    config = runs.with_pretrained(runs.preset(preset), pretrained)
    config = runs.check_pretrained(runs.with_simulator_models(config, simulator_models))
    if demos is not None:
        check_demos(demos)
    if iterations is not None:
        in_range("--iterations", iterations, 1)
        config = both_loops(config, iterations=iterations)
    if plain:
        config = both_loops(config, branch=0, noise=1.0, time_penalty=0.0)
    given = {
        "rounds": None if rounds is None else in_range("--rounds", rounds, 1, 9),
        "test_starts": None if starts is None else in_range("--starts", starts, 1),
        "tasks": task_names(tasks) if tasks else None,
        "demos": demos,
        "seed": seed,
        "rl_env": env,
        "stop_rule": stop_rule,
    }
    return replace(config, **{name: value for name, value in given.items() if value is not None})


def both_loops(config: RunConfig, **settings) -> RunConfig:
    """The same settings for LOOP in the dream and in the real simulator."""
    from dataclasses import replace

    loops = {name: replace(getattr(config, name), **settings) for name in ("loop", "real_loop")}
    return replace(config, **loops)


def check_device(name: str) -> None:
    """A device that torch can really compute on here: cpu, cuda, cuda:1, mps ..."""
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device: torch cannot compute on {name!r} here; expected cpu, or cuda or mps where "
            "there is one; `python cli.py doctor` says which; use --device cpu"
        ) from error


# --------------------------------------------------------------------------------- looking at a run

RunFolder = Annotated[Path, typer.Argument(help="A run folder, e.g. runs/default.")]


@app.command("imagine")
def imagine_command(
    folder: RunFolder,
    task: Annotated[str, typer.Option(help="Default: the run's first task.")] = "",
    seed: Annotated[int, typer.Option(help="Which start of the development split.")] = 0,
    actions: Annotated[
        str, typer.Option(help="Who acts: expert, policy (post-trained) or sft.")
    ] = "policy",
    out: Annotated[
        Path | None, typer.Option(help="Where the pictures go; default: RUN/imagine.")
    ] = None,
) -> None:
    """Dream the very actions of a real episode: film and strip of both, and the reward curves."""
    import demos
    import report
    from runs import Run

    one_of("--actions", actions, ("expert", "policy", "sft"))
    in_range("--seed", seed, 0)
    run = Run.open(folder)
    task = task_names(task)[0] if task else run.config.tasks[0]
    one_of("--task", task, run.config.tasks)
    reflector = run.reflector()
    simulator = run.simulator(demos.load(run.episodes_folder, run.config.env)[2])
    policy = None if actions == "expert" else run.policy(actions)
    out = out or run.folder / "imagine"
    name = f"{task}_{actions}_{seed}"
    with new_files(out, PICTURES_MB) as temporary:
        episode, dream, curves = report.real_and_dream(
            run, simulator, reflector, policy, task, seed
        )
        eta = float(reflector.threshold)
        demos.write_film(temporary / f"{name}.gif", report.side_by_side([episode.image, dream]))
        demos.write_png(temporary / f"{name}.png", report.strip([episode.image, dream]))
        chart = report.reward_curves(curves, eta, episode.first_success)
        demos.write_atomically(temporary / f"{name}_reward.png", chart)
    print(report.imagine_numbers(episode, dream, curves, eta))
    for ending in (".gif", ".png", "_reward.png"):
        print(out / f"{name}{ending}")


@app.command("evaluate")
def evaluate_command(
    folder: RunFolder,
    policy: Annotated[str, typer.Option(help="policy (post-trained) or sft.")] = "policy",
    termination: Annotated[
        str, typer.Option(help="Who stops: oracle, reflector or none.")
    ] = "oracle",
    starts: Annotated[int | None, typer.Option(help="Per task; default: the run's.")] = None,
    split: Annotated[str, typer.Option(help="test or dev.")] = "test",
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON on stdout and nothing else.")
    ] = False,
) -> None:
    """Measure real success, per task and in the mean, with Wilson's 95 % intervals."""
    from evaluate import TERMINATIONS, evaluate, test_starts
    from runs import Run
    from tasks import VecRealEnv

    one_of("--policy", policy, ("policy", "sft"))
    one_of("--termination", termination, TERMINATIONS)
    one_of("--split", split, ("test", "dev"))
    run = Run.open(folder)
    count = run.config.test_starts if starts is None else in_range("--starts", starts, 1)
    plan = test_starts(run.config.tasks, count, split)
    player = run.policy(policy)
    reflector = run.reflector() if termination == "reflector" else None
    env = VecRealEnv(min(run.config.slots, len(plan)), run.config.env)
    try:
        result = evaluate(player, env, plan, termination, reflector)
    finally:
        env.close()
    result |= {"run": str(folder), "policy": policy, "split": split, "seed": run.config.seed}
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print_result(result)


@app.command("report")
def report_command(folder: RunFolder) -> None:
    """Rewrite a run's report.md from what its stages recorded."""
    import report
    from runs import Run

    run = Run.open(folder)
    check_output(run.folder, PICTURES_MB)
    print(report.write_report(run))


@app.command("trust")
def trust_command(
    folder: RunFolder,
    starts: Annotated[int, typer.Option(help="Per task.")] = 50,
    split: Annotated[str, typer.Option(help="dev; test for reported figures only.")] = "dev",
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON on stdout and nothing else.")
    ] = False,
) -> None:
    """Say how often the dream lies: imagined success, the reflector's word, other actions."""
    import trust
    from runs import Run

    in_range("--starts", starts, 1)
    one_of("--split", split, ("dev", "test"))
    run = Run.open(folder)
    say = (lambda line: None) if as_json else print
    result = trust.trust(run, starts, say, split)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for path in (run.folder / "trust" / name for name in trust.FILES):
        if path.is_file():
            print(path)


# ------------------------------------------------------------------------------------------ studies
# Their work is in studies.py, imported inside each command like everything heavy.


@app.command()
def screen(
    out: Annotated[Path, typer.Option(help="Where screening.md and .jsonl go.")] = Path("results"),
) -> None:
    """Imitation from five demonstrations on every task, to choose a suite (an hour; resumable)."""
    import studies

    check_output(out, 1)
    studies.screen(out, print)


@app.command()
def summary(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Finished run folders to add to results/runs.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The results folder.")] = Path("results"),
) -> None:
    """Collect finished runs into results/, write results/summary.json and the README's table."""
    import studies

    check_output(out, 5)
    studies.collect(runs or [], out)
    result = studies.summarize_runs(out)
    if (HERE / "README.md").is_file() and out.resolve() == HERE / "results":
        studies.update_readme(result, HERE / "README.md")
    print(f"{out / 'summary.json'}: {len(result)} figures")


@app.command("compare")
def compare_command(
    out: Annotated[Path, typer.Option(help="Runs and tables go here.")] = Path("runs/compare"),
    preset: Preset = "cpu",
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = "0,1,2,3,4",
    methods: Annotated[str, typer.Option(help="Separated by commas; default: all.")] = "",
    starts: Annotated[int | None, typer.Option(help="Test starts per task.")] = None,
) -> None:
    """The dream beside its alternatives at the same real budget (hours; resumable)."""
    import compare as study
    import render
    from train import hardware

    try:
        numbers = [in_range("--seeds", int(seed), 0, 99) for seed in seeds.split(",")]
    except ValueError as error:
        raise ValueError(f"--seeds: got {seeds!r}; expected numbers from 0 to 99: 0,1,2") from error
    names = [name.strip() for name in methods.split(",")] if methods else study.METHODS
    for name in names:
        one_of("--methods", name, study.METHODS)
    config = build_config(preset, "", None, 0, "dream", None, None, starts, False)
    folders = [
        out / f"seed{n}" / name for n in numbers for name in {"dream", *names} & {*study.RUNS}
    ]
    episodes = len(config.tasks) * (config.demos + config.exploration)
    room = CHECKPOINTS_MB + episodes_mb(episodes, config.env)
    check_output(out, room * sum(not folder.exists() for folder in folders))
    render.choose_backend()
    say = partial(print, flush=True)  # a line per stage, also into a pipe
    records = study.compare(out, config, numbers, names, say, lambda *_: None)
    command = f"python cli.py compare --preset {preset} --seeds {','.join(map(str, numbers))}"
    command += f" --methods {','.join(names)}" if methods else ""
    command += f" --starts {starts}" if starts else ""
    study.write(out, records, command, hardware())
    print((out / "compare.md").read_text())


if __name__ == "__main__":  # required: workers of the real environment import this file again
    app()

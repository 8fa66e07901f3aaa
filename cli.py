"""The command line: `python cli.py --help`.

    doctor                       what works on this machine, and what to do about the rest
    demos collect|load|replay|inspect|export
                                 episodes on disk: record, check or convert, look at, hand on
    train                        the whole method, stage by stage (train.py), into a run folder
    imagine                      a dream beside the real rollout of the same actions
    play                         the same in the browser, live: move the hand in both
    evaluate                     real success with intervals
    trust                        how often the dream lies
    compare                      the dream beside its alternatives, and what each has cost
    bench                        how fast it all is here, dream and reality in the same run
    report                       rewrite a run's report.md and .html; several runs in one page
    ship                         a finished run as one small archive
    screen, expert               screening.py: which tasks suit; how often the expert succeeds
    summary                      summary.py: the reported figures
    config                       print the settings

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
from typing import TYPE_CHECKING, Annotated, Any

# First, because it tells in one line where typer or rich are missing.
from terminal import OneLineErrors, StageDisplay, check_device, check_files  # isort: skip
from terminal import check_output, new_files, print_result, take_back  # isort: skip
import typer
from rich.console import Console

import processes
from demos_cli import PICTURES_MB, demos_app, episodes_mb
from errors import HERE
from estimates import CHECKPOINTS_MB, expected, explored, room_mb
from options import (
    Demonstrations,
    SimulatorModels,
    Suite,
    Tasks,
    check_demos,
    check_playable,
    chosen_tasks,
    in_range,
    one_of,
    task_names,
    usual_preset,
)

if TYPE_CHECKING:
    from runs import RunConfig

app = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False, add_completion=False)
app.add_typer(demos_app, name="demos")


@app.callback()
def about(context: typer.Context) -> None:
    """World-Env: post-train a vision-language-action policy inside a learned world."""
    processes.check_command(context.invoked_subcommand)
    # Meta-World's notice in every worker that its expert's actions get clipped, which we know.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning")


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
    str,
    typer.Option(
        help="cpu (reported), debug (tiny), notebook or example (two tasks), gpu, paper, libero."
    ),
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
    notes.print("train changes them by its options: python cli.py train --help")


# -------------------------------------------------------------------------------------------- train


@app.command("train")
def train_command(
    demos: Annotated[int | None, typer.Option(help="Expert demonstrations per task.")] = None,
    demonstrations: Demonstrations = "",
    preset: Preset = "",
    tasks: Tasks = "",
    suite: Suite = "",
    seed: Annotated[int, typer.Option(help="0 to 99; each owns its own start states.")] = 0,
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/default"),
    env: Annotated[
        str, typer.Option(help="Where LOOP rolls out: dream (the method) or real.")
    ] = "dream",
    device: Device = "cpu",
    iterations: Annotated[int | None, typer.Option(help="Of reinforcement learning.")] = None,
    rounds: Annotated[int | None, typer.Option(help="How often explore to rl are run.")] = None,
    starts: Annotated[int | None, typer.Option(help="Test starts per task.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="LOOP as in the paper: noise in every decision.")
    ] = False,
    stop_rule: Annotated[
        str | None,
        typer.Option(help="What ends LOOP in the dream: real (counted episodes) or novelty."),
    ] = None,
    until: Annotated[str | None, typer.Option(help="The last stage to run.")] = None,
    pretrained: Annotated[
        str, typer.Option(help="A model for policy and reflector: hub id or folder.")
    ] = "",
    simulator_models: SimulatorModels = "",
    beside: Annotated[
        bool | None,
        typer.Option(help="Filtered BC and dream BC in a second process; as it pays."),
    ] = None,
) -> None:
    """Train: demos, sft, explore, filtered_bc, simulator, reflector, dream_bc, calibrate,
    rl, evaluate.

    Options that are left out come from the preset: cpu, or libero for LIBERO's tasks.
    Run again to resume; Ctrl-C ends a run safely.
    """
    import order
    import pipeline
    import report
    from resume import only_training
    from runs import Run

    check_device(device)
    preset = preset or usual_preset(suite, tasks)
    config = build_config(
        preset, tasks, demos, seed, env, iterations, rounds, starts, plain, stop_rule, pretrained,
        suite, simulator_models, device, demonstrations,
    )  # fmt: skip
    if until is not None:
        one_of("--until", until, order.stages_of(config))
    order.check_beside(beside)
    is_new = not (out / "config.json").exists()
    existing = check_place(out, preset, config, demonstrations if is_new else "")
    processes.start(device, config.shared)
    with processes.main_first():
        run = Run.create(out, config, device)
    both = order.side_by_side(config, device) if beside is None else beside
    with only_training(out), StageDisplay(order.as_they_end(config, both)) as display:
        for line in expected(preset, device, config):
            display.line(line)
        try:
            pipeline.train(run, display.say, display.progress, until, both)
        except Exception:
            if is_new and processes.is_main():
                take_back(out.absolute(), existing)
            raise
    if processes.is_main():
        print(f"report: {report.write_report(run).with_suffix('.html')}")


def check_place(out: Path, preset: str, config: RunConfig, demonstrations: str) -> Path:
    """Whether the run has room and a renderer, and demonstrations to begin with (a run that goes on
    has them: ""); the deepest folder that exists."""
    import render
    from demos import given

    episodes = len(config.tasks) * (config.demos + explored(config))
    existing = check_output(out, room_mb(preset, config) + episodes_mb(episodes, config.env))
    render.choose_backend()  # without a renderer there would be a run folder with nothing in it
    if demonstrations:
        given(demonstrations, config.env, config.tasks, config.demos)
    return existing


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
    suite: str = "",
    simulator_models: str = "",
    device: str = "cpu",
    demonstrations: str = "",
) -> RunConfig:
    """The preset with what was given on the command line; ValueError for anything impossible."""
    from dataclasses import replace

    import runs
    from ppo import PLAIN
    from tasks import SPLITS

    config = runs.with_pretrained(runs.preset(preset), pretrained)
    config = runs.with_simulator_models(config, simulator_models)
    if demos is not None:
        check_demos(demos)
    if iterations is not None:
        in_range("--iterations", iterations, 1)
        config = both_loops(config, iterations=iterations)
    if plain:
        config = both_loops(config, **PLAIN)
    names = chosen_tasks(suite, tasks)
    if names:
        config = runs.with_tasks(config, names)
    most = len(SPLITS["test"])
    given: dict[str, Any] = {
        "rounds": None if rounds is None else in_range("--rounds", rounds, 1, 9),
        "test_starts": None if starts is None else in_range("--starts", starts, 1, most),
        "demos": demos,
        "seed": seed,
        "rl_env": env,
        "stop_rule": stop_rule,
        "demonstrations": str(Path(demonstrations).absolute()) if demonstrations else None,
    }
    config = replace(config, **{name: value for name, value in given.items() if value is not None})
    check_playable(config.tasks)
    return runs.check_pretrained(config, device)


def both_loops(config: RunConfig, **settings) -> RunConfig:
    """The same settings for LOOP in the dream and in the real simulator."""
    from dataclasses import replace

    loops = {name: replace(getattr(config, name), **settings) for name in ("loop", "real_loop")}
    return replace(config, **loops)


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
    import charts
    import demos
    import films
    import report
    from runs import Run

    one_of("--actions", actions, ("expert", "policy", "sft"))
    in_range("--seed", seed, 0)
    run = Run.open(folder)
    task = task_names(task)[0] if task else run.config.tasks[0]
    one_of("--task", task, run.config.tasks)
    reflector = run.reflector()
    simulator = run.simulator(demos.camera_of(run.episodes_folder))
    policy = None if actions == "expert" else run.policy(actions)
    out = out or run.folder / "imagine"
    name = f"{task}_{actions}_{seed}"
    with new_files(out, PICTURES_MB) as temporary:
        episode, dream, curves = report.real_and_dream(
            run, simulator, reflector, policy, task, seed
        )
        eta = reflector.dream_eta(episode.instruction)
        etas = {"real": float(reflector.threshold), "dream": eta}
        demos.write_film(temporary / f"{name}.gif", films.side_by_side([episode.image, dream]))
        demos.write_png(temporary / f"{name}.png", films.strip([episode.image, dream]))
        chart = charts.reward_curves(curves, etas, episode.first_success)
        demos.write_atomically(temporary / f"{name}_reward.png", chart)
    print(report.imagine_numbers(episode, dream, curves, etas["dream"]))
    for ending in (".gif", ".png", "_reward.png"):
        print(out / f"{name}{ending}")


@app.command("play")
def play_command(
    folder: RunFolder = Path("runs/default"),
    host: Annotated[
        str, typer.Option(help="Who may come: by default this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the page.")] = 8080,
    browser: Annotated[bool, typer.Option(help="Open it in a browser.")] = True,
) -> None:
    """Play inside the dream, in the browser; the real simulator beside it is moved likewise."""
    import play

    play.serve(folder, host, port, browser)


@app.command("evaluate")
def evaluate_command(
    folder: RunFolder,
    policy: Annotated[str, typer.Option(help="policy (post-trained) or sft.")] = "policy",
    termination: Annotated[
        str, typer.Option(help="Who stops: oracle, reflector or none.")
    ] = "oracle",
    starts: Annotated[int | None, typer.Option(help="Per task; default: the run's.")] = None,
    split: Annotated[str, typer.Option(help="test or dev.")] = "test",
    skip: Annotated[int, typer.Option(help="Leave out that many first starts per task.")] = 0,
    device: Device = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON on stdout and nothing else.")
    ] = False,
) -> None:
    """Measure real success, per task and in the mean, with Wilson's 95 % intervals."""
    from evaluate import TERMINATIONS, evaluate, test_starts
    from runs import Run
    from vecenv import VecRealEnv

    one_of("--policy", policy, ("policy", "sft"))
    one_of("--termination", termination, TERMINATIONS)
    one_of("--split", split, ("test", "dev"))
    check_device(device)
    run = Run.open(folder, device)
    count = run.config.test_starts if starts is None else in_range("--starts", starts, 1)
    plan = test_starts(run.config.tasks, count, split, in_range("--skip", skip, 0))
    processes.start(device, {})
    player = run.policy(policy)
    reflector = run.reflector() if termination == "reflector" else None
    slots = -(-min(run.config.slots, len(plan)) // processes.world())
    env = VecRealEnv(slots, run.config.env)
    try:
        result = evaluate(player, env, plan, termination, reflector)
    finally:
        env.close()
    result |= {"run": str(folder), "policy": policy, "split": split, "seed": run.config.seed}
    result |= {"starts_per_task": count, "skipped": skip, "starts": [plan[0].seed, plan[-1].seed]}
    if as_json and processes.is_main():
        print(json.dumps(result, indent=1))
    elif processes.is_main():
        print_result(result)


@app.command("report")
def report_command(
    folders: Annotated[list[Path], typer.Argument(help="A run folder, or several.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Several runs: their page; default: comparison.html beside the first."),
    ] = None,
) -> None:
    """Rewrite a run's report.md and report.html; compare several runs in one page."""
    import overview

    for path in overview.write(folders, out):
        print(path)


@app.command("ship")
def ship_command(
    folder: RunFolder,
    out: Annotated[
        Path | None, typer.Option(help="The archive. [default: RUN.tar.xz, beside the run]")
    ] = None,
) -> None:
    """Pack what `imagine` and `play` need of a finished run into one small archive."""
    from runs import Run
    from ship import ENDING, card_of, ship

    out = out or folder.absolute().with_name(f"{folder.absolute().name}{ENDING}")
    if not out.name.endswith(ENDING) or out.name.removesuffix(ENDING) in ("", ".", ".."):
        raise ValueError(f"--out: got {str(out)!r}; expected a file named NAME{ENDING}")
    run = Run.open(folder)
    check_output(out.parent, PICTURES_MB)
    check_files(out, card_of(out))
    print(f"{out}: {ship(run, out) / 1e6:.2f} MB")


@app.command("trust")
def trust_command(
    folder: RunFolder,
    starts: Annotated[int, typer.Option(help="Per task.")] = 50,
    split: Annotated[str, typer.Option(help="dev; test for reported figures only.")] = "dev",
    device: Device = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON on stdout and nothing else.")
    ] = False,
) -> None:
    """Say how often the dream lies: imagined success, the reflector's word, other actions."""
    import trust
    from runs import Run

    in_range("--starts", starts, 1)
    one_of("--split", split, ("dev", "test"))
    check_device(device)
    run = Run.open(folder, device)
    say = (lambda line: None) if as_json else print
    result = trust.trust(run, starts, say, split)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for path in (run.folder / "trust" / name for name in trust.FILES):
        if path.is_file():
            print(path)


# ------------------------------------------------------------------------------------------ studies
# Their work is in screening.py, summary.py and compare.py, imported inside each command like
# everything heavy.


@app.command()
def screen(
    out: Annotated[Path, typer.Option(help="Where screening.md and .jsonl go.")] = Path("results"),
) -> None:
    """Imitation from five demonstrations on every task, to choose a suite (an hour; resumable)."""
    import screening

    check_output(out, 1)
    screening.screen(out, print)


@app.command("expert")
def expert_command(
    suite: Suite = "metaworld",
    tasks: Tasks = "",
    starts: Annotated[int, typer.Option(help="Of the dev split, per task.")] = 5,
    out: Annotated[Path, typer.Option(help="A JSON file; other suites in it stay.")] = Path(
        "results/expert.json"
    ),
) -> None:
    """Measure how often the scripted expert succeeds within the step limit."""
    import screening

    names = chosen_tasks(suite, tasks)
    check_playable(names)
    in_range("--starts", starts, 1)
    check_output(out.parent, 1)
    check_files(out)
    command = f"python cli.py expert --suite {suite} --starts {starts}"
    command += f" --tasks {tasks}" if tasks else ""
    screening.measure_expert(suite, names, starts, out, command, partial(print, flush=True))


@app.command("summary")
def summary_command(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Finished run folders to add to results/runs.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The results folder.")] = Path("results"),
) -> None:
    """Collect finished runs into results/, write results/summary.json and the README's table."""
    import summary

    check_output(out, 5)
    summary.collect(runs or [], out)
    result = summary.summarize_runs(out)
    if (HERE / "README.md").is_file() and out.resolve() == HERE / "results":
        summary.update_readme(result, HERE / "README.md")
    print(f"{out / 'summary.json'}: {len(result)} figures")


@app.command("compare")
def compare_command(
    out: Annotated[Path, typer.Option(help="Runs and tables go here.")] = Path("runs/compare"),
    preset: Preset = "cpu",
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = "0,1,2,3,4",
    methods: Annotated[
        str, typer.Option(help="Separated by commas; default: all of the above.")
    ] = "",
    starts: Annotated[int | None, typer.Option(help="Test starts per task.")] = None,
) -> None:
    """The dream beside its alternatives, and what each has cost (hours; resumable).

    Methods: sft, filtered_bc, dream_bc, more_sft, filtered_bc_equal_budget, dream,
    real_equal_budget, real_equal_rollouts, rounds, dream_no_extra_data,
    dream_untrained_reflector, dream_neither.
    """
    import compare as study
    import render
    from evaluate import hardware

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


@app.command("bench")
def bench_command(
    preset: Preset = "cpu",
    run: Annotated[
        Path | None, typer.Option(help="A finished run in the place of untrained parts.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="A JSON file; a table (.md) and a chart (.png) go beside it.")
    ] = Path("results/bench.json"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Few and short measurements, to look at.")
    ] = False,
) -> None:
    """Frames/s imagined and real, training steps/s, the denoiser's FLOP/s, memory, a profile."""
    import bench
    import render
    from runs import Run

    if out.suffix != ".json":
        raise ValueError(f"--out: got {str(out)!r}; expected a file that ends in .json")
    check_output(out.parent, 1)
    check_files(out, out.with_suffix(".md"), out.with_suffix(".png"))
    finished = None if run is None else Run.open(run)
    if finished is None:
        config = build_config(preset, "", None, 0, "dream", None, None, None, False)
        command = f"python cli.py bench --preset {preset}"
    else:
        config, command = finished.config, f"python cli.py bench --run {run}"
    render.choose_backend()
    command += " --quick" if quick else ""
    plan = bench.QUICK if quick else bench.Plan()
    bench.bench(out, config, finished, plan, command, partial(print, flush=True))
    print(out.with_suffix(".md").read_text())


if __name__ == "__main__":  # required: workers of the real environment import this file again
    app()

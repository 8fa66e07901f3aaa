"""The command line as a user meets it: help, mistakes, and the debug preset from end to end.

Bad input must cost nothing: one line that says what to do, exit code 2, every file as it was.
The long tests share one debug run, which is killed after its second stage and then resumed.
"""

import errno
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
import typer
from scripted import random_episode
from trees import tree, unpack
from typer.testing import CliRunner

import cli
import demos
import errors
import order
import pipeline
import ppo
import render
import report
import runs
import ship
import terminal
import train
from checkpoints import save_part
from demos import Episode
from policy import Policy, PolicyConfig
from tasks import SPLITS, Camera, EnvConfig, Start, split_seeds

ROOT = Path(cli.__file__).resolve().parent
CLI = str(ROOT / "cli.py")
STAGE_TIMEOUT = 300  # seconds; a whole debug run takes about 30 on two free cores
linux_only = pytest.mark.skipif(platform.system() != "Linux", reason="needs /proc")


def in_process(*arguments) -> SimpleNamespace:
    """Run a command inside this process: cheap, for everything that ends before the real work."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def in_shell(*arguments, **options) -> subprocess.CompletedProcess:
    """Run a command as a user does."""
    command = [sys.executable, CLI, *(str(argument) for argument in arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=STAGE_TIMEOUT, **options
    )  # fmt: skip


def assert_one_line(result, *words: str) -> None:
    """Exit code 2 and a single line on stderr that holds `words`; nothing on stdout."""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    for word in words:
        assert word in lines[0], lines[0]
    assert result.stdout == ""
    assert getattr(result, "exit_code", getattr(result, "returncode", None)) == 2


def make_episode(task: str = "reach", size: int = 64, length: int = 3, seed: int = 7) -> Episode:
    return random_episode(seed, length, size, task)


def make_episodes(folder: Path, *episodes: Episode, config: EnvConfig | None = None) -> Path:
    """A healthy folder of episodes that needs no simulator."""
    camera = Camera((0.0, 0.0, 1.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), 42.0, 64)
    demos.save(folder, list(episodes) or [make_episode()], config or EnvConfig(), camera)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder, so that files written by default would be noticed as well."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    ["", *sorted(typer.main.get_command(cli.app).commands)]
    + [f"demos {name}" for name in ("collect", "load", "inspect", "replay", "export")],
)
def test_help(command):
    result = in_process(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout and "--help" in result.stdout


def test_help_imports_nothing_heavy():
    code = "import sys, cli; print(sorted({'torch', 'numpy', 'mujoco'} & set(sys.modules)))"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert child.stdout.strip() == "[]", child.stderr


@pytest.mark.parametrize("preset", ["cpu", "debug", "notebook", "gpu", "paper"])
def test_config_prints_json_that_is_the_preset(preset):
    result = in_process("config", "--preset", preset)
    assert result.exit_code == 0
    assert runs.config_from_json(result.stdout) == runs.preset(preset)
    assert "preset" in result.stderr  # the notes stay off stdout


@pytest.mark.parametrize("preset", ["cpu", "debug", "notebook", "gpu", "paper", "libero"])
def test_an_iteration_of_either_world_fits_into_the_slots(preset):
    """In every preset each rollout has a slot; settings in which one has none are refused."""
    for world in ("dream", "real"):
        config = replace(runs.preset(preset), rl_env=world)
        needed = config.rl.groups * config.rl.rollouts
        assert config.slots >= needed
        with pytest.raises(ValueError, match=f"got {needed - 1}, expected {needed} or more"):
            replace(config, slots=needed - 1)


def test_options_of_train_reach_the_settings():
    config = cli.build_config("debug", " reach , push ", 3, 7, "real", 5, 2, 9, plain=True)
    assert (config.tasks, config.demos, config.seed) == (("reach", "push"), 3, 7)
    assert (config.rl_env, config.rounds, config.test_starts) == ("real", 2, 9)
    for loop in (config.loop, config.real_loop):
        assert (loop.iterations, loop.branch) == (5, 0)
        assert (loop.noise, loop.time_penalty) == (1.0, 0.0)
        assert loop.decisions > 8 * 32 * 30 and loop.max_kl > 100  # all rows, all passes
    untouched = cli.build_config("debug", "", None, 0, "dream", None, None, None, plain=False)
    assert untouched == runs.preset("debug")
    given = cli.build_config("debug", "", None, 0, "dream", None, None, None, False, "novelty")
    assert given == replace(runs.preset("debug"), stop_rule="novelty")


def given_demonstrations(folder: Path, **changes) -> Path:
    """Two for each task of the preset debug, as `demos collect` writes them."""
    config = runs.preset("debug")
    some = [
        replace(random_episode(seed, 3, config.env.size, task), **changes)
        for task in config.tasks
        for seed in range(2)
    ]
    return make_episodes(folder, *some, config=config.env)


def test_train_begins_with_a_folder_of_demonstrations(here):
    """They are the run's, bit by bit; the ledger counts them; resumed, the folder may be gone."""
    folder = given_demonstrations(here / "mine")
    config = runs.preset("debug")
    words = ["train", "--preset", "debug", "--demos", "1", "--from", "mine", "--out", "run"]
    result = in_process(*words, "--until", "demos")
    assert result.exit_code == 0, result.output
    ours, _, camera = demos.load(here / "run" / "episodes", config.env)
    theirs = {(e.task, e.seed): e for e in demos.load(folder)[0]}
    assert [(e.task, e.seed) for e in ours] == [(task, 0) for task in config.tasks]
    for episode in ours:
        there = theirs[episode.task, episode.seed]
        assert (episode.image == there.image).all() and (episode.action == there.action).all()
    assert camera == demos.camera_of(folder)
    ledger = runs.Run.open(here / "run").ledger()
    assert ledger["demonstrations"] == 2
    assert ledger["demonstration_steps"] == 2 * 3 * config.env.chunk
    shutil.rmtree(folder)
    again = in_process(*words, "--until", "demos")
    assert again.exit_code == 0 and "done already" in again.output, again.output


@pytest.mark.parametrize(
    "changes, options, told",
    [
        ({}, "--demos 3", "2 demonstrations of button-press-topdown that succeed; expected 3"),
        ({}, "--tasks reach", "0 demonstrations of reach"),
        ({"success": np.zeros(4, np.uint8)}, "", "0 demonstrations of button-press-topdown"),
        ({"source": "exploration"}, "", "0 demonstrations of button-press-topdown"),
        ({"seed": split_seeds("test", 1)[0]}, "--demos 1", "starts of test"),
        ({"seed": 3}, "", "1 demonstrations of button-press-topdown"),  # one start, given twice
        ({}, "--suite libero_object --tasks libero-object-milk", "expects"),
        ({}, "--from nowhere", "no such folder"),
    ],
)
def test_other_demonstrations_are_refused(here, monkeypatch, changes, options, told):
    """One line, and no run folder."""
    monkeypatch.setattr(cli, "check_playable", lambda tasks: None)
    given_demonstrations(here / "mine", **changes)
    before = tree(here)
    words = f"train --preset debug --from mine --out run {options}".split()
    assert_one_line(in_process(*words), told)
    assert tree(here) == before


def test_demonstrations_longer_than_the_horizon_are_refused(here):
    folder = given_demonstrations(here / "mine")
    config = runs.preset("debug")
    short = replace(config.env, horizon=2)
    with pytest.raises(demos.BadEpisodes, match="of 3 decisions; expected at most 2, the run's"):
        demos.given(folder, short, config.tasks, 1)


# --- bad options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, words",
    [
        ("", ["--help"]),
        ("nonsense", ["nonsense", "--help"]),
        ("train --nonsense", ["--nonsense", "train --help"]),
        ("train --seed x", ["--seed", "--help"]),
        ("train --preset huge", ["'huge'", "cpu, debug, notebook, example, gpu, paper or libero"]),
        ("expert --suite=", ["expected one or more different tasks", "got none"]),
        ("train --tasks fly", ["'fly'", "expected", "drawer-open"]),
        ("train --tasks reach,reach", ["different"]),
        ("train --tasks ,", ["expected one or more"]),
        ("train --demos 0", ["got 0", "expected 1 to 333"]),
        ("train --demos -3", ["got -3", "expected 1 to 333"]),
        ("train --demos 334", ["got 334", "expected 1 to 333"]),
        ("train --seed 100", ["got 100", "0 to 99"]),
        ("train --env mars", ["'mars'", "'dream' or 'real'"]),
        ("train --iterations 0", ["got 0", "1 or more"]),
        ("train --stop-rule luck", ["'luck'", "'real' or 'novelty'"]),
        ("train --until lunch", ["'lunch'", "simulator"]),
        ("train --starts 100001", ["--starts", "got 100001", "expected 1 to 100000"]),
        ("compare --starts 100001", ["--starts", "got 100001", "expected 1 to 100000"]),
        ("train --device toaster", ["'toaster'", "expected cpu"]),
        ("train --device meta", ["'meta'", "expected cpu"]),
        ("evaluate run --device mkldnn", ["'mkldnn'", "expected cpu"]),
        ("expert --tasks reach --starts 1 --out run/config.json", ["run/config.json", "a run"]),
        ("expert --tasks reach --starts 1 --out good", ["good: got a folder"]),
        ("bench --quick --out run/stages.json", ["run/stages.json", "a run"]),
        ("ship run --out .tar.xz", ["'.tar.xz'", "NAME.tar.xz"]),
        ("train --device cuda:99", ["'cuda:99'", "expected cpu", "--device cpu"]),
        ("config --preset huge", ["cpu, debug, notebook, example, gpu, paper or libero"]),
        ("demos nonsense", ["nonsense", "demos --help"]),
        ("demos load", ["folder", "demos load --help"]),
        ("demos collect new --tasks fly", ["'fly'", "expected"]),
        ("demos collect new --demos 0", ["got 0", "expected 1 to 333"]),
        ("demos collect new --demos -1", ["got -1", "expected 1 to 333"]),
        ("demos collect new --seed -1", ["got -1", "0 to 99"]),
        ("demos collect new --size 63", ["63", "multiple of 16"]),
        ("demos collect new --chunk 0", ["got 0", "1 or more"]),
        ("demos collect new --horizon -2", ["got -2", "1 or more"]),
        ("demos inspect good --film avi", ["'avi'", "gif, mp4"]),
        ("demos load good --size 128", ["64", "expected 128"]),
        ("demos load good --chunk 8", ["4", "expected 8"]),
        ("demos load good --tasks push", ["'reach'", "push"]),
        ("evaluate run --policy best", ["'best'", "policy, sft"]),
        ("evaluate run --termination never", ["'never'", "oracle, reflector, none"]),
        ("evaluate run --split train", ["'train'", "test, dev"]),
        ("evaluate run --starts 0", ["got 0", "1 or more"]),
        ("evaluate run --starts 999999", ["999999", "100000"]),
        ("evaluate run --skip -1", ["got -1", "0 or more"]),
        ("evaluate run --skip 99999", ["test split", "100000", "99999+2"]),
        ("evaluate run --device toaster", ["'toaster'", "expected cpu"]),
        ("trust run --device cuda:99", ["'cuda:99'", "expected cpu", "--device cpu"]),
        ("imagine run --actions best", ["'best'", "expert, policy, sft"]),
        ("imagine run --seed -1", ["got -1", "0 or more"]),
        ("imagine run --task reach", ["'reach'", "handle-press"]),
    ],
)
def test_bad_options(here, command, words):
    make_episodes(here / "good")
    runs.Run.create(here / "run", runs.preset("debug"))
    before = tree(here)
    assert_one_line(in_process(*command.split()), *words)
    assert tree(here) == before


# --- bad folders of episodes ---------------------------------------------------------------------


def truncate(folder: Path) -> None:
    path = folder / "episode_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil(**arrays):
    """Damage that replaces arrays of the only episode."""

    def damage(folder: Path) -> None:
        shutil.rmtree(folder)
        episode = make_episode()
        for name, change in arrays.items():
            setattr(episode, name, change(getattr(episode, name)))
        make_episodes(folder, episode)

    return damage


def change_description(**values):
    def damage(folder: Path) -> None:
        path = folder / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


DAMAGES = {
    "missing": (shutil.rmtree, ["no such folder", "demos collect"]),
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], ["no dataset.json", "demos collect"]),
    "no episodes": (lambda f: (f / "episode_00000.safetensors").unlink(), ["no episodes"]),
    "truncated": (truncate, ["truncated", "collect it anew"]),
    "broken description": (lambda f: (f / "dataset.json").write_text("{"), ["anew"]),
    "other format": (change_description(format=99), ["99", "expected 1", "anew"]),
    "other size inside": (spoil(image=lambda x: x[:, :32, :32]), ["32", "expected", "64"]),
    "short": (spoil(action=lambda x: x[:-1]), ["expected"]),
    "NaN": (spoil(state=lambda x: x * np.nan), ["NaN", "collect it anew"]),
    "wild actions": (spoil(action=lambda x: x * 3), ["[-1, 1]"]),
    "unknown task": (spoil(task=lambda x: "fly"), ["'fly'", "expected"]),
}  # fmt: skip


@pytest.mark.parametrize("command", ["load", "inspect"])
@pytest.mark.parametrize("name", DAMAGES)
def test_bad_episodes(here, command, name):
    damage, words = DAMAGES[name]
    damage(make_episodes(here / "bad"))
    before = tree(here)
    assert_one_line(
        in_process("demos", command, "bad"), "bad" if name != "unknown task" else "", *words
    )
    assert tree(here) == before


@pytest.mark.parametrize(
    "name, words", [(name, words) for name, (_, words) in DAMAGES.items() if name != "unknown task"]
)
def test_resuming_with_bad_episodes(here, name, words):
    run = runs.Run.create(here / "run", runs.preset("debug"))
    run.finish_stage("demos", 1.0, 1.0, {"line": "made by the test"})
    DAMAGES[name][0](make_episodes(run.episodes_folder))
    before = tree(here)
    result = in_process("train", "--preset", "debug", "--out", "run")
    assert (
        result.stdout == "demos: done already (1 s)\n"
    )  # a finished stage is told, then the error
    result = SimpleNamespace(stdout="", stderr=result.stderr, exit_code=result.exit_code)
    assert_one_line(result, *words)
    assert tree(here) == before


def test_good_episodes(here):
    make_episodes(here / "good", make_episode("reach"), make_episode("push", length=5))
    result = in_process("demos", "load", "good", "--tasks", "push,reach", "--size", 64)
    assert result.exit_code == 0 and result.stdout.startswith(
        "OK: 2 episodes of push, reach; 2 succeed"
    )
    result = in_process("demos", "inspect", "good", "--out", "pictures", "--film", "mp4")
    assert result.exit_code == 0, result.output
    assert "positive" in result.stdout
    assert imageio.imread(here / "pictures" / "contact_sheet.png").shape == (2 * 132, 8 * 132, 3)
    film = imageio.imread(here / "pictures" / "film.mp4")
    assert film.shape == (6, 256, 512, 3)  # the longer episode's frames, two tasks side by side


def test_collect_refuses_a_folder_that_is_in_use(here):
    make_episodes(here / "good")
    before = tree(here)
    assert_one_line(in_process("demos", "collect", "good"), "not empty", "choose another")
    assert tree(here) == before


# --- bad runs and checkpoints --------------------------------------------------------------------


def make_run(folder: Path, width: int = 16) -> runs.Run:
    """A debug run that looks trained up to its policy (of `width`); the preset's width is 16."""
    run = runs.Run.create(folder, runs.preset("debug"))
    config = PolicyConfig(width=width, hidden=64)
    save_part(run.checkpoint("policy"), Policy(config), asdict(config))
    return run


@pytest.mark.parametrize("command", ["evaluate", "imagine", "report"])
def test_no_run(here, command):
    (here / "other").mkdir()
    before = tree(here)
    for folder in ("missing", "other"):
        words = folder, "not a run folder", "cli.py train", "make example"
        assert_one_line(in_process(command, folder), *words)
    assert tree(here) == before


def test_checkpoint_of_another_config(here):
    make_run(here / "run", width=32)
    before = tree(here)
    assert_one_line(in_process("evaluate", "run"), "policy.safetensors", "saved 32, expected 16")
    assert tree(here) == before


def test_damaged_checkpoint(here):
    path = make_run(here / "run").checkpoint("policy")
    path.write_bytes(path.read_bytes()[:1000])
    before = tree(here)
    assert_one_line(in_process("evaluate", "run"), "policy.safetensors", "truncated", "train again")
    assert tree(here) == before


@pytest.mark.parametrize(
    "command, word",
    [
        ("evaluate run --policy sft", "sft"),
        ("evaluate run --termination reflector", "reflector"),
        ("imagine run", "reflector"),
        ("ship run --out new/run.tar.xz", "sft"),
    ],
)
def test_missing_checkpoint(here, command, word):
    make_run(here / "run")
    before = tree(here)
    assert_one_line(in_process(*command.split()), f"{word}.safetensors", "train it first")
    assert tree(here) == before


def test_evaluate_says_which_starts_it_played(here, monkeypatch):
    """Those after the first N of each task, in JSON and in the table's title."""
    make_run(here / "run")
    played = []

    def scripted(player, env, starts, termination, reflector):
        played.append(starts)
        row = {"success": 0.5, "low": 0.0, "high": 1.0, "n": 2}
        tasks = {"tasks": {start.task: row for start in starts}}
        return row | {"termination": termination, "mean": 0.5} | tasks

    monkeypatch.setattr("evaluate.evaluate", scripted)
    monkeypatch.setattr("vecenv.VecRealEnv", lambda *_: SimpleNamespace(close=lambda: None))
    arguments = ("evaluate", "run", "--starts", 2, "--skip", 3)
    answer = json.loads(in_process(*arguments, "--json").stdout)
    first = SPLITS["test"].start
    tasks = runs.Run.open(here / "run").config.tasks
    expected = [Start(task, seed) for task in tasks for seed in (first + 3, first + 4)]
    assert played == [expected]
    assert (answer["starts_per_task"], answer["skipped"]) == (2, 3)
    assert answer["starts"] == [first + 3, first + 4]
    shown = " ".join(in_process(*arguments).stdout.split())
    assert "policy, oracle termination, test starts 4 to 5 of each task" in shown


@pytest.mark.parametrize("name", ["config.json", "stages.json"])
@pytest.mark.parametrize("command", ["report run", "train --preset debug --out run"])
def test_broken_run_folder(here, name, command):
    make_run(here / "run")
    (here / "run" / name).write_text('{"tasks": [')
    before = tree(here)
    assert_one_line(in_process(*command.split()), name, "not readable")
    assert tree(here) == before


@pytest.mark.parametrize("option", ["--seed 1", "--demos 3", "--env real", "--preset cpu"])
def test_run_folder_of_other_settings(here, option):
    make_run(here / "run")
    before = tree(here)
    result = in_process("train", "--preset", "debug", "--out", "run", *option.split())
    assert_one_line(result, "other settings", "choose another --out")
    assert tree(here) == before


def test_out_is_not_a_run_folder(here):
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter1.txt").write_text("It was a dark and stormy night.")
    before = tree(here)
    result = in_process("train", "--preset", "debug", "--out", "thesis")
    assert_one_line(result, "not a run folder", "choose another --out")
    assert tree(here) == before


# --- output that cannot be written ---------------------------------------------------------------

WRITERS = ["train --preset debug --out {}", "demos collect {}", "demos inspect good --out {}"]


@pytest.mark.parametrize("command", WRITERS)
def test_out_below_a_file(here, command):
    make_episodes(here / "good")
    (here / "file").write_text("a file")
    before = tree(here)
    assert_one_line(
        in_process(*command.format("file/new/run").split()), "is a file", "choose another"
    )
    assert tree(here) == before


@linux_only
@pytest.mark.parametrize("command", WRITERS)
def test_out_where_nobody_may_write(here, command):
    make_episodes(here / "good")
    before = tree(here)
    assert_one_line(in_process(*command.format("/proc/new").split()), "/proc", "choose another")
    assert tree(here) == before


@pytest.mark.parametrize("command", WRITERS)
def test_out_on_a_full_disk(here, command, monkeypatch):
    make_episodes(here / "good")
    before = tree(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    assert_one_line(in_process(*command.format("new").split()), "only 1 MB are free", "--out")
    assert tree(here) == before


@linux_only
def test_disk_that_fills_up_while_writing(here):
    """No file may grow beyond 2 kB: the kernel says so in the middle of the first picture."""
    import resource

    make_episodes(here / "good")
    before = tree(here)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    assert_one_line(
        in_shell("demos", "inspect", "good", "--out", "new", preexec_fn=limit), "free some space"
    )
    assert tree(here) == before


@linux_only
@pytest.mark.parametrize("command", ["report", "demos load", "train --preset debug --out"])
def test_a_name_that_is_not_utf8(here, command):
    name = b"run\xff"
    os.mkdir(name)
    assert_one_line(in_shell(*command.split(), os.fsdecode(name)), "not UTF-8", "rename it")
    assert os.listdir(name) == []


# --- no renderer, interruption, mistakes of ours -------------------------------------------------


@linux_only
@pytest.mark.parametrize("command", WRITERS[:2])
def test_no_renderer(here, command, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    for variable in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
        monkeypatch.setenv(variable, "")  # so that monkeypatch restores it afterwards
        monkeypatch.delenv(variable)
    monkeypatch.setattr(render, "probe", lambda backend: (False, float("nan"), "no driver"))
    result = in_process(*command.format("new").split())
    assert_one_line(result, "cannot draw", "apt-get install -y libosmesa6")
    assert tree(here) == {}


def test_failure_before_the_first_stage_leaves_no_run_folder(here, monkeypatch):
    """An expert that solves nothing: the settings that cannot work do not stay on disk."""
    scripted = SimpleNamespace(config=EnvConfig(), close=lambda: None)
    monkeypatch.setattr("vecenv.VecRealEnv", lambda slots, config: scripted)
    monkeypatch.setattr(demos, "play", lambda *arguments: [])
    result = in_process("train", "--preset", "debug", "--out", "new/run")
    assert_one_line(result, "the scripted expert solved", "choose another task")
    assert tree(here) == {}


def test_interruption(here, monkeypatch):
    """Only where something was kept there is something to resume."""

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "train", interrupted)
    result = in_process("train", "--preset", "debug", "--out", "run")
    assert result.exit_code == 130
    assert result.stderr == "interrupted; run the same command again to resume\n"
    monkeypatch.setattr(runs.Run, "open", interrupted)
    result = in_process("evaluate", "train")
    assert result.exit_code == 130
    assert result.stderr == "interrupted; the same command begins anew\n"


@linux_only
@pytest.mark.parametrize(
    "number, group", [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGHUP, True)]
)
def test_a_command_that_is_ended_tidies_up(here, number, group):
    """`kill`, of the command or of all its processes, as `timeout` and job schedulers do, and a
    terminal that is closed: nothing half-written stays, and the code is that of an interruption."""
    command = [sys.executable, CLI, "demos", "collect", "new", "--tasks", "reach", "--demos", "50"]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # also where tests run by nohup
    )  # fmt: skip
    began = time.monotonic()
    while not list(here.glob(".worldenv-*")) and time.monotonic() - began < STAGE_TIMEOUT:
        time.sleep(0.05)
    time.sleep(2)  # workers are starting, or play
    (os.killpg if group else os.kill)(child.pid, number)
    _, told = child.communicate(timeout=STAGE_TIMEOUT)
    assert child.returncode == 130
    assert told.endswith("interrupted; the same command begins anew\n")
    assert tree(here) == {} and not list(here.iterdir())


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files_are_told(number):
    told = errors.explain(OSError(number, os.strerror(number)))
    assert os.strerror(number) in told and told.endswith("ulimit -n 1024")


def test_pictures_are_drawn_below_a_notebook_too(here):
    """Its kernel tells all children to draw by a package that only it has."""
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_none"}
    make_episodes(here / "good")
    done = in_shell("demos", "inspect", "good", "--out", "new", env=environment)
    assert done.returncode == 0 and list((here / "new").glob("*.png")), done.stderr


def test_traceback_on_demand(here, monkeypatch):
    monkeypatch.setenv("WORLDENV_TRACEBACK", "1")
    result = in_process("train", "--demos", "0")
    assert result.exit_code == 1 and isinstance(result.exception, ValueError)


def test_a_mistake_in_the_code_is_not_taken_for_bad_input(here, monkeypatch):
    def slip(name):
        return np.zeros(3) + np.zeros(4)

    monkeypatch.setattr(runs, "preset", slip)
    result = in_process("train")
    assert result.exit_code == 1 and "broadcast" in str(result.exception)


# --- progress and report -------------------------------------------------------------------------


def test_rl_line_tells_when_there_is_no_signal():
    metrics = {"return": 0.0, "success": 0.0, "groups_with_spread": 0.0, "decisions": 60}
    line = terminal.rl_line(4, 24, metrics)
    assert line.startswith("  rl 5/24: return 0.000") and ppo.no_signal(metrics) in line


def test_progress_without_a_terminal(here, monkeypatch, capsys):
    """A line now and then for a log file."""
    monkeypatch.setattr(terminal, "HEARTBEAT", 0)
    with terminal.StageDisplay(["sft"]) as display:
        for step in range(1000):
            display.progress("sft", step, 1000, {"loss": 0.5, "l1": 0.25})
        display.say("sft: done")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("  sft 1000/1000, loss 0.5000") and lines[-1] == "sft: done"


def test_steps_are_logged_now_and_then(here):
    """JSON lines thinned out to about 50 a stage, the last step among them."""
    run = runs.Run.create(here / "run", runs.preset("debug"))
    for step in range(1000):
        train.log_step(run, "sft", step, 1000, {"loss": 0.5, "l1": 0.25})
    logged = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert 50 <= len(logged) <= 52 and logged[-1]["step"] == 999 and logged[0]["l1"] == 0.25


def test_time_left_counts_only_the_steps_of_this_fit(here, monkeypatch, capsys):
    """A stage plays for an hour and fits then, twice, the second time from step 500 on: what came
    before a fit says nothing about the steps that are left."""
    clock = [0.0]
    monkeypatch.setattr(terminal, "HEARTBEAT", 0)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    with terminal.StageDisplay(["explore"]) as display:
        for begin, seconds in ((0, 2.0), (500, 0.5)):
            clock[0] += 3600
            for step in range(begin, 1000):
                display.progress("explore", step, 1000, {"loss": 0.5})
                clock[0] += seconds
            lines = capsys.readouterr().out.splitlines()
            left = [float(line.split(", ")[2].split(" s")[0]) for line in lines]
            # of its first step alone nothing is known; after each further one the rest is exact
            assert left == [round(seconds * (999 - step)) for step in range(begin + 1, 1000)]


def test_report_of_a_run_that_has_just_begun(here):
    runs.Run.create(here / "run", runs.preset("debug"))
    result = in_process("report", "run")
    assert result.exit_code == 0, result.output
    text = (here / "run" / "report.md").read_text()
    assert "Not finished" in text and "simulator" in text and "Real success" not in text


# --- the whole thing -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def debug_run(tmp_path_factory) -> SimpleNamespace:
    """A debug run by the real command: killed once its `sft` stage is done, then run to its end."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    command = [sys.executable, CLI, "train", "--preset", "debug", "--out", str(folder)]
    stages = folder / "stages.json"
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + STAGE_TIMEOUT
    while not (stages.is_file() and "sft" in stages.read_text()):
        assert first.poll() is None and time.time() < deadline, "train ended before it was killed"
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    killed = SimpleNamespace(stages=json.loads(stages.read_text()), tree=tree(folder))
    second = in_shell("train", "--preset", "debug", "--out", folder)
    assert second.returncode == 0, second.stderr
    return SimpleNamespace(folder=folder, killed=killed, output=second.stdout)


def test_killed_run_goes_on_where_it_was(debug_run):
    done = list(debug_run.killed.stages)
    assert "sft" in done and "evaluate" not in done
    lines = debug_run.output.splitlines()
    assert [line.split(":")[0] for line in lines if "done already" in line] == done
    after = json.loads((debug_run.folder / "stages.json").read_text())
    assert list(after) == list(order.STAGES)
    for name in done:  # not made again: the very same seconds and figures, and the same weights
        assert after[name] == debug_run.killed.stages[name]
    checkpoint = "checkpoints/sft.safetensors"
    assert tree(debug_run.folder)[checkpoint] == debug_run.killed.tree[checkpoint]


def test_run_folder(debug_run):
    folder, config = debug_run.folder, runs.preset("debug")
    names = set(tree(folder))
    for name in ("sft", "simulator", "reflector", "policy"):
        assert f"checkpoints/{name}.safetensors" in names
    assert {"config.json", "stages.json", "metrics.jsonl", "report.md", "report.html"} <= names
    assert {"pictures/rl.png", "pictures/learning.png", "pictures/success_oracle.png"} <= names
    assert not [name for name in names if name.endswith(".tmp") or "/." in name]
    episodes, _, _ = demos.load(folder / "episodes", config.env, config.tasks)
    assert len(episodes) == len(config.tasks) * (config.demos + config.exploration)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {
        "sft",
        "explore",
        "filtered_bc",
        "simulator",
        "reflector",
        "dream_bc",
        "gauge",
        "rl",
    } == {step["stage"] for step in steps}
    rl = [step for step in steps if step["stage"] == "rl"]
    assert [step["iteration"] for step in rl] == list(range(config.loop.iterations))
    probes = json.loads((folder / "stages.json").read_text())["rl"]["probes"]
    logged = [step for step in steps if step["stage"] == "gauge"]
    for step, probe in zip(logged, probes, strict=True):
        assert step["iteration"] == probe["iteration"]
        assert step["real"] == np.mean(probe["real"])
        assert step["imagined"] == np.mean(probe["imagined"])


def test_novelty_stops_without_real_episodes(debug_run, tmp_path):
    """The same run, its LOOP played again under the other stop rule: the ledger of rl has no real
    episode, and the report shows dreams only."""
    folder = tmp_path / "novelty"
    shutil.copytree(debug_run.folder, folder)
    config = replace(runs.Run.open(folder).config, stop_rule="novelty")
    (folder / "config.json").write_text(runs.config_to_json(config))
    run = runs.Run.open(folder)
    for stage in ("rl", "evaluate"):
        del run.stages[stage]
    pipeline.train(run, lambda line: None, lambda *step: None, until="rl")
    stage = run.stages["rl"]
    assert stage["ledger"]["gauge_episodes"] == 0 and stage["ledger"]["imagined_frames"] > 0
    assert [probe["iteration"] for probe in stage["probes"]][:2] == [0, 1]
    assert all("real" not in probe and len(probe["novel"]) > 0 for probe in stage["probes"])
    assert stage["kept"] in {probe["iteration"] for probe in stage["probes"]}
    text = report.write_report(run).read_text()
    assert "novel decisions" in text and "hallucinated" not in text


def test_output_is_a_line_per_stage_and_iteration(debug_run):
    lines = debug_run.output.splitlines()
    stages = [line.split(":")[0] for line in lines if not line.startswith(" ")]
    assert stages == [*order.STAGES, "report"]
    assert len([line for line in lines if line.startswith("  rl ")]) == 2


def test_report(debug_run):
    text = (debug_run.folder / "report.md").read_text()
    for heading in ("Real success", "Time and memory", "Ledger", "Simulator", "Reflector"):
        assert f"## {heading}" in text
    stages = json.loads((debug_run.folder / "stages.json").read_text())
    result = stages["evaluate"]["results"]["policy"]["oracle"]
    row = next(line for line in text.splitlines() if line.startswith("| post-trained | oracle |"))
    assert f"| {100 * result['mean']:.1f} [{100 * result['low']:.1f}, " in row
    ledgers = [stage["ledger"] for stage in stages.values()]
    for name in ("imagined_frames", "cpu_seconds", "exploration_episodes", "gauge_episodes"):
        spent = sum(ledger.get(name, 0) for ledger in ledgers)
        assert spent and f"| {name.replace('_', ' ')} | {spent:,} |" in text
    assert "## Does the dream tell the truth?" in text
    assert "Not finished" not in text
    for link in (part.split(")")[0] for part in text.split("](")[1:]):
        assert (debug_run.folder / link).is_file(), link


def test_same_command_again_changes_nothing(debug_run):
    before = tree(debug_run.folder)
    result = in_process("train", "--preset", "debug", "--out", debug_run.folder)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("done already") == len(order.STAGES)
    assert tree(debug_run.folder) == before


def test_until_stops_there(debug_run, here):
    """On a copy without its last two stages, `--until reflector` finds nothing left to do."""
    shutil.copytree(debug_run.folder, here / "run")
    stages = json.loads((here / "run" / "stages.json").read_text())
    kept = {name: stages[name] for name in order.STAGES[:-2]}
    (here / "run" / "stages.json").write_text(json.dumps(kept))
    arguments = ["train", "--preset", "debug", "--out", "run", "--until"]
    assert in_process(*arguments, "reflector").exit_code == 0
    assert json.loads((here / "run" / "stages.json").read_text()) == kept
    text = (here / "run" / "report.md").read_text()
    assert "Not finished" in text and "rl, evaluate" in text and "## Simulator" in text
    assert "Real success" not in text


def test_evaluate_prints_json_and_nothing_else(debug_run):
    result = in_shell("evaluate", debug_run.folder, "--starts", 1, "--split", "dev", "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["n"] == 2 and set(answer["tasks"]) == set(runs.preset("debug").tasks)
    assert 0 <= answer["low"] <= answer["mean"] <= answer["high"] <= 1
    assert (answer["policy"], answer["termination"]) == ("policy", "oracle")


def test_imagine(debug_run, here):
    arguments = ["--task", "handle-press", "--actions", "expert", "--seed", 3, "--out", "pictures"]
    before = tree(debug_run.folder)
    result = in_shell("imagine", debug_run.folder, *arguments)
    assert result.returncode == 0, result.stderr
    assert "dB after 1" in result.stdout and "real: success at decision" in result.stdout
    name = "pictures/handle-press_expert_3"
    film = imageio.imread(here / f"{name}.gif")
    assert len(film) > 5 and film.shape[1:3] == (256, 512)  # real left, dream right
    strip = imageio.imread(here / f"{name}.png")
    assert strip.shape == (256, 1280, 3)
    assert np.array_equal(
        strip[:128, :128], strip[128:, :128]
    )  # the dream begins at the real start
    assert not np.array_equal(strip[:128, -128:], strip[128:, -128:])
    assert imageio.imread(here / f"{name}_reward.png").ndim == 3
    assert len(tree(here)) == 4 and tree(debug_run.folder) == before


def test_a_shipped_run_dreams_as_its_run_does(debug_run, here):
    """Packed, unpacked as `make example` does it, and asked for the same dream: weights of eight
    bits less give nearly the same, and nothing that is not needed came along."""
    before = tree(debug_run.folder)
    result = in_process("ship", debug_run.folder, "--out", "sent/small.tar.xz")
    assert result.exit_code == 0, result.output
    archive, card = here / "sent" / "small.tar.xz", (here / "sent" / "small.md").read_text()
    assert tree(debug_run.folder) == before
    assert set(tree(here)) == {"sent", "sent/small.tar.xz", "sent/small.md"}
    assert "make example" in card and "## Real success" in card and "![" not in card
    assert result.stdout.split() == [
        "sent/small.tar.xz:", f"{archive.stat().st_size / 1e6:.2f}", "MB"
    ]  # fmt: skip
    unpack(archive, here)
    kept = {name for name, content in tree(here / "small").items() if content != "folder"}
    assert kept == {*ship.TEXTS, *(f"checkpoints/{name}.safetensors" for name in ship.PARTS)}
    dreams, curves, chunks = [], [], []
    for folder in (debug_run.folder, here / "small"):
        run = runs.Run.open(folder)
        simulator = run.simulator(demos.camera_of(run.episodes_folder))
        seen = report.real_and_dream(run, simulator, run.reflector(), None, "handle-press", 3)
        dreams.append(seen[1].astype(float))
        curves.append(seen[2]["dream"])
        first = {"image": seen[0].image[:1], "state": seen[0].state[:1], "instruction": ["press"]}
        chunks.append(run.policy().act(first, np.ones(1, bool)))
    assert 0 < np.abs(dreams[0] - dreams[1]).mean() < 1  # of 255
    assert np.abs(curves[0] - curves[1]).max() < 0.02
    assert 0 < np.abs(chunks[0] - chunks[1]).max() < 0.02


def test_what_is_there_is_not_replaced_by_a_shipped_run(debug_run, here):
    """Its own files, and a text that is no card of it; a card of before is."""
    shutil.copytree(debug_run.folder, here / "run")
    (here / "README.md").write_text("# mine\n")
    before = tree(here)
    told = in_process("ship", "run", "--out", "README.tar.xz")
    assert_one_line(told, "README.md: not the card", "another --out")
    for inside in ("run/run.tar.xz", "run/checkpoints/run.tar.xz"):
        assert_one_line(in_process("ship", "run", "--out", inside), "run's folder")
    assert tree(here) == before
    for _ in range(2):
        assert in_process("ship", "run", "--out", "small.tar.xz").exit_code == 0


def test_a_run_without_one_of_its_episodes_is_not_trained_on(debug_run, here):
    """Fewer would silently make another run; one that has more was killed in the stage."""
    shutil.copytree(debug_run.folder, here / "run")
    shutil.rmtree(here / "run" / "resume", ignore_errors=True)
    stages = json.loads((here / "run" / "stages.json").read_text())
    del stages["evaluate"], stages["rl"]
    (here / "run" / "stages.json").write_text(json.dumps(stages))
    (here / "run" / "episodes" / "episode_00001.safetensors").unlink()
    result = in_process("train", "--preset", "debug", "--out", "run")
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert "episodes: got 7 episodes; expected the 8" in line and "another --out" in line


def test_an_unfinished_run_is_not_shipped(debug_run, here):
    shutil.copytree(debug_run.folder, here / "run")
    stages = json.loads((here / "run" / "stages.json").read_text())
    del stages["evaluate"]
    (here / "run" / "stages.json").write_text(json.dumps(stages))
    before = tree(here / "run")
    assert_one_line(in_process("ship", "run", "--out", "small.tar.xz"), "not finished", "again")
    assert_one_line(in_process("ship", "run", "--out", "small.zip"), "--out", ".tar.xz")
    (here / "run" / "checkpoints" / "sft.safetensors").unlink()
    assert_one_line(in_process("ship", "run", "--out", "small.tar.xz"), "no such checkpoint")
    del before["checkpoints/sft.safetensors"]
    assert tree(here / "run") == before and set(tree(here)) - {"run"} == {
        f"run/{name}" for name in before
    }


def test_inspect_the_run_s_episodes(debug_run, here):
    before = tree(debug_run.folder)
    result = in_process("demos", "inspect", debug_run.folder / "episodes", "--out", "pictures")
    assert result.exit_code == 0, result.output
    assert "expert" in result.stdout and "explor" in result.stdout
    assert set(tree(here)) == {"pictures", "pictures/contact_sheet.png", "pictures/film.gif"}
    assert tree(debug_run.folder) == before

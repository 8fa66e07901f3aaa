"""Setting up: a renderer that really draws, and a doctor that tells what is missing.

The tests of the choice itself use scripted probes, so they say the same on every machine.
"""

import math
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import doctor
import render

ROOT = Path(render.__file__).resolve().parent
linux_only = pytest.mark.skipif(
    platform.system() != "Linux", reason="elsewhere MuJoCo's native backend needs no choice"
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No remembered answer, no MUJOCO_GL, no mujoco in memory; all of it restored afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for variable in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
        # setenv first: it makes monkeypatch restore the variable even if it was not set before
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.delitem(sys.modules, "mujoco.gl_context", raising=False)
    return monkeypatch


def script_probe(monkeypatch, working: set[str]) -> list[str]:
    """Replace render.probe by one where only `working` backends draw; return its list of calls."""
    calls = []

    def probe(backend):
        calls.append(backend)
        if backend in working:
            return True, 1.0, ""
        return False, math.nan, f"no {backend} here"

    monkeypatch.setattr(render, "probe", probe)
    return calls


# --- render.py ---------------------------------------------------------------------------------


def test_chosen_backend_draws_a_frame(fresh):
    backend = render.choose_backend()
    works, milliseconds, error = render.probe(backend)
    assert works, error
    assert 0 < milliseconds < 10_000
    if platform.system() == "Linux":
        assert os.environ["MUJOCO_GL"] == os.environ["PYOPENGL_PLATFORM"] == backend


@linux_only
def test_probe_reports_an_impossible_backend():
    works, milliseconds, error = render.probe("crayons")
    assert not works and math.isnan(milliseconds)
    assert "crayons" in error and "\n" not in error


def test_probe_refuses_a_constant_frame(fresh):
    """A context without error that draws nothing must not pass: leave out the ball and light."""
    backend = render.choose_backend()
    empty = render.PROBE_SCRIPT.replace('<light pos="0 0 3"/><geom size="0.3"/>', "")
    assert empty != render.PROBE_SCRIPT
    fresh.setattr(render, "PROBE_SCRIPT", empty)
    works, _, error = render.probe(backend)
    assert not works and "constant" in error


@linux_only
def test_first_backend_that_draws_is_taken(fresh):
    calls = script_probe(fresh, working={"osmesa"})
    assert render.choose_backend() == "osmesa"
    assert calls == ["egl", "osmesa"]
    assert os.environ["MUJOCO_GL"] == os.environ["PYOPENGL_PLATFORM"] == "osmesa"


@linux_only
def test_answer_is_remembered_until_refreshed(fresh):
    calls = script_probe(fresh, working={"osmesa"})
    render.choose_backend()
    del calls[:]
    assert render.choose_backend() == "osmesa"  # as a child process, which inherits MUJOCO_GL
    fresh.delenv("MUJOCO_GL")
    assert render.choose_backend() == "osmesa"  # as the next command in the same terminal
    assert calls == []

    fresh.delenv("MUJOCO_GL")
    script_probe(fresh, working={"egl"})  # a driver was installed, the library removed
    assert render.choose_backend(refresh=True) == "egl"


@linux_only
@pytest.mark.parametrize("content", ["", "not json", "[]", '{"key": "another machine"}'])
def test_a_useless_cache_is_ignored(fresh, content):
    render._cache_file().parent.mkdir(parents=True)
    render._cache_file().write_text(content)
    script_probe(fresh, working={"egl"})
    assert render.choose_backend() == "egl"


@linux_only
def test_a_set_variable_is_respected(fresh):
    calls = script_probe(fresh, working={"egl", "osmesa"})
    fresh.setenv("MUJOCO_GL", "osmesa")
    assert render.choose_backend() == "osmesa"
    assert calls == ["osmesa"]


@linux_only
def test_no_renderer_says_what_was_tried_and_what_to_run(fresh):
    script_probe(fresh, working=set())
    with pytest.raises(render.NoRenderer) as failure:
        render.choose_backend()
    message = str(failure.value)
    assert "no egl here" in message and "no osmesa here" in message
    assert message.endswith(render.REMEDY) and "\n" not in message
    assert "MUJOCO_GL" not in os.environ  # a failed choice leaves nothing behind


@linux_only
def test_an_impossible_variable_raises_with_the_remedy(fresh):
    fresh.setenv("MUJOCO_GL", "crayons")
    with pytest.raises(render.NoRenderer, match="crayons.*MUJOCO_GL is set.*unset MUJOCO_GL"):
        render.choose_backend()


@linux_only
def test_a_wanted_osmesa_that_is_missing_can_be_installed(fresh):
    script_probe(fresh, working=set())
    fresh.setenv("MUJOCO_GL", "osmesa")
    with pytest.raises(render.NoRenderer) as failure:
        render.choose_backend()
    assert failure.value.remedy == render.REMEDY


@linux_only
def test_choosing_after_mujoco_was_imported_otherwise_is_refused(fresh):
    class GLContext:
        __module__ = "mujoco.glfw"

    fresh.setitem(sys.modules, "mujoco.gl_context", type("module", (), {"GLContext": GLContext}))
    script_probe(fresh, working={"egl"})
    with pytest.raises(render.NoRenderer, match="imported before"):
        render.choose_backend()


# --- doctor.py ---------------------------------------------------------------------------------


def test_every_failing_row_has_a_remedy(fresh):
    """Break everything that can be broken from here, then read the table."""

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    script_probe(fresh, working=set())
    fresh.setattr(doctor.metadata, "version", missing)
    fresh.setattr(doctor, "NEWEST_PYTHON", (3, 0))
    fresh.setattr(doctor, "MIN_MEMORY_GB", math.inf)
    fresh.setattr(doctor, "MIN_DISK_GB", math.inf)
    for module in ("psutil", "torch"):
        fresh.setitem(sys.modules, module, None)  # makes `import` raise ImportError
    failures = [check for check in doctor.diagnose() if not check.ok]
    assert len(failures) >= len(doctor.read_pins()) + 4  # Python, memory, disk, device
    for check in failures:
        assert check.remedy, check.name


def test_missing_and_outdated_packages_are_reported(monkeypatch):
    installed = metadata.version

    def version(name):
        if name == "diffusers":
            raise metadata.PackageNotFoundError(name)
        return {"scipy": "0.1", "torch": "2.13.0+cpu"}.get(name) or installed(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    rows = {check.name: check for check in doctor.check_packages()}
    assert not rows["diffusers"].ok and "missing" in rows["diffusers"].found
    assert not rows["scipy"].ok and "0.1, expected" in rows["scipy"].found
    assert rows["torch"].ok  # a local build tag is no other version


@pytest.mark.parametrize("minor", [10, 11, 13])
def test_pins_follow_the_python_version(minor, tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(
        "# a comment\n\nrich==15.0.0  # another\n"
        'numpy==2.2.6 ; python_version < "3.11"\nnumpy==2.4.6 ; python_version >= "3.11"\n'
    )
    expected = "2.2.6" if minor == 10 else "2.4.6"
    pins = doctor.read_pins(requirements, python=(3, minor))
    assert pins == {"rich": "15.0.0", "numpy": expected}


def test_every_python_version_gets_the_same_packages():
    names = [set(doctor.read_pins(python=(3, minor))) for minor in range(10, 14)]
    assert all(found == names[0] for found in names) and "torch" in names[0]


def test_an_unreadable_pin_is_refused(tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("numpy>=2\n")
    with pytest.raises(ValueError, match="numpy>=2"):
        doctor.read_pins(requirements)


def test_only_what_is_not_installed_at_all_is_missing(monkeypatch):
    """Another version than the pinned one is not replaced: a hosted notebook has its own torch."""
    pins = {"numpy": "0.1", "no-such-package": "1.0"}
    monkeypatch.setattr(doctor, "read_pins", lambda: pins)
    assert doctor.missing_pins() == ["no-such-package==1.0"]


@pytest.mark.parametrize("with_rich", [True, False])
def test_table_shows_every_row(monkeypatch, capsys, with_rich):
    if not with_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    checks = [doctor.Check("one", "fine", True), doctor.Check("two", "[gone]", False, "mend it")]
    doctor.print_table(checks)
    printed = capsys.readouterr().out
    for text in ("one", "fine", "two", "[gone]", "mend it"):
        assert text in printed


@pytest.mark.parametrize(
    "uid, code, line", [(1000, 0, render.REMEDY), (0, 0, None), (0, 1, render.REMEDY)]
)
@linux_only
def test_only_root_installs(monkeypatch, uid, code, line):
    """Nothing is installed here: apt-get is scripted to end with `code`."""
    commands = []

    def run(command, check):
        commands.append(command[:2])
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(render.os, "geteuid", lambda: uid)
    monkeypatch.setattr(render.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(render.subprocess, "run", run)
    assert render.install_osmesa() == line
    assert commands == ([["apt-get", "update"], ["apt-get", "install"]] if uid == 0 else [])


def test_exit_code_follows_the_rows(monkeypatch, capsys):
    good, bad = doctor.Check("one", "fine", True), doctor.Check("two", "gone", False, "mend it")
    monkeypatch.setattr(doctor, "diagnose", lambda: [good])
    assert doctor.main([]) == 0
    monkeypatch.setattr(doctor, "diagnose", lambda: [good, bad])
    assert doctor.main([]) == 2
    assert "mend it" in capsys.readouterr().out


def run_doctor(**variables) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "doctor.py"],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.pinned
def test_the_doctor_command_approves_this_environment(tmp_path):
    done = run_doctor(XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "off-screen renderer" in done.stdout


@linux_only
def test_the_doctor_command_fails_without_a_renderer(tmp_path):
    done = run_doctor(XDG_CACHE_HOME=str(tmp_path), MUJOCO_GL="crayons")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "unset MUJOCO_GL" in done.stdout

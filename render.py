"""Choose how MuJoCo draws without a window, by trying it.

MuJoCo can draw off-screen in two ways on Linux: EGL (on a GPU, or on the processor with a complete
Mesa) and OSMesa (always on the processor; needs the library `libosmesa6`). Whether EGL works cannot
be read off a file: the library may be installed and still fail when a context is made. So each
backend draws a real frame, and the first one that succeeds is taken. EGL goes first because it also
keeps several renderers apart, whereas under OSMesa closing one spoils the others.

MuJoCo reads the choice from the environment variable MUJOCO_GL *while it is imported*. Hence
  - every try runs in a process of its own;
  - `choose_backend()` must be called before anything imports mujoco or metaworld.
On macOS and Windows MuJoCo's native backend needs no choice, and the variables stay untouched.
"""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

BACKENDS = ("egl", "osmesa")  # in order of preference; both are Linux names
NATIVE = "native"  # the answer on macOS and Windows: MuJoCo's own default
REMEDY = "sudo apt-get install -y libosmesa6"
PROBE_TIMEOUT = 60  # seconds; a healthy try takes about one, importing mujoco included

# One try: a lit ball on 64x64 pixels. It reports on its last line of standard output and leaves
# by os._exit, because MuJoCo's destructors fill the output with noise after a failed context.
PROBE_SCRIPT = """
import os, time
try:
    import mujoco
    model = mujoco.MjModel.from_xml_string(
        '<mujoco><worldbody><light pos="0 0 3"/><geom size="0.3"/></worldbody></mujoco>')
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = mujoco.Renderer(model, height=64, width=64)

    def draw():
        renderer.update_scene(data)
        return renderer.render()

    frame = draw()  # the first frame also uploads the meshes: do not time it
    if frame.min() == frame.max():
        raise RuntimeError('the frame is constant: nothing was drawn')
    start = time.perf_counter()
    for _ in range(5):
        draw()
    print('ok', (time.perf_counter() - start) / 5 * 1000, flush=True)
except BaseException as error:
    message = ' '.join(str(error).split())
    print('error', type(error).__name__ + ': ' + message, flush=True)
os._exit(0)
"""


class NoRenderer(RuntimeError):
    """Nothing draws off-screen. One line: what is wrong, then what to run (also as `.remedy`)."""

    def __init__(self, problem: str, remedy: str):
        super().__init__(f"{problem}; run: {remedy}")
        self.remedy = remedy


def choose_backend(refresh: bool = False) -> str:
    """Set MUJOCO_GL (and PYOPENGL_PLATFORM) to a backend that draws; return its name.

    A MUJOCO_GL that is already set is respected: it is tried and nothing else is. Otherwise the
    first of BACKENDS that draws a frame wins. Trying costs about a second a backend, so successes
    (never failures) are remembered per machine, start-up and MuJoCo version. `refresh=True`
    ignores what was remembered, e.g. after a driver or library has come or gone.

    Raises NoRenderer when nothing draws, or when mujoco was imported earlier with another backend.
    """
    if platform.system() != "Linux":
        return NATIVE
    if importlib.util.find_spec("mujoco") is None:
        raise NoRenderer("mujoco is not installed", "make setup")
    wanted = os.environ.get("MUJOCO_GL", "").strip().lower()
    remembered = {} if refresh else _read_cache()
    backend = remembered.get(wanted or "automatic")
    if backend is None:
        backend = _try_in_order((wanted,) if wanted else BACKENDS)
        # Child processes inherit MUJOCO_GL, so they will ask for the backend by name.
        _write_cache({**remembered, wanted or "automatic": backend, backend: backend})
    _check_not_too_late(backend)
    _set_variables(os.environ, backend)
    return backend


def probe(backend: str) -> tuple[bool, float, str]:
    """Draw with `backend` in a process of its own: (it works, milliseconds a frame, error line).

    The error line is "" when it works, the milliseconds are NaN when it does not.
    """
    environment = dict(os.environ)
    if backend != NATIVE:
        _set_variables(environment, backend)
    failed = float("nan")
    try:
        child = subprocess.run(
            [sys.executable, "-c", PROBE_SCRIPT],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return False, failed, f"no frame within {PROBE_TIMEOUT} s"
    lines = child.stdout.strip().splitlines()
    verdict, _, detail = (lines[-1] if lines else "").partition(" ")
    if verdict == "ok":
        return True, float(detail), ""
    if verdict == "error":
        return False, failed, detail
    return False, failed, f"the process that tried it died (exit code {child.returncode})"


def install_osmesa() -> str | None:
    """Install the OSMesa library if this process may; else return the line for the user to run.

    Only root on a machine with apt-get may. None means that the library is installed now.
    """
    if platform.system() != "Linux" or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return REMEDY
    # A fresh container has no package lists yet. A failing update is not fatal: old lists may do.
    subprocess.run(["apt-get", "update", "-qq"], check=False)
    install = subprocess.run(["apt-get", "install", "-y", "-qq", "libosmesa6"], check=False)
    return None if install.returncode == 0 else REMEDY


def _try_in_order(backends: tuple[str, ...]) -> str:
    """The first backend that draws; NoRenderer, with what each one said, when none does."""
    complaints = []
    for backend in backends:
        works, _, error = probe(backend)
        if works:
            return backend
        complaints.append(f"{backend} ({error})")
    problem = f"MuJoCo cannot draw off-screen here: tried {', '.join(complaints)}"
    if "osmesa" in backends:  # its library can be installed
        raise NoRenderer(problem, REMEDY)
    raise NoRenderer(f"{problem} because MUJOCO_GL is set; to try others", "unset MUJOCO_GL")


def _check_not_too_late(backend: str) -> None:
    """Refuse when mujoco is in memory with another backend: the choice would have no effect."""
    loaded = sys.modules.get("mujoco.gl_context")
    if loaded is None or backend not in BACKENDS:
        return
    context = getattr(loaded, "GLContext", None)  # e.g. the class mujoco.osmesa.GLContext
    if backend not in getattr(context, "__module__", ""):
        raise NoRenderer(
            f"mujoco was imported before render.choose_backend() could select {backend!r}",
            f"export MUJOCO_GL={backend}",
        )


def _set_variables(environment, backend: str) -> None:
    """Write the choice where MuJoCo and PyOpenGL look for it; the two must agree."""
    environment["MUJOCO_GL"] = backend
    if backend in BACKENDS:
        environment["PYOPENGL_PLATFORM"] = backend


def _cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "worldenv" / "renderer.json"


def _cache_key() -> str:
    """What a remembered answer depends on: this host, since its last start, this MuJoCo."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    started = boot.read_text().strip() if boot.exists() else "unknown"
    return f"{platform.node()} {started} {sys.executable} mujoco {metadata.version('mujoco')}"


def _read_cache() -> dict[str, str]:
    """Remembered answers, {wanted: backend}; empty when there are none or they are out of date."""
    try:
        stored = json.loads(_cache_file().read_text())
        return dict(stored["answers"]) if stored["key"] == _cache_key() else {}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, metadata.PackageNotFoundError):
        return {}  # the cache only saves a second; without it we simply try again


def _write_cache(answers: dict[str, str]) -> None:
    try:
        path = _cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps({"key": _cache_key(), "answers": answers}))
        partial.replace(path)  # atomic: several workers may write at once
    except (OSError, RuntimeError):
        pass  # e.g. a read-only home, or none: as above

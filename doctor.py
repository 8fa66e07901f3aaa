"""Say whether this machine can run World-Env, and what to do where it cannot.

    python doctor.py                     print the table
    python doctor.py --ensure-renderer   first install an off-screen renderer if none works

The exit code is 0 when everything needed is there and 2 otherwise. Only the standard library is
imported at the top: the doctor must also be able to speak when no package is installed yet.
"""

import argparse
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import render

REQUIREMENTS = Path(__file__).resolve().parent / "requirements.txt"
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)  # what requirements.txt is pinned for
GB = 1e9  # bytes
MIN_MEMORY_GB = 2.0  # available; a round lower bound, below which training is sure to be killed
MIN_DISK_GB = 1.0  # free where runs/ is written; a round lower bound too
# Linux's names for "multiplies matrices in bfloat16 in hardware", as `fit.bf16_autocast` asks
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    name: str
    found: str  # what is there, for a human
    ok: bool  # False: World-Env cannot be expected to run
    remedy: str = ""  # what to do about it; never empty when not ok


def diagnose() -> list[Check]:
    """Every check, in the order in which failures should be repaired."""
    return [
        check_python(),
        *check_packages(),
        check_renderer(),
        check_processor(),
        check_memory(),
        check_disk(),
        check_device(),
        check_bf16(),
    ]


def check_python() -> Check:
    """The version that runs this very command."""
    ok = OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON
    return Check(
        "Python",
        platform.python_version(),
        ok,
        "" if ok else "use Python 3.10 to 3.13, e.g. make clean-venv setup PYTHON=python3.11",
    )


def read_pins(requirements: Path = REQUIREMENTS, python: tuple = sys.version_info) -> dict:
    """{package: version} as pinned for this Python version.

    Understands what requirements.txt uses, `name==version ; python_version < "3.11"` with < or >=,
    and refuses anything else: a pin the doctor cannot read is a pin it cannot check.
    """
    pins = {}
    for line in requirements.read_text().splitlines():
        line = line.split("#")[0].strip()
        if not line:
            continue
        pin = re.fullmatch(
            r'([\w.-]+)==([\w.]+)(?:\s*;\s*python_version\s*(<|>=)\s*"3\.(\d+)")?', line
        )
        if pin is None:
            raise ValueError(f"{requirements.name}: cannot read the line {line!r}")
        name, version, sign, minor = pin.groups()
        below = sign is not None and tuple(python[:2]) < (3, int(minor))
        if sign is None or below == (sign == "<"):
            pins[name] = version
    return pins


def missing_pins() -> list[str]:
    """The pins of requirements.txt, name==version, whose package is not installed in any version.

    What a hosted notebook has to install: it brings its own torch and numpy, and other versions of
    what is already loaded would need a new kernel.
    """
    pins = read_pins()
    return [f"{name}=={wanted}" for name, wanted in pins.items() if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_packages() -> list[Check]:
    """One row per pinned package. Looks at the installed metadata; imports nothing."""
    checks = []
    for name, wanted in read_pins().items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "missing"
        ok = found.split("+")[0] == wanted  # the CPU build of torch calls itself 2.13.0+cpu
        remedy = "" if ok else f"make setup, or: python -m pip install {name}=={wanted}"
        checks.append(Check(name, found if ok else f"{found}, expected {wanted}", ok, remedy))
    return checks


def check_renderer() -> Check:
    """Really draw a frame, now, whatever an earlier run remembered."""
    try:
        backend = render.choose_backend(refresh=True)
    except render.NoRenderer as error:
        return Check("off-screen renderer", str(error), False, error.remedy)
    works, milliseconds, problem = render.probe(backend)
    found = f"{backend}, {milliseconds:.1f} ms a frame" if works else f"{backend}: {problem}"
    remedy = "" if works else "repair the graphics driver: its error is in this row"
    return Check("off-screen renderer", found, works, remedy)


def check_processor() -> Check:
    """The cores this process may use, which in a container is fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    found = f"{cores} usable"
    quota = read_first_line("/sys/fs/cgroup/cpu.max").split()  # "microseconds period" or "max ..."
    if len(quota) == 2 and quota[0] != "max":
        found += f", limited to {int(quota[0]) / int(quota[1]):.1f} by the container"
    return Check("CPU cores", found, True)


def check_memory() -> Check:
    """What is available now, not what is built in: other programs count."""
    try:
        import psutil
    except ImportError:
        return Check("memory", "unknown (psutil is missing)", False, "make setup")
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit = read_first_line("/sys/fs/cgroup/memory.max")  # bytes, or "max", or "" without cgroup v2
    if limit.isdigit() and int(limit) < total:
        used = int(read_first_line("/sys/fs/cgroup/memory.current") or 0)
        total, available = int(limit), min(available, int(limit) - used)
    ok = available >= MIN_MEMORY_GB * GB
    return Check(
        "memory",
        f"{available / GB:.1f} GB available of {total / GB:.1f} GB",
        ok,
        "" if ok else f"close other programs: {MIN_MEMORY_GB:g} GB have to be available",
    )


def check_disk() -> Check:
    """Space where the command is run: `runs/` is written below it."""
    free = shutil.disk_usage(".").free
    ok = free >= MIN_DISK_GB * GB
    return Check(
        "disk",
        f"{free / GB:.1f} GB free here",
        ok,
        "" if ok else f"free {MIN_DISK_GB:g} GB, e.g. delete old folders in runs/",
    )


def check_device() -> Check:
    """Where torch will compute. The processor alone is enough, so every answer is fine."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library does not load
        return Check("torch device", f"torch does not import: {error}", False, "make setup")
    if torch.cuda.is_available():
        return Check("torch device", f"cuda: {torch.cuda.get_device_name(0)}", True)
    if torch.backends.mps.is_available():
        return Check("torch device", "mps (Apple GPU)", True)
    return Check("torch device", f"cpu, {torch.get_num_threads()} threads", True)


def check_bf16() -> Check:
    """bfloat16 in hardware makes the simulator faster on a processor; without it all still runs.

    Read from the processor's own list: torch also says yes where it only emulates bfloat16.
    """
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # not Linux
        return Check("bf16 on the processor", "unknown on this system", True)
    flags = sorted(BF16_FLAGS & words)
    return Check("bf16 on the processor", ", ".join(flags) or "no (fp32 is used)", True)


def read_first_line(path: str) -> str:
    """The first line of a small system file, "" where the file does not exist."""
    try:
        return Path(path).read_text().split("\n")[0].strip()
    except OSError:
        return ""


def print_table(checks: list[Check]) -> None:
    """The rows as a table; as plain lines while rich is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for check in checks:
            mark = "ok " if check.ok else "NOT"
            print(f"{mark} {check.name:22} {check.found}")
            if check.remedy:
                print(f"    -> {check.remedy}")
        return
    table = Table("", "check", "found", "remedy", title="World-Env doctor")
    for check in checks:
        style = None if check.ok else "bold red"
        # Brackets in an error message are text, not rich's markup: Table cells get escaped.
        cells = ["ok" if check.ok else "NOT", check.name, check.found, check.remedy]
        table.add_row(*(cell.replace("[", r"\[") for cell in cells), style=style)
    Console().print(table)


def ensure_renderer() -> None:
    """If nothing draws, install OSMesa as root; the table then tells how it went."""
    if check_renderer().remedy != render.REMEDY:
        return  # it draws, or what is wrong is not a missing library
    line = render.install_osmesa()
    if line is not None:
        print(f"No off-screen renderer works. Run this once, then try again:\n{line}")


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description="Check that this machine can run World-Env.")
    parser.add_argument(
        "--ensure-renderer",
        action="store_true",
        help="if no off-screen renderer works, install OSMesa (as root) or print how to",
    )
    options = parser.parse_args(arguments)
    if options.ensure_renderer:
        ensure_renderer()
    checks = diagnose()
    print_table(checks)
    failures = [check for check in checks if not check.ok]
    if failures:
        print(
            f"{len(failures)} of {len(checks)} checks failed; repair the first one first: "
            f"{failures[0].name}: {failures[0].remedy}"
        )
    return 2 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

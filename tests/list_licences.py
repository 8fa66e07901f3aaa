"""Writes docs/licences.md: every package of constraints.txt with the licence that it declares.

    make licences        installs all that requirements*.txt list, then runs this file

pip-licenses reads what is installed, so everything must be: an optional package that is missing
would be missing from the list.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
# Licences that ask more than to keep the notice, and those that nobody has declared.
NOT_PERMISSIVE = re.compile(r"GPL|MPL|Mozilla|EPL|proprietary|UNKNOWN", re.IGNORECASE)
# What the declared licence does not say; of each it was looked up in the package itself.
NOTES = {
    "bddl": "declares nothing; the file LICENSE in it is MIT's; only for LIBERO",
    "bidict": "only for `play`",
    "certifi": "a list of certificates; its changes stay under the licence",
    "docutils": "public domain and BSD; the GPL is an Emacs mode's, which is not in the wheel; "
    "only for `play`",
    "easydict": "a module that LIBERO's code imports; only for LIBERO",
    "imageio-ffmpeg": "BSD itself, but its wheel brings a program, FFmpeg, built under the GPL "
    "(version 3); films are written by running that program",
    "opencv-python": "Apache itself, but its wheel brings libraries under the LGPL (FFmpeg, Qt); "
    "only for LIBERO",
    "orjson": "only for `play`",
    "pathspec": "only for mypy",
    "robosuite": "declares nothing; the file LICENSE in it is MIT's; only for LIBERO",
    "tqdm": "a progress bar that the model libraries import",
}
HEADER = """# Licences of the dependencies

Written by `make licences`, not by hand: every package of `constraints.txt` that a Python 3.11 on
Linux takes, with the licence that the package itself declares. World-Env contains none of them;
`make setup` fetches them.

On Linux the default build of torch also fetches NVIDIA's libraries for CUDA, which are under
NVIDIA's own, proprietary terms. The CPU build brings none. Pretrained models have licences of their
own.
"""


def names_in(*files: Path) -> set[str]:
    """Names of the packages that requirements files ask for in this Python, on this system."""
    lines = [line.split("#")[0].strip() for file in files for line in file.read_text().splitlines()]
    asked = [Requirement(line) for line in lines if line]
    return {canonicalize_name(r.name) for r in asked if r.marker is None or r.marker.evaluate()}


def requirement_files() -> list[Path]:
    """All that list direct dependencies; the oldest versions are the same packages again."""
    files = sorted(ROOT.glob("requirements*.txt"))
    return [path for path in files if path.name != "requirements-minimum.txt"]


def declared() -> dict[str, tuple[str, str, str]]:
    """{canonical name: (name, version, licence)} of everything installed, by pip-licenses."""
    command = [sys.executable, "-m", "piplicenses", "--from=mixed", "--with-system"]
    done = subprocess.run(
        [*command, "--format=json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return {
        # The CPU build of torch calls itself 2.13.0+cpu.
        canonicalize_name(p["Name"]): (p["Name"], p["Version"].split("+")[0], p["License"])
        for p in json.loads(done.stdout)
    }


def table(rows: list[tuple[str, ...]], *header: str) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def page(found: dict[str, tuple[str, str, str]], direct: set[str], wanted: set[str]) -> str:
    """The whole of docs/licences.md."""
    permissive = {name for name in wanted if not NOT_PERMISSIVE.search(found[name][2])}
    remarkable = sorted(wanted - permissive | (wanted & set(NOTES)))
    parts = [
        HEADER,
        "## Not permissive, or not plain from what is declared\n",
        table([(*found[n], NOTES.get(n, "")) for n in remarkable],
              "package", "version", "licence", "note"),
        "## Direct dependencies\n",
        table([found[n] for n in sorted(direct)], "package", "version", "licence"),
        "## What these need in turn\n",
        table([found[n] for n in sorted(wanted - direct)], "package", "version", "licence"),
    ]  # fmt: skip
    return "\n".join(parts)


def main() -> int:
    """Write the page; 2 where packages are missing."""
    found, direct = declared(), names_in(*requirement_files())
    wanted = names_in(ROOT / "constraints.txt")
    missing = sorted(wanted - set(found))
    if missing:
        print(f"error: not installed: {', '.join(missing)}; expected all; run: make licences")
        return 2
    (ROOT / "docs" / "licences.md").write_text(page(found, direct, wanted))
    return 0


if __name__ == "__main__":
    sys.exit(main())

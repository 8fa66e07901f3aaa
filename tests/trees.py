"""What the tests say of folders."""

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def tree(folder: Path) -> dict[str, str]:
    """Every path below a folder with a hash of its content: equal trees are byte-identical."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a shipped run there, as `make example` does it."""
    command = [sys.executable, str(ROOT / "unpack.py"), str(archive), "."]
    subprocess.run(command, check=True, cwd=folder)

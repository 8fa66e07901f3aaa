"""Unpack a shipped run: `python unpack.py shipped/example.tar.xz runs`.

What a stranger sends may hold a file `../../.bashrc`, or a link that leads there. Here only plain
files and folders below the given folder are written, and nothing at all where the archive has
anything else. Python's own way, tarfile's filter "data", came with 3.10.12 and 3.11.4; this asks
for no filter, so that it does the same on each Python. Owners, dates and permissions in the archive
are left aside.

The standard library alone, so that it runs before anything is installed. ship.py packs.
"""

from __future__ import annotations

import io
import lzma
import sys
import tarfile
from pathlib import Path

LARGEST = 2**28  # bytes, of all files together: a few kB of .xz can be a disk full of zeros
USAGE = "usage: python unpack.py ARCHIVE FOLDER"


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of a .tar.xz below `folder`.

    Everything is read and checked before anything is written: ValueError for an archive that is
    damaged, too large, or holds a link, a device, or a path that leads out of the folder, or where
    a file of another run is there already; OSError where it cannot be read or the folder cannot be
    written, and then what was begun is taken away again."""
    try:
        with lzma.open(archive) as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ValueError(
                f"{archive}: got more than {LARGEST / 2**20:g} MiB; expected a run small enough to "
                "be sent; do not trust this archive"
            )
        files, folders = _members(archive, data, folder.resolve())
    except (tarfile.TarError, lzma.LZMAError, EOFError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{archive}: {error}; expected a whole .tar.xz; fetch it once more"
        ) from error
    for path in files:
        if path.is_dir() or any(parent in files or parent.is_file() for parent in path.parents):
            raise ValueError(
                f"{archive}: {path} is a folder and a file; expected one of both; unpack it into "
                "another folder"
            )
    new = {path: content for path, content in files.items() if not path.exists()}
    for path, content in files.items():
        if path not in new and path.read_bytes() != content:
            raise ValueError(
                f"{path}: another run's is there; expected none, or the archive's own; unpack it "
                "into another folder, or move that run away"
            )
    try:
        for path in folders:
            path.mkdir(parents=True, exist_ok=True)
        for path, content in new.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            begun = path.with_name(f".{path.name}.part")  # whole or not at all under its own name
            begun.write_bytes(content)
            begun.replace(path)
    except BaseException:  # also Ctrl-C
        for path in new:
            path.with_name(f".{path.name}.part").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        raise


def _members(archive: Path, data: bytes, folder: Path) -> tuple[dict[Path, bytes], list[Path]]:
    """(content by path, folders) of a .tar that would lie in a folder without links in its path;
    ValueError where a member is none of both, or would lie elsewhere."""
    files, folders = {}, []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as opened:
        for member in opened:
            # Links that are in the folder already are followed; an absolute name replaces it.
            path = (folder / member.name).resolve()
            plain = member.isdir() or (member.isfile() and not member.issparse())
            if not plain or folder not in path.parents:
                raise ValueError(
                    f"{archive}: got the member {member.name!r}; expected only files and folders, "
                    "below the folder that it is unpacked into; do not trust this archive"
                )
            if member.isdir():
                folders.append(path)
            else:
                files[path] = opened.extractfile(member).read()  # type: ignore[union-attr]  # a file
    return files, folders


def main(words: list[str]) -> int:
    """The command; its exit code, 2 after one line that says what is wrong."""
    if len(words) != 2:
        print(USAGE, file=sys.stderr)
        return 2
    try:
        unpack(Path(words[0]), Path(words[1]))
    except FileNotFoundError as error:
        print(f"error: {error.filename}: not there; expected it; check the path", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command begins anew", file=sys.stderr)
        return 130
    except MemoryError:
        print("error: out of memory; expected some 300 MB; close other programs", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

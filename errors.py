"""What went wrong, in one line: for errors that the user can repair.

Nothing heavy is imported at the top: `python cli.py --help` loads this file.
"""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

from typer.exceptions import TyperException

import processes

HERE = Path(__file__).resolve().parent

# What goes wrong on a user's disk, as opposed to a mistake of ours. A file below a regular file is
# ENOTDIR, a full disk ENOSPC, a quota EDQUOT or EFBIG, one that fails or went away EIO, ESTALE.
DISK_ERRORS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC, errno.EFBIG, errno.EIO,
    getattr(errno, "EDQUOT", errno.ENOSPC), getattr(errno, "ESTALE", errno.EIO),
}  # fmt: skip
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


# How torch says it; numpy and Python raise MemoryError, the system ENOMEM.
NO_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "out of memory",
    "Cannot allocate memory",
    "could not create a primitive",  # oneDNN, which does torch's convolutions on a processor
)
LONGEST = 1000  # characters of a line: what was wrong may quote a file of any length


def explain(error: Exception) -> str | None:
    """The one line for an error that the user can repair; None for a mistake in the code."""
    if isinstance(error, TyperException):  # unknown command or option, a value of the wrong type
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "python cli.py"
        return f"{error.format_message().rstrip('.')}; see: {path} --help"
    if isinstance(error, ModuleNotFoundError):
        return f"{error}; expected the packages of requirements.txt; run: make setup"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{error.strerror}; expected room for some dozens; raise the limit: ulimit -n 1024"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        where = error.filename or "the disk"
        remedy = "free some space" if error.errno in FULL else "check the path and its permissions"
        return f"{where}: {error.strerror}; expected a place that can be read and written; {remedy}"
    if is_out_of_memory(error):
        detail = (str(error).strip().splitlines() or ["no more was given"])[0]
        return (
            f"out of memory ({shortened(detail, 200)}); expected room for this run; close other "
            f"programs or choose a smaller preset; {processes.AGAIN}"
        )
    ours = isinstance(error, (ValueError, RuntimeError, FloatingPointError))
    if ours and raised_on_purpose(error):
        lines = str(error).strip().splitlines()
        return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}; see WORLDENV_TRACEBACK=1"
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, numpy, torch or the system had no memory left to give."""
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or system or (told and not raised_on_purpose(error))


def shortened(line: str, most: int = LONGEST) -> str:
    """A line without its middle where it is too long: cause and remedy stand at its ends."""
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"


def raised_on_purpose(error: Exception) -> bool:
    """Whether a `raise` of this repository made the error, not a library or a slip like 1 / 0."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).resolve().parent == HERE and (last.line or "").startswith("raise ")

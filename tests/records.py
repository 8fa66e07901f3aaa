"""What the timing scripts leave in results/: figures with where they come from."""

import json
from pathlib import Path


def write_pairs(out: Path, command: str, what: str, pairs: list[dict], **about) -> None:
    """Pairs of timings, with their command, the commit, the machine and the versions."""
    from demos import write_atomically
    from evaluate import current_commit, hardware, versions

    record = {
        "command": command, "what": what, **about,
        "commit": current_commit(), "hardware": hardware(), "versions": versions(), "pairs": pairs,
    }  # fmt: skip
    write_atomically(out, json.dumps(record, indent=1).encode())

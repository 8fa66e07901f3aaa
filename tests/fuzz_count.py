"""How many spoiled inputs each reader takes: `python tests/fuzz_count.py CASES SEED READER...`, by
default 1000 of seed 0 for all.

Writes results/fuzz.json: for each reader the cases that passed (fuzzing.py says what that means),
how many of them were read and how many refused, the longest one in seconds and the most memory in
MiB, with its own command, seed, commit, hardware and versions. A case that fails ends it with its
traceback; nothing is written then. Readers that are named are counted anew, the others stay.
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for place in (ROOT, ROOT / "tests"):
    sys.path.insert(0, str(place))

import fuzzing  # noqa: E402 (needs the path)

OUT = ROOT / "results" / "fuzz.json"


def main(cases: int = 1000, seed: int = 0, *names: str) -> None:
    from demos import write_atomically
    from evaluate import current_commit, hardware, versions

    found = json.loads(OUT.read_text()) if OUT.is_file() else {"readers": {}}
    for name in names or fuzzing.READERS:
        if fuzzing.missing(name):
            raise SystemExit(f"error: {name}: {fuzzing.missing(name)}")
        with tempfile.TemporaryDirectory() as folder:
            counts = fuzzing.fuzz(name, cases, seed, Path(folder))
        passed = counts["read"] + counts["refused"]
        print(name, counts, flush=True)
        found["readers"][name] = {
            "cases": passed,
            **counts,
            "seed": seed,
            "command": f"python tests/fuzz_count.py {cases} {seed} {name}",
            "commit": current_commit(),
            "hardware": hardware(),
            "versions": versions(),
        }
        write_atomically(OUT, json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    numbers, names = [int(word) for word in sys.argv[1:3]], sys.argv[3:]
    main(*numbers, *names)

"""Where several processes of pytest share the tests (`make test`), each keeps to a core of its own,
and so does all that it starts: then nobody waits for a core that another one has."""

import os

NUMBER = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
if NUMBER:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(NUMBER) % len(cores)]})

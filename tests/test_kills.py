"""What `kills.py` counts: kills in the middle of the training, and only runs that had one."""

import json
import subprocess
import sys
import time

import kills
import numpy as np

import summary


def test_the_clock_starts_where_the_training_holds_its_folder(tmp_path):
    """Not while Python imports, nor while the settings are only read."""
    config = tmp_path / "config.json"
    config.write_text("{}")
    code = "import sys; input(); file = open(sys.argv[1], 'r+'); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(config)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert not kills.at_work(child.pid, tmp_path)
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "held\n"
        assert kills.at_work(child.pid, tmp_path) and not kills.at_work(child.pid, tmp_path / "no")
        child.communicate("\n")
    assert not kills.at_work(child.pid, tmp_path)


def test_what_was_hit_is_recorded(tmp_path, monkeypatch):
    """The first kill comes before any stage, the second in the middle of one, the third never."""
    lives = []

    def train(folder, life):
        lives.append(life)
        if len(lives) == 2:
            (folder / "resume").mkdir()
            (folder / "stages.json").write_text(json.dumps({"demos": {}, "sft": {}}))
            for name in ("explore-9", "explore-12"):
                (folder / "resume" / f"{name}.safetensors").touch()
                time.sleep(0.02)
        return len(lives) < 3, ""

    monkeypatch.setattr(kills, "train", train)
    found = kills.killed_run(tmp_path, np.random.default_rng(0), 10.0, 50)
    assert [kill["seconds"] for kill in found] == [round(life, 1) for life in lives[:2]]
    assert [kill["finished"] for kill in found] == [[], ["demos", "sft"]]
    assert [kill["newest_state"] for kill in found] == [None, "explore-12.safetensors"]
    monkeypatch.setattr(kills, "train", lambda folder, life: (life is not None, ""))
    assert len(kills.killed_run(tmp_path, np.random.default_rng(0), 10.0, 4)) == 4


def test_only_killed_runs_are_counted(tmp_path):
    """And the same command goes on with them; another begins anew; the summary reads both forms."""
    path, about = tmp_path / "kills.json", {"command": "a", "commit": "b", "hardware": "c"}
    result = kills.begun(path, about)
    kill = {"seconds": 1.0, "finished": [], "newest_state": None}
    kills.count(result, [kill, kill], [])
    kills.count(result, [], [])
    kills.count(result, [kill], ["pictures"])
    assert (result["begun"], result["runs"], result["runs_bit_equal"]) == (3, 2, 1)
    assert (result["kills"], result["bit_equal"]) == (3, 2)
    assert result["differences"] == [{"run": 3, "what": ["pictures"]}]
    path.write_text(json.dumps(result))
    assert kills.begun(path, about) == result
    assert kills.begun(path, about | {"commit": "d"})["begun"] == 0
    assert summary._counted(tmp_path)["kills_bit_equal"] == {"value": 2, "n": 3, **about}
    stored = json.loads((kills.ROOT / "results" / "kills.json").read_text())
    told = summary._counted(kills.ROOT / "results")["kills_bit_equal"]
    assert (told["value"], told["n"]) == (stored["bit_equal"], stored["kills"])

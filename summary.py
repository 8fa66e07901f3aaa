"""The summary of all committed runs, and the README's table that is made of it.

python cli.py summary RUN...   collects finished runs into results/runs/*.json
                               and writes results/summary.json
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from checkpoints import SPOILED, first_difference, from_values
from demos import parse_json, write_atomically
from evaluate import current_commit, mean_interval, real_episodes
from instructions import TASKS
from order import wall_seconds
from runs import BadRun, Run, RunConfig, config_to_json, preset
from tasks import METAWORLD

_BEGIN, _END = "<!-- results:begin -->", "<!-- results:end -->"  # of the README's table


@contextmanager
def reading_results(path: Path, remedy: str) -> Iterator[None]:
    """A file of results that is spoiled, or lacks what is asked of it, as BadRun."""
    try:
        yield
    except BadRun:
        raise
    except SPOILED as error:
        raise BadRun(
            f"{path}: not readable ({error!r:.200}); expected what this version writes; {remedy}"
        ) from error


def collect(run_folders: list[Path], results: Path) -> None:
    """Copy what finished runs measured (settings, stages; no weights, no films)
    to results/runs/<name>.json. BadRun, and nothing is written, where a run is not finished or not
    like the reported ones, or the results that are there already cannot be summed up with it."""
    commit = current_commit()
    new: dict[Path, dict] = {}
    for folder in run_folders:
        run = Run.open(folder)
        if "evaluate" not in run.stages:
            raise BadRun(f"{folder}: not finished (no evaluate stage); run train again")
        target = results / "runs" / f"{Path(folder).resolve().name}.json"
        settings = json.loads((run.folder / "config.json").read_text())
        there = _record(target) if target.is_file() else None
        if target in new or (there and there["config"] != settings):
            raise BadRun(f"{folder}: {target} is of another run; give the folder another name")
        if there and there["stages"] == run.stages:
            continue  # the same run is there already: its commit stays the one it was made with
        _check_alike(run, target, results)
        new[target] = {
            "command": _command(run),
            "commit": commit,
            "config": settings,
            "stages": run.stages,
            "ledger": run.ledger(),
        }
        with reading_results(folder / "stages.json", "train again with another --out"):
            _sums([new[target]])
    _sums_of_all(results)
    for target, record in new.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, json.dumps(record, indent=1).encode())


def _check_alike(run: Run, target: Path, results: Path) -> None:
    """BadRun where a run has other settings than the reported ones, or a seed of theirs."""
    config, base = run.config, _with_reported_networks(preset("cpu"), results)
    if not _in_the_means(asdict(config)):
        return
    loop = base.loop if config.rl_env == "dream" else config.loop
    free = {name: getattr(config, name) for name in ("seed", "rl_env", "test_starts", "real_loop")}
    usual = replace(base, loop=loop, **free)
    if config != usual:
        where = first_difference(*(json.loads(config_to_json(c)) for c in (config, usual)))
        raise BadRun(
            f"{run.folder}: not of the preset cpu ({where}); expected a run that differs in its "
            "seed, with the networks of the reported ones; others have an --out of their own, and "
            "runs of any kind stand side by side by: python cli.py report RUN1 RUN2"
        )
    for path in sorted((results / "runs").glob("*.json")):
        other = _record(path)["config"]
        same = (other["seed"], other["rl_env"]) == (config.seed, config.rl_env)
        if path != target and same and _in_the_means(other):
            raise BadRun(
                f"{run.folder}: its seed {config.seed} is among the reported runs ({path}); "
                "expected another seed, whose run is independent; train one, or delete that file"
            )


def _with_reported_networks(base: RunConfig, results: Path) -> RunConfig:
    """The preset with the networks that the reported runs have, which may be those of an earlier
    one: all are alike."""
    for path in sorted((results / "runs").glob("*.json")):
        settings = _record(path)["config"]
        if settings["rl_env"] == "dream" and _in_the_means(settings):
            with reading_results(path, "delete it"):
                parts = {
                    name: from_values(type(getattr(base, name)), settings[name])
                    for name in ("policy", "simulator", "reflector")
                }
                return replace(base, **parts)
    return base


def _in_the_means(config: dict) -> bool:
    """LIBERO's runs, and those with --plain, stand alone."""
    return bool(config["loop"]["branch"]) and set(config["tasks"]) <= set(TASKS)


def _record(path: Path) -> dict:
    """One of results/runs/*.json; BadRun where it cannot be summed up."""
    with reading_results(path, "delete it, and add its run again: python cli.py summary RUN"):
        record = parse_json(path.read_bytes())
        json.dumps(_sums([record]), allow_nan=False)
    return record


def _command(run: Run) -> str:
    config = run.config
    name = "cpu" if config.env.robot == METAWORLD else "libero"
    base = preset(name)
    words = [f"python cli.py train --demos {config.demos} --seed {config.seed}"]
    words += [f"--preset {name}"] if name != "cpu" else []
    words += [f"--tasks {','.join(config.tasks)}"] if config.tasks != base.tasks else []
    words += [f"--from {config.demonstrations}"] if config.demonstrations else []
    words += [f"--starts {config.test_starts}"] if config.test_starts != base.test_starts else []
    words += [f"--rounds {config.rounds}"] if config.rounds > 1 else []
    words += ["--env real"] if config.rl_env == "real" else []
    words += [f"--iterations {config.rl.iterations}"]
    words += ["--plain"] if config.rl.branch == 0 else []
    words += ["--stop-rule novelty"] if config.stop_rule == "novelty" else []
    return " ".join(words)


def summarize_runs(results: Path) -> dict:
    """results/runs/*.json, those of Meta-World -> results/summary.json: one flat object,
    every value with interval, n, command and commit. BadRun for a file that is spoiled."""
    summary = _sums_of_all(results)
    write_atomically(
        results / "summary.json", json.dumps(summary, indent=1, allow_nan=False).encode()
    )
    return summary


def _sums_of_all(results: Path) -> dict:
    """The content of summary.json, from what the other files hold."""
    records = [_record(path) for path in sorted((results / "runs").glob("*.json"))]
    return _sums(records) | _counted(results)


def _sums(records: list[dict]) -> dict[str, dict]:
    """The figures of runs, means over the seeds of each kind."""
    records = [r for r in records if _in_the_means(r["config"])]
    dream = [r for r in records if r["config"]["rl_env"] == "dream"]
    real = [r for r in records if r["config"]["rl_env"] == "real"]
    summary: dict[str, dict] = {}
    if dream or real:
        alike = _unique_seeds(real + dream)  # of a seed with both, the run in the dream
        _put(summary, "sft_success", alike, lambda r: _success(r, "sft", "oracle"))
        _put(summary, "sft_real_episodes", alike, lambda r: _real_episodes(r, "sft"))
    if real:
        _put(summary, "simulator_loop_real_episodes", real, _real_episodes)
        _put(summary, "simulator_loop_gain", real, lambda r: _gain(r, "oracle", "oracle"))
        _put(summary, "simulator_loop_success", real, lambda r: _success(r, "policy", "oracle"))
        _put_low(summary, "simulator_loop_gain")
    if dream:
        # Time and memory count only where the run had the whole machine to itself. A record of a
        # run that did not has "timed": false, set by hand, with a note that says why.
        timed = [r for r in dream if r.get("timed", True)]
        _put(summary, "train_minutes", timed, lambda r: wall_seconds(r["stages"]) / 60)
        _put(summary, "train_peak_gib", timed, lambda r: _over_stages(r, "peak_gib", max))
        for depth in ("1", "5", "last"):
            for kind in ("sim", "copy"):
                key = f"{kind}_psnr_{depth}"
                _put(summary, key, dream, partial(_of_simulator, key=key))
        for key, value in INSTRUMENTS.items():
            # Runs made before an instrument was built, or where it had nothing to measure, lack it.
            _put(summary, key, [r for r in dream if value(r) is not None], value)
        _put(summary, "dream_real_episodes", dream, _real_episodes)
        _put(summary, "dream_gain_oracle", dream, lambda r: _gain(r, "oracle", "oracle"))
        _put_low(summary, "dream_gain_oracle")
        # Without the oracle: SFT runs to the horizon and its end counts;
        # the post-trained policy has the reflector's stop.
        _put(summary, "dream_gain_no_oracle", dream, lambda r: _gain(r, "none", "reflector"))
        _put_low(summary, "dream_gain_no_oracle")
        for name in ("filtered_bc", "dream_bc"):
            _put_imitation(summary, [r for r in dream if name in r["stages"]], name)
        _put(summary, "sft_success_no_stop", dream, lambda r: _success(r, "sft", "none"))
        _put(
            summary, "sft_success_reflector_stop", dream, lambda r: _success(r, "sft", "reflector")
        )
        _put(summary, "dream_success", dream, lambda r: _success(r, "policy", "oracle"))
        numbers = [record["config"]["seed"] for record in dream]
        summary["seeds"] = summary["dream_success"] | {"value": numbers, "low": None, "high": None}
        _put(
            summary,
            "dream_success_reflector_stop",
            dream,
            lambda r: _success(r, "policy", "reflector"),
        )
    return summary


def _put_imitation(summary: dict, records: list[dict], name: str) -> None:
    """A policy on the way to the post-trained one, and what the rest of the way adds to it."""
    stopped = f"{name}_success_reflector_stop"
    _put(summary, f"{name}_success", records, lambda r: _success(r, name, "oracle"))
    _put(summary, stopped, records, lambda r: _success(r, name, "reflector"))
    _put(summary, f"{name}_real_episodes", records, lambda r: _real_episodes(r, name))
    gain = f"dream_gain_over_{name}"
    _put(summary, gain, records, lambda r: _gain(r, "oracle", "oracle", name))


def _counted(results: Path) -> dict[str, dict]:
    """What other commands measured and counted, each in a file of its own: no means over seeds."""
    summary: dict[str, dict] = {}
    for name, figures in (
        ("bench", _how_fast),
        ("kills", _kills),
        ("fuzz", _fuzz),
        ("compare/compare", _equal_rollouts),
    ):
        path = results / f"{name}.json"
        if path.is_file():
            with reading_results(path, "delete it, or make it again"):
                summary |= figures(parse_json(path.read_bytes()))
    return summary


ORIGIN = ("command", "commit", "hardware")


def _kills(kills: dict) -> dict[str, dict]:
    """The count of tests/kills.py."""
    told = {key: kills[key] for key in ORIGIN}
    return {"kills_bit_equal": {"value": kills["bit_equal"], "n": kills["kills"], **told}}


def _fuzz(fuzz: dict) -> dict[str, dict]:
    """The count of tests/fuzz_count.py over its readers, each of which may have been counted by
    itself."""
    readers = fuzz["readers"].values()
    told = {key: ", ".join(sorted({reader[key] for reader in readers})) for key in ORIGIN}
    cases = sum(reader["cases"] for reader in readers)
    return {"fuzz_cases": {"value": cases, "n": len(readers), **told}}


def _equal_rollouts(compared: dict) -> dict[str, dict]:
    """Of the comparison: LOOP in the real simulator with as many rollouts as the dream has had."""
    rows = [row for row in compared["rows"] if row["method"] == "real_equal_rollouts"]
    told, key = {name: compared[name] for name in ORIGIN}, "simulator_loop_equal_rollouts"
    # A comparison of runs of several commits says so by hand: "commits", by method.
    told["commit"] = compared.get("commits", {}).get("real_equal_rollouts", told["commit"])
    summary = {}
    for row in rows:
        success, spent = dict(row["oracle"]), {"low": None, "high": None, "n": row["oracle"]["n"]}
        summary[f"{key}_success"] = {"value": success.pop("mean"), **success, **told}
        summary[f"{key}_real_episodes"] = {"value": row["real_episodes"], **spent, **told}
    return summary


def _how_fast(bench: dict) -> dict[str, dict]:
    """The figures of `python cli.py bench`. Here n counts the turns of one run: the value is their
    median, low and high are the lowest and the highest."""
    origin = {name: bench[name] for name in ORIGIN}
    return {
        key: {name: figure[name] for name in ("value", "low", "high", "n")} | origin
        for key, figure in bench["figures"].items()
    }


def _agreement(record: dict, share: str) -> float | None:
    """What dream and reality say of the policy that was kept, at the test starts; None in runs of
    earlier versions."""
    found = record["stages"]["evaluate"].get("agreement")
    return found[share]["share"] if found else None


# What the instruments of a run in the dream measured: key of the summary, value or None.
INSTRUMENTS = {
    "hand_mm_last": lambda r: r["stages"]["simulator"].get("hand_mm_last"),
    "reflector_auroc": lambda r: r["stages"]["reflector"]["reflector_auroc"],
    "reflector_auroc_generated": lambda r: _generated(r, "reflector_auroc"),
    "ece_real": lambda r: r["stages"]["reflector"].get("ece"),
    "ece_generated": lambda r: _generated(r, "ece"),
    "false_stops": lambda r: r["stages"]["reflector"]["reflector_false_stops"],
    "false_stops_generated": lambda r: _generated(r, "reflector_false_stops"),
    "false_stops_test": lambda r: _played(r).get("false_stops"),
    "recall_at_success": lambda r: r["stages"]["reflector"]["recall_at_success"],
    "agreement": lambda r: _agreement(r, "agreement"),
    "hallucinated_success": lambda r: _agreement(r, "hallucinated"),
    "missed_success": lambda r: _agreement(r, "missed"),
    "agreement_of_yes": lambda r: _always_yes(r),
    "kappa": lambda r: (r["stages"]["evaluate"].get("agreement") or {}).get("kappa"),
}


def _always_yes(record: dict) -> float | None:
    """On what share of these starts a dream that always says "success" would agree: those that
    succeed in reality."""
    found = record["stages"]["evaluate"].get("agreement")
    return (found["table"]["both"] + found["table"]["missed"]) / found["n"] if found else None


def _played(record: dict) -> dict:
    """The post-trained policy's test episodes with the reflector's stop; {} without a reflector."""
    return record["stages"]["evaluate"]["results"]["policy"].get("reflector", {})


def _generated(record: dict, key: str) -> float | None:
    return record["stages"]["reflector"].get("generated", {}).get(key)


POLICY_ROWS = {  # label -> how its keys in summary.json begin
    "SFT, five demonstrations a task": "sft",
    "LOOP in the real simulator": "simulator_loop",
    "... with as many rollouts as in the dream": "simulator_loop_equal_rollouts",
    "filtered BC, with the exploration episodes that succeeded": "filtered_bc",
    "... and with dreams of them (dream BC)": "dream_bc",
    "... and LOOP in the dream": "dream",
}


def results_block(summary: dict) -> str:
    """The README's table, made from results/summary.json and nothing else."""

    def cell(key: str, scale: float = 100, digits: int = 1) -> str:
        if key not in summary:
            return "not measured"
        entry = summary[key]
        value = f"{scale * entry['value']:.{digits}f}"
        if entry["low"] is None:
            return f"{value} (n = {entry['n']})"
        low, high = scale * entry["low"], scale * entry["high"]
        return f"{value} ({low:.{digits}f} to {high:.{digits}f}, n = {entry['n']})"

    lines = [
        "| real success on test starts, % | stop: oracle | stop: reflector | no stop "
        "| real episodes it has cost |",
        "|---|---|---|---|---|",
    ]
    for label, key in POLICY_ROWS.items():
        stops = [cell(f"{key}_success"), "-", "-"]
        if not key.startswith("simulator_loop"):  # it has no reflector
            stops[1] = cell(f"{key}_success_reflector_stop")
        if key == "sft":  # the others are to be stopped
            stops[2] = cell("sft_success_no_stop")
        spent = summary.get(f"{key}_real_episodes")
        stops.append(f"{spent['value']:,.0f}" if spent else "not measured")
        lines.append(f"| {label} | " + " | ".join(stops) + " |")
    lines += ["", "| measured | value |", "|---|---|"]
    for label, key, scale, digits in (
        ("gain of LOOP in the real simulator over SFT, points", "simulator_loop_gain", 1, 1),
        ("gain of the whole method over SFT, oracle stop, points", "dream_gain_oracle", 1, 1),
        ("... over filtered BC: what the dream adds", "dream_gain_over_filtered_bc", 1, 1),
        ("... over dream BC: what LOOP in the dream adds", "dream_gain_over_dream_bc", 1, 1),
        (
            "gain of the whole method with its stop over SFT without a stop, points",
            "dream_gain_no_oracle",
            1,
            1,
        ),
        ("simulator, open-loop PSNR after 1 decision, dB", "sim_psnr_1", 1, 1),
        ("... repeating the start frame instead, dB", "copy_psnr_1", 1, 1),
        ("simulator, after 5 decisions, dB", "sim_psnr_5", 1, 1),
        ("... repeating the start frame instead, dB", "copy_psnr_5", 1, 1),
        ("simulator, at the last decision, dB", "sim_psnr_last", 1, 1),
        ("... repeating the start frame instead, dB", "copy_psnr_last", 1, 1),
        ("dreamt hand, off at the last decision, mm", "hand_mm_last", 1, 1),
        ("reflector, AUROC over held-out real frames", "reflector_auroc", 1, 3),
        ("... over dreamt frames of the same episodes", "reflector_auroc_generated", 1, 3),
        ("reflector, calibration error (ECE) on real frames", "ece_real", 1, 3),
        ("... on dreamt frames", "ece_generated", 1, 3),
        ("reflector, held-out noisy episodes with a false stop, %", "false_stops", 100, 1),
        ("... dreams of them, with one eta for all tasks, %", "false_stops_generated", 100, 1),
        ("... the policy's own test episodes, %", "false_stops_test", 100, 1),
        ("reflector, successes stopped in time, %", "recall_at_success", 100, 1),
        ("dream and reality agree on a start's outcome, % of starts", "agreement", 100, 1),
        ("... success hallucinated, % of starts", "hallucinated_success", 100, 1),
        ("... success missed, % of starts", "missed_success", 100, 1),
        ('... a dream that always says "success" would agree, %', "agreement_of_yes", 100, 1),
        ("... Cohen's kappa: 0 as often as by chance, 1 always", "kappa", 1, 2),
        ("`train --demos 5` on two cores with bfloat16, minutes", "train_minutes", 1, 1),
        ("... peak memory, GiB", "train_peak_gib", 1, 1),
    ):
        lines.append(f"| {label} | {cell(key, scale, digits)} |")
    lines += ["", "Mean over seeds, Student's 95 % interval, n seeds; `results/summary.json`."]
    lines += [
        "Of real episodes demonstrations and evaluation are not counted; means over a row's seeds."
    ]
    return "\n".join(lines)


def update_readme(summary: dict, readme: Path) -> None:
    """Put the table between the README's markers."""
    text = readme.read_text()
    before, rest = text.split(_BEGIN)
    _, after = rest.split(_END)
    block = f"{_BEGIN}\n{results_block(summary)}\n{_END}"
    write_atomically(readme, (before + block + after).encode())


def _of_simulator(record: dict, key: str) -> float:
    return record["stages"]["simulator"][key]


def _success(record: dict, policy: str, termination: str) -> float:
    return record["stages"]["evaluate"]["results"][policy][termination]["mean"]


def _real_episodes(record: dict, until: str = "evaluate") -> int:
    """What the ledgers of the stages up to `until` count, demonstrations and evaluation apart."""
    names = list(record["stages"])
    spent = [record["stages"][name]["ledger"] for name in names[: names.index(until) + 1]]
    return sum(map(real_episodes, spent))


def _over_stages(record: dict, key: str, reduce: Callable) -> float:
    return reduce(stage[key] for stage in record["stages"].values())


def _gain(record: dict, before: str, after: str, than: str = "sft") -> float:
    """Points: post-trained under `after` minus SFT (or another policy) under `before`."""
    return 100 * (_success(record, "policy", after) - _success(record, than, before))


def _unique_seeds(records: list[dict]) -> list[dict]:
    return list({r["config"]["seed"]: r for r in records}.values())


def _put_low(summary: dict, key: str) -> None:
    """The lower end of the interval of `key` as a figure of its own, KEY_low."""
    summary[f"{key}_low"] = summary[key] | {"value": summary[key]["low"]}


def _put(summary: dict, key: str, records: list[dict], value: Callable[[dict], float]) -> None:
    """Mean over runs with Student's 95 % interval; n is the number of runs (seeds). Nothing where
    there is no run."""
    if not records:
        return
    mean, low, high = mean_interval([value(r) for r in records])
    finite = [None if not math.isfinite(x) else round(x, 4) for x in (low, high)]
    summary[key] = {
        "value": round(mean, 4),
        "low": finite[0],
        "high": finite[1],
        "n": len(records),
        "command": "; ".join(sorted({r["command"] for r in records})),
        "commit": ", ".join(sorted({c for r in records for c in r["commit"].split(", ")})),
        "hardware": "; ".join(sorted({r["stages"]["evaluate"]["hardware"] for r in records})),
    }

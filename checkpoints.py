"""Checkpoints: the weights of a part and its settings in one safetensors file.

    policy.safetensors    tensors by name; in the header {"description": settings as JSON,
                          "sha256": checksum of both}

A file is written whole or not at all, and read only where its checksum fits and the settings in its
header are those that are expected. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

import processes
from demos import parse_json
from hub import BadCheckpoint
from policy import Policy, PolicyConfig
from resume import read_tensors, write_tensors

AGAIN = "delete it, take its stage out of stages.json, and train again"


# What it raises to work with a record that has something else in the place of what is expected.
SPOILED = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, StopIteration)


class BadRun(ValueError):
    """A run folder or checkpoint that cannot be used; the message is one line with the remedy."""


def save_part(path: Path, part: nn.Module, description: dict) -> None:
    """Write weights and description (settings, JSON) to one safetensors file, atomically. Of
    several processes all come here, and leave when the file is there: they may read it next."""
    state = {name: processes.whole(tensor) for name, tensor in part.state_dict().items()}
    if processes.is_main():
        write_tensors(path, state, json.dumps(used(description)))
    processes.wait()


def load_part(path: Path, part: nn.Module, description: dict) -> None:
    """Read weights into `part`; raises BadRun when the file is missing, damaged, of other settings,
    does not fit, holds numbers that are not finite, or is of another pretrained model."""
    check_settings(path, description)
    tensors, _ = read_part(path)
    try:
        part.load_state_dict(tensors)
    except RuntimeError as error:
        raise BadRun(f"{path}: weights do not fit the model; {AGAIN}") from error
    except BadCheckpoint as error:  # they were trained on another pretrained model
        raise BadRun(f"{path}: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise BadRun(f"{path}: {name} has numbers that are not finite; {AGAIN}")
    part.eval()


def read_part(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """(weights and buffers by name, description as text); BadRun where the file is damaged."""
    try:
        return read_tensors(path)
    except ValueError as error:  # what the disk refuses is no damage, and is told as it is
        raise _damaged(path, error) from error


def read_settings(path: Path):
    """The settings in a checkpoint's header, None where it has none; BadRun where the file is
    missing or damaged. No weight is read."""
    text = _header(path).get("description", "null")
    try:
        return parse_json(text)
    except ValueError as error:
        raise _damaged(path, error) from error


def same_parts(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold the same weights and settings, by the checksums in their
    headers. (Their files may differ: a header's words come in any order.)"""
    sums = [_header(path).get("sha256") for path in (first, second)]
    return sums[0] is not None and sums[0] == sums[1]


def _header(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise BadRun(f"{path}: no such checkpoint; train it first: python cli.py train")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> BadRun:
    return BadRun(f"{path}: damaged or truncated ({error}); {AGAIN}")


def check_settings(path: Path, description: dict) -> None:
    """BadRun where a checkpoint is not of these settings. To be asked before the part is built:
    settings that were spoiled may ask for any amount of memory."""
    saved, expected = read_settings(path), json.loads(json.dumps(used(description)))
    if saved != expected:
        raise BadRun(
            f"{path}: made with other settings than this run's "
            f"({first_difference(saved, expected)}); {AGAIN}"
        )


def used(description: dict) -> dict:
    """Without the settings of pretrained models where none is named, a robot's frame where it is
    the world's, and narrow convolutions where there are none: checkpoints that were made before
    there were any have none."""
    kept = {}
    for name, value in description.items():
        if (name, value) in (("frame", ""), ("narrow", False)):
            continue
        if name == "pretrained" and (value.get("checkpoint") == "" or not any(value.values())):
            continue
        kept[name] = used(value) if isinstance(value, dict) else value
    return kept


def export_policy(policy: Policy, folder: Path | str) -> None:
    """Write a policy with a pretrained backbone so that it needs nothing else: the model with its
    adapters merged in, in the hub's format, and the rest in policy.safetensors."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadRun(f"{folder}: not empty; expected a new folder; choose another or delete it")
    merged = policy.merged(folder)
    save_part(folder / "policy.safetensors", merged, asdict(merged.config))


def exported_policy(folder: Path | str) -> Policy:
    """The policy that `export_policy` wrote to `folder`, which may have been moved since."""
    path = Path(folder) / "policy.safetensors"
    if not path.is_file():
        raise BadRun(f"{path}: no such file; expected a folder that export_policy wrote")
    description = read_settings(path)
    try:
        config = from_values(PolicyConfig, description)
        config = replace(config, pretrained=replace(config.pretrained, checkpoint=str(folder)))
        _check_sizes(path, config)
    except (ValueError, TypeError, KeyError) as error:
        raise BadRun(
            f"{path}: not settings of a policy ({error}); expected a folder that export_policy "
            "wrote; write it again"
        ) from error
    policy = Policy(config)
    load_part(path, policy, description)
    return policy


def _check_sizes(path: Path, config: PolicyConfig) -> None:
    """ValueError or KeyError where an exported policy's settings ask for other sizes than its
    weights have: they would be built before the weights are looked at."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
    robot, tokens = config.robot, config.chunk * config.robot.action_dim
    there = [shapes["backbone.placeholders"][:1], shapes["mean_head.weight"], shapes["state_mean"]]
    asked = [[tokens], [robot.action_dim, config.hidden], [robot.state_dim]]
    if there != asked:
        raise ValueError(f"weights of {there}, settings of {shown(asked)}")


def first_difference(saved, expected) -> str:
    """Where two settings read from JSON are not the same: "name: name: saved 1, expected 2"."""
    if not isinstance(saved, dict) or not isinstance(expected, dict):
        return f"saved {shown(saved)}, expected {shown(expected)}"
    for name in expected:
        if saved.get(name) != expected[name]:
            return f"{name}: " + first_difference(saved.get(name), expected[name])
    return "unknown settings"


def from_values(kind, values: dict):
    """The dataclass `kind`, and those inside it, from what `asdict` made of it; ValueError for a
    setting that it does not have, and for a value of another type than the default's."""
    if not isinstance(values, dict):
        raise ValueError(f"{kind.__name__}: got {shown(values)}, expected settings by name")
    default = kind()
    names = {field.name for field in dataclasses.fields(kind)}
    built = {}
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"unknown setting {shown(name)}")
        usual = getattr(default, name)
        if dataclasses.is_dataclass(usual):
            built[name] = from_values(type(usual), value)
        elif isinstance(usual, tuple):
            several = isinstance(value, list) and all(same_type(v, usual[0]) for v in value)
            if not several:
                raise ValueError(f"{name}: got {shown(value)}, expected a list as {list(usual)}")
            built[name] = tuple(value)
        elif same_type(value, usual):
            built[name] = value
        else:
            raise ValueError(f"{name}: got {shown(value)}, expected a value as {usual!r}")
    return kind(**built)


def same_type(value, usual) -> bool:
    """Whether a value from JSON can stand where `usual` does: a whole number may be a float's."""
    if isinstance(usual, float):
        whole_or_not = isinstance(value, (int, float)) and not isinstance(value, bool)
        return whole_or_not and abs(value) <= sys.float_info.max  # no infinity, no NaN
    return type(value) is type(usual)


def shown(value) -> str:
    """A value as an error shows it: what was read may be of any length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."

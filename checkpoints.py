"""Checkpoints: the weights of a part and its settings in one safetensors file.

    policy.safetensors    tensors by name; in the header {"description": settings as JSON,
                          "sha256": checksum of both}

A file is written whole or not at all, and read only where its checksum fits and the settings in its
header are those that are expected. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

import processes
from policy import Policy, PolicyConfig
from resume import read_tensors, write_tensors


class BadRun(ValueError):
    """A run folder or checkpoint that cannot be used; the message is one line with the remedy."""


def save_part(path: Path, part: nn.Module, description: dict) -> None:
    """Write weights and description (settings, JSON) to one safetensors file, atomically."""
    state = {name: processes.whole(tensor) for name, tensor in part.state_dict().items()}
    if processes.is_main():
        write_tensors(path, state, json.dumps(used(description)))


def load_part(path: Path, part: nn.Module, description: dict) -> None:
    """Read weights into `part`; raises BadRun when the file is missing,
    damaged or of other settings."""
    if not path.is_file():
        raise BadRun(f"{path}: no such checkpoint; train it first: python cli.py train")
    try:
        tensors, text = read_tensors(path)
        saved = json.loads(text)
    except (ValueError, OSError) as error:
        raise BadRun(
            f"{path}: damaged or truncated ({error}); delete it and train again"
        ) from error
    expected = json.loads(json.dumps(used(description)))
    if saved != expected:
        raise BadRun(
            f"{path}: made with other settings than this run's "
            f"({first_difference(saved, expected)})"
        )
    try:
        part.load_state_dict(tensors)
    except RuntimeError as error:
        raise BadRun(f"{path}: weights do not fit the model; delete it and train again") from error
    part.eval()


def used(description: dict) -> dict:
    """Without the settings of pretrained models where none is named: checkpoints that were made
    before there were any have none."""
    kept = {}
    for name, value in description.items():
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
    from safetensors import safe_open

    path = Path(folder) / "policy.safetensors"
    if not path.is_file():
        raise BadRun(f"{path}: no such file; expected a folder that export_policy wrote")
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["description"])
    config = from_values(PolicyConfig, description)
    moved = replace(config.pretrained, checkpoint=str(folder))
    policy = Policy(replace(config, pretrained=moved))
    load_part(path, policy, description)
    return policy


def first_difference(saved, expected) -> str:
    """Where two settings read from JSON are not the same: "name: name: saved 1, expected 2"."""
    if not isinstance(saved, dict) or not isinstance(expected, dict):
        return f"saved {saved}, expected {expected}"
    for name in expected:
        if saved.get(name) != expected[name]:
            return f"{name}: " + first_difference(saved.get(name), expected[name])
    return "unknown settings"


def from_values(kind, values: dict):
    """The dataclass `kind`, and those inside it, from what `asdict` made of it; ValueError for a
    setting that it does not have."""
    parts = {f.name: type(getattr(kind(), f.name)) for f in dataclasses.fields(kind)}
    built = {}
    for name, value in values.items():
        if name not in parts:
            raise ValueError(f"unknown setting {name!r}")
        if dataclasses.is_dataclass(parts[name]):
            built[name] = from_values(parts[name], value)
        else:
            built[name] = tuple(value) if parts[name] is tuple else value
    return kind(**built)

"""Checkpoints in the hub's format: found, and judged before a weight is loaded.

A checkpoint is a folder (config.json, weights as safetensors, files of tokenizer and processor) or
a hub id, which is downloaded once into the hub's own cache: its *.json first, its weights only if
there is memory for them. Which weights there are, of which shapes, stands in the headers of the
safetensors; so a model can be built on torch's "meta" device, without numbers, and compared with
them in seconds (`headers`, `complain_of`).

Only safetensors are read, and no code that comes with a checkpoint. Whatever is wrong with one is
told in one line, a `BadCheckpoint`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
OVERHEAD = 1.2  # times the weights: adapters, their gradients, activations [estimate]
# What a model raises that is given what it was not made for; reading one raises more (`loading`).
LIBRARY_ERRORS = (OSError, ValueError, RuntimeError, TypeError, AttributeError, LookupError)


class BadCheckpoint(ValueError):
    """A pretrained model that cannot be used; one line: what, what was expected, what to do."""


# ---------------------------------------------------------------------------------------- finding


def find(
    checkpoint: str, files: list[str] = HUB_FILES, judge: Callable[[Path], None] | None = None
) -> Path:
    """The folder of a checkpoint; a hub id is downloaded first, unless that was done before. An id
    may name a branch, tag or commit, and go on into the repository: owner/name@revision/subfolder.
    files: patterns of what is downloaded.
    judge: is given the folder with its *.json, and may refuse it, before anything else is."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    if judge is not None:
        judge(_download(checkpoint, ["*.json"]))
    return _download(checkpoint, files)


def _download(checkpoint: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    repository, revision, inside = _parts(checkpoint)
    wanted = ["/".join([*inside, file]) for file in files]
    deeper = ["/".join([*inside, "*/*"])]
    try:
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=wanted, ignore_patterns=deeper
        )
    except Exception as error:  # what its HTTP library raises is a plain Exception
        raise BadCheckpoint(
            f"{checkpoint}: no such folder, and no access to it on the hub "
            f"({type(error).__name__}); expected a folder in the hub's format or the id of a model "
            "on the hub; check name, network and licence, or give the path of a copy"
        ) from error
    return Path(folder, *inside)


def _parts(checkpoint: str) -> tuple[str, str | None, list[str]]:
    """ "owner/name@v1/unet" -> ("owner/name", "v1", ["unet"]); None: the hub's newest. A revision
    may also be one of the hub's own, "refs/pr/1"."""
    names = checkpoint.split("/")
    repository, _, revision = "/".join(names[:2]).partition("@")
    inside = names[2:]
    if revision == "refs":
        revision, inside = "/".join(["refs", *inside[:2]]), inside[2:]
    return repository, revision or None, inside


# ----------------------------------------------------------------------------------------- memory


def check_room(what: str, needed: int, device: str = "cpu", say: bool = True) -> None:
    """Say how much memory `what` needs (bytes, an estimate) and how much there is: the GPU's where
    the device is one, else the machine's. BadCheckpoint if that is too little."""
    free, where = _free(device)
    told = f"{what}: needs about {needed / 2**30:.3g} GiB of {where} (estimate)"
    if needed > free:
        raise BadCheckpoint(
            f"{told}; expected that the {free / 2**30:.3g} available suffice; close other programs "
            "or choose a smaller model"
        )
    if say and os.environ.get("RANK", "0") == "0":  # of several processes the first
        print(f"{told}, {free / 2**30:.3g} are available", file=sys.stderr)


def _free(device: str) -> tuple[int, str]:
    """(bytes that are free, of what)."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0], "the GPU's memory"
    import psutil

    return psutil.virtual_memory().available, "memory"


def check_download(checkpoint: str, folder: Path, name: str, bf16: bool, device: str) -> None:
    """Refuse a model of the hub that cannot fit before its weights are downloaded.

    folder: has its *.json. name: see `weight_files`. What is stored in a width that config.json
    does not tell is taken as float32: rather too few numbers than too many, for when the weights
    are there `memory_needed` counts them."""
    stored = _stored_bytes(checkpoint, folder, name)
    settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    dtype = settings.get("dtype") or settings.get("torch_dtype")
    count = stored / (2 if dtype in ("float16", "bfloat16") else 4)
    check_room(checkpoint, round(OVERHEAD * count * (2 if bf16 else 4)), device, say=False)


def _stored_bytes(checkpoint: str, folder: Path, name: str) -> int:
    """Of the weights, told by their index, else by the hub; 0 where neither tells: the download
    that follows says why."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    index = folder / f"{name}.safetensors.index.json"
    if index.is_file():
        metadata = read_json(index).get("metadata")
        size = metadata.get("total_size", 0) if isinstance(metadata, dict) else 0
        return size if isinstance(size, int) else 0
    if (folder / f"{name}.safetensors").is_file():  # downloaded before
        return 0
    repository, revision, inside = _parts(checkpoint)
    try:
        file = "/".join([*inside, f"{name}.safetensors"])
        url = hf_hub_url(repository, file, revision=revision)
        return get_hf_file_metadata(url).size or 0
    except Exception:  # as in `_download`
        return 0


def memory_needed(files: list[Path], bf16: bool) -> int:
    """Bytes for the weights of these files in the width they are held in, times `OVERHEAD`; only
    the headers are read."""
    count = sum(math.prod(shape) for shape in shapes(files).values())
    return round(OVERHEAD * count * (2 if bf16 else 4))


# ----------------------------------------------------------------------------------- what is there


def weight_files(folder: Path, name: str = "model") -> list[Path]:
    """The safetensors of a checkpoint, in one file or listed in an index; all of them exist.
    name: "model" in the files of transformers, "diffusion_pytorch_model" in those of diffusers."""
    index = folder / f"{name}.safetensors.index.json"
    names = weight_map(index) if index.is_file() else []
    if any(Path(file).name != file for file in names):
        raise BadCheckpoint(
            f"{index}: names {', '.join(names)}; expected files of this folder; do not "
            "use this checkpoint"
        )
    files = [folder / file for file in names or [f"{name}.safetensors"]]
    for path in files:
        if not path.is_file():
            raise BadCheckpoint(
                f"{path}: missing; expected the weights as safetensors (pickled ones, *.bin, can "
                "run code and are not read); download them again, or convert them"
            )
    return files


def weight_map(index: Path) -> list:
    """The files that an index names, each once; BadCheckpoint where it is no index."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict):
        raise BadCheckpoint(
            f"{index}: no weight_map in it; expected the file of every weight; download it again"
        )
    return sorted(set(map(str, named.values())))


def shapes(files: list[Path]) -> dict[str, list[int]]:
    """{name: shape} of all weights of these files; only the headers are read."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, list[int]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise BadCheckpoint(
                f"{path}: damaged or cut short ({error}); expected safetensors; download it again"
            ) from error
    return found


def headers(files: list[Path]) -> dict[str, torch.Tensor]:
    """{name: tensor on the meta device} of all weights of these files: their shapes, no numbers."""
    found = shapes(files).items()
    return {name: torch.empty(shape, device="meta") for name, shape in found}


def complain_of(info: dict) -> None:
    """ValueError where the libraries' loading info tells of weights that are missing or of another
    shape: they would fill the gaps with random numbers."""
    for name in sorted(info["missing_keys"]):
        raise ValueError(f"no weights for {name}")
    for name, theirs, ours in sorted(info["mismatched_keys"]):
        raise ValueError(f"{name} is {tuple(theirs)} and not {tuple(ours)}")


def first_line(error: Exception) -> str:
    """Of what a library says, for our one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quietly() -> Iterator[None]:
    """Without the progress bars and reports of transformers: what is wrong is told in one line."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def loading(folder: Path, expected: str) -> Iterator[None]:
    """`quietly`; whatever a library raises for what lies in the folder is a BadCheckpoint. (Errors
    of a tokenizer or a configuration are plain Exceptions.)"""
    try:
        with quietly():
            yield
    except MemoryError:
        raise
    except Exception as error:
        raise BadCheckpoint(
            f"{folder}: cannot be used ({first_line(error)}); expected {expected}; download it "
            "again, or choose another"
        ) from error


def read_json(path: Path) -> dict:
    """The content of one of a checkpoint's files; BadCheckpoint if it is damaged."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(
            f"{path}: not readable ({error}); expected JSON; download it again"
        ) from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path}: no settings by name; expected JSON; download it again")
    return content

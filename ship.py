"""A finished run, small enough to be sent: one archive with what it takes to dream and to play.

    shipped/example.tar.xz
        example/config.json, stages.json     settings, and what each stage gave
        example/episodes/dataset.json        the camera; no episode
        example/checkpoints/*.safetensors    SFT, the post-trained policy, simulator, reflector
    shipped/example.md                       the card: what it is, and the run's report

Unpacked, it is a run folder for `imagine`, `play`, `evaluate` and `report`. `make example` unpacks
the one that comes with the project (unpack.py); `python cli.py ship` made it, of a run of the
preset example.

Weights are rounded to bfloat16: half of their size, and a third once they are packed, since their
exponents are much alike. Kinematics keeps its precision, for its errors add up from decision to
decision. So does the album, whose frames, with their still background, pack to little.
"""

from __future__ import annotations

import io
import lzma
import tarfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from checkpoints import BadRun, read_part, read_settings
from demos import write_atomically
from evaluate import current_commit
from report import report_text, what_is_missing
from resume import packed_tensors
from runs import Run, RunConfig, preset
from tasks import METAWORLD

ENDING = ".tar.xz"
PARTS = ("sft", "policy", "simulator", "reflector")
TEXTS = ("config.json", "stages.json", "episodes/dataset.json")
EXACT = ("kinematics.", "album.")  # parts of the simulator that are not rounded

CARD = """# {name}{ending}

A finished run of World-Env, {megabytes:.1f} MB, to look at before one has been trained:

```
python unpack.py {name}{ending} runs
python cli.py imagine runs/{name}
python cli.py play runs/{name}
```

In the project's folder, with the path of this archive for its name: the first line unpacks it
(`make example` does that with the project's own), the second shows a dream beside the real episode
of the same actions, the third the same in the browser.

- **What it is.** SFT, the post-trained policy, simulator and reflector, each trained in that run
  on episodes of {suite}. {origin}
- **What it is not.** A result: that is in the README, and is of more than this one seed. It cannot
  be trained further, for it comes without its episodes.
- **How it was made.** {made_by}, then
  `python cli.py ship runs/{name}`, commit {commit}. Settings are in its `config.json`.
- **Rounding.** Its weights are in bfloat16 (`ship.py`). What follows is the run's own report, from
  before; `python cli.py evaluate runs/{name}` measures what was shipped.

"""


def rounded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with matrices and convolutions in bfloat16; vectors, which are few numbers, the
    album and kinematics as they are."""
    return {
        name: tensor.bfloat16()
        if tensor.is_floating_point() and tensor.dim() > 1 and not name.startswith(EXACT)
        else tensor
        for name, tensor in tensors.items()
    }


def ship(run: Run, archive: Path) -> int:
    """Write the archive and its card, each whole or not at all; the archive's size in bytes.

    archive: a path that ends in .tar.xz; the run will be unpacked into a folder of that name.
    Raises BadRun where the run is not finished, a checkpoint is damaged, or another run's archive
    or card is there."""
    check_archive(archive, run)
    for name in PARTS:
        read_settings(run.checkpoint(name))
    if "evaluate" not in run.stages:
        raise BadRun(
            f"{run.folder}: not finished, so nobody knows what it is worth; expected a run that "
            "has been evaluated; give its train command again to go on"
        )
    files = {name: (run.folder / name).read_bytes() for name in TEXTS}
    for name in PARTS:
        path = run.checkpoint(name)
        tensors, text = read_part(path)
        files[f"checkpoints/{path.name}"] = packed_tensors(rounded(tensors), text)
    name = archive.name.removesuffix(ENDING)
    data = packed({f"{name}/{path}": content for path, content in files.items()})
    about = card(run, name, len(data))
    archive.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(archive, data)
    write_atomically(card_of(archive), about.encode())
    return len(data)


def check_archive(archive: Path, run: Run) -> None:
    """BadRun where a file is there that is not an archive of this run's settings."""
    if not archive.is_file():
        return
    own, name = (run.folder / "config.json").read_bytes(), archive.name.removesuffix(ENDING)
    try:
        with tarfile.open(archive, "r:xz") as opened:
            there = opened.extractfile(f"{name}/config.json")
            same = there is not None and there.read() == own
    except (tarfile.TarError, lzma.LZMAError, EOFError, KeyError):
        same = False
    if not same:
        raise BadRun(
            f"{archive}: not an archive of {run.folder}; expected none or that; choose another "
            "--out"
        )


def card_of(archive: Path) -> Path:
    """Where the card goes. BadRun where another text is there."""
    path = archive.with_name(f"{archive.name.removesuffix(ENDING)}.md")
    if path.is_file() and not path.read_bytes().startswith(f"# {archive.name}\n".encode()):
        raise BadRun(
            f"{path}: not the card of {archive}; expected none or that; choose another --out"
        )
    return path


def packed(files: dict[str, bytes]) -> bytes:
    """A .tar.xz of these files, whose owner and date are left at nothing."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz", preset=9) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def card(run: Run, name: str, size: int) -> str:
    """What an archive of `size` bytes holds, in words, and the run's report without pictures."""
    about = CARD.format(
        name=name,
        ending=ENDING,
        megabytes=size / 1e6,
        commit=current_commit(),
        suite="Meta-World" if run.config.env.robot == METAWORLD else "LIBERO",
        origin=origin(run.config),
        made_by=made_by(run.config, f"runs/{name}"),
    )
    with what_is_missing([run.folder]):
        return about + report_text(run, pictures=False)


def origin(config: RunConfig) -> str:
    """Where weights and episodes come from, and whose licences hold."""
    begun = [config.policy.pretrained.checkpoint, config.reflector.pretrained.checkpoint]
    begun += asdict(config.simulator.pretrained).values()
    models = ", ".join(f"`{name}`" for name in dict.fromkeys(begun) if name)
    given = config.demonstrations
    recorded = f"Its demonstrations are those of `{given}`" if given else "It recorded them itself"
    if models:
        return (
            f"{recorded}.\n  It stands on pretrained models, whose licences hold for it: {models}."
        )
    if given:
        return f"{recorded}.\n  Nothing in it comes from a pretrained model."
    own = "comes from a pretrained model. Licence: MIT, as the project's."
    return f"{recorded}, and nothing in it\n  {own}"


def made_by(config: RunConfig, folder: str) -> str:
    """The command that trains a run with these settings, where a preset has them."""
    for name in ("example", "cpu", "notebook", "debug", "libero", "gpu"):
        if replace(preset(name), seed=config.seed) == config:
            seed = f" --seed {config.seed}" if config.seed else ""
            return f"`python cli.py train --preset {name}{seed} --out {folder}`"
    return "`python cli.py train`"

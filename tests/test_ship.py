"""The run that comes with the project, shipped/example.tar.xz: small, whole, and no smear. And what
unpacks it: only below its folder, whatever the archive says."""

import io
import json
import lzma
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from trees import tree
from trees import unpack as unpack_by_command

import demos
import evaluate
import game
import report
import runs
import ship
import trust
import unpack

ROOT = Path(ship.__file__).resolve().parent
ARCHIVE, CARD = ROOT / "shipped" / "example.tar.xz", ROOT / "shipped" / "example.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> runs.Run:
    """Unpacked as `make example` does it."""
    folder = tmp_path_factory.mktemp("shipped")
    unpack_by_command(ARCHIVE, folder)
    return runs.Run.open(folder / "example")


def test_it_is_small():
    assert ARCHIVE.stat().st_size < 5e6


def test_it_holds_what_is_needed_and_names_no_place_outside():
    with tarfile.open(ARCHIVE) as archive:
        members = archive.getmembers()
    expected = {*ship.TEXTS, *(f"checkpoints/{name}.safetensors" for name in ship.PARTS)}
    assert {member.name for member in members} == {f"example/{name}" for name in expected}
    assert all(member.isfile() for member in members)


def test_it_was_made_with_the_preset(run):
    assert run.config == runs.preset("example")


def test_the_card_is_that_of_this_run(run):
    card = CARD.read_text()
    assert report.report_text(run, pictures=False) in card
    assert f"{ARCHIVE.stat().st_size / 1e6:.1f} MB" in card


def test_the_card_says_what_this_run_is(run):
    """Word for word the committed one's; of another run its own command, suite and models."""
    head = ship.card(run, "example", ARCHIVE.stat().st_size).split("# World-Env:")[0]
    commit = ship.current_commit()
    assert (
        head.replace(f"commit {commit}", "commit 1d7ed4b")
        == CARD.read_text().split("# World-Env:")[0]
    )
    other = replace(runs.preset("cpu"), seed=3)
    assert (
        ship.made_by(other, "runs/x") == "`python cli.py train --preset cpu --seed 3 --out runs/x`"
    )
    assert ship.made_by(replace(other, rounds=2), "runs/x") == "`python cli.py train`"
    parts = replace(other.simulator.pretrained, unet="owner/name/unet")
    begun = replace(other, simulator=replace(other.simulator, pretrained=parts))
    assert "`owner/name/unet`" in ship.origin(begun) and "MIT" not in ship.origin(begun)
    given = ship.origin(replace(other, demonstrations="data/mine"))
    assert "data/mine" in given and "MIT" not in given


def test_all_of_it_can_be_played_with(run):
    parts = game.load_parts(run)
    assert not parts.notes and set(parts.policies) == {"sft", "policy"}
    etas = [stage["etas"] for name, stage in run.stages.items() if name.startswith("calibrate")]
    assert set(etas[-1]) == set(run.config.tasks)


@pytest.mark.parametrize("task", runs.preset("example").tasks)
def test_its_dream_is_far_nearer_to_reality_than_the_first_frame(run, task):
    """Of the expert's actions, from a start that nothing was trained on."""
    simulator = run.simulator(demos.camera_of(run.episodes_folder))
    episode, dream, curves = report.real_and_dream(run, simulator, run.reflector(), None, task, 0)
    depths = range(1, len(episode) + 1)
    dreamt = np.mean([evaluate.psnr(episode.image[t], dream[t]) for t in depths])
    still = np.mean([evaluate.psnr(episode.image[t], episode.image[0]) for t in depths])
    assert dreamt > still + 6  # decibels: a quarter of the squared error
    assert np.isfinite(curves["dream"]).all()


def test_what_needs_its_episodes_says_so(run):
    with pytest.raises(runs.BadRun, match="has no episodes, as a run that was shipped"):
        trust.trust(run, 1, print)


def test_it_reports_itself(run):
    """`report` works without episodes and films."""
    page = report.write_report(run)
    assert "## Real success" in page.read_text()
    assert json.loads((run.folder / "stages.json").read_text()) == run.stages


# ---------------------------------------------------------------------------------------- unpacking


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    """A member without content."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def archive_of(path: Path, *members: tarfile.TarInfo) -> Path:
    """A healthy file, then these."""
    with tarfile.open(path, "w:xz") as archive:
        healthy = tarfile.TarInfo("run/config.json")
        healthy.size = 2
        archive.addfile(healthy, io.BytesIO(b"{}"))
        for info in members:
            archive.addfile(info)
    return path


@pytest.fixture(params=["with the filter", "without"])
def any_python(request, monkeypatch) -> None:
    """As on a Python that knows tarfile's filters, and as on one that does not."""
    if request.param == "without":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    elif not hasattr(tarfile, "data_filter"):
        pytest.skip("this Python does not know them")


HOSTILE = {
    "above": member("../outside"),
    "above, later": member("run/../../outside"),
    "absolute": member("ABSOLUTE/outside"),
    "the folder itself": member("."),
    "symbolic link": member("run/link", tarfile.SYMTYPE, "config.json"),
    "symbolic link outside": member("run/link", tarfile.SYMTYPE, "../../outside"),
    "hard link": member("run/link", tarfile.LNKTYPE, "run/config.json"),
    "device": member("run/device", tarfile.CHRTYPE),
    "pipe": member("run/pipe", tarfile.FIFOTYPE),
    "folder outside": member("../outside", tarfile.DIRTYPE),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_leads_outside_is_refused(kind, any_python, tmp_path, capsys):
    """In one line that names it, and not even the healthy file before it is written."""
    info = HOSTILE[kind].replace(name=HOSTILE[kind].name.replace("ABSOLUTE", str(tmp_path)))
    archive = archive_of(tmp_path / "hostile.tar.xz", info)
    before = tree(tmp_path)
    assert unpack.main([str(archive), str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and repr(info.name) in said
    assert tree(tmp_path) == before


def test_no_archive(any_python, tmp_path, capsys):
    assert unpack.main([str(tmp_path / "none.tar.xz"), str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {tmp_path / 'none.tar.xz'}: not there; expected it; check the path\n"
    assert tree(tmp_path) == {}


def test_a_link_that_is_there_already_leads_nowhere(any_python, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs" / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="run/config.json"):
        unpack.unpack(archive_of(tmp_path / "a.tar.xz"), tmp_path / "runs")
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_healthy_archive_is_unpacked_twice(any_python, tmp_path):
    """Over itself, and where the runs are, by a link, on another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    archive = archive_of(tmp_path / "a.tar.xz", member("run/empty", tarfile.DIRTYPE))
    for _ in range(2):
        assert unpack.main([str(archive), str(tmp_path / "runs")]) == 0
    assert set(tree(tmp_path / "disk")) == {"run", "run/config.json", "run/empty"}
    assert (tmp_path / "runs" / "run" / "config.json").read_text() == "{}"


def test_a_file_in_the_place_of_a_folder_is_refused(any_python, tmp_path):
    """Within the archive, and on the disk; before anything is written."""
    both = archive_of(tmp_path / "a.tar.xz", member("run/config.json/more"))
    with pytest.raises(ValueError, match="a folder and a file"):
        unpack.unpack(both, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "run" / "config.json").mkdir(parents=True)
    with pytest.raises(ValueError, match="a folder and a file"):
        unpack.unpack(archive_of(tmp_path / "a.tar.xz"), tmp_path / "runs")


def test_names_without_end_are_refused(any_python, tmp_path):
    """Thousands of headers that each say that the next is a long name."""
    header = member("././@LongLink", tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar.xz").write_bytes(lzma.compress(header * 5000))
    with pytest.raises(ValueError, match="expected a whole .tar.xz"):
        unpack.unpack(tmp_path / "a.tar.xz", tmp_path / "runs")


def test_a_damaged_archive_is_refused(tmp_path, monkeypatch):
    """Cut off anywhere, no archive at all, a byte changed, too much in it: nothing is written."""
    whole = ARCHIVE.read_bytes()
    spoiled = [
        b"",
        b"no archive",
        whole[:-100],
        whole[:1000],
        whole[:-2000] + bytes([whole[-2000] ^ 1]) + whole[-1999:],
        lzma.compress(b"no archive" * 100),
    ]
    archive, folder = tmp_path / "a.tar.xz", tmp_path / "runs"
    for data in spoiled:
        archive.write_bytes(data)
        with pytest.raises(ValueError, match="expected a whole .tar.xz"):
            unpack.unpack(archive, folder)
    archive.write_bytes(whole)
    monkeypatch.setattr(unpack, "LARGEST", 2**20)
    with pytest.raises(ValueError, match="got more than 1 MiB"):
        unpack.unpack(archive, folder)
    with pytest.raises(OSError):
        unpack.unpack(tmp_path / "missing.tar.xz", folder)
    assert set(tree(tmp_path)) == {"a.tar.xz"}


def test_another_run_of_the_same_name_is_left_alone(tmp_path):
    """Half of one and half of the other would be a run of nobody's."""
    archive = archive_of(tmp_path / "a.tar.xz")
    unpack.unpack(archive, tmp_path / "runs")
    path = next(p for p in (tmp_path / "runs").rglob("*") if p.is_file())
    path.write_text("mine")
    before = tree(tmp_path / "runs")
    with pytest.raises(ValueError, match="another run's is there; expected none"):
        unpack.unpack(archive, tmp_path / "runs")
    assert tree(tmp_path / "runs") == before


def test_a_full_disk_leaves_no_half_of_a_run(tmp_path, monkeypatch):
    archive = archive_of(tmp_path / "a.tar.xz")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unpack.Path, "write_bytes", full)
    assert unpack.main([str(archive), str(tmp_path / "runs")]) == 2
    assert not [p for p in (tmp_path / "runs").rglob("*") if p.is_file()]


def test_another_archive_is_not_replaced(run, tmp_path):
    """Its own may be; not the project's by another run's, nor any file."""
    out = tmp_path / "example.tar.xz"
    out.write_bytes(ARCHIVE.read_bytes())
    ship.check_archive(out, run)
    ship.check_archive(tmp_path / "new.tar.xz", run)
    other = runs.Run.create(tmp_path / "other", runs.preset("debug"))
    with pytest.raises(runs.BadRun, match="not an archive of .*other; expected none or that"):
        ship.check_archive(out, other)
    out.write_bytes(b"precious")
    with pytest.raises(runs.BadRun, match="not an archive of"):
        ship.check_archive(out, run)


def test_unpacking_needs_no_package_and_says_how(tmp_path):
    """-S leaves out all that pip has installed."""
    command = [sys.executable, "-S", str(ROOT / "unpack.py")]
    done = subprocess.run([*command, ARCHIVE, tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "example").is_dir()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"{unpack.USAGE}\n"

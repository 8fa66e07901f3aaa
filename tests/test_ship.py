"""The run that comes with the project, shipped/example.tar.xz: small, whole, and no smear."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from trees import unpack

import demos
import evaluate
import game
import report
import runs
import ship
import trust

ROOT = Path(ship.__file__).resolve().parent
ARCHIVE, CARD = ROOT / "shipped" / "example.tar.xz", ROOT / "shipped" / "example.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> runs.Run:
    """Unpacked as `make example` does it."""
    folder = tmp_path_factory.mktemp("shipped")
    unpack(ARCHIVE, folder)
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

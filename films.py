"""Films: dream beside reality, and which of them say the most.

A film is (T, H, W, 3) uint8. Of many pairs of episodes, played from the same starts in both worlds
(`gauge.play_both`), two say the most: one success that both show, and the worst lie.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import processes
from demos import Episode, write_film, write_png
from reflector import judge_episodes

WORST = 3  # disagreements of each kind in `worst_film`

# Colours of Okabe and Ito, which colour-blind readers tell apart.
HALLUCINATED, MISSED = (213, 94, 0), (0, 114, 178)  # frames of the film: vermillion, blue


def side_by_side(films: list[np.ndarray]) -> np.ndarray:
    """Films (T, H, W, 3) next to each other; shorter ones rest on their last frame."""
    length = max(len(film) for film in films)
    padded = [
        np.concatenate([film, film[-1:].repeat(length - len(film), axis=0)]) for film in films
    ]
    return np.concatenate(padded, axis=2)


def strip(films: list[np.ndarray], columns: int = 10, scale: int = 2) -> np.ndarray:
    """Films of equal length as a picture: a row each, `columns` frames from first to last."""
    picks = np.linspace(0, len(films[0]) - 1, columns).round().astype(int)
    rows = [np.concatenate(list(film[picks]), axis=1) for film in films]
    return np.concatenate(rows, axis=0).repeat(scale, axis=0).repeat(scale, axis=1)


def write_strips(folder: Path, episodes: list[Episode], dreams: list[Episode]) -> None:
    """One picture and film per episode, named after its task: the real one above (in the film
    left), below (right) the dream of the same actions."""
    if not processes.is_main():
        return
    for episode, dream in zip(episodes, dreams, strict=True):
        both, path = [episode.image, dream.image], folder / f"dream_{episode.task}"
        write_png(path.with_suffix(".png"), strip(both))
        write_film(path.with_suffix(".gif"), side_by_side(both), scale=2)


def _framed(film: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    framed = np.pad(film, ((0, 0), (2, 2), (2, 2), (0, 0)))
    framed[:, [0, 1, -2, -1]] = framed[:, :, [0, 1, -2, -1]] = colour
    return framed


def grid(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Films (T, H, W, 3) in rows and columns; shorter ones rest on their last frame."""
    # Turned on its side, a film of a row stands in a row itself.
    turned = [side_by_side(row).swapaxes(1, 2) for row in rows]
    return side_by_side(turned).swapaxes(1, 2)


def lies(
    reflector, pairs: list[tuple[Episode, Episode]]
) -> tuple[list[tuple[Episode, Episode]], list[tuple[Episode, Episode]]]:
    """Of pairs (real, dream): (hallucinated successes, missed ones), the worst first.

    A hallucinated success is the worse the higher R is in the dream, a missed one the lower
    max_t R_t is.
    """
    differ = [(r, d) for r, d in pairs if r.succeeded != d.succeeded]
    peaks = [float(curve.max()) for curve in judge_episodes(reflector, [d for _, d in differ])]
    ranked = [differ[i] for i in np.argsort(peaks, kind="stable")]
    missed = [(r, d) for r, d in ranked if r.succeeded]
    hallucinated = [(r, d) for r, d in reversed(ranked) if d.succeeded]
    return hallucinated, missed


def worst_film(reflector, pairs: list[tuple[Episode, Episode]]) -> np.ndarray | None:
    """The worst disagreements as a film (T+1, H', W', 3) uint8: real left, dream right, a pair per
    row; None where (real, dream) of all pairs agree.

    Above, framed in vermillion, hallucinated successes; below, framed in blue, missed ones. Up to
    WORST of each, the worst (`lies`) on top.
    """
    hallucinated, missed = lies(reflector, pairs)
    rows = [[_framed(e.image, HALLUCINATED) for e in pair] for pair in hallucinated[:WORST]]
    rows += [[_framed(e.image, MISSED) for e in pair] for pair in missed[:WORST]]
    return grid(rows) if rows else None


def telling_films(
    reflector, real: list[Episode], dreams: list[Episode]
) -> dict[str, tuple[str, np.ndarray]]:
    """{"success": (what it shows, film), "lie": ...}: real left, dream right.

    real, dreams: of the same starts, in the same order. success: the first start that succeeds in
    both; lie: the worst hallucinated success or, where there is none, the worst missed one. A key
    is left out where there is no such start.
    """
    pairs = list(zip(real, dreams, strict=True))
    both = [(r, d) for r, d in pairs if r.succeeded and d.succeeded]
    hallucinated, missed = lies(reflector, pairs)
    found = {}
    for name, candidates, what in (
        ("success", both, "success in both"),
        ("lie", hallucinated, "success in the dream only"),
        ("lie", missed, "success in reality only"),
    ):
        if candidates and name not in found:
            episode, dream = candidates[0]
            words = f"{episode.task}, start {episode.seed}: {what}"
            found[name] = (words, side_by_side([episode.image, dream.image]))
    return found


def write_telling(folder: Path, films: dict[str, tuple[str, np.ndarray]]) -> dict[str, str]:
    """film_success.gif and film_lie.gif of `telling_films`, by the main process; returns what they
    show."""
    if processes.is_main():
        for name in ("success", "lie"):  # those of an earlier round showed another policy
            (folder / f"film_{name}.gif").unlink(missing_ok=True)
        for name, (_, film) in films.items():
            write_film(folder / f"film_{name}.gif", film, scale=2)
    return {name: words for name, (words, _) in films.items()}

"""Scores made into probabilities, and how well scores tell good examples from bad ones."""

from __future__ import annotations

import numpy as np

BINS = 10  # of the calibration error


def platt(margins: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the logistic function that makes probabilities of margins, by Newton's method.

    Targets are drawn in from 0 and 1 as in Platt 1999, so that examples without an error give no infinite slope.
    """
    good, bad = float(labels.sum()), float((1 - labels).sum())
    targets = np.where(labels > 0, (good + 1) / (good + 2), 1 / (bad + 2))
    scale = float(np.abs(margins).mean()) or 1.0  # margins near 1 keep the matrix well conditioned
    design = np.stack([margins / scale, np.ones_like(margins)], axis=1)
    found = np.array([1.0, 0.0])

    def loss(at: np.ndarray) -> float:
        return float(np.sum(np.logaddexp(0, design @ at) - targets * (design @ at)))

    for _ in range(100):
        chance = 1 / (1 + np.exp(-np.clip(design @ found, -500, 500)))
        gradient = design.T @ (chance - targets)
        if np.abs(gradient).max() < 1e-10 * len(labels):
            break
        curvature = (design * (chance * (1 - chance))[:, None]).T @ design + 1e-10 * np.eye(2)
        step, size = np.linalg.solve(curvature, gradient), 1.0
        while loss(found - size * step) > loss(found) and size > 1e-6:
            size /= 2
        found = found - size * step
    return float(found[0]) / scale, float(found[1])


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a good example scores above a bad one, ties half: by ranks (Mann and Whitney 1947)."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    good = float(labels.sum())
    bad = len(labels) - good
    return float((ranks[labels > 0].sum() - good * (good + 1) / 2) / (good * bad))


def calibration_error(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance between score and share of good ones, over bins of equal width by their sizes (Naeini 2015)."""
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    parts = [bins == b for b in range(BINS) if (bins == b).any()]
    return float(sum(p.mean() * abs(scores[p].mean() - labels[p].mean()) for p in parts))


def deciles(scores: np.ndarray, labels: np.ndarray) -> list[dict[str, float]]:
    """Rows for a card: of each tenth of the scores, lowest first, its bounds and the share of good ones."""
    order = np.argsort(scores, kind="stable")
    tenths = [part for part in np.array_split(order, 10) if len(part)]
    return [
        {
            "from": round(float(scores[p].min()), 4),
            "to": round(float(scores[p].max()), 4),
            "examples": len(p),
            "good": round(float(labels[p].mean()), 4),
        }
        for p in tenths
    ]

"""Frequencies against exact probabilities."""

from __future__ import annotations

from torch import Tensor


def plackett_luce_probability(weights: Tensor, order: tuple[int, ...]) -> float:
    left, total = float(weights.sum()), 1.0
    for position in order:
        total *= float(weights[position]) / left
        left -= float(weights[position])
    return total


def chi_square(counts: Tensor, probabilities: Tensor) -> None:
    """Frequencies of all outcomes, each expected at least 5 times, within 5 standard deviations of the statistic."""
    expected = probabilities * counts.sum()
    assert abs(float(probabilities.sum()) - 1) < 1e-5
    assert expected.min() > 5, "every outcome must be expected a few times"
    degrees = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5, (counts, expected)

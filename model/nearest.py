"""The valid numbers nearest to a refused one, as the sentence that refuses it gives them."""

from __future__ import annotations

from collections.abc import Callable


def neighbours(value: int, fits: Callable[[int], bool], most: int) -> list[int]:
    """The nearest numbers from 1 to `most` that fit, below `value` and above it; those that there are."""
    below = next((n for n in range(min(value - 1, most), 0, -1) if fits(n)), None)
    above = next((n for n in range(max(value + 1, 1), most + 1) if fits(n)), None)
    return [n for n in (below, above) if n is not None]


def either(numbers: list[int]) -> str:
    """Numbers to choose from, in words."""
    return " or ".join(str(n) for n in numbers)

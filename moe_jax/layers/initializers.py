"""Initializers that several layers share."""

from collections.abc import Callable


def scaled(init: Callable, factor: float) -> Callable:
    """`init` with its draws, and so their standard deviation, times `factor`; 1: `init` itself, to the bit."""
    return init if factor == 1 else lambda key, shape, dtype: init(key, shape, dtype) * factor

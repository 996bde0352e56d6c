"""How a dropout probability becomes the threshold of 16 random bits, and what the branch is scaled by for it."""

DROP_LEVELS = 1 << 16
"""Dropout compares 16 random bits with a threshold: p is rounded to a multiple of 2**-16."""


def drop_threshold(dropout_p: float) -> int:
    """dropout_p in [0, 1] -> how many of the 2**16 levels are dropped."""
    return round(dropout_p * DROP_LEVELS)


def effective_scaling(scaling: float, threshold: int) -> float:
    """scaling / (1 - p) for the p that the threshold really gives; 0 when everything is dropped."""
    return scaling * DROP_LEVELS / (DROP_LEVELS - threshold) if threshold < DROP_LEVELS else 0.0

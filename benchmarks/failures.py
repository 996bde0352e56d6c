"""What a contender may raise without ending a run: its row says so instead."""

import torch

FAILURES: tuple[type[Exception], ...] = (
    RuntimeError,  # out of memory is one
    ValueError,
    # What a peer also raises where it does not fit the PyTorch, Triton or transformers that is here:
    AssertionError, AttributeError, ImportError, TypeError,
)  # fmt: skip

try:
    from triton.errors import TritonError

    FAILURES += (TritonError,)
except ImportError:
    pass


def because(error: Exception) -> str:
    """A row's status."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"error: {type(error).__name__}: {' '.join(str(error).split())[:160]}"

"""Which dtype sums are carried in."""

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of `dtype` are carried in: fp64 for fp64, fp32 for all else."""
    return torch.promote_types(dtype, torch.float32)

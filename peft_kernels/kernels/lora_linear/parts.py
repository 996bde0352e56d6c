"""The floor of every kernel of the LoRA linear on the GPUs that configurations are made for."""

import torch

from ..._core.parts import PARTS, Part, nearest_part

__all__ = ["PARTS", "Part", "floors", "nearest_part"]


def floors(M: int, N: int, K: int, R: int, dtype: torch.dtype, part: Part) -> dict[str, dict[str, float]]:
    """Per kernel: bytes that must move, FLOPs that must be done, and the seconds that neither can beat (a model)."""
    b = dtype.itemsize
    rate = part.flops_16bit if b == 2 else part.flops_fp32
    work = {
        "down": (b * (M * K + R * K + M * R), 2 * M * K * R),
        "gemm_forward": (b * (M * K + N * K + M * N + (M + N) * R), 2 * M * N * (K + R)),
        "bwd_dy": (b * (M * N + 2 * N * R + 2 * M * R), 4 * M * N * R),
        "bwd_da": (b * (M * K + M * R + R * K), 2 * M * K * R),
        "gemm_dx": (b * (M * K + N * K + M * N + (M + K) * R), 2 * M * K * (N + R)),
        "frozen": (2 * b * (M * K + N * K + M * N), 4 * M * N * K),
    }
    return {
        name: {"bytes": moved, "flops": flops, "seconds": max(moved / part.bandwidth, flops / rate)}
        for name, (moved, flops) in work.items()
    }

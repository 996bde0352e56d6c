"""The GPUs that configurations are made for, the floor of every kernel on them, and which tiles fit."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Part:
    """One GPU architecture. Rates are dense and attainable, not peak: see `source`."""

    arch: int | str
    name: str
    sms: int
    shared_bytes: int  # largest per block
    bandwidth: float  # bytes/s of device memory
    flops_16bit: float  # FLOP/s, bf16 and fp16 with fp32 accumulation
    flops_fp32: float  # FLOP/s outside the matrix units, what input_precision="ieee" runs at
    descriptors: bool  # the chip has TMA
    gemm_ratio: float  # assumed time of cuBLAS / time of our GEMM on one full wave of tiles
    source: str


_PEAK = "0.8 of the data sheet; gemm_ratio assumed"

PARTS: dict[int | str, Part] = {
    part.arch: part
    for part in (
        Part(80, "A100 SXM 80 GB", 108, 163840, 1.63e12, 2.50e14, 1.56e13, False, 0.92, _PEAK),
        Part(86, "RTX A6000", 84, 101376, 6.1e11, 1.24e14, 3.1e13, False, 0.92, _PEAK),
        Part(89, "RTX 4090", 128, 101376, 8.1e11, 1.32e14, 6.6e13, False, 0.92, _PEAK),
        Part(
            90, "H100 SXM", 132, 232448, 3.0e12, 7.9e14, 5.3e13, True, 0.96,
            "790 TFLOP/s and 3.0 TB/s measured; gemm_ratio from lorafusion #8 (+2.5 and +5.4 %)",
        ),
        Part(100, "B200", 148, 232448, 6.4e12, 1.8e15, 6.4e13, True, 0.85, _PEAK),
        Part(120, "RTX 5090", 170, 101376, 1.43e12, 1.68e14, 8.4e13, True, 0.92, _PEAK),
        Part("gfx942", "MI300X", 304, 65536, 4.2e12, 1.04e15, 1.3e14, False, 0.85, _PEAK),
    )
}  # fmt: skip


def nearest_part(arch: int | str) -> tuple[Part, str]:
    """The Part for `arch` and, where it is not in the table, a note that says which one stands in."""
    if arch in PARTS:
        return PARTS[arch], ""
    if isinstance(arch, str):
        return PARTS["gfx942"], f"no table for {arch!r}: that of gfx942 (MI300X)"
    known = sorted(key for key in PARTS if isinstance(key, int))
    below = [key for key in known if key <= arch] or known[:1]
    return PARTS[below[-1]], f"no table for compute capability {arch}: that of {below[-1]} ({PARTS[below[-1]].name})"


@dataclass(frozen=True)
class Tile:
    """How one kernel is launched.

    The GEMM walks block_k; the skinny passes own block_m rows by block_n columns and walk `span` elements of the
    long axis (columns for "down", rows for "bwd_dy" and "bwd_da").
    """

    block_m: int
    block_n: int
    block_k: int = 0  # GEMM only
    num_warps: int = 4
    num_stages: int = 3
    span: int = 0  # passes only
    group_m: int = 8  # GEMM only
    subtiles: int = 1  # GEMM only: 2 stores the tile in halves


KERNELS = ("gemm", "down", "bwd_dy", "bwd_da")
MAX_PASS_RANK = 128  # wider ranks are cut into blocks; the one-pass dy kernel is not used beyond it


def pass_rank_block(R: int) -> int:
    """Columns of the rank axis that a skinny pass holds at once: a power of two in [16, 128]."""
    return min(MAX_PASS_RANK, max(16, 1 << (R - 1).bit_length()))


def gemm_rank_block(R: int) -> int:
    """Rank columns per step of the K-extension: its tiles share the block's memory with the pipeline."""
    return min(64, pass_rank_block(R))


def shared_bytes(kernel: str, tile: Tile, R: int, itemsize: int, part: Part) -> int:
    """Shared memory the compiled kernel may take: an upper estimate, which test_aot.py holds against the compiler."""
    stages = max(1, tile.num_stages - 1) if isinstance(part.arch, str) else tile.num_stages
    barriers = 1024
    if kernel == "gemm":
        rank = gemm_rank_block(R)
        loop = stages * (tile.block_m + tile.block_n) * tile.block_k * itemsize
        low_rank = (tile.block_m + tile.block_n) * rank * itemsize
        store = tile.block_m * tile.block_n * itemsize // tile.subtiles
        # Persistent with descriptors: the pipeline's, the rank tile's and the store's buffers live side by side.
        if part.descriptors:
            return loop + tile.block_n * rank * itemsize + store + barriers
        return max(loop, low_rank, tile.block_m * tile.block_n * itemsize) + barriers
    rank = pass_rank_block(R)
    big = tile.block_m * tile.block_n * itemsize
    if kernel == "down":
        return stages * (big + tile.block_n * rank * itemsize) + barriers
    small = tile.block_m * rank * itemsize
    resident = tile.block_n * rank * itemsize if kernel == "bwd_dy" else 0
    return stages * (big + small) + resident + barriers


def problem(kernel: str, tile: Tile, R: int, itemsize: int, part: Part) -> str | None:
    """Why `tile` cannot run `kernel` at rank R on `part`; None when it can. Shared by the heuristic and by tuning."""
    blocks = [tile.block_m, tile.block_n] + ([tile.block_k] if kernel == "gemm" else [])
    if any(block < 16 or block & (block - 1) for block in blocks):
        return f"blocks {blocks} must be powers of two, 16 or more"
    if tile.num_warps not in (1, 2, 4, 8, 16) or tile.num_stages < 1:
        return f"num_warps {tile.num_warps} must be 1, 2, 4, 8 or 16 and num_stages {tile.num_stages} at least 1"
    if kernel != "gemm":
        step = tile.block_n if kernel == "down" else tile.block_m
        if tile.span < step or tile.span % step:
            return f"span {tile.span} must be a multiple of its step {step}"
    if kernel == "bwd_dy" and R > MAX_PASS_RANK:
        return f"rank {R} is over {MAX_PASS_RANK}: dy takes two passes"
    need = shared_bytes(kernel, tile, R, itemsize, part)
    if need > part.shared_bytes:
        return f"needs about {need} bytes of shared memory, {part.name} has {part.shared_bytes}"
    rank = pass_rank_block(R)
    outer = {"gemm": tile.block_n, "down": rank, "bwd_dy": rank, "bwd_da": rank}[kernel]
    accumulators = (tile.block_n if kernel in ("bwd_dy", "bwd_da") else tile.block_m) * outer
    lanes = 64 if isinstance(part.arch, str) else 32
    if accumulators // (lanes * tile.num_warps) > 128:
        return f"{accumulators} accumulators over {tile.num_warps} warps leave no registers"
    return None


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

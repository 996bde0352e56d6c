"""How the GPU's 4-bit linear runs a call: which path, its chunks, Triton's tiles, and the floors. Nothing was measured.

MOST_ROWS and the chunks are the CUDA kernels' too; tests hold csrc/nf4_linear/nf4_linear.cu to them.

Few rows, "rows": one kernel reads the packed weight once, decodes it in registers and multiplies, split along K so that
there are four programs for each SM; a second adds the parts in fp32. The floor is the packed weight, 9.4 MB at
N = K = 4096 and a blocksize of 64: 3.1 us at an H100's 3.0 TB/s. About 7 instructions a weight (read off the machine
code) let an SM decode 16 of them a clock, which is 4.7 us there: that, not the bandwidth, is this kernel's limit on
parts of much bandwidth. More rows than one tile's 64 would decode the weight again.

All else, "chunks": as many rows of the weight (for dx: columns) as CHUNK_BYTES hold are written out, and cuBLAS
multiplies by them while they are in the L2 cache of a large GPU; device memory then sees the packed weight alone. Each
chunk makes columns of the result of its own, so that every sum is one GEMM's: a single rounding, and the same workspace
for dx as for y. (Chunks of the weight's rows would be summed up for dx: an accumulator of fp32 [M, K], or a rounding
for each.) The floor is that of the product beside one read of the packed weight.

What chunks cost and save, on an H100 and a bf16 [14336, 4096], 117 MB in 5 chunks of 3072 rows, 25 MB, half of its L2:
117 MB less are written to memory and read again, 78 us of its time. The 8 launches more are 24 us of the CPU's, hidden
once the product of a chunk outlasts two, from about 190 rows on. And each product ends with a wave of tiles of its own,
which is seldom full: of 8192 rows in tiles of 128 x 256 3 % is lost, but of 1024 rows a chunk has 96 tiles for 132 SMs,
and where K is 14336, so that 1024 rows of the weight are a chunk, 32: unless cuBLAS splits K, half of the time of that
product and more is lost. Larger chunks would leave the L2, for all. What nothing else gives is the bound, 24 MiB (256
lines where those are more) for every layer and both ways: the whole of an output layer of 128,256 tokens has 1 GB.

`seconds` is the model that chooses: bytes over bandwidth, work over rate, 3 us a launch. By it "rows" wins on every
part up to M = 32; at 64 "chunks" does for some shapes on an RTX 5090, whose matrix units are slow beside its L2.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch

from ..._core.parts import Part, nearest_part

PATHS = ("rows", "chunks")
MOST_ROWS = 64
LEAST_GROUP = 32  # elements of a row that surely share a scale, for "rows"; a multiple of a 16-byte load besides
CHUNK_BYTES = 24 * 2**20  # of a dequantised weight at a time; half of an H100's L2
_CHUNK_LINES = 256  # rows or columns in a chunk: a multiple of it, which is a tile of cuBLAS
_LEAST_SPAN = 512  # elements of K in a part: four steps, as many as the copies that run ahead want at least
_PROGRAMS = 4  # for each SM: what 128 registers a thread allow
_DECODED = 16  # weights that an SM decodes in a clock
_CLOCK = 1.7e9  # assumed of every part
_LAUNCH_SECONDS = 3e-6  # assumed


@dataclass(frozen=True)
class Rows:
    """The launch plan of "rows": a program owns block_n rows of the weight and `span` elements of K."""

    block_m: int
    group: int  # neighbours in a row that share a scale
    span: int
    block_n: int = 64  # what Hopper's matrix unit takes as rows
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 3


def floor_bytes(M: int, N: int, K: int, blocksize: int, nested: bool, dtype: torch.dtype) -> int:
    """Bytes that nf4_linear_fwd or nf4_linear_bwd must move: the 4-bit weight once, x and y (or dy and dx) once."""
    blocks = -(-N * K // blocksize)
    scales = blocks + 4 * (-(-blocks // 256) + 257) if nested else 4 * blocks
    return -(-N * K // 2) + scales + dtype.itemsize * M * (N + K)


def seconds(M: int, N: int, K: int, blocksize: int, dtype: torch.dtype, part: Part) -> dict[str, float]:
    """The traffic model of both paths' forward; parts along K are written and read once, chunks at the L2's rate."""
    b, weights = dtype.itemsize, N * K
    flops = part.flops_16bit if b == 2 else part.flops_fp32
    read = floor_bytes(M, N, K, blocksize, False, dtype) / part.bandwidth
    padded = max(16, 1 << (M - 1).bit_length())
    parts = _parts(N, K, part)
    sums = 8 * parts * M * N / part.bandwidth + _LAUNCH_SECONDS if parts > 1 else 0.0
    decode = weights / (_DECODED * part.sms * _CLOCK)
    product = 2 * padded * weights / (0.5 * flops)  # mma.sync's share of the rate, and operands by way of shared memory
    chunks = ceil(weights * b / CHUNK_BYTES)
    through_l2 = 2 * weights * b / (2 * part.bandwidth)
    return {
        "rows": max(read, decode, product) + sums + _LAUNCH_SECONDS,
        "chunks": max(read + through_l2, 2 * M * weights / flops) + 2 * chunks * _LAUNCH_SECONDS,
    }


def _parts(N: int, K: int, part: Part) -> int:
    """Along K, for programs enough, but none of a part with less than _LEAST_SPAN."""
    return max(1, min(_PROGRAMS * part.sms // ceil(N / Rows.block_n), K // _LEAST_SPAN))


_forced: list[tuple[str | None, int | None]] = []


@contextmanager
def force(path: str | None = None, chunk_bytes: int | None = None) -> Iterator[None]:
    """Inside, Triton's forward goes by `path` wherever it can, and chunks, dx's too, are planned with `chunk_bytes`.
    None leaves what an outer `force` or the model says; not thread-safe. The C++ kernels have their own constants.

    Raises:
        ValueError: a path that is not of PATHS, chunks of less than a byte.
    """
    if path is not None and path not in PATHS:
        raise ValueError(f"force: path is {path!r}; expected one of {PATHS}")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"force: chunk_bytes is {chunk_bytes}; expected at least 1")
    outer = _forced[-1] if _forced else (None, None)
    _forced.append((outer[0] if path is None else path, outer[1] if chunk_bytes is None else chunk_bytes))
    try:
        yield
    finally:
        _forced.pop()


def pick_rows(M: int, N: int, K: int, blocksize: int, dtype: torch.dtype, arch: int | str) -> Rows | None:
    """The plan for a forward of x [M, K], weight [N, K] on `arch`, or None: then "chunks".

    fp32 is left to cuBLAS: without a matrix unit the product of 16 rows at least would take longer than the decoding.
    A K that is no multiple of 32 has rows that begin within a scale's block, or within a byte.
    """
    return _pick_rows(M, N, K, blocksize, dtype, arch, _forced[-1][0] if _forced else None)


@lru_cache(maxsize=4096)
def _pick_rows(M, N, K, blocksize, dtype, arch, path: str | None) -> Rows | None:
    if M > MOST_ROWS or dtype.itemsize != 2 or K % LEAST_GROUP:
        return None
    part, _ = nearest_part(arch)
    modelled = seconds(M, N, K, blocksize, dtype, part)
    if (path or min(PATHS, key=modelled.__getitem__)) == "chunks":
        return None
    block_m = max(16, 1 << (M - 1).bit_length())
    # With twice as much of K in a tile Triton 3.6 and 3.9 spill on a B200, and 3.9 these 32 rows on parts of consumers.
    block_k, stages = (64, 4) if part.arch == 100 or block_m == 32 else (128, 3)
    group = min(blocksize, K & -K, block_k)
    span = ceil(K / _parts(N, K, part) / block_k) * block_k
    return Rows(block_m, group, span, block_k=block_k, num_stages=stages)


def chunk_lines(lines: int, length: int, dtype: torch.dtype) -> int:
    """How many of `lines` rows (or columns) of `length` elements are written out at a time: equal chunks, or all."""
    most = (_forced[-1][1] if _forced else None) or CHUNK_BYTES
    chunks = -(-lines * length * dtype.itemsize // most)
    return min(lines, -(-lines // (chunks * _CHUNK_LINES)) * _CHUNK_LINES)


def chunk_columns(N: int, K: int, dtype: torch.dtype) -> int:
    """The same of the columns of a weight [N, K]: all where rows do not begin with a group of 8, as memory has them."""
    return chunk_lines(K, N, dtype) if K % 8 == 0 else K

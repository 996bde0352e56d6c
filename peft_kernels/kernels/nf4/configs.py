"""How quantising is cut into tiles, and the floors of quantising and dequantising.

Plans follow from the blocksize alone: no matrix unit takes part and hardly any shared memory, so that parts differ only
in their bandwidth. _shared/nf4.py has the tile of dequantising, which the linear layer uses too.

The floors are one read of what goes in and one write of what comes out: at 4096 x 4096 in bf16 and a blocksize of 64,
43.0 MB either way, 14.3 us at the 3.0 TB/s measured on an H100; with nested scales 42.2 MB to dequantise. Dequantising
takes about 13 instructions an element, and an H100 has time for 25 at that rate. Quantising takes about 48, half of
them the search for the code: what is done once per weight stays at half its floor there.
"""

import torch

_TILE = 4096  # elements: 16 for each thread of eight warps of 32, two 16-byte loads of 16-bit elements
_SCALES_TILE = 1024
NUM_WARPS = 8
SCALES_NUM_WARPS = 4


def blocks_per_program(blocksize: int) -> int:
    """Blocks of elements that a program of nf4_quantize takes."""
    return max(1, _TILE // blocksize)


def scale_blocks_per_program(nested_blocksize: int) -> int:
    """Blocks of scales that a program of nf4_quantize_scales takes."""
    return _SCALES_TILE // nested_blocksize


def _weight_bytes(numel: int, blocksize: int, nested: bool) -> int:
    """Bytes of a 4-bit weight: codes, scales, and what nested scales take besides."""
    blocks = -(-numel // blocksize)
    return -(-numel // 2) + (blocks + 4 * (-(-blocks // 256) + 256 + 1) if nested else 4 * blocks)


def quantize_floor_bytes(numel: int, blocksize: int, dtype: torch.dtype) -> int:
    """Bytes that nf4_quantize must move: the weight in, codes and scales out."""
    return numel * dtype.itemsize + _weight_bytes(numel, blocksize, False)


def scales_floor_bytes(blocks: int) -> int:
    """Bytes that nf4_quantize_scales must move: each scale once for the mean and once for its code."""
    return 8 * blocks + blocks + 4 * (-(-blocks // 256) + 256 + 1)


def dequantize_floor_bytes(numel: int, blocksize: int, nested: bool, dtype: torch.dtype) -> int:
    """Bytes that nf4_dequantize must move: codes and scales in, values out."""
    return _weight_bytes(numel, blocksize, nested) + numel * dtype.itemsize

"""What the 4-bit formats' bytes are worth and how they come about, once, in plain PyTorch on any device.

Quantising follows bitsandbytes' CUDA kernels bit for bit: an element is multiplied by the fp32 reciprocal of its
block's absmax and compared with fp32 thresholds, strictly. Its CPU code differs from those in the last, partial block
(it divides), at four thresholds, and in the 8-bit scales (a table of 65,536 bins). One rule is ours: an element that is
0 has the code of the value 0 in every block. CUDA's kernels give code 0 where 1 / absmax is infinite: -0 in a block of
zeros, but -absmax in one whose absmax is below 2^-128.
"""

from functools import cache

import torch
from torch import Tensor

from .nf4 import FP4_BOUNDS, FP4_CODES, LEVELS, NESTED_BLOCKSIZE, NF4_BOUNDS


def scales(absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None, nested_offset) -> Tensor:
    """fp32 [blocks]: absmax itself, or what double quantisation stored of it."""
    if nested_absmax is None:
        return absmax
    block = torch.arange(absmax.numel(), device=absmax.device) // NESTED_BLOCKSIZE
    return nested_code[absmax.int()] * nested_absmax[block] + nested_offset


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    numel: int,
    dtype: torch.dtype,
) -> Tensor:
    """[numel] in `dtype`: level * scale in fp32, rounded once."""
    scale = scales(absmax, nested_absmax, nested_code, nested_offset)
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten()[:numel]
    level = torch.tensor(LEVELS[quant_type], dtype=torch.float32, device=packed.device)
    block = torch.arange(numel, device=packed.device) // blocksize
    return (level[codes.int()] * scale[block]).to(dtype)


def _scaled(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Any shape -> fp32 [blocks, blocksize], filled up with zeros, times 1 / absmax, and absmax [blocks]."""
    flat = values.flatten().float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    return blocks * (1 / absmax).unsqueeze(1), absmax


def _nf4_codes(scaled: Tensor) -> Tensor:
    return torch.bucketize(scaled, torch.tensor(NF4_BOUNDS, device=scaled.device))


def _fp4_codes(scaled: Tensor) -> Tensor:
    size = torch.bucketize(scaled.abs(), torch.tensor(FP4_BOUNDS, device=scaled.device))
    return torch.tensor(FP4_CODES, device=scaled.device)[size] + 8 * (scaled < 0)


def encode(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Floating, any shape -> packed uint8 [ceil(numel / 2)], absmax fp32 [blocks].

    The absmax of a block that holds NaN or an infinity is NaN or infinite; its codes mean nothing.
    """
    scaled, absmax = _scaled(weight, blocksize)
    scaled = torch.where(scaled.isnan(), 0.0, scaled)
    codes = (_nf4_codes if quant_type == "nf4" else _fp4_codes)(scaled).to(torch.uint8).flatten()
    codes = codes[: weight.numel() + weight.numel() % 2]
    return codes[::2] << 4 | codes[1::2], absmax


@cache
def _nested_bounds(code: tuple[float, ...]) -> Tensor:
    """Thresholds between neighbours of a nested code: above bound i the code is above i.

    A value midway has the even code of the two, as bitsandbytes' search on CUDA has it: below an even code the bound is
    the last number before the midpoint.
    """
    low, high = torch.tensor(code[:-1]), torch.tensor(code[1:])
    middle = (high + low) * 0.5
    below = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
    return torch.where(torch.arange(middle.numel()) % 2 == 0, middle, below)


def encode_scales(absmax: Tensor, code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 [blocks], the nested code fp32 [256] -> uint8 [blocks], nested_absmax fp32 [ceil(blocks / 256)], offset [1].

    The offset is PyTorch's mean of absmax, as in bitsandbytes, whose last bit depends on the device.
    """
    offset = absmax.mean()
    scaled, nested_absmax = _scaled(absmax - offset, NESTED_BLOCKSIZE)
    codes = torch.bucketize(scaled, _nested_bounds(tuple(code.tolist())).to(scaled.device))
    # A block of equal scales is all zeros: 0 / 0 has code 0, which times their absmax of 0 is 0.
    codes = torch.where(scaled.isnan(), 0, codes)
    return codes.flatten()[: absmax.numel()].to(torch.uint8), nested_absmax, offset.view(1)

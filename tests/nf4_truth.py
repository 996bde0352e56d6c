"""What quantising to 4 bits and back must give, bit for bit.

Worked out in fp64, from which products, quotients and sums of fp32 numbers round to fp32 as if once.
"""

import torch
from torch import Tensor

from peft_kernels.formats.nf4 import FP4_BOUNDS, FP4_CODES, LEVELS, NF4_BOUNDS, nested_code

CODE = nested_code()


def same_bits(found: Tensor, expected: Tensor, what: str) -> None:
    """Equal in dtype, shape and every bit, but for the bits of a NaN."""
    assert found.dtype == expected.dtype and found.shape == expected.shape, f"{what}: {found.dtype} {found.shape}"
    found, expected = found.cpu(), expected.cpu()
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.itemsize]
    differs = found.view(as_bits) != expected.view(as_bits)
    if found.is_floating_point():
        differs &= ~(found.isnan() & expected.isnan())
    if differs.any():
        i = int(differs.nonzero()[0])
        n = int(differs.sum())
        raise AssertionError(f"{what}: {n} differ, the first at {i}: {found[i].item()!r}, not {expected[i].item()!r}")


def in_blocks(values: Tensor, blocksize: int) -> Tensor:
    flat = values.flatten()
    return torch.cat([flat, flat.new_zeros(-len(flat) % blocksize)]).view(-1, blocksize)


def _scaled(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """fp32 [blocks, blocksize] and absmax."""
    blocks = in_blocks(values.cpu().double(), blocksize)
    absmax = blocks.abs().max(1).values
    return (blocks * (1 / absmax).float().double().unsqueeze(1)).float(), absmax.float()


def true_bytes(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    scaled, absmax = _scaled(weight.contiguous(), blocksize)
    scaled = scaled.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    code = torch.zeros(scaled.shape, dtype=torch.int32)
    if quant_type == "nf4":
        for bound in NF4_BOUNDS:
            code += scaled > torch.tensor(bound)
    else:
        for bound in FP4_BOUNDS:
            code += scaled.abs() > torch.tensor(bound)
        code = torch.tensor(FP4_CODES, dtype=torch.int32)[code.long()] + 8 * (scaled < 0)
    pairs = code.flatten()[: weight.numel() + weight.numel() % 2].view(-1, 2)
    return (16 * pairs[:, 0] + pairs[:, 1]).to(torch.uint8), absmax


def true_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A value on the middle of two codes has the even one; the offset is PyTorch's own mean."""
    offset = absmax.mean()
    scaled, nested = _scaled((absmax.cpu().double() - offset.cpu().double()).float(), 256)
    middles = (CODE[1:] + CODE[:-1]) * 0.5
    code = torch.zeros(scaled.shape, dtype=torch.int32)
    for i, middle in enumerate(middles):
        code += (scaled >= middle) if i % 2 else (scaled > middle)
    # A block of equal scales is 0 / 0, which is above nothing: code 0, which times its absmax of 0 is 0.
    return code.flatten()[: absmax.numel()].to(torch.uint8), nested, offset.view(1)


def true_values(tensors: tuple, quant_type: str, blocksize: int, numel: int, dtype: torch.dtype) -> Tensor:
    packed, absmax, nested_absmax, code, offset = (None if one is None else one.cpu() for one in tensors)
    scale = absmax
    if nested_absmax is not None:
        block = torch.arange(absmax.numel()) // 256
        product = (code.double()[absmax.long()] * nested_absmax.double()[block]).float()
        scale = (product.double() + offset.double()).float()
    codes = torch.stack([packed // 16, packed % 16], 1).flatten()[:numel].long()
    level = torch.tensor(LEVELS[quant_type], dtype=torch.float32)
    values = level.double()[codes] * scale.double().repeat_interleave(blocksize)[:numel]
    return values.float().to(dtype)

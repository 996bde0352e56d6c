"""The checks of the 4-bit formats' ops, each a function of an implementation: tests and planted faults run the same."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import LAYOUTS, lay_out
from nf4_truth import CODE, in_blocks, same_bits, true_bytes, true_scales, true_values
from torch import Tensor

from peft_kernels.formats.nf4 import FP4_BOUNDS, LEVELS, NF4_BOUNDS
from peft_kernels.kernels.nf4 import op, reference

IN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUT_DTYPES = (*IN_DTYPES, torch.float64)
TYPES = ("nf4", "fp4")
SIZES = (1, 2, 3, 31, 32, 33, 63, 65, 100, 129, 4097, 70_001)
"""Odd counts, less than a group of 32, a block and one element more or less, several chunks of work."""


@dataclass(frozen=True)
class Ops:
    """One implementation of the three ops."""

    quantize: Callable[..., tuple[Tensor, Tensor]]
    quantize_scales: Callable[..., tuple[Tensor, Tensor, Tensor]]
    dequantize: Callable[..., Tensor]


REFERENCE = Ops(reference.nf4_quantize, reference.nf4_quantize_scales, reference.nf4_dequantize)
OP = Ops(op.nf4_quantize, op.nf4_quantize_scales, op.nf4_dequantize)


def weights(numel: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(numel + seed)
    return torch.randn(numel, generator=generator).to(dtype).to(device)


def check_quantized(ops: Ops, weight: Tensor, quant_type: str, blocksize: int) -> None:
    what = f"{quant_type} {blocksize} {weight.dtype} {list(weight.shape)}"
    for name, found, expected in zip(
        ("packed", "absmax"),
        ops.quantize(weight, quant_type, blocksize),
        true_bytes(weight, quant_type, blocksize),
        strict=True,
    ):
        same_bits(found, expected, f"{name} of {what}")


def check_quantize_sizes(ops: Ops, dtype: torch.dtype, device: str) -> None:
    for quant_type in TYPES:
        for blocksize in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            for numel in SIZES:
                check_quantized(ops, weights(numel, dtype, device), quant_type, blocksize)


def check_quantize_layouts(ops: Ops, dtype: torch.dtype, device: str) -> None:
    for layout in LAYOUTS:
        check_quantized(ops, lay_out(weights(37 * 53, dtype, device).view(37, 53), layout), "nf4", 64)
    check_quantized(ops, weights(600, dtype, device).view(4, 5, 30).transpose(0, 2), "fp4", 32)
    check_quantized(ops, weights(40, dtype, device).expand(70, 40), "nf4", 32)


def check_every_16_bit_number(ops: Ops, dtype: torch.dtype, device: str) -> None:
    """All that 16 bits hold from -1 to 1, and the bounds with their neighbours, in blocks of an absmax of 1 and 3."""
    if dtype == torch.float32:
        bounds = torch.tensor([*NF4_BOUNDS, *FP4_BOUNDS, *(-bound for bound in FP4_BOUNDS)])
        near = torch.cat([bounds.view(torch.int32) + step for step in range(-3, 4)]).view(torch.float32)
        every = torch.cat([near, (bounds * 3 / 3).nextafter(torch.tensor(9.0)), torch.tensor([0.0, -0.0])])
    else:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[every.abs() <= 1]
    for top in (1.0, 3.0, -1.0):
        blocks = every[: len(every) // 31 * 31].view(-1, 31).float() * abs(top)
        blocks = torch.cat([blocks, torch.full((len(blocks), 1), top)], 1).to(dtype).to(device)
        for quant_type in TYPES:
            check_quantized(ops, blocks, quant_type, 32)


def check_quantize_extremes(ops: Ops, dtype: torch.dtype, device: str) -> None:
    """Zeros of both signs, the smallest and the largest numbers, and blocks of them; also in the last, part block."""
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps
    rows = [[0.0], [-0.0], [0.0, -0.0], [tiny, -tiny, 0.0], [info.smallest_normal, tiny, -tiny], [info.max, info.min]]
    rows += [[info.max, 1.0, tiny, -0.0], [2.0**-127, -(2.0**-128), 0.0], [2.0**-128, 2.0**-129, -0.0]]
    rows += [[info.max * scale, -info.max * scale / 3] for scale in (0.25, 0.125)]
    blocks = [torch.tensor((row * 32)[:32], dtype=torch.float64) for row in rows]
    for end in blocks:
        weight = torch.cat([*blocks, weights(32, torch.float64, "cpu"), end[:7]]).to(dtype).to(device)
        for quant_type in TYPES:
            check_quantized(ops, weight, quant_type, 32)


def check_not_finite(ops: Ops, dtype: torch.dtype, device: str) -> None:
    """The absmax of a block with NaN is NaN, with an infinity infinite; the other blocks are as they were."""
    for blocksize in (32, 256):
        clean = weights(5 * blocksize + 9, dtype, device)
        for value in (torch.nan, -torch.nan, torch.inf, -torch.inf):
            for place in (0, blocksize // 3, blocksize - 1):
                weight = clean.clone()
                weight[2 * blocksize + place] = value
                weight[5 * blocksize + 8] = value
                packed, absmax = ops.quantize(weight, "nf4", blocksize)
                expected_bytes, expected = ops.quantize(clean, "nf4", blocksize)
                expected[2], expected[5] = abs(value), abs(value)
                same_bits(absmax, expected, f"absmax with {value} at {place}")
                half = blocksize // 2
                for i in (0, 1, 3, 4):
                    same_bits(packed[i * half : (i + 1) * half], expected_bytes[i * half : (i + 1) * half], "packed")


def scales_like(blocks: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(blocks)
    return (torch.rand(blocks, generator=generator) * 0.05 + 0.01).to(device)


def check_scales(ops: Ops, dtype: torch.dtype, device: str) -> None:
    """Sizes around a block of 256, equal scales, zeros, outliers, the smallest numbers."""
    cases = [scales_like(n, device) for n in (1, 2, 255, 256, 257, 1000, 70_001)]
    cases += [torch.full((300,), value, device=device) for value in (0.0, 0.1, 1e-40, 3e38)]
    spread = scales_like(600, device)
    spread[5], spread[300], spread[301] = 900.0, 1e-42, 0.0
    for absmax in (*cases, spread, spread * 1e-38, spread.flip(0)[:513]):
        for name, found, expected in zip(
            ("codes", "nested_absmax", "nested_offset"),
            ops.quantize_scales(absmax, CODE.to(device)),
            true_scales(absmax),
            strict=True,
        ):
            same_bits(found, expected, f"{name} of {list(absmax.shape)}")


def check_scales_on_bounds(ops: Ops, dtype: torch.dtype, device: str) -> None:
    """The middles of the codes and their neighbours, beside their opposites and 1 in each block: the mean is next to
    nothing, so that they are compared as they are."""
    middles = (CODE[1:] + CODE[:-1]) * 0.5
    near = torch.cat([(middles.view(torch.int32) + step).view(torch.float32) for step in (-1, 0, 1)])
    every = torch.cat([near, CODE])
    blocks = torch.cat([torch.ones(len(every) // 127 + 1, 1), in_blocks(every, 127)], 1)
    absmax = torch.cat([blocks, -blocks], 1).flatten().to(device)
    found = ops.quantize_scales(absmax, CODE.to(device))
    for name, one, expected in zip(("codes", "nested", "offset"), found, true_scales(absmax), strict=True):
        same_bits(one, expected, name)


def quantized(numel: int, blocksize: int, double_quant: bool, device: str) -> tuple:
    """Random bytes and scales of every size, as tensors() of an NF4Weight."""
    generator = torch.Generator().manual_seed(numel + blocksize)
    packed = torch.randint(0, 256, (-(-numel // 2),), dtype=torch.uint8, generator=generator)
    blocks = -(-numel // blocksize)
    absmax = torch.rand(blocks, generator=generator) + 0.1
    for i, value in enumerate((0.0, 1e-39, 1e-45, 3e38, 6e4, 70_000.0, 2.0**-126, 1e-7)):
        absmax[5 * i + 3 :: 97] = value
    if not double_quant:
        return packed.to(device), absmax.to(device), None, None, None
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    nested = torch.rand(-(-blocks // 256), generator=generator) / 3
    offset = torch.rand(1, generator=generator)
    return tuple(one.to(device) for one in (packed, codes, nested, CODE, offset))


def check_decoded(ops: Ops, tensors: tuple, quant_type: str, blocksize: int, numel: int, dtype: torch.dtype) -> None:
    found = ops.dequantize(*tensors, quant_type, blocksize, numel, dtype)
    nested = "nested" if tensors[2] is not None else "plain"
    what = f"values of {quant_type} {blocksize} {nested} [{numel}] in {dtype}"
    same_bits(found, true_values(tensors, quant_type, blocksize, numel, dtype), what)


def check_dequantize(ops: Ops, dtype: torch.dtype, device: str) -> None:
    for quant_type in TYPES:
        for blocksize in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            for numel in SIZES:
                for double_quant in (False, True):
                    tensors = quantized(numel, blocksize, double_quant, device)
                    check_decoded(ops, tensors, quant_type, blocksize, numel, dtype)


def check_round_trip(ops: Ops, dtype: torch.dtype, device: str) -> None:
    """What is on a level comes back as it was, whatever its sign and place."""
    for quant_type in TYPES:
        level = torch.tensor(LEVELS[quant_type])
        index = torch.randint(0, 16, (40, 64), generator=torch.Generator().manual_seed(1))
        index[:, 0] = int(level.argmax())
        weight = level[index].to(device)
        packed, absmax = ops.quantize(weight, quant_type, 64)
        values = ops.dequantize(packed, absmax, None, None, None, quant_type, 64, weight.numel(), torch.float32)
        assert torch.equal(values.view(weight.shape), weight), f"{quant_type} levels do not come back"


CHECKS = (
    check_quantize_sizes,
    check_quantize_layouts,
    check_every_16_bit_number,
    check_quantize_extremes,
    check_not_finite,
)
"""Of quantising, in every dtype of IN_DTYPES."""
SCALE_CHECKS = (check_scales, check_scales_on_bounds, check_round_trip)
"""Without a dtype of their own."""
VALUE_CHECKS = (check_dequantize,)
"""Of dequantising, in every dtype of OUT_DTYPES."""

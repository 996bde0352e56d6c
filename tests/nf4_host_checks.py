"""Checks of the 4-bit formats' CUDA kernels on a CPU: every bit is that of formats/nf4_values.py."""

import torch
from cuda_host import nf4

from peft_kernels.formats import nf4_values
from peft_kernels.formats.nf4 import FP4_BOUNDS, NF4_BOUNDS, nested_code

TYPES = ("nf4", "fp4")
SIZES = (1, 2, 3, 7, 8, 31, 64, 65, 1000, 4097)


def any_weight(numel: int, quant_type: str, blocksize: int, nested: bool) -> tuple:
    """Tensors of every code, and scales of many sizes."""
    generator = torch.Generator().manual_seed(numel * 31 + blocksize)
    packed = torch.randint(256, (-(-numel // 2),), generator=generator, dtype=torch.uint8)
    blocks = -(-numel // blocksize)
    if not nested:
        return packed, torch.randn(blocks, generator=generator).exp(), None, None, None
    absmax = torch.randint(256, (blocks,), generator=generator, dtype=torch.uint8)
    nested_absmax = torch.randn(-(-blocks // 256), generator=generator).exp()
    return packed, absmax, nested_absmax, nested_code(), torch.tensor([1.2345])


def equal(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[want.element_size()]
    bad = (got.view(kind) != want.view(kind)) & ~want.isnan()
    assert not bad.any(), f"{int(bad.sum())} of {bad.numel()} differ, the first at {int(bad.flatten().nonzero()[0])}"


def check_dequantize(lib, numel, quant_type, blocksize, nested, dtype, **how) -> None:
    tensors = any_weight(numel, quant_type, blocksize, nested)
    args = tensors, quant_type, blocksize, numel, dtype
    (got,) = nf4.in_both_orders(lib, lambda lib, device: nf4.dequantize(lib, device, *args, **how))
    equal(got, nf4_values.dequantize(*tensors, quant_type, blocksize, numel, dtype))


def check_dequantize_part(
    lib, numel: int, blocksize: int, nested: bool, dtype, part: tuple, aligned: bool = True
) -> None:
    """Rows of `cols` neighbours that begin `pitch` elements apart: those of the whole."""
    (start, pitch, rows, cols), tensors = part, any_weight(numel, "nf4", blocksize, nested)
    weight = tensors, "nf4", blocksize, numel
    (got,) = nf4.in_both_orders(lib, nf4.dequantize_part, weight, dtype, part, aligned)
    whole = nf4_values.dequantize(*tensors, *weight[1:], dtype)
    equal(got, whole.as_strided((rows, cols), (pitch, 1), start).contiguous())


def weights(numel: int, dtype: torch.dtype, blocksize: int, quant_type: str) -> torch.Tensor:
    """Normal values of very different scales by block; the bounds themselves and their neighbours in some; zeros."""
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    values *= 2.0 ** (torch.arange(numel) // blocksize % 21 - 10)
    bounds = torch.tensor(NF4_BOUNDS if quant_type == "nf4" else FP4_BOUNDS + tuple(-b for b in FP4_BOUNDS))
    ties = torch.cat([bounds, *(torch.nextafter(bounds, torch.tensor(way)) for way in (2.0, -2.0))])
    if numel > 3 * blocksize:
        part = values[blocksize : 2 * blocksize]
        part[: len(ties)], part[-1] = ties[: len(part)], 1.0  # absmax 1: compared as they are
        values[2 * blocksize : 3 * blocksize] = 0.0
    return values.to(dtype)


def check_quantize(lib, values, quant_type, blocksize, aligned=True) -> None:
    got = nf4.in_both_orders(lib, nf4.quantize, values, quant_type, blocksize, aligned)
    for one, want in zip(got, nf4_values.encode(values, quant_type, blocksize), strict=True):
        equal(one, want)


def check_scales(lib, absmax, code) -> None:
    got = nf4.in_both_orders(lib, nf4.quantize_scales, absmax, code)
    for one, want in zip(got, nf4_values.encode_scales(absmax, code), strict=True):
        equal(one, want)


def check_ties(lib, code: torch.Tensor) -> None:
    """Nested blocks of absmax 1 and offset 0: the midpoints of the code, and the numbers beside them."""
    middle = (code[1:] + code[:-1]) * 0.5
    beside = [torch.nextafter(middle, torch.full_like(middle, way)) for way in (2.0, -2.0)]
    absmax = torch.cat([torch.cat([part, torch.ones(1)]) for part in (middle, *beside)])
    codes, scales, _ = nf4.in_both_orders(lib, nf4.quantize_scales, absmax, code, torch.zeros(1))
    assert torch.equal(scales, torch.ones(3))
    low = torch.arange(255)
    even = low + low % 2
    assert torch.equal(codes.view(3, 256)[:, :255], torch.stack([even, low + 1, low]).to(torch.uint8))

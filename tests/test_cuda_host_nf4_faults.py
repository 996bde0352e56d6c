"""Faults planted in the 4-bit formats' CUDA kernels, which the checks must see."""

import ctypes
from itertools import product

import pytest
import torch
from cuda_host import nf4
from cuda_host.build import CXX, library
from cuda_host.memory import at, memory
from nf4_host_checks import (
    TYPES,
    any_weight,
    check_dequantize,
    check_dequantize_part,
    check_quantize,
    check_scales,
    check_ties,
    equal,
    weights,
)

from peft_kernels.formats import nf4_values
from peft_kernels.formats.nf4 import nested_code

pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")

DEQUANTIZE_FAULTS = {
    "halves of a byte": ("csrc/common/nf4.cuh", "(i % 2 == 0 ? 4 : 0)", "(i % 2 == 0 ? 0 : 4)"),
    "bytes of a word": ("csrc/common/nf4.cuh", "i / 2 * 8", "(3 - i / 2) * 8"),
    "one scale for all": (nf4.DEQUANTIZE, "blocks[i] = piece * N >> shift;", "blocks[i] = 0;"),
    "a part's start": (nf4.DEQUANTIZE, "= pieces.first + row * pieces.pitch", "= row * pieces.pitch"),
    "a part's pitch": (nf4.DEQUANTIZE, "first + i * (apart * pieces.pitch)", "first + i * apart"),
    "rows of out": (nf4.DEQUANTIZE, "* pieces.per_row + column) * N", "+ column) * N"),
    "columns past a row": (nf4.DEQUANTIZE, "column < pieces.per_row ? pieces.rows : 0", "pieces.rows"),
    "rows past the last": (nf4.DEQUANTIZE, "row + i * apart < rows ? first", "true ? first"),
    "a part's last elements": (nf4.DEQUANTIZE, "element = pieces.first * N + at;", "element = at;"),
    "offset left out": ("csrc/common/nf4.cuh", "shared_scales[i]), offset)", "shared_scales[i]), 0.0f)"),
    "contracted": ("csrc/common/nf4.cuh", "__fadd_rn(__fmul_rn(out[i], shared_scales[i]), offset)",
                   "__fmaf_rn(out[i], shared_scales[i], offset)"),
    "nested block": ("csrc/common/nf4.cuh", "blocks[i] / kNestedBlock", "0 * blocks[i]"),
    "barrier missing": (nf4.DEQUANTIZE, "  __syncthreads();\n", ""),
    "last elements left out": (nf4.DEQUANTIZE, "< pieces.tail)", "< 0)"),
    "last elements by every block": (nf4.DEQUANTIZE, "element % 2)", "1 - element % 2)"),
    "past the last piece": (nf4.DEQUANTIZE, "    if (row + i * apart >= rows) continue;\n", ""),
    "alignment of the codes": (nf4.DEQUANTIZE, "on_bytes(a.weight.packed, kWide<T> / 2)", "true"),
    "alignment of the values": (nf4.DEQUANTIZE, "&& on_bytes(a.out, 16)", ""),
}  # fmt: skip
QUANTIZE_FAULTS = {
    "not strictly above": (nf4.QUANTIZE, "code += x > search.bound[code] ?", "code += x >= search.bound[code] ?"),
    "a level too low": (nf4.QUANTIZE, "search.bound[code + 1] ? 2 : 0", "search.bound[code + 1] ? 1 : 0"),
    "lanes of half a warp": (nf4.QUANTIZE, "bits < 32; bits *= 2", "bits < 16; bits *= 2"),
    "neighbours' blocks": (nf4.QUANTIZE, "    if (bits >= span) break;\n", ""),
    "warps apart": (nf4.QUANTIZE, "if (team > 32) {", "if (team < 1) {"),
    "another warp's": (nf4.QUANTIZE, "of_team, i * kWarps + warp)", "of_team, warp)"),
    "barrier missing": (nf4.QUANTIZE, "  __syncthreads();\n  if (team", "  if (team"),
    "NaN kept": (nf4.QUANTIZE, "x = scaled == scaled ? scaled : 0.0f", "x = scaled"),
    "NaN passed over": (nf4.QUANTIZE, "& 0x7fffffffu; }", "& 0x7f800000u; }"),
    "sign of zero": (nf4.QUANTIZE, "(x < 0.0f ? 8 : 0)", "(x <= 0.0f ? 8 : 0)"),
    "elements past the end": (nf4.QUANTIZE, "    if (piece * N + i < numel) values[i]", "    values[i]"),
    "bytes past the end": (nf4.QUANTIZE, "    if (piece * N + 2 * i < numel) packed", "    packed"),
    "alignment of the weight": (nf4.QUANTIZE, "on_bytes(a.weight, 16) &&", ""),
    "ties of scales": (nf4.QUANTIZE, "thread % 2 == 0 ? middle : next_below(middle)", "middle"),
    "last number below": (nf4.QUANTIZE, "? bits + 1 : bits - 1", "? bits - 1 : bits + 1"),
    "offset added": (nf4.QUANTIZE, "__fsub_rn(__ldg(a.absmax", "__fadd_rn(__ldg(a.absmax"),
    "scales past the end": (nf4.QUANTIZE, "if (block < a.blocks) a.codes", "a.codes"),
}


@pytest.fixture(scope="module")
def cache(pytestconfig):
    return pytestconfig.cache.mkdir("cuda_host")


def dequantize_checks(lib) -> None:
    for dtype, nested in product((torch.bfloat16, torch.float32), (False, True)):
        for numel in (7, 65, 20_005):
            check_dequantize(lib, numel, "nf4", 32, nested, dtype)
            check_dequantize(lib, numel, "nf4", 64, nested, dtype, aligned=False)
        for part in ((16, 272, 33, 264), (40, 0, 1, 4097)):
            check_dequantize_part(lib, 20_000, 64, nested, dtype, part)
    # Codes off their bytes and values on theirs, and the other way round.
    for aligned_codes in (False, True):
        tensors = any_weight(1000, "nf4", 64, False)
        with memory(lib) as device:
            weight = nf4.put_weight(device, tensors, "nf4", 64, 1000, aligned_codes)
            out = device.empty((1008,), torch.bfloat16, align=16)[0 if not aligned_codes else 3 :][:1000]
            args = nf4.Dequantize(weight, at(out).value, 0, 0, 1, 1000, 0, 0)
            nf4.raise_for(lib, lib.nf4_dequantize_cuda(ctypes.byref(args), None))
            equal(out.clone(), nf4_values.dequantize(*tensors, "nf4", 64, 1000, torch.bfloat16))


def quantize_checks(lib) -> None:
    for quant_type, blocksize, numel in product(TYPES, (32, 256, 4096), (7, 65, 20_005)):
        for aligned in (True, False):
            check_quantize(lib, weights(numel, torch.bfloat16, blocksize, quant_type), quant_type, blocksize, aligned)
        check_quantize(lib, weights(numel, torch.float32, blocksize, quant_type), quant_type, blocksize)
    for special in (torch.nan, torch.inf):
        check_quantize(lib, torch.tensor([1.0, special, 0.3] * 50), "nf4", 32)
    check_scales(lib, torch.linspace(0.3, 2.7, 700), nested_code())
    check_ties(lib, nested_code())


def test_the_checks_pass_without_a_fault(cache):
    dequantize_checks(library(cache, nf4.DEQUANTIZE))
    quantize_checks(library(cache, nf4.QUANTIZE))


def is_seen(checks, lib) -> None:
    with pytest.raises((AssertionError, RuntimeError)) as seen:
        checks(lib)
    assert "failed:" not in str(seen.value), "the fault does not compile"


@pytest.mark.parametrize("fault", DEQUANTIZE_FAULTS)
def test_faults_in_dequantising_are_seen(cache, fault):
    is_seen(dequantize_checks, library(cache, nf4.DEQUANTIZE, [DEQUANTIZE_FAULTS[fault]]))


@pytest.mark.parametrize("fault", QUANTIZE_FAULTS)
def test_faults_in_quantising_are_seen(cache, fault):
    is_seen(quantize_checks, library(cache, nf4.QUANTIZE, [QUANTIZE_FAULTS[fault]]))

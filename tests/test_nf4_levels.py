"""The levels and thresholds: the same bits in Python, in C++ and in bitsandbytes' tables."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from peft_kernels.formats import nf4, nf4_values

HEADER = Path(__file__).resolve().parent.parent / "csrc" / "common" / "nf4.h"


def _numbers(name: str) -> list[np.ndarray]:
    """The braced lists of numbers of a constant of the header, in fp32 as a compiler reads them."""
    body = re.search(rf"constexpr \w+ {name}\b[^=]*=\s*(\{{.*?\}});", HEADER.read_text(), re.DOTALL).group(1)
    lists = []
    for inner in re.findall(r"\{([^{}]*)\}", body):
        terms = [one.strip().removesuffix("f") for one in inner.split(",")]
        fractions = [[np.float32(part.strip().removesuffix("f")) for part in one.split("/")] for one in terms]
        lists.append(np.array([one[0] / one[1] if len(one) == 2 else one[0] for one in fractions], dtype=np.float32))
    return lists


def _bits(values) -> list[int]:
    return np.asarray(values, dtype=np.float32).view(np.int32).tolist()


@pytest.mark.parametrize(
    ("name", "levels", "bounds"),
    [("kNf4", nf4.NF4_LEVELS, nf4.NF4_BOUNDS), ("kFp4", nf4.FP4_LEVELS, nf4.FP4_BOUNDS)],
)
def test_the_header_has_the_same_bits(name, levels, bounds):
    found_levels, found_bounds = _numbers(name)
    assert _bits(found_levels) == _bits(levels) and len(levels) == 16
    assert _bits(found_bounds) == _bits(bounds)


def test_the_header_has_the_same_codes_and_block():
    assert _numbers("kFp4Codes")[0].tolist() == list(nf4.FP4_CODES)
    assert f"constexpr int kNestedBlock = {nf4.NESTED_BLOCKSIZE};" in HEADER.read_text()


@pytest.mark.parametrize(("levels", "bounds"), [(nf4.NF4_LEVELS, nf4.NF4_BOUNDS)])
def test_bounds_lie_between_their_levels(levels, bounds):
    """Next to the middle: at most one unit in the last place from it."""
    for low, high, bound in zip(levels, levels[1:], bounds, strict=False):
        assert abs(bound - (low + high) / 2) <= np.spacing(np.float32(abs(bound)))


def test_fp4_bounds_lie_between_their_magnitudes():
    """The constants have fewer digits than a middle: six decimals of it."""
    sizes = [nf4.FP4_LEVELS[code] for code in nf4.FP4_CODES]
    assert sizes == sorted(sizes)
    for low, high, bound in zip(sizes, sizes[1:], nf4.FP4_BOUNDS, strict=False):
        assert abs(bound - (low + high) / 2) < 5e-7


def test_the_nested_code_is_ascending_and_has_256_values():
    code = nf4.nested_code()
    assert code.shape == (256,) and code.dtype == torch.float32 and (code[1:] > code[:-1]).all()
    assert code[-1] == 1 and (code == 0).sum() == 1
    bounds = nf4_values._nested_bounds(tuple(code.tolist()))
    assert (bounds >= code[:-1]).all() and (bounds < code[1:]).all()


def test_a_fresh_nested_code_each_time():
    one = nf4.nested_code()
    one.zero_()
    assert nf4.nested_code().abs().sum() > 0


def test_bitsandbytes_has_the_same_tables():
    functional = pytest.importorskip("bitsandbytes.functional", reason="the peer: pip install bitsandbytes==0.50.2")
    for quant_type, levels in nf4.LEVELS.items():
        found = functional.get_4bit_type(quant_type, device="cpu").clone()
        if quant_type == "fp4":
            assert found[8] == 0  # with the sign of its CUDA code here, without one there
            found[8] = -0.0
        assert _bits(found) == _bits(levels)
    assert _bits(functional.create_dynamic_map()) == _bits(nf4.nested_code())

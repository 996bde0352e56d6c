"""Every primitive's speed cases for pytest-benchmark: `pytest benchmarks/test_speed.py`, or a smoke test with
`--benchmark-disable`. Published ratios are paired by round and come from `throughput.py` and `gpu.py`."""

import functools

import pytest
import torch

from benchmarks.cases import PRIMITIVES
from benchmarks.measure import PARTS, Contender

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [(name, case) for name, primitive in PRIMITIVES.items() for case in primitive.suites["speed"]]


@functools.lru_cache(maxsize=1)
def _contenders(primitive: str, case) -> list[Contender]:
    return PRIMITIVES[primitive].contenders(case, DEVICE, 0)


@pytest.mark.parametrize(
    ("primitive", "case"), CASES, ids=[f"{name}-{str(case.dtype)[6:]}-{case.label}" for name, case in CASES]
)
@pytest.mark.parametrize("role", ["floor", "ours", "peer"])
@pytest.mark.parametrize("part", PARTS)
def test_speed(benchmark, primitive, case, role, part):
    contender = next(one for one in _contenders(primitive, case) if one.role == role)
    if contender.missing:
        pytest.skip(contender.missing)
    if part != "both" and contender.forward is None:
        pytest.skip("it is made in one piece")
    errors = contender.check() if contender.check else {}
    wrong = {name: error for name, error in errors.items() if not error <= 1}
    if wrong and role == "peer":
        pytest.skip(f"{contender.name} computes wrong values, so it is not timed: {wrong} of their bounds")
    assert not wrong, wrong
    benchmark.group = f"{primitive} {case.label} {case.dtype} {part}"
    timed = contender.begin(part)

    def step() -> None:
        timed(0)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, warmup_rounds=2, rounds=20)

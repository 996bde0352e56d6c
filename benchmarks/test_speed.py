"""The LoRA linear's speed cases for pytest-benchmark: `pytest benchmarks/test_speed.py`, or a smoke test with
`--benchmark-disable`. The paired ratios that are published come from `lora_linear_cpu` and `gpu`."""

import pytest
import torch

from benchmarks.cases import PRIMITIVES
from benchmarks.measure import Contender

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = PRIMITIVES["lora_linear"].suites["speed"]


def _contender(case, name: str) -> Contender:
    found = {one.name: one for one in PRIMITIVES["lora_linear"].contenders(case, DEVICE)}
    return found[name]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{str(case.dtype)[6:]}-M{case.M}-r{case.R}")
@pytest.mark.parametrize("name", ["frozen linear", "peft_kernels", "PEFT"])
def test_forward_and_backward(benchmark, case, name):
    contender = _contender(case, name)
    if contender.missing:
        pytest.skip(contender.missing)
    errors = contender.check()
    assert all(error <= 1 for error in errors.values()), errors
    benchmark.group = f"{case.label} {case.dtype}"

    def step() -> None:
        contender.step(0)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, warmup_rounds=2, rounds=20)

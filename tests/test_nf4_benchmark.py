"""The benchmark of quantising to 4 bits and back: every contender right, a fault seen, the floor's bytes."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last, so that an installed peft_kernels stays the one that is tested

from benchmarks import cases, nf4  # noqa: E402
from benchmarks.measure import Effort  # noqa: E402

ENV = {"device": "test", "threads": "1", "source": "abc"}


@pytest.mark.parametrize("case", cases.PRIMITIVES["nf4"].suites["tiny"], ids=lambda case: f"{case.dtype} {case.label}")
def test_contenders_are_right_and_a_fault_is_seen(case, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="the peer: pip install bitsandbytes==0.50.2")
    found = cases.run_case("nf4", case, "cpu", ENV, Effort(1, 0.0, 1))
    assert {row["role"]: row["status"] for row in found} == {"floor": "ok", "ours": "ok", "peer": "ok"}
    monkeypatch.setattr(nf4.nf4_values, "NF4_BOUNDS", tuple(bound + 0.01 for bound in nf4.nf4_values.NF4_BOUNDS))
    monkeypatch.setattr(nf4.nf4_values, "dequantize", lambda *args: torch.zeros(args[-2], dtype=args[-1]))
    by = {row["role"]: row["status"] for row in cases.run_case("nf4", case, "cpu", ENV, Effort(1, 0.0, 1))}
    assert all(by[role].startswith("wrong values: ") for role in ("ours", "peer"))


def test_bytes_of_a_case():
    sizes = {"M": 64, "K": 64, "op": "dequantize"}
    scales = 64 * 4
    assert nf4.work(sizes, "bfloat16", True) == (4096 // 2 + scales + 2 * 4096, 4096)
    assert nf4.work(sizes | {"op": "quantize"}, "float32", True) == (4096 // 2 + scales + 4 * 4096, 4096)
    assert nf4.work(sizes | {"nested": 1}, "bfloat16", True)[0] == 2048 + 64 + 4 * (1 + 256 + 1) + 8192
    assert nf4.of_layers([(32, 96), (32, 96), (96, 32)], 1, 1, torch.bfloat16, 0.0) == [
        nf4.NF4Case(96, 32, torch.bfloat16, nested=True),
        nf4.NF4Case(32, 96, torch.bfloat16, nested=True),
    ]

"""How a case becomes rows: planted slow, wrong, leaking, failing and missing contenders, and parts timed apart."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last, so that an installed peft_kernels stays the one that is tested

from benchmarks import cases, held, lora_linear, measure  # noqa: E402
from benchmarks.lora_linear_check import LoRACase, forward, make_inputs, step, value_errors  # noqa: E402
from benchmarks.measure import Contender, Effort  # noqa: E402

SMALL = LoRACase(24, 40, 32, 4, torch.bfloat16)
DROPPED = replace(SMALL, dropout=0.25)
ENV = {"device": "test", "threads": "1", "source": "abc"}
SHORT = Effort(5, 0.0, 5)
OURS = "peft_kernels"


def _by_name(found) -> dict[str, dict]:
    return {row["contender"]: row for row in found}


def _sleeper(name: str, role: str, seconds: float, **more) -> Contender:
    return Contender(name, role, lambda i: time.sleep(seconds), **more)


def test_a_slow_contender_is_reported_slow():
    field = [
        _sleeper("floor", "floor", 0.002),
        _sleeper(OURS, "ours", 0.04),
        _sleeper("peer", "peer", 0.002, rival=OURS),
    ]
    by = _by_name(cases.run_case("planted", SMALL, "cpu", ENV, SHORT, field))
    assert float(by[OURS]["ratio_floor"]) > 2
    assert float(by["peer"]["ours_over_this"]) > 2
    assert by["floor"]["ratio_floor"] == "1" and by["floor"]["samples"] == "5"


@pytest.mark.parametrize("case", [SMALL, DROPPED], ids=["plain", "dropout"])
@pytest.mark.parametrize("fault", ["scale", "dropped adapter", "no dlora_a", "nan"])
def test_wrong_values_are_refused_and_not_timed(case, fault):
    def build(case, inputs):
        honest = lora_linear.ours()(case, inputs)
        a, _ = honest.trained
        without_a = lora_linear.ours()(case, replace(inputs, lora_a=a.detach()))
        faulty = {
            "scale": lambda x: honest.forward(x) * 1.05,
            "dropped adapter": lambda x: torch.nn.functional.linear(x, inputs.weight) + 0 * honest.forward(x),
            "no dlora_a": lambda x: without_a.forward(x) + 0 * a.sum(),
            "nan": lambda x: honest.forward(x) * torch.nan,
        }
        return replace(honest, forward=faulty[fault])

    inputs = make_inputs(case, "cpu")
    layer = build(case, inputs)
    field = [Contender("bad", "ours", lambda i: step(layer, inputs), check=lambda: value_errors(case, inputs, layer))]
    (row,) = cases.run_case("planted", case, "cpu", ENV, SHORT, field)
    assert row["status"].startswith("wrong values: ")
    assert not row["ms_p50"] and not row["samples"] and not row["ratio_floor"]


@pytest.mark.parametrize("case", [SMALL, DROPPED, replace(SMALL, dtype=torch.float32)], ids=["bf16", "dropout", "fp32"])
def test_every_contender_is_right(case):
    found = cases.run_case("lora_linear", case, "cpu", ENV, Effort(1, 0.0, 1))
    assert {row["status"] for row in found if not row["status"].startswith("not installed")} == {"ok"}, found
    assert all(row["samples"] == "1" for row in found if row["status"] == "ok")


def _block() -> torch.Tensor:
    return torch.empty(1 << 20, dtype=torch.uint8)


def test_a_leak_is_reported_and_not_timed():
    kept, first = [], []

    def with_cycle(i: int) -> None:
        ring = [_block()]
        ring.append(ring)

    steps = {
        "leaks": lambda i: kept.append(_block()),
        "clean": lambda i: _block(),
        "keeps the first": lambda i: first or first.append(_block()),
        "has a cycle": with_cycle,
    }
    field = [Contender(name, "peer", step) for name, step in steps.items()]
    by = _by_name(cases.run_case("planted", SMALL, "cpu", ENV, SHORT, field))
    assert by["leaks"]["status"] == "leaks 1048576 bytes a step" and not by["leaks"]["ms_p50"]
    for name in ("clean", "keeps the first", "has a cycle"):
        assert by[name]["status"] == "ok" and by[name]["ms_p50"], name
    assert by["clean"]["peak_bytes"] == "1048576"


def test_parts_are_timed_and_weighed_apart():
    """Forward sleeps 20 ms and keeps a block; backward sleeps 2, needs another, and frees the first."""
    calls = []

    def forward(i: int):
        calls.append(("forward", i))
        time.sleep(0.02)
        saved = [_block()]

        def backward(keep: bool) -> None:
            calls.append(("backward", keep))
            time.sleep(0.002)
            _block()
            if not keep:
                saved.clear()

        return backward

    field = [Contender("floor", "floor", lambda i: forward(i)(False), forward, sets=3)]
    field.append(Contender("whole", "peer", lambda i: None))
    found = cases.run_case("planted", SMALL, "cpu", ENV, SHORT, field, parts=measure.PARTS, seed=7)
    by = {(row["contender"], row["part"]): row for row in found}
    assert set(by) == {("floor", "both"), ("floor", "forward"), ("floor", "backward"), ("whole", "both")}
    ms = {part: float(by["floor", part]["ms_p50"]) for part in measure.PARTS}
    assert 2 <= ms["backward"] < ms["forward"] and ms["both"] >= 22
    peaks = {part: int(by["floor", part]["peak_bytes"]) for part in measure.PARTS}
    assert peaks == {"both": 2 << 20, "forward": 1 << 20, "backward": 1 << 20}
    assert {row["seed"] for row in found} == {"7"}
    timed = calls[-3 - 7 :]  # every set's forward once, then two rounds of warm-up and five timed ones
    assert timed == [("forward", 0), ("forward", 1), ("forward", 2), *[("backward", True)] * 7]


def test_parts_of_the_lora_linear_are_those_of_its_step():
    case = replace(DROPPED, dtype=torch.float32)
    inputs = make_inputs(case, "cpu")
    layer = lora_linear.ours()(case, inputs)
    torch.manual_seed(3)
    _, *expected = step(layer, inputs)
    torch.manual_seed(3)
    backward = forward(layer, inputs)
    for keep in (True, False):
        assert all(torch.equal(a, b) for a, b in zip(backward(keep), expected, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        backward(False)


def test_what_is_saved_is_counted_once_and_without_parameters():
    x = torch.randn(6, 8, requires_grad=True)
    weight = torch.randn(5, 8, requires_grad=True)
    assert held.saved_bytes(lambda: torch.nn.functional.linear(x, weight), [weight]) == x.nbytes
    assert held.saved_bytes(lambda: (x * x.exp()) @ weight.t(), [weight]) == 3 * x.nbytes
    lean = lora_linear.layer_saved_bytes(SMALL, make_inputs(SMALL, "cpu"), lora_linear.ours())
    assert lean == (SMALL.M * SMALL.K + SMALL.M * SMALL.R) * 2
    masked = lora_linear.layer_saved_bytes(DROPPED, make_inputs(DROPPED, "cpu"), lora_linear.ours())
    assert masked == lean + SMALL.M * SMALL.K // 8


def test_a_missing_peer_has_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(lora_linear, "version", lambda package: "none")
    by = _by_name(cases.run_case("lora_linear", SMALL, "cpu", ENV, SHORT))
    assert by["PEFT"]["status"] == "not installed: pip install peft" and not by["PEFT"]["ms_p50"]
    assert by[OURS]["status"] == "ok" and by[OURS]["ratio_floor"]


def test_a_failing_contender_does_not_end_the_run():
    def fail() -> dict[str, float]:
        raise RuntimeError("no such kernel")

    def out_of_memory() -> dict[str, float]:
        raise torch.OutOfMemoryError("tried to allocate")

    field = [_sleeper("floor", "floor", 0.0), _sleeper("bad", "peer", 0.0, check=fail)]
    field.append(_sleeper("large", "peer", 0.0, check=out_of_memory))
    by = _by_name(cases.run_case("planted", SMALL, "cpu", ENV, SHORT, field))
    assert by["bad"]["status"] == "error: RuntimeError: no such kernel"
    assert by["large"]["status"] == "out of memory"
    assert by["floor"]["status"] == "ok"

"""How a case becomes rows: planted slow, wrong, leaking, failing and missing contenders, and parts timed apart."""

import sys
import time
from contextlib import contextmanager
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
        "leaks little": lambda i: kept.append(torch.empty(64, dtype=torch.uint8)),
        "leaks now and then": lambda i: i % 2 and kept.append(_block()),
        "clean": lambda i: _block(),
        "keeps the first": lambda i: first or first.append(_block()),
        "has a cycle": with_cycle,
    }
    field = [Contender(name, "peer", step) for name, step in steps.items()]
    by = _by_name(cases.run_case("planted", SMALL, "cpu", ENV, SHORT, field))
    assert by["leaks"]["status"] == "leaks 1048576 bytes a step" and not by["leaks"]["ms_p50"]
    assert by["leaks little"]["status"] == "leaks 64 bytes a step"
    assert by["leaks now and then"]["status"] == "leaks 524288 bytes a step"
    for name in ("clean", "keeps the first", "has a cycle"):
        assert by[name]["status"] == "ok" and by[name]["ms_p50"], name
    assert by["clean"]["peak_bytes"] == "1048576" and by["keeps the first"]["peak_bytes"] == "0"


def test_parts_are_timed_and_weighed_apart():
    """Forward sleeps 20 ms and keeps two blocks; backward sleeps 2, needs another, and frees the two."""
    calls = []

    def forward(i: int):
        calls.append(("forward", i))
        time.sleep(0.02)
        saved = [_block(), _block()]

        def backward(keep: bool) -> None:
            calls.append(("backward", i, keep))
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
    assert peaks == {"both": 3 << 20, "forward": 2 << 20, "backward": 1 << 20}
    assert {row["seed"] for row in found} == {"7"}
    # After its memory, which is that of one that frees, every set's forward once, two warm-up rounds and five timed.
    assert calls[-12:-7] == [("forward", 0), ("backward", 0, False), *(("forward", i) for i in range(3))]
    assert calls[-7:] == [("backward", i, True) for i in (0, 1, 0, 1, 2, 0, 1)]


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


def test_a_part_alone_gets_a_quarter_of_the_time(monkeypatch):
    seen = []
    monkeypatch.setattr(measure, "time_cpu", lambda steps, effort: seen.append(effort.seconds) or {})
    field = [Contender("floor", "floor", lambda i: None, lambda i: lambda keep: None)]
    cases.run_case("planted", SMALL, "cpu", ENV, Effort(1, 8.0, 1), field, parts=measure.PARTS)
    assert seen == [8.0, 2.0, 2.0]


def test_what_breaks_while_it_is_timed_leaves_the_others():
    """A backward that runs only once, and a step that breaks late; both once their turn has come."""
    calls = {"late": 0}

    def late(i: int) -> None:
        calls["late"] += 1
        if calls["late"] > 8:
            raise torch.OutOfMemoryError("tried to allocate")

    def forward(i: int):
        ran = []

        def backward(keep: bool) -> None:
            if ran:
                raise AttributeError("the graph is gone")
            ran.append(1)

        return backward

    field = [
        Contender("floor", "floor", lambda i: None, lambda i: lambda keep: None),
        Contender("late", "peer", late),
        Contender("once", "peer", lambda i: None, forward),
    ]
    found = cases.run_case("planted", SMALL, "cpu", ENV, SHORT, field, parts=measure.PARTS)
    by = {(row["contender"], row["part"]): row for row in found}
    assert by["late", "both"]["status"] == "out of memory" and not by["late", "both"]["ms_p50"]
    assert by["once", "backward"]["status"] == "error: AttributeError: the graph is gone"
    assert by["once", "forward"]["ms_p50"] and by["once", "both"]["ms_p50"]
    for part in measure.PARTS:
        assert by["floor", part]["ms_p50"] and by["floor", part]["samples"] == "5"


@pytest.mark.parametrize("error", [ImportError, RuntimeError, TypeError])
def test_a_peer_that_cannot_be_built_has_a_row_that_says_so(error, monkeypatch):
    def build(*args):
        raise error("does not fit")

    monkeypatch.setattr(lora_linear, "peft_layer", lambda *args: build)
    by = _by_name(cases.run_case("lora_linear", SMALL, "cpu", ENV, SHORT))
    assert by["PEFT"]["status"] == f"error: {error.__name__}: does not fit" and by[OURS]["ms_p50"]


def test_every_part_runs_under_what_its_layer_asks_for():
    inside, inputs = [], make_inputs(SMALL, "cpu")

    @contextmanager
    def within():
        inside.append("in")
        yield
        inside.append("out")

    backward = forward(lora_linear.ours(within=within)(SMALL, inputs), inputs)
    assert inside == ["in", "out"]
    backward(False)
    assert inside == ["in", "out"] * 2


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

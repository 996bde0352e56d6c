"""The glue around CUDA's events, graphs and counters, on a stand-in for torch.cuda that keeps time with the host."""

import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last, so that an installed peft_kernels stays the one that is tested

from benchmarks import cases, measure, tune  # noqa: E402
from benchmarks.lora_linear_check import LoRACase  # noqa: E402
from benchmarks.measure import Contender, Effort  # noqa: E402
from peft_kernels.kernels.lora_linear import configs  # noqa: E402

SMALL = LoRACase(24, 40, 32, 4, torch.bfloat16)
ENV = {"device": "test", "threads": "1", "source": "abc"}


class Event:
    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "Event") -> float:
        return (end.at - self.at) * 1e3


class Stream:
    def wait_stream(self, other) -> None: ...


class Graph:
    """Replays at twice the speed what ran while it was captured: a sleep."""

    replayed = 0

    def replay(self) -> None:
        Graph.replayed += 1
        time.sleep(self.seconds / 2)


@pytest.fixture
def gpu(monkeypatch):
    on = [default := Stream()]  # streams that are current, the last one now

    @contextmanager
    def stream(one):
        on.append(one)
        yield
        on.pop()

    @contextmanager
    def capture(graph, stream):
        assert stream is not default
        begin = time.perf_counter()
        on.append(stream)
        yield
        on.pop()
        graph.seconds = time.perf_counter() - begin

    for name, value in {
        "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "stream": stream, "graph": capture,
        "current_stream": lambda: on[-1], "synchronize": lambda: None, "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 1000, "max_memory_allocated": lambda: 5096,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return on


seen = set()  # the input sets of each contender that ran


def _contender(name: str, role: str, gpu, **more) -> Contender:
    def forward(i: int):
        seen.add((name, i % 3))
        stream = gpu[-1]
        time.sleep(0.02)

        def backward(keep: bool) -> None:
            assert gpu[-1] is stream, "autograd runs a backward on the stream of its forward"
            time.sleep(0.005)

        return backward

    return Contender(name, role, lambda i: forward(i)(False), forward, sets=3, **more)


def test_every_part_eager_and_as_a_graph(gpu):
    Graph.replayed = 0
    field = [_contender("floor", "floor", gpu), _contender("ours", "ours", gpu)]
    field.append(Contender("whole", "peer", lambda i: time.sleep(0.001), rival="ours"))
    found = cases.run_case("planted", SMALL, "cuda", ENV, Effort(3, 0.0, 3), field, parts=measure.PARTS)
    by = {(row["contender"], row["part"], row["timing"]): row for row in found}
    ways = [(part, timing) for part in measure.PARTS for timing in ("eager", "graph")]
    assert set(by) == {(name, *way) for name in ("floor", "ours") for way in ways} | {
        ("whole", "both", "eager"), ("whole", "both", "graph"),
    }  # fmt: skip
    assert {row["status"] for row in found} == {"ok"} and Graph.replayed
    assert seen == {(name, i) for name in ("floor", "ours") for i in range(3)}
    ms = {key: float(row["ms_p50"]) for key, row in by.items()}
    for name in ("floor", "ours"):
        assert 5 <= ms[name, "backward", "eager"] < ms[name, "forward", "eager"] < ms[name, "both", "eager"]
        for part in measure.PARTS:  # a graph of three steps, replayed in half the time
            assert 0.3 < ms[name, part, "graph"] / ms[name, part, "eager"] < 0.9, part
    assert by["whole", "both", "graph"]["ours_over_this"] and by["ours", "both", "graph"]["ratio_floor"]
    assert by["ours", "forward", "eager"]["peak_bytes"] == "4096"


def test_what_cannot_be_captured_has_a_row_that_says_so(gpu, monkeypatch):
    def refuse(*args, **more):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    found = cases.run_case("planted", SMALL, "cuda", ENV, Effort(2, 0.0, 2), [_contender("floor", "floor", gpu)])
    assert [(row["timing"], row["status"].split(":")[0]) for row in found] == [("eager", "ok"), ("graph", "error")]


def test_tuning_times_what_computes_right_values(gpu, monkeypatch):
    inputs = tune.make_inputs(SMALL, "cpu")
    monkeypatch.setattr(tune, "make_inputs", lambda case, device, seed: inputs)
    monkeypatch.setattr(measure, "input_sets", lambda nbytes, device: 2)
    picked = configs.pick_config(SMALL.M, SMALL.N, SMALL.K, SMALL.R, SMALL.dtype, 90)
    monkeypatch.setattr(tune, "value_errors", lambda case, inputs, layer: {"y": next(errors)})
    errors = iter([0.5, 3.0])
    first, second = tune.cuda_clock(SMALL, Effort(2, 0.0, 2))([picked, picked])
    assert first > 0 and second is None


def test_every_timed_step_takes_the_next_inputs(gpu):
    calls = []
    measure.time_cuda({"one": lambda i: (calls.append(i), time.sleep(0.001))}, Effort(3, 0.0, 3))
    timed = calls[3 + 4 :]  # after warming up, and finding out how many make a batch
    assert timed == list(range(len(timed))) and len(timed) >= 3

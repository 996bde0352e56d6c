"""benchmarks/vram.py beside a real step: how far a prediction is off, what a failing method leaves, snapshots."""

import dataclasses
import json
import re

import pytest
import torch
from test_memory import Toy, foreach
from test_vram import SMALL, architectures, memory_methods, vram

from benchmarks import vram_fits, vram_measure
from peft_kernels import predict_memory
from peft_kernels.memory import replay

MEASURE = (*SMALL, "--measure", "cpu")


@pytest.fixture(scope="module")
def answered() -> vram.Result:
    """A step predicted and measured."""
    options = memory_methods.Options(dtype=torch.float32)
    asked = vram.Question(architectures.find("shallow"), options, 2, 16, False, "adamw", None)
    return vram.answer(asked, [vram.methods()["lora"]], "cpu", list)[0]


def test_within_says_how_far_the_farthest_is(answered):
    """A step holds 12 bytes more than predicted on a CPU, where a number is wrapped for a product."""
    right, said = vram_measure.within(0.01, [answered])
    assert right and said.startswith("all within 0.01 %; farthest off is lora: ")
    right, said = vram_measure.within(0, [answered])
    assert not right and "over 0 %: lora: step " in said
    step = next(
        d for d in vram_measure.deviations("", answered.prediction.replay, answered.measured) if d.what == ": step"
    )
    assert step.measured - step.predicted == 12


def test_within_decides_the_exit_status(capsys, monkeypatch, answered):
    measured = [answered.measured, dataclasses.replace(answered.measured, saved=1)]
    monkeypatch.setattr(vram_measure, "measure", lambda *args: measured.pop(0))
    assert vram.main([*MEASURE, "--method", "lora", "--within", "5"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("all within 5 %")
    assert vram.main([*MEASURE, "--method", "lora", "--within", "5"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("over 5 %: lora: saved ")


def double(replayed: replay.Replay, phase: str) -> replay.Replay:
    moment = replayed.phases[phase]
    changed = dataclasses.replace(moment, allocated=2 * moment.allocated)
    return dataclasses.replace(replayed, phases=replayed.phases | {phase: changed})


def half(replayed: replay.Replay, phase: str, kind: str) -> replay.Replay:
    moment = replayed.phases[phase]
    changed = dataclasses.replace(moment, kinds=moment.kinds | {kind: moment.kinds[kind] // 2})
    return dataclasses.replace(replayed, phases=replayed.phases | {phase: changed})


@pytest.mark.parametrize(
    ("change", "over"),
    [
        (lambda one: dataclasses.replace(one, saved=2 * one.saved), ["saved"]),
        (lambda one: double(one, "load"), ["peak", "load"]),
        (lambda one: double(one, "backward"), ["peak", "backward"]),
        (lambda one: half(one, "step", "gradients"), ["gradients in step"]),
        (lambda one: half(one, "forward", "optimizer"), ["optimizer in forward"]),
        (lambda one: half(one, "load", "weights"), ["weights in load"]),
        (lambda one: half(one, "backward", "inputs"), ["inputs in backward"]),
    ],
)
def test_what_was_measured_otherwise_is_named(change, over, answered):
    right, said = vram_measure.within(5, [dataclasses.replace(answered, measured=change(answered.measured))])
    assert not right
    assert [
        re.match(r"over 5 %: lora: (\D+) [\d,]+ bytes predicted, .* % off$", line)[1] for line in said.split("\n")
    ] == over


def test_on_a_gpu_what_is_reserved_counts_too():
    moment = {"load": replay.Moment(100, {"weights": 100}, "")}
    predicted, measured = replay.Replay(moment, 300, 10, 12), replay.Replay(moment, 200, 12, 12)
    off = {one.what: one.percent for one in vram_measure.deviations("lora", predicted, measured)}
    assert off == {
        "lora: saved": 0, "lora: reserved": 50, "lora: peak": 0, "lora: load": 0, "lora: weights in load": 0,
    }  # fmt: skip
    assert vram_measure.Deviation("", 1, 0).percent == float("inf")
    assert vram_measure.Deviation("", 0, 0).percent == 0


def test_within_needs_something_to_compare(capsys):
    assert vram.main([*MEASURE, "--method", "peft-qlora", "--within", "5"]) == 1
    assert "nothing was both predicted and measured" in capsys.readouterr().out


def test_what_forward_leaves_is_counted_in_blocks():
    """As a GPU's allocator is asked for it: relu's output and the loss, each in blocks of 512 bytes."""
    saved = predict_memory(Toy, {"x": torch.zeros(255, 1024)}, arch=90).replay
    assert (saved.saved, saved.saved_blocks) == (4 * 255 * 1024 + 4, 4 * 255 * 1024 + 512)
    plain = predict_memory(Toy, {"x": torch.zeros(255, 1024)}, arch=None).replay
    assert plain.saved == plain.saved_blocks


def methods_with(monkeypatch, **changes) -> None:
    """`full` with some of its fields changed, beside the others."""
    found = vram.methods()
    found["full"] = dataclasses.replace(found["full"], **changes)
    monkeypatch.setattr(vram, "methods", lambda: found)


def fails(model, options):
    raise RuntimeError("asked for a value\n  that is not there")


def test_a_method_that_fails_leaves_the_others(capsys, monkeypatch, tmp_path):
    methods_with(monkeypatch, adapt=fails)
    path = tmp_path / "rows.json"
    assert vram.main([*MEASURE, "--method", "full", "lora", "--json", str(path)]) == 1
    out = capsys.readouterr().out
    for what in ("prediction", "measurement"):
        assert f"full: {what} failed: RuntimeError: asked for a value that is not there" in out.splitlines()
    rows = {(row["method"], row["source"]) for row in json.loads(path.read_text())["rows"]}
    assert rows == {("full", "estimate"), *(("lora", source) for source in ("estimate", "predicted", "measured"))}


def test_memory_that_runs_out_is_a_row_s_own(capsys, monkeypatch):
    def measure(question, method, *args, real=vram_measure.measure):
        if method.name == "full":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return real(question, method, *args)

    monkeypatch.setattr(vram_measure, "measure", measure)
    assert vram.main([*MEASURE, "--method", "full", "lora", "--within", "5"]) == 1
    out = capsys.readouterr().out
    assert "full: measurement failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB" in out
    assert "all within 5 %" in out


def test_a_method_without_prediction_is_estimated_and_measured(capsys, monkeypatch):
    methods_with(monkeypatch, unpredicted="its kernels need real tensors")
    assert vram.main([*MEASURE, "--method", "full"]) == 0
    out = capsys.readouterr().out
    assert "full: no prediction: its kernels need real tensors" in out
    assert "measured" in out and "predicted" not in out
    monkeypatch.setattr(vram_fits, "_row", lambda question, result, *more: (result.method.name, "", ""))
    assert vram.main([*SMALL, "--method", "full", "lora", "--fits", "24GB"]) == 0
    table = capsys.readouterr().out.split("Largest batch")[1]
    assert "lora" in table and "full" not in table


def test_json_names_what_it_was_measured_on(tmp_path):
    path = tmp_path / "rows.json"
    for arguments, measured in ((SMALL, False), (MEASURE, True)):
        assert vram.main([*arguments, "--method", "lora", "--json", str(path)]) == 0
        about = json.loads(path.read_text())["question"]
        assert ("measured_on" in about) == measured
    assert {"device", "driver", "torch", "date"} <= set(about["measured_on"])


@pytest.mark.parametrize(
    ("changes", "arguments", "note"),
    [
        ({"missing": "not installed: pip install it"}, SMALL, "full: not installed: pip install it"),
        ({"missing": "not installed: pip install it"}, MEASURE, "full: not installed: pip install it"),
        ({"cuda_only": True, "unpredicted": "real"}, MEASURE, f"full: {memory_methods.NEEDS_CUDA}"),
    ],
)
def test_a_method_that_cannot_run_here_says_why(changes, arguments, note, capsys, monkeypatch):
    methods_with(monkeypatch, **changes)
    assert vram.main([*arguments, "--method", "full"]) == 0
    out = capsys.readouterr().out
    assert note in out.splitlines() and "load" not in out


@pytest.mark.parametrize("changes", [{"missing": memory_methods.NEEDS_CUDA, "cuda_only": True}, {"cuda_only": True}])
def test_a_prediction_needs_no_device(changes, capsys, monkeypatch):
    methods_with(monkeypatch, **changes)
    for arguments, noted in ((SMALL, 0), (MEASURE, 1)):
        assert vram.main([*arguments, "--method", "full"]) == 0
        out = capsys.readouterr().out
        assert re.search("full +predicted +load", out) and " measured " not in out
        assert out.count(f"full: {memory_methods.NEEDS_CUDA}\n") == noted


def test_a_search_that_fails_is_a_row_s_own(capsys, monkeypatch):
    def row(question, result, *more):
        if result.method.name == "full":
            raise RuntimeError("no such size")
        return result.method.name, "3 x 16", "48 tokens"

    monkeypatch.setattr(vram_fits, "_row", row)
    assert vram.main([*SMALL, "--method", "full", "lora", "--fits", "24GB"]) == 1
    table = capsys.readouterr().out.split("Largest batch")[1]
    assert "what fits failed: RuntimeError: no such size" in table and "3 x 16" in table


class Cuda:
    """Stands for torch.cuda.memory."""

    def __init__(self):
        self.calls = []

    def _record_memory_history(self, **settings):
        self.calls.append(("record", settings))

    def _dump_snapshot(self, path: str):
        self.calls.append(("dump", path))


def test_a_snapshot_is_of_the_measured_step(monkeypatch, tmp_path):
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "memory", cuda)
    model, batch = Toy(), {"x": torch.zeros(8, 1024)}
    vram_measure.step(model, batch, foreach(model.parameters()))
    assert cuda.calls == []
    count = lambda model, batch: cuda.calls.append(("forward",)) or model(**batch)  # noqa: E731
    vram_measure.step(model, batch, foreach(model.parameters()), count, tmp_path / "one.pickle")
    assert cuda.calls == [
        ("forward",),
        ("record", {"stacks": "python"}),
        ("forward",),
        ("dump", str(tmp_path / "one.pickle")),
        ("record", {"enabled": None}),
    ]


def test_what_was_reserved_before_is_not_this_step_s(monkeypatch):
    """The cache is emptied, and then the record of the most that was reserved: before a model is made, and after."""
    calls = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    vram_measure._clear("cpu")
    assert calls == []
    vram_measure._clear("cuda")
    assert calls == ["empty_cache", "reset_peak_memory_stats"]
    monkeypatch.setattr(vram_measure, "_clear", calls.append)
    asked = vram.Question(architectures.find("shallow"), memory_methods.Options(), 1, 8, False, "sgd", None)
    vram_measure.measure(asked, vram.methods()["lora"], "cpu")
    assert calls[2:] == ["cpu", "cpu"]


def test_each_method_has_a_snapshot_of_its_own(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(vram_measure, "measure", lambda question, method, device, file: seen.append(file))
    asked = vram.Question(architectures.find("shallow"), memory_methods.Options(), 1, 8, False, "adamw", 90)
    monkeypatch.setattr(vram.Question, "predict", lambda *args: None)
    for names in (["lora"], ["full", "lora"]):
        vram.answer(asked, [vram.methods()[name] for name in names], "cuda", list, tmp_path / "a.b.pickle")
    assert [path.name for path in seen] == ["a.b.pickle", "a.b-full.pickle", "a.b-lora.pickle"]

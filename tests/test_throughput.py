"""benchmarks/throughput.py: going on where a run ended, every row of a command, shapes of named models."""

import csv
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last, so that an installed peft_kernels stays the one that is tested

from benchmarks import bias_grad, cases, environment, lora_linear, measure, rows, summary, throughput  # noqa: E402
from benchmarks.bias_grad import BiasCase  # noqa: E402
from benchmarks.lora_linear_check import LoRACase, make_inputs  # noqa: E402
from benchmarks.measure import Contender, Effort  # noqa: E402

SMALL = LoRACase(24, 40, 32, 4, torch.bfloat16)
ENV = {"device": "test", "threads": "1", "source": "abc", "seed": "0"}
SHORT = Effort(5, 0.0, 5)
OURS = "peft_kernels"


def _sleeper(name: str, role: str, seconds: float, **more) -> Contender:
    return Contender(name, role, lambda i: time.sleep(seconds), **more)


def test_an_interrupted_suite_goes_on_where_it_ended(tmp_path):
    path = tmp_path / "lora_linear.csv"
    done, other = SMALL, replace(SMALL, M=7)
    rows.write(path, cases.run_case("lora_linear", done, "cpu", ENV, SHORT, [_sleeper("floor", "floor", 0.0)]))
    found = throughput.current(rows.read(path), ENV, 5)
    assert throughput.pending([done, other], found, ["both"]) == [other]
    assert throughput.pending([replace(done, compiled=True)], found, ["both"]) == [replace(done, compiled=True)]
    for name in ("source", "device", "threads", "torch", "triton", "peft", "driver", "seed"):
        assert throughput.current(rows.read(path), ENV | {name: "changed"}, 5) == [], name
    assert throughput.current(rows.read(path), ENV, 6) == []
    assert throughput.pending([done, other], found, measure.PARTS) == [done, other]
    assert SMALL.label in summary.table(rows.read(path)) and summary.table([]) == "no rows"


@pytest.mark.parametrize("primitive", cases.PRIMITIVES)
def test_a_case_that_was_measured_is_not_pending(primitive):
    """Not of all can forward and backward be timed apart: a case says of which, and those are what its rows are."""
    tiny = cases.PRIMITIVES[primitive].suites["tiny"]
    for case in (tiny[0], tiny[-1]):
        made = cases.run_case(primitive, case, "cpu", ENV, SHORT, parts=measure.PARTS)
        assert {row["part"] for row in made} == set(case.parts)
        assert throughput.pending([case], made, measure.PARTS) == []


def test_every_row_of_a_command(tmp_path, capsys, monkeypatch):
    """Forward, backward and both of every contender, in a file of its own for the primitive; then nothing is left."""
    arguments = ["--suite", "tiny", "--rounds", "2", "--device", "cpu", "--csv", str(tmp_path), "--seed", "5"]
    monkeypatch.setattr(environment, "source_hash", lambda: "abc")
    assert throughput.main(["lora_linear", *arguments]) == 0
    found = list(csv.DictReader((tmp_path / "lora_linear.csv").open()))
    tiny = cases.PRIMITIVES["lora_linear"].suites["tiny"]
    assert {row["case"] for row in found} == {case.label for case in tiny}
    for name in {row["contender"] for row in found}:
        assert sum(row["contender"] == name for row in found) == len(measure.PARTS) * len(tiny), name
    assert all(row["ms_p50"] for row in found if row["status"] == "ok")
    assert {row["seed"] for row in found} == {"5"}
    first = capsys.readouterr().out
    assert throughput.main(["lora_linear", *arguments]) == 0  # all from the file
    again = capsys.readouterr().out
    assert re.findall(r"^\| M=.*", again, re.M) == re.findall(r"^\| M=.*", first, re.M)


def test_the_seed_decides_the_inputs(monkeypatch):
    monkeypatch.setattr(lora_linear, "input_sets", lambda nbytes, device: 3)
    seen = []
    monkeypatch.setattr(lora_linear, "make_inputs", lambda case, device, seed: seen.append(seed) or inputs)
    inputs = make_inputs(SMALL, "cpu", 9)
    lora_linear.contenders(SMALL, "cpu", 9)
    assert seen == [9, 10, 11]
    assert not torch.equal(make_inputs(SMALL, "cpu", 1).x, inputs.x)


def test_wrong_values_and_leaks_fail_the_command(monkeypatch, capsys):
    kept = []
    field = [
        _sleeper("floor", "floor", 0.0),
        Contender("bad", "ours", lambda i: None, check=lambda: {"y": 3.0}),
        Contender("leaky", "peer", lambda i: kept.append(torch.empty(1000))),
    ]
    changed = replace(cases.PRIMITIVES["lora_linear"], contenders=lambda case, device, seed: field)
    monkeypatch.setitem(cases.PRIMITIVES, "lora_linear", changed)
    assert throughput.main(["lora_linear", "--suite", "tiny", "--parts", "both", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "bad: wrong values: y 3x its bound" in text and "leaky: leaks 4000 bytes a step" in text


@pytest.mark.parametrize(("role", "code"), [("floor", 1), ("ours", 1), ("peer", 0)])
def test_ours_must_run_and_a_peer_may_not(role, code, monkeypatch):
    field = [Contender("broken", role, missing="error: RuntimeError: no such kernel")]
    changed = replace(cases.PRIMITIVES["lora_linear"], contenders=lambda case, device, seed: field)
    monkeypatch.setitem(cases.PRIMITIVES, "lora_linear", changed)
    assert throughput.main(["lora_linear", "--suite", "tiny", "--device", "cpu"]) == code


def test_only_what_was_asked_for_is_printed(tmp_path, capsys, monkeypatch):
    """The file holds more: another case, other parts."""
    monkeypatch.setattr(environment, "source_hash", lambda: "abc")
    tiny = cases.PRIMITIVES["lora_linear"].suites["tiny"]
    changed = replace(cases.PRIMITIVES["lora_linear"], suites={"tiny": tiny[:1], "gpu": tiny[1:2]})
    monkeypatch.setitem(cases.PRIMITIVES, "lora_linear", changed)
    arguments = ["lora_linear", "--rounds", "1", "--device", "cpu", "--csv", str(tmp_path / "rows.csv")]
    assert throughput.main([*arguments, "--suite", "tiny"]) == 0
    assert throughput.main([*arguments, "--suite", "gpu", "--parts", "forward"]) == 0
    capsys.readouterr()
    assert throughput.main([*arguments, "--suite", "tiny", "--parts", "both"]) == 0
    (line,) = re.findall(r"^\| M=.*", capsys.readouterr().out, re.M)
    assert tiny[0].label in line and "| both " in line


def test_compiled_peers_are_asked_for_or_in_the_suite():
    pytest.importorskip("transformers", reason="its models are transformers': pip install transformers")
    suite = cases.PRIMITIVES["lora_linear"].suites["gpu"]
    twice = ["--suite", "gpu", "--model", "llama-3-8b", "--rows", "8192", "--rank", "16", "--device", "cpu"]
    found = throughput.chosen_cases("lora_linear", throughput.arguments(twice))
    assert {case for case in suite if case.compiled} == {case for case in found if case.compiled}
    assert len(found) == len(suite) + 3  # of four shapes one is the suite's
    args = throughput.arguments(["--suite", "tiny", "--compile", "--device", "cpu"])
    assert all(case.compiled for case in throughput.chosen_cases("lora_linear", args))


def test_the_layers_of_a_named_model(capsys):
    pytest.importorskip("transformers", reason="its models are transformers': pip install transformers")
    args = throughput.arguments(["--model", "llama-3-8b", "--rows", "8", "16", "--rank", "4", "--device", "cpu"])
    found = throughput.chosen_cases("lora_linear", args)
    shapes = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
    assert [(case.M, case.N, case.K) for case in found] == [(M, N, K) for M in (8, 16) for N, K in shapes]
    assert {case.R for case in found} == {4}
    assert "N=14336 K=4096 gate_proj, up_proj; N=4096 K=14336 down_proj" in capsys.readouterr().out
    for arguments, message in (
        (["--model", "nothing"], "model 'nothing' is no file"),
        (["--model", "llama-3-8b", "--rank", "1025"], "rank is 1025; expected 1 to 1024"),
    ):
        assert throughput.main(["lora_linear", *arguments, "--device", "cpu"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora"], "primitive 'lora'; expected one or more of bias_act, bias_grad, lora_linear, nf4, nf4_linear, norm"),
        (["--rows", "0"], "--rows is 0; expected at least 1"),
        (["--rounds", "0"], "--rounds is 0; expected at least 1"),
        (["--dropout", "1"], "--dropout is 1.0; expected 0 up to"),
        (["lora_linear", "--csv", "/dev/null/rows.csv"], "--csv /dev/null/rows.csv: "),
        (["lora_linear", "--csv", "FOREIGN.csv"], "has columns ['a', 'b']"),
    ],
)
def test_what_is_wrong_is_said(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOREIGN.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        throughput.main([*arguments, "--device", "cpu"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bias_gradient_beside_a_read(dtype, monkeypatch):
    """Every contender is right; one that drops a row is not."""
    case = BiasCase(77, 40, dtype)
    found = cases.run_case("bias_grad", case, "cpu", ENV, SHORT)
    assert {row["role"]: row["status"] for row in found} == {"floor": "ok", "ours": "ok", "peer": "ok"}
    assert {row["status"] for row in found} == {"ok"}
    monkeypatch.setattr(bias_grad.op, "bias_grad", lambda dy, dtype: dy[1:].sum(0).to(dtype))
    by = {row["contender"]: row for row in cases.run_case("bias_grad", case, "cpu", ENV, SHORT)}
    assert by[OURS]["status"].startswith("wrong values: dbias") and not by[OURS]["ms_p50"]


def test_the_floor_of_the_bias_gradient_reads_every_byte():
    dy = torch.zeros(3, 5, dtype=torch.bfloat16)
    assert bias_grad.read(dy) == 0
    for i in range(dy.numel()):
        one = dy.clone()
        one.view(-1)[i] = 1
        assert bias_grad.read(one) != 0
    assert bias_grad.work({"M": 8, "N": 4}, "bfloat16", True) == (9 * 4 * 2, 32)

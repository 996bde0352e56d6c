"""The harness is measured too: planted slow, wrong, leaking and missing contenders, rows, tuning, the step runner."""

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last, so that an installed peft_kernels stays the one that is tested

from benchmarks import cases, environment, lora_linear, measure, rows, steps, suite, summary, tune  # noqa: E402
from benchmarks.lora_linear_check import LoRACase, make_inputs, step, value_errors  # noqa: E402
from benchmarks.measure import Contender, Effort, Timing  # noqa: E402
from peft_kernels.kernels.lora_linear import configs  # noqa: E402

SMALL = LoRACase(24, 40, 32, 4, torch.bfloat16)
DROPPED = replace(SMALL, dropout=0.25)
ENV = {"device": "test", "threads": "1", "source": "abc"}
SHORT = Effort(5, 0.0, 5)
OURS = "peft_kernels"


def _by_name(found) -> dict[str, dict]:
    return {row["contender"]: row for row in found}


def _sleeper(name: str, role: str, seconds: float, **more) -> Contender:
    return Contender(name, role, lambda i: time.sleep(seconds), **more)


# Planted contenders


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


def test_a_leak_is_seen():
    kept = []
    block = 1 << 20

    def leaking(i: int) -> None:
        kept.append(torch.empty(block, dtype=torch.uint8))

    clean = measure.memory(lambda i: torch.empty(block, dtype=torch.uint8), "cpu")
    assert (clean.peak, clean.left) == (block, 0)
    assert measure.memory(leaking, "cpu").left == block


def test_what_is_saved_is_counted_once_and_without_parameters():
    x = torch.randn(6, 8, requires_grad=True)
    weight = torch.randn(5, 8, requires_grad=True)
    assert measure.saved_bytes(lambda: torch.nn.functional.linear(x, weight), [weight]) == x.nbytes
    assert measure.saved_bytes(lambda: (x * x.exp()) @ weight.t(), [weight]) == 3 * x.nbytes
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


# Statistics and rows


def test_ratio_is_paired_and_its_interval_holds_the_median():
    drift = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]
    found = measure.ratio(Timing([3 * ms for ms in drift]), Timing(drift))
    assert (found.median, found.low, found.high) == (3, 3, 3)
    found = measure.ratio(Timing([float(i) for i in range(1, 101)]), Timing([1.0] * 100))
    assert found.median == 50.5 and 40 <= found.low <= 42 and 59 <= found.high <= 61


def test_input_sets_are_larger_than_three_times_the_cache(monkeypatch):
    monkeypatch.setattr(measure, "last_level_cache", lambda device: 50 * 2**20)
    for set_bytes in (2**23, 40 * 2**20, 150 * 2**20, 2**30):
        assert measure.input_sets(set_bytes, "cuda") * set_bytes > 150 * 2**20
    assert measure.input_sets(1, "cuda") == 32


def test_rows_merge_by_key_and_refuse_other_columns(tmp_path):
    path = tmp_path / "device" / "planted.csv"
    one = rows.make_row(primitive="p", case="M=1", contender="a", ms_p50=1.23456789, status="ok", **ENV)
    assert tuple(one) == rows.COLUMNS and one["ms_p50"] == "1.2346"
    rows.write(path, [one, rows.make_row(primitive="p", case="M=2", contender="a")])
    rows.write(path, [one | {"ms_p50": "2"}])
    assert [(row["case"], row["ms_p50"]) for row in rows.read(path)] == [("M=1", "2"), ("M=2", "")]
    assert [file.name for file in path.parent.iterdir()] == ["planted.csv"]
    with pytest.raises(KeyError, match="no such column: speed"):
        rows.make_row(speed=1)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has columns"):
        rows.read(path)


def test_environment_names_what_a_row_needs(monkeypatch):
    facts = environment.environment("cpu")
    assert set(facts) <= set(rows.COLUMNS) and facts["torch"] == torch.__version__ and facts["threads"].isdigit()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert environment.commit() == "unknown"
    assert len(environment.source_hash()) == 12


def test_an_interrupted_suite_goes_on_where_it_ended(tmp_path):
    path = tmp_path / "lora_linear.csv"
    done, other = SMALL, replace(SMALL, M=7)
    rows.write(path, cases.run_case("lora_linear", done, "cpu", ENV, SHORT, [_sleeper("floor", "floor", 0.0)]))
    assert suite.pending([done, other], path, ENV) == [other]
    assert suite.pending([done, other], path, ENV | {"source": "changed"}) == [done, other]
    assert SMALL.label in summary.table(path, "abc") and "no rows" in summary.table(path, "changed")


# The step runner


def _step(name: str, code: str, budget: float = 20.0, **more) -> steps.Step:
    return steps.Step(name, (sys.executable, "-c", code), budget, **more)


def _run(tmp_path: Path, *todo: steps.Step, source: str = "one", **more) -> list[tuple[str, str]]:
    outcomes = steps.run_steps(todo, tmp_path / "work", source, tmp_path, more.pop("limit", 60), **more)
    return [(one.name, one.status) for one in outcomes]


def test_steps_resume_and_repeat_for_other_sources(tmp_path):
    count = _step("count", "open('ran', 'a').write('x')")
    assert _run(tmp_path, count) == [("count", "done")]
    assert _run(tmp_path, count) == [("count", "done before")]
    assert _run(tmp_path, count, source="two") == [("count", "done")]
    assert _run(tmp_path, count, source="two", force=True) == [("count", "done")]
    assert _run(tmp_path, replace(count, env={"OTHER": "1"}), source="two") == [("count", "done")]
    assert (tmp_path / "ran").read_text() == "xxxx"


def test_a_red_test_stops_the_run_and_shows_its_log(tmp_path, capsys):
    red = _step("tests", "print('1 failed'); raise SystemExit(1)")
    after = _step("measure", "open('measured', 'w')")
    assert _run(tmp_path, red, after) == [("tests", "failed"), ("measure", "not run")]
    assert "1 failed" in capsys.readouterr().out and not (tmp_path / "measured").exists()
    assert _run(tmp_path, replace(red, stops=()), after) == [("tests", "failed"), ("measure", "done")]


def test_a_step_that_overran_says_so_and_leaves_no_process(tmp_path, capsys):
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3); "
    child += 'open("late", "w")\']); print(\'begun\', flush=True); time.sleep(60)'
    slow = _step("slow", child, budget=1.5, stops=("failed",))
    assert _run(tmp_path, slow, _step("next", "")) == [("slow", "overran"), ("next", "done")]
    assert "stopped after 2 s" in capsys.readouterr().out
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


def test_nothing_begins_when_the_whole_time_is_spent(tmp_path):
    assert _run(tmp_path, _step("late", ""), limit=1.0) == [("late", "not run")]


# Tuning


def test_tuning_finds_the_planted_best_and_writes_rows_that_configs_reads(tmp_path):
    case = LoRACase(8192, 4096, 4096, 64, torch.bfloat16)
    base = configs.pick_config(case.M, case.N, case.K, case.R, case.dtype, 90)
    target = tune.gemm_choices(base, case, 90)[-1]

    def clock(tried):
        cost = [1.0 + (one.gemm != target.gemm) + one.down.span / 1e6 for one in tried]
        return [ms if one.path == target.path else None for one, ms in zip(tried, cost, strict=True)]

    best, ms = tune.best_config(base, case, 90, clock)
    assert (best.path, best.gemm) == (target.path, target.gemm) and math.isfinite(ms)
    assert best.down.span <= base.down.span
    path = tmp_path / "configs.json"
    path.write_text(json.dumps([tune.row(best, case, 90, "planted, today")]))
    ((key, ((M, config),)),) = configs.read_tuned(str(path)).items()
    expected = (90, "bfloat16", 4096, 4096, 64, False), 8192, replace(best, measured="planted, today")
    assert (key, M, config) == expected


def test_no_contender_goes_first_always_or_reads_what_the_one_before_has_read():
    calls = []
    contenders = [Contender(n, "peer", lambda i, n=n: calls.append((n, i))) for n in "abc"]
    measure.time_cpu(contenders, Effort(6, 0.0, 6))
    timed = calls[6:]  # after two rounds of warm-up
    assert [i for _, i in timed] == list(range(18))
    assert [name for name, _ in timed[::3]] == list("abcabc")

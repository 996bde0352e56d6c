"""What benchmarks stand on: statistics, result files, tuning, the runner of steps."""

import json
import math
import sys
import time
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last, so that an installed peft_kernels stays the one that is tested

from benchmarks import environment, gpu, measure, rows, steps, summary, tune  # noqa: E402
from benchmarks.lora_linear_check import LoRACase  # noqa: E402
from benchmarks.measure import Effort, Timing  # noqa: E402
from peft_kernels.kernels.lora_linear import configs  # noqa: E402

ENV = {"device": "test", "threads": "1", "source": "abc"}


# Statistics and rows


def test_ratio_is_paired_and_its_interval_holds_the_median():
    drift = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]
    found = measure.ratio(Timing([3 * ms for ms in drift]), Timing(drift))
    assert (found.median, found.low, found.high) == (3, 3, 3)
    assert measure.ratio(Timing([1.0, 2.0, 9.0]), Timing([9.0, 1.0, 3.0])).median == 2  # 1/9, 2/1, 9/3
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
    for name in rows.KEY:  # rows of another device, another way of timing, ... are other rows
        assert len(rows.merge([one], [one | {name: "other"}])) == 2, name
    with pytest.raises(KeyError, match="no such column: speed"):
        rows.make_row(speed=1)
    early = {name: value for name, value in one.items() if name not in rows.EARLIER}
    path.write_bytes(rows.csv_bytes(tuple(early), [early]))
    assert rows.read(path) == [one | rows.EARLIER]
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


def test_no_contender_always_comes_after_the_same_one_or_reads_what_the_one_before_has_read():
    def called() -> list[tuple[str, int]]:
        calls = []
        measure.time_cpu({n: lambda i, n=n: calls.append((n, i)) for n in "abc"}, Effort(20, 0.0, 20))
        return calls[6:]  # after two rounds of warm-up

    timed = called()
    assert timed == called()
    assert [i for _, i in timed] == list(range(60))
    assert {tuple(name for name, _ in timed[i : i + 3]) for i in range(0, 60, 3)} == set(permutations("abc"))


def test_problems_are_told_once_for_all_parts():
    bad = {"case": "M=1", "dtype": "d", "timing": "wall", "contender": "c", "status": "leaks 3 bytes a step"}
    found = [rows.make_row(part=part, **bad) for part in ("forward", "backward")]
    assert summary.problems(found) == ["d M=1 wall c: leaks 3 bytes a step"]


# What `make gpu` publishes


def test_only_what_these_sources_measured_is_published(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    found = [rows.make_row(primitive="p", case="M=1", contender=name, source=name) for name in ("now", "before")]
    for name in ("lora_linear", "lora_linear_paths"):
        rows.write(work / f"{name}.csv", found)
    for name in ("ceilings.json", "memory_small.csv", "memory_large.csv", "p_roofline.png"):
        (work / name).write_text(name)
    outcomes = [steps.Outcome("ceilings", "done"), steps.Outcome("memory small", "done before")]
    outcomes += [steps.Outcome("memory large", "failed"), steps.Outcome("pictures", "overran")]
    written = gpu.publish(work, out, ["lora_linear"], "now", outcomes)
    assert [path.name for path in written] == [
        "lora_linear.csv", "lora_linear_paths.csv", "ceilings.json", "memory_small.csv"
    ]  # fmt: skip
    assert all([row["contender"] for row in rows.read(path)] == ["now"] for path in written[:2])


def test_cases_are_read_and_ordered_by_numbers_and_words():
    labels = ["M=8 N=4 act=gelu", "M=16 N=4 act=gelu", "M=8 N=4 act=relu", "M=8 K=4 kind=rms_norm residual=1"]
    assert rows.values_of(labels[0]) == {"M": 8.0, "N": 4.0, "act": "gelu"}
    found = [
        rows.make_row(case=label, dtype="d", timing="wall", part="both", contender="floor", role="floor")
        for label in (labels[1], labels[2], labels[0])
    ]
    lines = [line for line in summary.table(found).splitlines() if "M=" in line]
    assert [line.split("|")[1].strip() for line in lines] == [labels[0], labels[1], labels[2]]

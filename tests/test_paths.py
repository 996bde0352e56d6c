"""The ways of a 4-bit product, forced by name: that each is what runs, and what the sweep over M says of them."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
pytest.importorskip("benchmarks", reason="the benchmarks are not part of the wheel")

from benchmarks import paths, rows  # noqa: E402
from peft_kernels.kernels.nf4_linear import configs as nf4_configs  # noqa: E402
from peft_kernels.kernels.qlora_linear import configs as qlora_configs  # noqa: E402

BF16 = torch.bfloat16


def picked(M: int, dtype: torch.dtype = BF16) -> bool:
    """Whether "rows" runs it on an RTX 5090, where the model says chunks at 64 rows of this shape."""
    return nf4_configs.pick_rows(M, 4096, 4096, 64, dtype, 120) is not None


def test_a_forced_path_runs_wherever_it_can_and_no_longer():
    assert picked(16) and not picked(64)
    with nf4_configs.force(path="rows"):
        assert picked(16) and picked(64) and not picked(65) and not picked(16, torch.float32)
        with nf4_configs.force(path="chunks"):
            assert not picked(16)
        assert picked(64)
    assert picked(16) and not picked(64)


def test_forced_chunks_have_their_size_under_any_path():
    lines = [nf4_configs.chunk_lines(4096, 4096, BF16)]
    with nf4_configs.force(chunk_bytes=48 * 2**20):
        lines.append(nf4_configs.chunk_lines(4096, 4096, BF16))
        with nf4_configs.force(path="chunks"):
            lines.append(nf4_configs.chunk_lines(4096, 4096, BF16))
            with nf4_configs.force(chunk_bytes=8 * 2**20):
                lines.append(nf4_configs.chunk_lines(4096, 4096, BF16))
    assert lines == [2048, 4096, 4096, 1024]
    assert nf4_configs.chunk_lines(4096, 4096, BF16) == 2048


def test_force_refuses_what_is_not_there():
    with pytest.raises(ValueError, match="path is 'fast'; expected one of"), nf4_configs.force(path="fast"):
        pass
    with pytest.raises(ValueError, match="chunk_bytes is 0; expected at least 1"), nf4_configs.force(chunk_bytes=0):
        pass
    assert nf4_configs._forced == []


@pytest.mark.parametrize("M", [4, qlora_configs.DENSE_ROWS])
@pytest.mark.parametrize("dense", [False, True])
def test_the_forced_base_is_what_runs(dense, M):
    """Forward and backward, by the ops that are called."""
    case = paths.LoRACase(M, 96, 64, 4, BF16)
    way = {one.name: one for one in paths.qlora_ways(case, "cpu")}["dequantised" if dense else "in place"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        way.step(0)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.get("peft_kernels::nf4_dequantize", 0) == (2 if dense else 0)
    linear = [counts.get(f"peft_kernels::nf4_linear_{part}", 0) for part in ("fwd", "bwd")]
    assert linear == ([0, 0] if dense else [1, 1])
    assert qlora_configs._forced == []


def row(M: int, contender: str, ms: float | None, timing: str = "graph", role: str = "ours") -> rows.Row:
    return rows.make_row(
        case=f"M={M} N=8 K=8", dtype="bfloat16", contender=contender, ms_p50=ms, timing=timing, role=role
    )


def test_ranges_are_of_the_fastest_in_graphs_and_leave_out_floors_and_what_failed():
    found = [row(M, "rows", float(M)) for M in (16, 8, 32)]
    found += [row(8, "chunks", 9.0), row(16, "chunks", 9.0), row(32, "chunks", 9.0), row(100, "chunks", 9.0)]
    found += [row(16, "floor", 0.1, role="floor"), row(32, "broken", None), row(16, "rows", 0.1, timing="eager")]
    assert paths.ranges(found) == ["bfloat16 N=8 K=8: M=8-8 rows, M=16-100 chunks"]
    assert paths.ranges([row(8, "one", 2.0, "wall"), row(8, "two", 1.0, "wall")]) == ["bfloat16 N=8 K=8: M=8-8 two"]


@pytest.mark.parametrize("primitive", sorted(paths.SWEPT))
def test_the_sweep_measures_every_way_and_keeps_the_rows(primitive, tmp_path, capsys):
    file = tmp_path / "paths.csv"
    arguments = [primitive, "--device", "cpu", "--tiny", "--rounds", "2", "--csv", str(file)]
    assert paths.main(arguments) == 0
    found = rows.read(file)
    assert len(found) == 2 * 3 and all(one["status"] == "ok" and one["ms_p50"] for one in found)
    assert "fastest:\nbfloat16 N=" in capsys.readouterr().out


def test_the_sweep_refuses_a_file_that_it_cannot_write(tmp_path, capsys):
    with pytest.raises(SystemExit):
        paths.main(["nf4_linear", "--device", "cpu", "--tiny", "--csv", str(tmp_path)])
    assert f"--csv {tmp_path}: cannot be written" in capsys.readouterr().err

"""benchmarks/plot.py: pictures from result files, of what the rows say."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last, so that an installed peft_kernels stays the one that is tested

pytest.importorskip("matplotlib", reason="draws with matplotlib: pip install matplotlib")

from benchmarks import lora_linear, plot, rows  # noqa: E402


def _row(contender: str, M: int, ratio: float, **more) -> dict[str, str]:
    fixed = {"primitive": "lora_linear", "dtype": "bfloat16", "timing": "graph", "device": "x", "status": "ok"}
    fixed |= {"role": "floor" if contender == "frozen" else "ours", "ms_p50": 1e-3 * M, "part": "both"}
    values = {"ratio_floor": ratio, "ratio_floor_low": 0.9 * ratio, "ratio_floor_high": 1.1 * ratio}
    return rows.make_row(contender=contender, case=f"M={M} N=64 K=32 R=4 dropout=0", **(fixed | values | more))


RATIOS = {"frozen": 1.0, "peft_kernels": 1.2, "PEFT": 2.0}
FOUND = [_row(name, M, ratio) for M in (8, 16) for name, ratio in RATIOS.items()]


def test_a_line_per_contender_over_m():
    figure = plot.over_floor([*FOUND, _row("lonely", 8, 1.0, timing="wall")])
    (axes,) = [axes for axes in figure.axes if axes.axison]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["PEFT"] == [[8, 2.0], [16, 2.0]] and lines["peft_kernels"] == [[8, 1.2], [16, 1.2]]
    assert "lonely" not in lines


def test_the_roofline_s_work():
    sizes = {"M": 8.0, "N": 64.0, "K": 32.0, "R": 4.0}
    assert lora_linear.work(sizes, "bfloat16", True) == (2 * 2 * (8 * 32 + 64 * 32 + 8 * 64), 4 * 8 * 64 * 32)
    assert lora_linear.work(sizes, "bfloat16", False)[1] == 4 * 8 * 64 * 32 + 6 * 8 * 4 * (64 + 32)


def test_files_of_a_folder(tmp_path, monkeypatch, capsys):
    rows.write(tmp_path / "lora_linear.csv", FOUND)
    assert [path.name for path in plot.draw(tmp_path, tmp_path)] == ["lora_linear_over_floor.png"]
    (tmp_path / "ceilings.json").write_text(json.dumps({"bf16_tflop_per_s": 700.0, "copy_gb_per_s": 3000.0}))
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path), "--out", str(tmp_path / "pictures")])
    assert plot.main() == 0
    drawn = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in drawn] == ["lora_linear_over_floor.png", "lora_linear_roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "empty")])
    assert plot.main() == 1
    assert "no rows" in capsys.readouterr().out

"""benchmarks/plot.py: pictures from result files, of what the rows say."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last, so that an installed peft_kernels stays the one that is tested

pytest.importorskip("matplotlib", reason="draws with matplotlib: pip install matplotlib")

from matplotlib.figure import Figure  # noqa: E402

from benchmarks import environment, lora_linear, plot, rows  # noqa: E402


def _row(contender: str, M: int, ratio: float, **more) -> dict[str, str]:
    fixed = {"primitive": "lora_linear", "dtype": "bfloat16", "timing": "graph", "device": "x", "status": "ok"}
    fixed |= {"role": "floor" if contender == "frozen" else "ours", "ms_p50": 1e-3 * M, "part": "both"}
    values = {"ratio_floor": ratio, "ratio_floor_low": 0.9 * ratio, "ratio_floor_high": 1.1 * ratio}
    return rows.make_row(contender=contender, case=f"M={M} N=64 K=32 R=4 dropout=0", **(fixed | values | more))


RATIOS = {"frozen": 1.0, "peft_kernels": 1.2, "PEFT": 2.0}
FOUND = [_row(name, M, ratio) for M in (8, 16) for name, ratio in RATIOS.items()]


def _lines(figure) -> dict[str, list[list[float]]]:
    """Label -> points of the one panel that is drawn."""
    (axes,) = [axes for axes in figure.axes if axes.axison]
    named = [line for line in axes.get_lines() if not line.get_label().startswith("_")]  # not the floor's
    return {line.get_label(): line.get_xydata().tolist() for line in named}


def test_a_line_per_contender_over_m():
    figure = plot.over_floor([*FOUND, _row("lonely", 8, 1.0, timing="wall")])
    lines = _lines(figure)
    assert lines["PEFT"] == [[8, 2.0], [16, 2.0]] and lines["peft_kernels"] == [[8, 1.2], [16, 1.2]]
    assert "lonely" not in lines


def test_the_roofline_s_work():
    sizes = {"M": 8.0, "N": 64.0, "K": 32.0, "R": 4.0}
    assert lora_linear.work(sizes, "bfloat16", True) == (2 * 2 * (8 * 32 + 64 * 32 + 8 * 64), 4 * 8 * 64 * 32)
    assert lora_linear.work(sizes, "bfloat16", False)[1] == 4 * 8 * 64 * 32 + 6 * 8 * 4 * (64 + 32)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """What is given rows, and gives the file name and the figure of each picture of them."""

    def draw(found) -> dict[str, Figure]:
        figures = {}
        monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: figures.update({path.name: figure}))
        rows.write(tmp_path / "lora_linear.csv", found)
        ceilings = {"bf16_tflop_per_s": 700.0, "copy_gb_per_s": 3000.0, "device": "x"}
        (tmp_path / "ceilings.json").write_text(json.dumps(ceilings))
        assert [path.name for path in plot.draw(tmp_path, tmp_path)] == list(figures)
        return figures

    return draw


def test_a_picture_per_device(drawn):
    """With its name; the ceilings are of one."""
    other = [_row(name, M, 3 * ratio, device="Y, 2 threads") for M in (8, 16) for name, ratio in RATIOS.items()]
    figures = drawn([*FOUND, *other])
    expected = ["lora_linear_y-2-threads_over_floor.png", "lora_linear_x_over_floor.png", "lora_linear_x_roofline.png"]
    assert list(figures) == expected
    assert [figure.get_suptitle() for figure in figures.values()] == ["Y, 2 threads", "x", "x"]
    assert [_lines(figures[name])["PEFT"] for name in expected[:2]] == [[[8, 6.0], [16, 6.0]], [[8, 2.0], [16, 2.0]]]
    assert sum(len(dots.get_offsets()) for dots in figures[expected[2]].axes[0].collections) == len(FOUND)


def test_of_a_case_measured_twice_the_newest_is_drawn(drawn):
    """Whatever the number of threads, which keeps both in the file; one that came to nothing since is not drawn."""
    day = "2026-11-{} 09:00:00 UTC".format
    old = [_row(name, M, 5.0, threads=16, date=day(22), commit="a") for M in (8, 16) for name in RATIOS]
    new = [_row(name, M, RATIOS[name], threads=8, date=day(23), commit="b") for M in (8, 16) for name in RATIOS]
    new[-1] |= {"status": "error", "ms_p50": "", "ratio_floor": ""}
    older = [_row("PEFT", 8, 7.0, threads=32, date=day(21))]
    figure = drawn([*old, *new, *older])["lora_linear_over_floor.png"]
    lines = _lines(figure)
    assert lines["PEFT"] == [[8, 2.0]] and lines["peft_kernels"] == [[8, 1.2], [16, 1.2]]


def test_other_parts_and_timings_are_not_drawn(drawn):
    others = [{"part": "forward"}, {"part": "backward"}, {"timing": "eager"}]
    found = [_row(f"PEFT {n}", M, 9.0, **more) for n, more in enumerate(others) for M in (8, 16)]
    found += [_row("PEFT", M, 9.0, **more, date="2027") for more in others for M in (8, 16)]
    figures = drawn([*FOUND, *found])
    assert set(_lines(figures["lora_linear_over_floor.png"])) == set(RATIOS)
    assert _lines(figures["lora_linear_over_floor.png"])["PEFT"] == [[8, 2.0], [16, 2.0]]
    dots = figures["lora_linear_roofline.png"].axes[0].collections
    assert {one.get_label() for one in dots} == set(RATIOS) and sum(len(one.get_offsets()) for one in dots) == 6


@pytest.mark.parametrize("package", ["matplotlib", "tabulate"])
def test_says_what_to_install(package, capsys, monkeypatch, tmp_path):
    real = environment.version
    monkeypatch.setattr(environment, "version", lambda name: "none" if name == package else real(name))
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(plot.__file__, run_name="__main__")
    assert ended.value.code == 2
    assert f"error: not installed: pip install {package}\n" in capsys.readouterr().err


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

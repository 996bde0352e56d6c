"""Pictures of result files: time over the floor against M, and the roofline, a PNG each beside the CSV.

python benchmarks/plot.py benchmarks/results/nvidia-h100-80gb-hbm3 [--out DIR]
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called by its path, it finds its neighbours too

from benchmarks import environment

if __name__ == "__main__" and (
    absent := [name for name in ("matplotlib", "tabulate") if environment.version(name) == "none"]
):  # before an import of one ends in a traceback
    argparse.ArgumentParser(prog="python benchmarks/plot.py").error(f"not installed: pip install {' '.join(absent)}")

from matplotlib.figure import Figure

from benchmarks import rows
from benchmarks.cases import PRIMITIVES
from benchmarks.rows import Row

_TIMINGS = ("graph", "wall")  # without launch gaps: what the kernels take


def by_device(every: list[Row]) -> dict[str, list[Row]]:
    """device -> the rows of whole steps without launch gaps, one for each case and contender: the newest, whatever the
    commit and the number of threads."""
    newest = {}
    for row in sorted(every, key=lambda row: row["date"]):
        if row["timing"] in _TIMINGS and row["part"] == "both":
            newest[tuple(row[name] for name in ("device", "case", "dtype", "contender", "timing"))] = row
    devices: dict[str, list[Row]] = defaultdict(list)
    for key in sorted(newest):
        devices[key[0]].append(newest[key])
    return devices


def sizes(row: Row) -> dict[str, float]:
    """Those values of its case that are numbers."""
    return {name: value for name, value in rows.values_of(row["case"]).items() if isinstance(value, float)}


def _others(row: Row) -> str:
    """What a panel shows one value of: all sizes but M, the dtype, the way of timing."""
    words = [word for word in row["case"].split() if not word.startswith("M=")]
    return " ".join((row["dtype"], *words, f"({row['timing']})"))


def _panels(found: list[Row]) -> dict[str, dict[str, list[Row]]]:
    """panel -> contender -> its rows by M, where there are at least two."""
    panels: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(found, key=lambda row: sizes(row)["M"]):
        panels[_others(row)][row["contender"]].append(row)
    return {name: by for name, by in panels.items() if max(map(len, by.values())) > 1}


def over_floor(found: list[Row]) -> Figure | None:
    """Time over the floor against M: a panel per shape, a line per contender, its 95 % interval around it."""
    panels = _panels([row for row in found if row["ratio_floor"]])
    if not panels:
        return None
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.6 * lines + 0.8), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (name, by) in zip(grid, panels.items(), strict=False):
        for contender, its in by.items():
            at = [sizes(row)["M"] for row in its]
            values, low, high = (
                [float(row[key]) for row in its] for key in ("ratio_floor", "ratio_floor_low", "ratio_floor_high")
            )
            ours = contender.startswith("peft_kernels")
            (line,) = axes.plot(at, values, "o-" if ours else "s--", label=contender, linewidth=2 if ours else 1)
            axes.fill_between(at, low, high, color=line.get_color(), alpha=0.2)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", title=name, xlabel="M, rows of x", ylabel="time over the floor")
        axes.title.set_fontsize(9)
    for axes in list(grid)[len(panels) :]:
        axes.set_axis_off()
    handles = {}
    for axes in figure.axes:
        handles |= dict(zip(axes.get_legend_handles_labels()[1], axes.get_legend_handles_labels()[0], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)))
    return figure


def roofline(found: list[Row], ceilings: dict, work: Callable) -> Figure | None:
    """FLOP/s against FLOPs per byte that must move, under the ceilings measured on the same card.

    work: see cases.Primitive.
    """
    timed = [row for row in found if row["ms_p50"]]
    if not timed:
        return None
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in timed:
        moved, flops = work(rows.values_of(row["case"]), row["dtype"], row["role"] == "floor")
        points[row["contender"]].append((flops / moved, flops / float(row["ms_p50"]) / 1e9))
    for contender, its in points.items():
        marker = "o" if contender.startswith("peft_kernels") else "s"
        axes.scatter(*zip(*its, strict=True), marker=marker, s=16, label=contender)
    rate, bandwidth = ceilings["bf16_tflop_per_s"], ceilings["copy_gb_per_s"] / 1e3
    most = max(x for its in points.values() for x, _ in its)
    least = min(x for its in points.values() for x, _ in its)
    edge = rate / bandwidth
    axes.plot([least / 2, edge, max(2 * edge, 2 * most)], [least / 2 * bandwidth, rate, rate], color="black")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must move", ylabel="TFLOP/s")
    axes.set_title(f"bf16 {rate:.0f} TFLOP/s, copies {1e3 * bandwidth:.0f} GB/s, both measured", fontsize=9)
    axes.legend(fontsize=7)
    return figure


def draw(folder: Path, out: Path) -> list[Path]:
    """Every picture that the folder's files have rows for; of several devices in one file, each has its own."""
    out.mkdir(parents=True, exist_ok=True)
    file = folder / "ceilings.json"
    ceilings = json.loads(file.read_text()) if file.exists() else None
    written = []
    for name, primitive in PRIMITIVES.items():
        devices = by_device(rows.read(folder / f"{name}.csv"))
        for device, found in devices.items():
            pictures = {"over_floor": over_floor(found)}
            if ceilings and primitive.work and ceilings.get("device", device) == device:
                pictures["roofline"] = roofline(found, ceilings, primitive.work)
            of = f"_{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}" if len(devices) > 1 else ""
            for kind, figure in pictures.items():
                if figure is not None:
                    figure.suptitle(device, fontsize=10)
                    written.append(out / f"{name}{of}_{kind}.png")
                    figure.savefig(written[-1], dpi=120)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/plot.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of one device's results")
    parser.add_argument("--out", type=Path, help="default: the folder itself")
    options = parser.parse_args()
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is no folder")
    written = draw(options.folder, options.out or options.folder)
    print("\n".join(f"wrote {path}" for path in written) or f"no rows of a known primitive in {options.folder}")
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())

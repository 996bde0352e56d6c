"""The demo's tables and files: losses.csv, losses.png, memory.csv, and what they say in one screen of text."""

import csv
from pathlib import Path

from matplotlib.figure import Figure
from tabulate import tabulate

from benchmarks.finetune import Run
from benchmarks.footprint import Footprint


def write_losses(runs: dict[str, Run], exact: dict[str, Run], out: Path) -> None:
    """losses.csv and losses.png: a column and a curve for each run of `runs`, and of `exact` (fp32, fewer steps)."""
    every = runs | {f"{name}, fp32": run for name, run in exact.items()}
    with open(out / "losses.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "step", "loss", "seconds"])
        for name, run in every.items():
            writer.writerows(
                [name, step, *values] for step, values in enumerate(zip(run.losses, run.seconds, strict=True))
            )
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, run), style in zip(every.items(), ("-", "--", "o", "x"), strict=False):
        axes.plot(run.losses, style, label=name, fillstyle="none")
    axes.set(xlabel="step", ylabel="loss on the answer tokens", yscale="log", title="SmolLM2-135M on movie reviews")
    axes.legend()
    figure.savefig(out / "losses.png", dpi=150)


def print_speed(before: float, after: dict[str, float], runs: dict[str, Run], tokens: int, peer: str, n: int) -> None:
    print(f"\nHeld-out accuracy on {n} snippets, and training speed over {tokens:,} tokens")
    rows = [["before", f"{before:.1%}", "", "", ""]]
    for name, run in runs.items():
        seconds = sum(run.seconds)
        ratio = f"{sum(runs[peer].seconds) / seconds:.2f}x" if peer in runs else ""
        rows.append([name, f"{after[name]:.1%}", f"{tokens / seconds:,.0f}", f"{seconds:.1f}", ratio])
    headers = ["", "accuracy", "tokens/s", "seconds", f"speed over {peer}"]
    print(tabulate(rows, headers=headers, stralign="right", disable_numparse=True))


def print_memory(footprints: dict[str, Footprint], dtype: str, out: Path) -> None:
    """The table in MB; the exact bytes go to memory.csv."""
    kinds = Footprint._fields
    with open(out / "memory.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", *(f"{kind}_bytes" for kind in kinds)])
        writer.writerows([name, *f] for name, f in footprints.items())
    print(f"\nPeak memory by kind in MB, one step on the longest batch, {dtype} base")
    rows = [[name, *(f"{n / 1e6:,.1f}" for n in (*f, f.total))] for name, f in footprints.items()]
    headers = ["", "weights", "gradients", "optimizer", "saved activations", "sum"]
    print(tabulate(rows, headers=headers, stralign="right", disable_numparse=True))


def _gap(one: Run, other: Run, start: int = 0) -> tuple[float, float]:
    """(largest, mean) difference of two loss curves over the steps that both have, from `start` on."""
    gaps = [abs(a - b) for a, b in list(zip(one.losses, other.losses, strict=False))[start:]]
    return max(gaps), sum(gaps) / len(gaps)


def curve_gaps(runs: dict[str, Run], exact: dict[str, Run], dtype: str, peer: str, fused: str) -> dict[str, tuple]:
    """What differs between the loss curves -> (largest, mean) difference."""
    gaps = {}
    if exact:
        steps = len(exact[peer].losses)
        gaps[f"{fused} fp32 - {peer} fp32, first {steps} steps"] = _gap(exact[fused], exact[peer])
        for name, run in runs.items():
            gaps[f"{name} {dtype} - {peer} fp32, first {steps} steps"] = _gap(run, exact[peer])
    if peer in runs:
        half = len(runs[peer].losses) // 2
        gaps[f"{fused} {dtype} - {peer} {dtype}, all steps"] = _gap(runs[fused], runs[peer])
        gaps[f"{fused} {dtype} - {peer} {dtype}, from step {half}"] = _gap(runs[fused], runs[peer], half)
    return gaps


def print_gaps(gaps: dict[str, tuple]) -> None:
    print("\nDifference of the loss curves")
    rows = [[name, f"{largest:.2g}", f"{mean:.2g}"] for name, (largest, mean) in gaps.items()]
    print(tabulate(rows, headers=["", "largest", "mean"], disable_numparse=True, colalign=("left", "right", "right")))

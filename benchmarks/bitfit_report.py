"""The encoder run's tables and files: bitfit.csv, bitfit.png, summary.json, rates.csv."""

import io
import json
from pathlib import Path
from statistics import median
from typing import NamedTuple

from matplotlib.figure import Figure
from tabulate import tabulate

from .classification import Share, difference, share
from .footprint import Footprint
from .rows import csv_bytes, replace_file

_SMOOTHED = 20  # steps of which the picture's loss is the mean


class Outcome(NamedTuple):
    """What is known of one method. stored, footprint and peak in bytes; right: of each held-out snippet, whether its
    label was predicted; reloaded: relative difference of the logits after storing and loading."""

    rate: float
    trained: int
    stored: int
    footprint: Footprint
    peak: int
    losses: list[float]
    seconds: list[float]
    right: list[bool]
    reloaded: float


def _row(name: str, one: Outcome, total: int) -> dict[str, object]:
    accuracy = share(one.right)
    return {
        "method": name,
        "learning_rate": one.rate,
        "trained": one.trained,
        "trained_percent": 100 * one.trained / total,
        "stored_bytes": one.stored,
        **{f"{kind}_bytes": size for kind, size in one.footprint._asdict().items()},
        "peak_bytes": one.peak,
        "seconds_per_step": median(one.seconds),
        "seconds": sum(one.seconds),
        "right": sum(one.right),
        "snippets": len(one.right),
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "reload_relative_difference": one.reloaded,
    }


def _percent(one: Share) -> str:
    return f"{100 * one.value:.1f} ({100 * one.low:.1f}-{100 * one.high:.1f})"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f}" if size >= 1e5 else f"{size / 1e6:.3f}"


def print_outcomes(outcomes: dict[str, Outcome], total: int, snippets: int) -> None:
    print(f"\nAccuracy on {snippets} held-out snippets in % with its 95 % interval; seconds are the median step's")
    lines = []
    for name, one in outcomes.items():
        stored = f"{one.stored / 1e3:,.1f}"
        sizes = (f"{one.trained:,}", f"{100 * one.trained / total:.3f}", stored)
        lines.append((name, f"{one.rate:g}", *sizes, f"{median(one.seconds):.3f}", _percent(share(one.right))))
    headers = ("", "rate", "trained", "% of all", "stored KB", "s/step", "accuracy")
    print(tabulate(lines, headers=headers, stralign="right", disable_numparse=True))
    print("\nBytes by kind in MB, one step on the longest batch, exact. saved: kept from forward for backward;")
    print("peak: the most that the CPU's allocator gave at once, with what is temporary")
    lines = [(name, *map(_mb, (*one.footprint, one.peak))) for name, one in outcomes.items()]
    headers = ("", "weights", "gradients", "optimizer", "saved", "peak")
    print(tabulate(lines, headers=headers, stralign="right", disable_numparse=True))
    if "bitfit" in outcomes:
        ours = outcomes["bitfit"].right
        for name, one in outcomes.items():
            if name != "bitfit":
                gap = Share(*(100 * value for value in difference(ours, one.right)))
                print(f"bitfit - {name}: {gap.value:+.1f} points (95 %: {gap.low:+.1f} to {gap.high:+.1f})")
    worst = max(one.reloaded for one in outcomes.values())
    print(f"\nStored and loaded back, each gives the same logits (largest relative difference {worst:.1e})")


def picture(outcomes: dict[str, Outcome]) -> Figure:
    """Loss, accuracy and bytes, by method."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    losses, accuracies, sizes = figure.subplots(1, 3)
    for name, one in outcomes.items():
        lately = [one.losses[max(0, step - _SMOOTHED) : step] for step in range(1, len(one.losses) + 1)]
        losses.plot([sum(some) / len(some) for some in lately], label=name)
    losses.set(xlabel="step", ylabel=f"loss, mean of {_SMOOTHED} steps")
    losses.legend()
    shares = [share(one.right) for one in outcomes.values()]
    names, values = list(outcomes), [100 * s.value for s in shares]
    spans = [[100 * (s.value - s.low) for s in shares], [100 * (s.high - s.value) for s in shares]]
    accuracies.errorbar(names, values, yerr=spans, fmt="o", capsize=4)
    accuracies.set(ylabel="held-out accuracy, %, with 95 % interval")
    base = [0.0] * len(names)
    for kind in Footprint._fields:
        heights = [getattr(one.footprint, kind) / 1e6 for one in outcomes.values()]
        sizes.bar(names, heights, bottom=base, label=kind)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    sizes.set(ylabel="MB in a step")
    sizes.legend()
    return figure


def write(outcomes: dict[str, Outcome], total: int, about: dict, out: Path) -> None:
    """bitfit.csv, bitfit.png and summary.json in `out`, each whole or not at all."""
    lines = [_row(name, one, total) for name, one in outcomes.items()]
    curves = {name: {"losses": one.losses, "seconds": one.seconds} for name, one in outcomes.items()}
    gaps = {}
    if "bitfit" in outcomes:
        ours = outcomes["bitfit"].right
        gaps = {f"bitfit - {n}": difference(ours, o.right)._asdict() for n, o in outcomes.items() if n != "bitfit"}
    summary = about | {"methods": lines, "accuracy_differences": gaps, "curves": curves}
    image = io.BytesIO()
    picture(outcomes).savefig(image, dpi=150, format="png")
    replace_file(out / "bitfit.csv", csv_bytes(tuple(lines[0]), lines))
    replace_file(out / "bitfit.png", image.getvalue())
    replace_file(out / "summary.json", json.dumps(summary, indent=1).encode() + b"\n")
    print(f"wrote {out}/bitfit.csv, bitfit.png, summary.json; {about['seconds']:.0f} s in all")


def print_rates(found: dict[tuple[str, float], Share], snippets: int) -> None:
    print(f"\nAccuracy in % on {snippets} snippets of the training side that were not trained on")
    best = {name: max((s.value, rate) for (n, rate), s in found.items() if n == name)[1] for name, _ in found}
    lines = [(n, f"{rate:g}", _percent(s), "best" if rate == best[n] else "") for (n, rate), s in found.items()]
    print(tabulate(lines, headers=("method", "rate", "accuracy", ""), disable_numparse=True))


def write_rates(found: dict[tuple[str, float], Share], out: Path) -> None:
    """rates.csv in `out`."""
    lines = [{"method": n, "learning_rate": rate, **s._asdict()} for (n, rate), s in found.items()]
    replace_file(out / "rates.csv", csv_bytes(tuple(lines[0]), lines))

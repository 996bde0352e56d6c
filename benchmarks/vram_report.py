"""The memory tables in print, as CSV, JSON and as a picture."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

from tabulate import tabulate

from peft_kernels.memory.replay import Moment
from peft_kernels.memory.trace import PHASES

from . import environment
from .rows import csv_bytes, replace_file

GIB = 2**30
COLUMNS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "saved activations",
    "logits": "logits and loss",
    "temporaries": "temporaries",
    "inputs": "inputs",
    "library": "cuBLAS",
    "rounding": "rounding",
}
"""Kinds of bytes, as the tables call them; together they are what is allocated."""

_VISIBLE = 0.002  # of the highest bar: less is no more than a line


def _gib(nbytes: float) -> str:
    size = nbytes / GIB
    return "-" if nbytes == 0 else f"{size:.4f}" if size < 0.1 else f"{size:.2f}"


def _kinds(moment: Moment) -> dict[str, int]:
    return {kind: moment.kinds.get(kind, 0) for kind in COLUMNS if kind != "rounding"} | {"rounding": moment.rounding}


def rows(results) -> Iterator[dict[str, object]]:
    """One row per method, source and phase; bytes by kind, allocated and reserved. `peak` is the phases' worst."""
    for result in results:
        one = result.estimate
        if one is None:
            continue
        yield {"method": result.method.name, "source": "estimate", "phase": "sum", **one.kinds, "allocated": one.total}
        replays = {"predicted": result.prediction and result.prediction.replay, "measured": result.measured}
        for source, replay in replays.items():
            if replay is None:
                continue
            for phase, moment in (*replay.phases.items(), ("peak", replay.peak)):
                row = {"method": result.method.name, "source": source, "phase": phase, **_kinds(moment)}
                yield row | {"allocated": moment.allocated, "reserved": replay.reserved, "during": moment.during}


def _estimates(question, results) -> str:
    lines = []
    for result in results:
        one = result.estimate
        if one is None:
            continue
        sums = (*one.kinds.values(), one.total)
        lines.append((result.method.name, f"{one.trained:,}", *(_gib(size) for size in sums)))
    nominal, width = question.architecture.nominal, question.options.dtype.itemsize
    if nominal and any(result.method.name == "full" for result in results):
        moments = 0 if question.optimizer == "sgd" else 2
        sums = tuple(times * nominal * width for times in (1, 1, moments, 2 + moments))
        lines.append((f"full, were it {nominal:.3g}", f"{nominal:,.0f}", *(_gib(size) for size in sums)))
    headers = ("method", "trained", "weights", "gradients", "SGD" if question.optimizer == "sgd" else "Adam", "sum")
    return tabulate(lines, headers=headers, disable_numparse=True, stralign="right")


def _phases(results) -> str:
    found = [row for row in rows(results) if row["source"] != "estimate" and row["phase"] != "peak"]
    used = [kind for kind in COLUMNS if any(row.get(kind) for row in found)]
    lines, last = [], None
    for row in found:
        name = (row["method"], row["source"])
        lines.append((
            *(name if name != last else ("", "")), row["phase"], *(_gib(row[kind]) for kind in used),
            _gib(row["allocated"]), _gib(row["reserved"] or 0) if row["phase"] == "step" else "",
        ))  # fmt: skip
        last = name
    headers = ("method", "", "worst moment of", *(COLUMNS[kind] for kind in used), "allocated", "reserved")
    return tabulate(lines, headers=headers, disable_numparse=True, stralign="right")


def _gap(result) -> str:
    """The estimate's alpha: what the peak holds beyond the formula, and where less is alive at that moment."""
    peak, one = result.prediction.replay.peak, result.estimate
    parts = {kind: size - one.kinds.get(kind, 0) for kind, size in _kinds(peak).items()}
    words = [f"{COLUMNS[kind]} {'+' if size > 0 else '-'}{_gib(abs(size))}" for kind, size in parts.items()
             if abs(size) >= 1e-4 * GIB]  # fmt: skip
    phase = next(name for name in PHASES if result.prediction.replay.phases.get(name) is peak)
    where = f"reached in {phase}" + (f", at {peak.during}" if peak.during else "")
    sums = f"{_gib(one.total)} by formula, {_gib(peak.allocated)} predicted"
    return f"{result.method.name}: {sums}, {where}: {', '.join(words)}"


def _device(question) -> str:
    """What a step is predicted for."""
    return "CPU" if question.arch is None else f"compute capability {question.arch / 10:.1f}"


def _dtype(question) -> str:
    return str(question.options.dtype).removeprefix("torch.")


def text(question, results) -> str:
    """All of it, in GiB."""
    sizes, options = f"batch {question.batch} x {question.seq}", question.options
    targets = options.targets if isinstance(options.targets, str) else ", ".join(options.targets)
    head = (
        f"{question.architecture.name}: {_dtype(question)} base, {sizes} tokens, "
        f"{question.optimizer}{', checkpointing' if question.checkpointing else ''}, rank {options.rank} on {targets}, "
        f"{_device(question)}. GiB throughout."
    )
    states = " and per gradient" if question.optimizer == "sgd" else ", per gradient and per moment of Adam's two"
    parts = [
        head,
        f"\nEstimated: {options.dtype.itemsize} bytes per parameter{states}; all the rest is alpha\n",
        _estimates(question, results),
    ]
    if any(result.prediction or result.measured for result in results):
        parts += ["\nThe worst moment of each phase of a step, by kind\n", _phases(results)]
        parts += ["\nWhat alpha is, at the peak", *(_gap(result) for result in results if result.prediction)]
    parts += [f"{result.method.name}: {note}" for result in results for note in result.notes]
    return "\n".join(parts)


def picture(question, results):
    """A bar per method and source, of the peak by kind; the estimate's beside what was predicted and measured."""
    from matplotlib.figure import Figure  # optional: only a picture needs it

    bars = [row for row in rows(results) if row["phase"] in ("sum", "peak")]
    figure = Figure(figsize=(2 + 1.3 * len(bars), 5), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['method']}\n{row['source']}" for row in bars]
    base = [0.0] * len(bars)
    highest = max(row["allocated"] for row in bars) / GIB
    for kind, label in COLUMNS.items():
        heights = [row.get(kind, 0) / GIB for row in bars]
        if max(heights) > _VISIBLE * highest:
            axes.bar(names, heights, bottom=base, label=label)
            base = [low + height for low, height in zip(base, heights, strict=True)]
    for at, row in enumerate(bars):
        axes.annotate(_gib(row["allocated"]), (at, base[at]), ha="center", va="bottom")
    axes.set(
        ylabel="GiB",
        ylim=(0, 1.08 * highest),
        title=f"{question.architecture.name}, batch {question.batch} x {question.seq}",
    )
    figure.legend(loc="outside right upper")
    return figure


def _about(question, results) -> dict[str, object]:
    """What was asked, of which version of the sources, and where it was measured."""
    about = {"model": question.architecture.name, "batch": question.batch, "seq": question.seq}
    about |= {"optimizer": question.optimizer, "checkpointing": question.checkpointing, "arch": question.arch}
    options = question.options
    about |= {"rank": options.rank, "targets": options.targets, "dtype": str(options.dtype)}
    about |= {"commit": environment.commit(), "torch": environment.version("torch")}
    if any(result.measured for result in results):
        about["measured_on"] = environment.environment("cpu" if question.arch is None else "cuda")
    return about


def _csv(question, found: list[dict], about: dict) -> bytes:
    """The rows, each with what it is of: a file that was moved still says so."""
    names = ("model", "batch", "seq", "rank", "targets", "checkpointing")
    asked = {name: about[name] for name in names} | {"update": about["optimizer"], "dtype": _dtype(question)}
    versions = {name: about[name] for name in ("torch", "commit")}
    measured = about.get("measured_on", {}).get("device")
    lines = []
    for row in found:
        device = measured if row["source"] == "measured" else _device(question)
        lines.append({**asked, "device": device, **row, **versions})
    kinds = ("method", "source", "phase", *COLUMNS, "allocated", "reserved", "during")
    return csv_bytes((*asked, "device", *kinds, *versions), lines)


def write(question, results, to_csv: Path | None, to_json: Path | None, to_png: Path | None) -> None:
    """Write what was asked for; bytes in CSV and JSON."""
    found = list(rows(results))
    about = _about(question, results) if to_csv or to_json else {}
    if to_csv:
        replace_file(to_csv, _csv(question, found, about))
    if to_json:
        replace_file(to_json, json.dumps({"question": about, "rows": found}, indent=1).encode() + b"\n")
    if to_png:
        image = io.BytesIO()
        picture(question, results).savefig(image, dpi=150, format="png")
        replace_file(to_png, image.getvalue())
    for path in (to_csv, to_json, to_png):
        if path:
            print(f"wrote {path}")

"""The short table of measured rows: every case over its floor, by contender; and what went wrong, in words."""

import json
from collections.abc import Sequence
from pathlib import Path

from . import rows
from .measure import PARTS
from .rows import Row

_MIB = 2**20


def _cases(found: Sequence[Row]) -> dict[tuple[str, str, str, str], dict[str, Row]]:
    """(case, dtype, timing, part) -> contender -> row, in the order measured sizes grow."""
    grouped: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in found:
        grouped.setdefault((row["case"], row["dtype"], row["timing"], row["part"]), {})[row["contender"]] = row

    def order(key: tuple[str, str, str, str]) -> tuple:
        values = rows.values_of(key[0]).values()
        sizes = [(value, "") if isinstance(value, float) else (0.0, value) for value in values]
        return key[2], sizes[1:4], sizes[0], sizes[4:], key[1], PARTS.index(key[3])

    return {key: grouped[key] for key in sorted(grouped, key=order)}


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{float(row['ratio_floor']):.3f}" if row["ratio_floor"] else row["status"].split(":")[0]


def _peaks(by: dict[str, Row]) -> str:
    """Of the first of ours, and of the first peer that is set beside it."""
    held = (next((row["peak_bytes"] for row in by.values() if row["role"] == role), "") for role in ("ours", "peer"))
    return " / ".join(f"{int(text) / _MIB:.3g}" if text else "-" for text in held)


def table(found: Sequence[Row]) -> str:
    """Ratios to the floor of every contender, and the peak MiB of ours beside the first peer's."""
    if not found:
        return "no rows"
    names = list(dict.fromkeys(row["contender"] for row in found if row["role"] != "floor"))
    names.sort(key=lambda name: (not name.startswith("peft_kernels"), name))
    lines = []
    for (case, dtype, timing, part), by in _cases(found).items():
        floor = next((row for row in by.values() if row["role"] == "floor"), None)
        time = f"{float(floor['ms_p50']):.4g}" if floor and floor["ms_p50"] else "-"
        lines.append((case, dtype, timing, part, time, *(_cell(by.get(name)) for name in names), _peaks(by)))
    return rows.markdown(("case", "dtype", "timing", "part", "floor ms", *names, "peak MiB ours/peer"), lines)


def is_fault(row: Row) -> bool:
    """Whether a row says that something is wrong, and not only that a peer is missing or does not fit."""
    ours = row["role"] != "peer" and row["status"] != "ok"
    return ours or row["status"].startswith(("wrong values", "leaks"))


def problems(found: Sequence[Row]) -> list[str]:
    """Every row that is not "ok", in words; of one contender's parts once."""
    bad = [row for row in found if row["status"] != "ok"]
    lines = (f"{row['dtype']} {row['case']} {row['timing']} {row['contender']}: {row['status']}" for row in bad)
    return list(dict.fromkeys(lines))


def training(found: Sequence[Row]) -> str:
    """The training step's methods: time, over the frozen step, and what each needs."""
    names = ("contender", "case", "ms_p50", "ratio_floor", "peak_bytes", "status")
    return rows.markdown(names, ([row[name] for name in names] for row in found)) if found else "no rows"


def ceilings(path: Path) -> str:
    if not path.exists():
        return "ceilings: not measured"
    found = json.loads(path.read_text())
    return f"ceilings: copy {found['copy_gb_per_s']:.0f} GB/s, bf16 matmul {found['bf16_tflop_per_s']:.4g} TFLOP/s"

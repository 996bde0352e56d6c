"""The short table that `make gpu` prints last: every case over its floor, by contender, for one version."""

import json
from collections.abc import Sequence
from pathlib import Path

from . import rows
from .rows import Row

_MIB = 2**20


def _cases(found: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """(case, dtype, timing) -> contender -> row, in the order measured sizes grow."""
    grouped: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in found:
        grouped.setdefault((row["case"], row["dtype"], row["timing"]), {})[row["contender"]] = row

    def order(key: tuple[str, str, str]) -> tuple:
        sizes = [float(word.split("=")[1]) for word in key[0].split()]
        return key[2], sizes[1:4], sizes[0], sizes[4:], key[1]

    return {key: grouped[key] for key in sorted(grouped, key=order)}


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{float(row['ratio_floor']):.3f}" if row["ratio_floor"] else row["status"].split(":")[0]


def _peaks(by: dict[str, Row], ours: str, peer: str) -> str:
    held = [by[name]["peak_bytes"] if name in by else "" for name in (ours, peer)]
    return " / ".join(f"{int(text) / _MIB:.0f}" if text else "-" for text in held)


def table(path: Path, source: str) -> str:
    """Ratios to the floor of every contender, and the peak MiB of ours beside PEFT's, for the rows of `source`."""
    found = [row for row in rows.read(path) if row["source"] == source]
    if not found:
        return f"no rows of these sources in {path.name}"
    names = list(dict.fromkeys(row["contender"] for row in found if row["role"] != "floor"))
    names.sort(key=lambda name: (not name.startswith("peft_kernels"), name))
    lines = []
    for (case, dtype, timing), by in _cases(found).items():
        floor = next((row for row in by.values() if row["role"] == "floor"), None)
        time = f"{float(floor['ms_p50']):.4g}" if floor and floor["ms_p50"] else "-"
        lines.append(
            (case, dtype, timing, time, *(_cell(by.get(name)) for name in names), _peaks(by, "peft_kernels", "PEFT"))
        )
    return rows.markdown(("case", "dtype", "timing", "floor ms", *names, "peak MiB ours/PEFT"), lines)


def problems(path: Path, source: str) -> list[str]:
    """Every row that is not "ok", in words."""
    found = [row for row in rows.read(path) if row["source"] == source and row["status"] != "ok"]
    return [f"{row['dtype']} {row['case']} {row['timing']} {row['contender']}: {row['status']}" for row in found]


def ceilings(path: Path) -> str:
    if not path.exists():
        return "ceilings: not measured"
    found = json.loads(path.read_text())
    return f"ceilings: copy {found['copy_gb_per_s']:.0f} GB/s, bf16 matmul {found['bf16_tflop_per_s']:.4g} TFLOP/s"

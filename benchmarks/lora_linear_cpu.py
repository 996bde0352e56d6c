"""The README's CPU table of the LoRA linear: time over the frozen floor beside PEFT, a sweep, and saved bytes.

python -m benchmarks.lora_linear_cpu [--quick] [--threads N] [--csv DIR]
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from . import cases, environment, lora_linear, rows
from .lora_linear import make_inputs, ours
from .lora_linear_check import LoRACase
from .measure import Effort
from .rows import Row

TARGETS = {("float32", 16): 1.05, ("float32", 64): 1.13, ("bfloat16", 16): 1.08, ("bfloat16", 64): 1.16}
"""(dtype, R) -> time over the frozen floor to reach at M = N = K = 2048."""

_OURS = "peft_kernels"


def _by_contender(found: Sequence[Row]) -> dict[str, Row]:
    return {row["contender"]: row for row in found}


def flops_ratio(N: int, K: int, R: int) -> float:
    """FLOPs of the LoRA linear over the frozen one's: six skinny products, 6 M R (N + K), beside 4 M N K."""
    return 1 + 6 * R * (N + K) / (4 * N * K)


def _ratio(row: Row | None, name: str = "ratio_floor") -> str:
    """ "1.043" with its confidence interval, or why there is none."""
    if row is None:
        return "-"
    if not row[name]:
        return row["status"]
    return f"{float(row[name]):.3f} ({float(row[name + '_low']):.3f}-{float(row[name + '_high']):.3f})"


def headline(found: Sequence[tuple[LoRACase, list[Row]]]) -> str:
    """Time over the frozen floor at the README's shapes, the target beside it."""
    lines = []
    for case, measured in found:
        by = _by_contender(measured)
        mine, floor = by[_OURS], by["frozen linear"]
        key = floor["dtype"], case.R
        met = "-" if not mine["ratio_floor"] else "met" if float(mine["ratio_floor"]) <= TARGETS[key] else "missed"
        lines.append(
            (
                floor["dtype"],
                case.R,
                f"{float(floor['ms_p50']):.1f} ms" if floor["ms_p50"] else floor["status"],
                f"{flops_ratio(case.N, case.K, case.R):.3f}",
                _ratio(mine),
                _ratio(by["PEFT"]),
                _ratio(by.get("peft_kernels, fp32 adapters")),
                _ratio(by.get("PEFT, fp32 adapters (its default)")),
                f"{TARGETS[key]:.2f} {met}",
            )
        )
    heads = ("dtype", "R", "frozen linear", "FLOPs alone", "**peft_kernels**", "PEFT")
    return rows.markdown((*heads, "ours, fp32 adapters", "PEFT, fp32 adapters", "target"), lines)


def _verdict(row: Row) -> str:
    """Ours over a peer: "slower" only where the whole confidence interval says so."""
    if not row["ours_over_this"]:
        return row["status"]
    low, high = float(row["ours_over_this_low"]), float(row["ours_over_this_high"])
    word = "**slower**" if low > 1 else "level" if high > 1 else ""
    return f"{float(row['ours_over_this']):.2f} {word}".strip()


def sweep(found: Sequence[tuple[LoRACase, list[Row]]], peer: str) -> str:
    """Ours over `peer` for every M and R: below 1 is where ours is faster."""
    ranks = sorted({case.R for case, _ in found})
    cells: dict[tuple[str, int], dict[int, str]] = {}
    for case, measured in found:
        row = _by_contender(measured).get(peer)
        if row is not None:
            cells.setdefault((row["dtype"], case.M), {})[case.R] = _verdict(row)
    lines = [(dtype, M, *(by_rank.get(R, "-") for R in ranks)) for (dtype, M), by_rank in cells.items()]
    return rows.markdown(("dtype", "M", *(f"R={R}" for R in ranks)), lines)


def slower(found: Sequence[tuple[LoRACase, list[Row]]]) -> list[str]:
    """Every case in which ours is slower than PEFT beyond its confidence interval."""
    return [
        f"{row['dtype']} {case.label}: {float(row['ours_over_this']):.3f} of {row['contender']}"
        for case, measured in found
        for row in measured
        if row["contender"].startswith("PEFT") and row["ours_over_this_low"] and float(row["ours_over_this_low"]) > 1
    ]


def saved(M: int, K: int, R: int) -> str:
    """Exact bytes that one layer keeps for backward, in bf16."""
    lines = []
    for dropout in (0.0, 0.1):
        case = LoRACase(M, K, K, R, torch.bfloat16, dropout)
        inputs = make_inputs(case, "cpu")
        builds = {
            "**peft_kernels**": ours(),
            "peft_kernels, frozen A": ours(train_a=False),
            "peft_kernels, fp32 adapters": ours(torch.float32),
        }
        if environment.version("peft") != "none":
            builds["PEFT"] = lora_linear.peft_layer(False)
            builds["PEFT, fp32 adapters (its default)"] = lora_linear.peft_layer(True)
        for name, build in builds.items():
            kept = lora_linear.layer_saved_bytes(case, inputs, build)
            of_x = kept / (case.M * case.K * 2)
            lines.append((name, f"{dropout:g}", f"{kept:,}", f"{of_x:.4f}"))
    return rows.markdown(("layer", "dropout", "bytes kept", "over the bytes of x"), lines)


def _measure(
    chosen: Sequence[LoRACase], env: dict, effort: Effort, bar: tqdm, path: Path | None
) -> list[tuple[LoRACase, list[Row]]]:
    found = []
    for case in chosen:
        bar.set_postfix_str(f"{str(case.dtype)[6:]} {case.label}")
        # What is by hand is PEFT without its bookkeeping: of use beside a GPU, not worth the minutes here.
        field = [c for c in lora_linear.contenders(case, "cpu") if c.name != "PyTorch composition"]
        found.append((case, cases.run_case("lora_linear", case, "cpu", env, effort, field)))
        if path:  # case by case, so that a run that is cut short keeps what it measured
            rows.write(path, found[-1][1])
        bar.update()
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller sweep: a look, not a figure")
    parser.add_argument("--threads", type=int, default=None, help="Torch's threads (default: Torch's own choice)")
    parser.add_argument("--csv", type=Path, default=None, metavar="DIR", help="also write DIR/<cpu>/lora_linear.csv")
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    begin, env = time.perf_counter(), environment.environment("cpu")
    busy = os.getloadavg()[0]
    if busy > 0.5:
        print(f"other work is running (load average {busy:.1f}): figures will be noisy, absolute times too long")
    path = options.csv / environment.device_slug("cpu") / "lora_linear.csv" if options.csv else None
    wide = cases.PRIMITIVES["lora_linear"].suites["cpu"]
    many = cases.quick(cases.LORA_CPU_SWEEP) if options.quick else cases.LORA_CPU_SWEEP
    with tqdm(total=len(wide) + len(many), unit="case", dynamic_ncols=True) as bar:
        first = _measure(wide, env, Effort(5, 0.0, 5) if options.quick else Effort(21, 6.0, 60), bar, path)
        second = _measure(many, env, Effort(5, 0.0, 5) if options.quick else Effort(11, 1.5, 200), bar, path)
    print(f"\nMeasured on {environment.describe('cpu')}")
    print("\nForward and backward of x [2048, 2048] through a [2048, 2048] linear, over the same linear frozen")
    print(f"(its forward and dx); median of paired rounds (95 % confidence interval):\n\n{headline(first)}")
    for peer in ("PEFT", "PEFT, fp32 adapters (its default)"):
        print(f"\nOurs over {peer}, N = K = 2048 (below 1: ours is faster):\n\n{sweep(second, peer)}")
    print(f"\nKept for backward by one [2048, 2048] layer, M = 2048, R = 16, bf16:\n\n{saved(2048, 2048, 16)}")
    lost = slower([*first, *second])
    print(f"\nSlower than PEFT in {len(lost)} cases" + "".join(f"\n  {line}" for line in lost))
    print(f"\n{time.perf_counter() - begin:.0f} s")
    if path:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()

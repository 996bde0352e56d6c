"""Which way a 4-bit product should go, and from how many rows on: each way by name, over a range of M.

    python -m benchmarks.paths nf4_linear|qlora_linear --csv FILE [--device cuda|cpu] [--tiny]

What it prints is for kernels/nf4_linear/configs.py (MOST_ROWS, CHUNK_BYTES and the model between them) and
kernels/qlora_linear/configs.py (DENSE_ROWS). Chunks of dx are of as many bytes as those of y, and not measured apart.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from peft_kernels._core import native
from peft_kernels._core.registry import OWNERS
from peft_kernels.kernels.nf4_linear import configs as nf4_configs
from peft_kernels.kernels.qlora_linear import configs as qlora_configs

from . import cases, environment, nf4_linear, qlora_linear, rows, summary
from .lora_linear_check import Layer, LoRACase
from .measure import Contender, Effort
from .nf4_linear import NF4LinearCase
from .rows import Row

if native.HAS_TRITON:
    from peft_kernels.kernels.nf4_linear import triton_impl

_OURS = "as it is"  # where there is a CUDA extension, its kernels: up to MOST_ROWS the one of few rows, then chunks
_CHUNKS_MIB = (12, 24, 48)
_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
_FEW, _MANY = (8, 16, 32, 48, 64), (96, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Sweep:
    """`contenders(case, device)`: the ways, after the floor; `chosen(device, tiny)`: the cases."""

    contenders: Callable[[NF4LinearCase | LoRACase, str], list[Contender]]
    chosen: Callable[[str, bool], list[NF4LinearCase] | list[LoRACase]]


def _by_triton(case: NF4LinearCase, inputs: nf4_linear.Inputs, **way: object) -> nf4_linear.Layer:
    weight = inputs.weight
    args = *weight.tensors(), None, None, weight.quant_type, weight.blocksize, case.N

    def layer(x: Tensor) -> Tensor:
        with nf4_configs.force(**way):
            return triton_impl.nf4_linear_fwd(x, *args)

    return layer


def nf4_ways(case: NF4LinearCase, device: str) -> list[Contender]:
    """The 4-bit linear's: the kernel of few rows, chunks of several sizes, and all of the weight in one piece."""
    owner, torch_version = OWNERS["nf4_linear_fwd", device.upper()], f"torch {torch.__version__}"
    field = [
        ("linear over a dense weight", "floor", torch_version, "", nf4_linear.dense),
        (_OURS, "ours", owner, "", nf4_linear.ours),
        ("dequantise, then PyTorch", "ours", torch_version, _OURS, nf4_linear.by_hand),
    ]
    if device == "cuda" and native.HAS_TRITON:
        if case.M <= nf4_configs.MOST_ROWS:
            field.append(("rows, Triton", "ours", "triton", _OURS, partial(_by_triton, path="rows")))
        for mib in _CHUNKS_MIB:
            way = partial(_by_triton, path="chunks", chunk_bytes=mib * 2**20)
            field.append((f"chunks of {mib} MiB", "ours", "triton", _OURS, way))
    return nf4_linear.contenders(case, device, field=field)


def qlora_ways(case: LoRACase, device: str) -> list[Contender]:
    """The QLoRA linear's, forward and backward: the 4-bit base in place, and dequantised."""

    def way(dense: bool) -> Callable[[LoRACase, qlora_linear.QLoRAInputs], Layer]:
        within = partial(qlora_configs.force, dense=dense)
        return lambda case, inputs: replace(qlora_linear.ours(case, inputs), within=within)

    owner = OWNERS["lora_linear_fwd", device.upper()]
    field = [
        ("frozen linear, 16 bits", "floor", f"torch {torch.__version__}", "", qlora_linear.frozen),
        ("in place", "ours", owner, "", way(False)),
        ("dequantised", "ours", owner, "in place", way(True)),
    ]
    return qlora_linear.contenders(case, device, field=field)


def _nf4_cases(device: str, tiny: bool) -> list[NF4LinearCase]:
    shapes = [(128, 128)] if tiny else _SHAPES if device == "cuda" else _SHAPES[:1]
    return [NF4LinearCase(M, N, K, torch.bfloat16) for N, K in shapes for M in ((4, 33) if tiny else _FEW + _MANY)]


def _qlora_cases(device: str, tiny: bool) -> list[LoRACase]:
    shapes = [(96, 64)] if tiny else _SHAPES[:2] if device == "cuda" else [(2048, 2048)]
    dtypes = (torch.bfloat16,) if device == "cuda" or tiny else (torch.bfloat16, torch.float32)
    many = (4, 33) if tiny else (64, *_MANY[1:], 4096) if device == "cuda" else _MANY[1:]
    return [LoRACase(M, N, K, 16, dtype) for dtype in dtypes for N, K in shapes for M in many]


SWEPT = {"nf4_linear": Sweep(nf4_ways, _nf4_cases), "qlora_linear": Sweep(qlora_ways, _qlora_cases)}


def ranges(found: Sequence[Row]) -> list[str]:
    """Of each shape the fastest way by its median, and of how many rows it is that; by graphs where there are any."""
    timing = "graph" if any(row["timing"] == "graph" for row in found) else "wall"
    shapes: dict[str, dict[int, list[tuple[float, str]]]] = {}
    for row in found:
        if row["timing"] != timing or row["role"] == "floor" or not row["ms_p50"]:
            continue
        first, _, rest = row["case"].partition(" ")
        of_rows = shapes.setdefault(f"{row['dtype']} {rest}", {})
        of_rows.setdefault(int(first.removeprefix("M=")), []).append((float(row["ms_p50"]), row["contender"]))
    lines = []
    for shape, by in shapes.items():
        fastest = [(M, min(by[M])[1]) for M in sorted(by)]
        spans = [(name, [M for M, _ in run]) for name, run in groupby(fastest, key=lambda one: one[1])]
        lines.append(f"{shape}: " + ", ".join(f"M={span[0]}-{span[-1]} {name}" for name, span in spans))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paths", description=__doc__.splitlines()[0])
    parser.add_argument("primitive", choices=sorted(SWEPT))
    parser.add_argument("--csv", type=Path, required=True, help="merge the rows into this file, case by case")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20, help="at least")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a rehearsal")
    args = parser.parse_args(argv)
    try:
        rows.check_file(args.csv)
    except ValueError as error:
        parser.error(f"--csv {args.csv}: {error}")
    sweep, env, found = SWEPT[args.primitive], environment.environment(args.device), []
    effort = Effort(args.rounds, 0.2 if args.device == "cuda" else 0.1)
    for case in tqdm(sweep.chosen(args.device, args.tiny), unit="case", desc=args.primitive, dynamic_ncols=True):
        ways = sweep.contenders(case, args.device)
        mine = cases.run_case(args.primitive, case, args.device, env, effort, ways)
        rows.write(args.csv, mine)
        found += mine
        if args.device == "cuda":
            torch.cuda.empty_cache()
    print(f"\n{args.primitive} on {environment.describe(args.device)}: time over the floor\n")
    print(summary.table(found))
    print("\n".join([*summary.problems(found), "\nfastest:", *ranges(found)]))
    return 1 if any(summary.is_fault(row) for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())

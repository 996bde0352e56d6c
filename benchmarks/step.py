"""One whole training step of a named model with random weights: tokens/s, FLOP/s, memory, launches; ours beside peers.

    python benchmarks/step.py --model llama-3-8b --rank 16 --batch 1 --seq 4096 --method lora peft-lora --compile
    python benchmarks/step.py --model llama-3-8b --method lora lora-bf16 peft-lora-bf16 peft-lora-liger peft-lora-cce

The model has as many of its layers as fit the device (--layers sets their number). Every method but full fine-tuning
trains over the same base weights; ratios are to the frozen step: forward, and backward to the first layer's input. The
loss is the first step's, when adapters add nothing yet: all should agree.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import torch
import transformers
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called by its path, it finds its neighbours too

from benchmarks import cases, environment, rows, vram
from benchmarks.architectures import find
from benchmarks.lora_linear import arch_here
from benchmarks.measure import Effort
from benchmarks.memory_methods import Method, Options, targeted
from benchmarks.step_contenders import OURS, Step, StepCase, contenders, model_flops
from benchmarks.vram_fits import largest

_SHARE = 0.8  # of a device's memory that a predicted step may take: all methods' adapters and states are there at once


def _is_operator(event) -> bool:
    return event.name.startswith(("aten::", "peft_kernels::"))


def launches(step: Step, device: str) -> int:
    """Kernels that a step launches on a GPU; on a CPU, where there are none, the operators that it calls."""
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CUDA if device == "cuda" else kind.CPU]) as profile:
        step(0)
    if device == "cuda":
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    called = [event for event in profile.events() if _is_operator(event)]
    return sum(not (event.cpu_parent and _is_operator(event.cpu_parent)) for event in called)


def fitting_layers(case: StepCase, methods: Sequence[Method], capacity: int, arch: int | str | None) -> int:
    """The most blocks of which every method's predicted step stays within its share of `capacity` bytes.

    Of a method without a prediction nothing is known; where no other is asked for, ours stands in for it.
    """
    known = [method for method in methods if method.adapt and not method.missing and not method.unpredicted]
    known = known or [vram.methods()[OURS[0]]]

    def works(layers: int) -> bool:
        shorter = replace(case, layers=layers).shortened()
        asked = vram.Question(shorter, case.options, case.batch, case.seq, False, case.optimizer, arch)
        return all(asked.predict(method).replay.peak.allocated <= _SHARE * capacity for method in known)

    whole = case.architecture.config.num_hidden_layers
    return whole if works(whole) else largest(works, whole - 1)


def table(
    case: StepCase,
    found: Sequence[rows.Row],
    losses: dict[str, float],
    counted: dict[str, int],
    flops: Callable[[bool], float],
) -> str:
    lines = []
    for row in found:
        name = row["contender"]
        loss = f"{losses[name]:.6g}" if name in losses else ""
        if not row["ms_p50"]:
            lines.append((name, row["status"], *[""] * 5, loss))
            continue
        seconds = float(row["ms_p50"]) / 1e3
        rate = f"{case.batch * case.seq / seconds:,.0f}"
        achieved = f"{flops(name.startswith('full')) / seconds / 1e12:.3g}"
        peak, count = f"{int(row['peak_bytes']) / 2**30:.4g}", f"{counted[name]:,}"
        lines.append((name, f"{1e3 * seconds:.4g}", rate, achieved, row["ratio_floor"], peak, count, loss))
    headers = ("method", "ms", "tokens/s", "TFLOP/s", "over frozen", "GiB over weights", "launches", "loss")
    return tabulate(lines, headers=headers, disable_numparse=True, stralign="right")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = {"model": "llama-3-8b", "method": ["lora", "peft-lora"], "rank": 16}
    vram.add_question(parser, **defaults, batch=1, seq=4096, optimizer="adamw-fused")
    parser.add_argument("--layers", type=int, help="default: as many as fit, by prediction")
    parser.add_argument("--compile", action="store_true", help="each peer but Liger and CCE under torch.compile too")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="merge the rows into this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    transformers.logging.set_verbosity_error()
    try:
        options = Options(args.rank, "all-linear", vram.DTYPES[args.dtype])
        case = StepCase(find(args.model), args.layers or 1, args.batch, args.seq, options, args.optimizer)
        case.architecture.batch(args.batch, args.seq)
        with torch.device("meta"):
            targeted(replace(case, layers=1).shortened().build(case.dtype), options)
    except ValueError as error:
        print(f"step: {error}", file=sys.stderr)
        return 2
    chosen = [vram.methods()[name] for name in dict.fromkeys(args.method)]
    if args.layers is None:
        cuda = args.device == "cuda"
        capacity = torch.cuda.get_device_properties(0).total_memory if cuda else psutil.virtual_memory().available
        case = replace(case, layers=fitting_layers(case, chosen, capacity, arch_here() if cuda else None))
        if case.layers == 0:
            print(f"step: not one layer fits {capacity / 2**30:.1f} GiB: a smaller batch or seq?", file=sys.stderr)
            return 2
    field, losses = contenders(case, args.device, chosen, args.compile)
    env = environment.environment(args.device)
    found = cases.run_case("step", case, args.device, env, Effort(args.rounds, 0.0, args.rounds), field, graphs=False)
    timed = {row["contender"] for row in found if row["ms_p50"]}
    counted = {one.name: launches(one.step, args.device) for one in field if one.name in timed}
    with torch.device("meta"):
        model = case.shortened().build(case.dtype)
    print(f"{case.label}, {args.dtype}, {args.optimizer}, on {environment.describe(args.device)}\n")
    print(table(case, found, losses, counted, lambda trained: model_flops(model, args.batch * args.seq, trained)))
    if args.csv:
        rows.write(args.csv, found)
        print(f"wrote {args.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

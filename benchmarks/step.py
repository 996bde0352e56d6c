"""One whole training step of a named model with random weights: tokens/s, FLOP/s, memory, launches; ours beside peers.

    python benchmarks/step.py --model llama-3-8b --rank 16 --batch 1 --seq 4096 --method lora peft-lora --compile
    python benchmarks/step.py --model llama-3-8b --method lora lora-bf16 peft-lora-bf16 peft-lora-liger peft-lora-cce

The model has as many of its layers as fit the device (--layers sets their number). Every method but full fine-tuning
trains over the same base weights; ratios are to the frozen step: forward, and backward to the first layer's input.

GiB over weights: the most that a step holds, over the frozen base's weights: adapters, optimizer states, gradients and
activations, but for full fine-tuning not its own copy of the weights. launches: kernels on a GPU, without copies and
fills of memory; on a CPU operators. loss: the first step's, when adapters add nothing yet: a method whose loss is not
the frozen model's, but for rounding, is not timed. Where the model drops at random (bert) losses need not agree, and
none is refused.

Exits with 1 where values are wrong, memory leaks, or a method of this package or the frozen step fails; with 2 where
the options make no sense.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called by its path, it finds its neighbours too

try:
    import psutil
    import torch
    import transformers
    from tabulate import tabulate
    from tqdm import tqdm

    from benchmarks import cases, environment, rows, summary, vram
    from benchmarks.architectures import find
    from benchmarks.failures import because
    from benchmarks.lora_linear import arch_here
    from benchmarks.measure import Effort
    from benchmarks.memory_methods import DTYPES, Method, Options, targeted
    from benchmarks.step_contenders import Field, Step, StepCase, compilable, contenders, model_flops
    from benchmarks.step_fits import fitting_layers
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    print(f"step: needs {missing.name}: pip install {missing.name}", file=sys.stderr)
    sys.exit(2)

_NO_KERNELS = ("Memcpy", "Memset")


def _is_operator(event) -> bool:
    return event.name.startswith(("aten::", "peft_kernels::"))


def _is_kernel(event) -> bool:
    """What runs on a GPU, but for copies and fills of memory, and for the ranges that record_function names."""
    on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
    return on_gpu and not event.is_user_annotation and not event.name.startswith(_NO_KERNELS)


def launches(step: Step, device: str) -> int:
    """Kernels that a step launches on a GPU; on a CPU, where there are none, the operators that it calls."""
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CUDA if device == "cuda" else kind.CPU]) as profile:
        step(0)
    if device == "cuda":
        return sum(_is_kernel(event) for event in profile.events())
    called = [event for event in profile.events() if _is_operator(event)]
    return sum(not (event.cpu_parent and _is_operator(event.cpu_parent)) for event in called)


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
    parser.add_argument("--csv", type=Path, help="merge the rows into this file; peak_bytes: GiB over weights")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; expected at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    try:
        if args.csv:
            rows.check_file(args.csv)
    except ValueError as error:
        parser.error(f"--csv {args.csv} {error}")
    return args


def asked_case(args: argparse.Namespace) -> StepCase:
    """The case that the options describe; with one layer, where their number is left to the device.

    Raises:
        ValueError: it makes no sense.
    """
    options = Options(args.rank, "all-linear", DTYPES[args.dtype])
    case = StepCase(find(args.model), 1, args.batch, args.seq, options, args.optimizer)
    case.architecture.batch(args.batch, args.seq)
    most = case.architecture.config.num_hidden_layers
    if args.layers is not None and not 1 <= args.layers <= most:
        raise ValueError(f"--layers is {args.layers}; expected 1 to {most}, which {args.model} has")
    with torch.device("meta"):
        targeted(case.shortened().build(case.dtype), options)
    return replace(case, layers=args.layers or 1)


def measured(case: StepCase, field: Field, device: str, rounds: int) -> tuple[list[rows.Row], dict[str, int]]:
    """The rows, whose peak is over the base's weights, and the launches of each that was timed."""
    env = environment.environment(device)
    effort = Effort(rounds, 0.0, rounds)
    found = cases.run_case("step", case, device, env, effort, field.contenders, graphs=False)
    for row in found:
        if row["peak_bytes"] and row["contender"] in field.resident:
            row["peak_bytes"] = str(int(row["peak_bytes"]) + field.resident[row["contender"]]())
    timed = {row["contender"] for row in found if row["ms_p50"]}
    return found, {one.name: launches(one.step, device) for one in field.contenders if one.name in timed}


def layers_here(case: StepCase, chosen: Sequence[Method], args: argparse.Namespace) -> int:
    """As many as fit.

    Raises:
        ValueError: not one does.
    """
    cuda = args.device == "cuda"
    capacity = torch.cuda.get_device_properties(0).total_memory if cuda else psutil.virtual_memory().available
    most = fitting_layers(case, chosen, args.compile, capacity, arch_here() if cuda else None)
    if most == 0:
        raise ValueError(f"not one layer fits {capacity / 2**30:.1f} GiB: a smaller batch or seq?")
    return most


def run(case: StepCase, args: argparse.Namespace, bar: tqdm) -> tuple[StepCase, Field, list[rows.Row], dict[str, int]]:
    """Build, check and time every contender."""

    def progress(what: str) -> None:
        bar.set_description(what if bar.n + 1 < bar.total else f"{what}, then time {args.rounds} rounds of all")
        bar.update()

    chosen = [vram.methods()[name] for name in dict.fromkeys(args.method)]
    able = [method for method in chosen if not method.missing_on(args.device)]
    built = 1 + len(able) + sum(args.compile and compilable(method) for method in able)
    bar.total = 2 + 2 * built  # each is built and checked
    progress("predict how many layers fit" if args.layers is None else f"take {args.layers} layers")
    if args.layers is None:
        case = replace(case, layers=layers_here(case, chosen, args))
    field = contenders(case, args.device, chosen, args.compile, progress)
    return case, field, *measured(case, field, args.device, args.rounds)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    transformers.logging.set_verbosity_error()
    try:
        case = asked_case(args)
        with tqdm(total=1, dynamic_ncols=True, leave=False) as bar:
            case, field, found, counted = run(case, args, bar)
    except ValueError as error:
        print(f"step: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # the base model's: what a contender raises is in its row
        print(f"step: {because(error)}", file=sys.stderr)
        return 1
    with torch.device("meta"):
        model = case.shortened().build(case.dtype)
    losses, tokens = field.losses.values, args.batch * args.seq
    print(f"{case.label}, {args.dtype}, on {environment.describe(args.device)}\n")
    print(table(case, found, losses, counted, lambda trained: model_flops(model, tokens, trained)))
    if case.drops:
        print("\nlosses are not compared: the model drops at random")
    elif field.losses.bound is not None:
        print(f"\nlosses may be {field.losses.bound:.2g} from the frozen model's by rounding")
    if args.csv:
        rows.write(args.csv, found)
        print(f"wrote {args.csv}")
    return int(any(summary.is_fault(row) for row in found))


if __name__ == "__main__":
    sys.exit(main())

"""One whole training step of a named model with random weights: tokens/s, FLOP/s, memory, launches; ours beside peers.

    python benchmarks/step.py --model llama-3-8b --rank 16 --batch 1 --seq 4096 --method lora peft-lora --compile

The model has as many of its layers as fit the device (--layers sets their number). Every method but full fine-tuning
trains over the same base weights; ratios are to the frozen step: forward, and backward to the first layer's input.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
import transformers
from tabulate import tabulate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called by its path, it finds its neighbours too

from benchmarks import cases, environment, rows, vram
from benchmarks.architectures import Architecture, find
from benchmarks.measure import Contender, Effort, Step
from benchmarks.memory_methods import OPTIMIZERS, Method, Options
from benchmarks.models import sharing_copy
from benchmarks.vram_fits import largest
from peft_kernels.memory.predict import default_loss

FLOOR, OURS = "frozen", "lora"
_SHARE = 0.8  # of a device's memory that a predicted step may take: all methods' adapters and states are there at once


@dataclass(frozen=True)
class StepCase:
    """A training step of `layers` blocks of an architecture."""

    architecture: Architecture
    layers: int
    batch: int
    seq: int
    options: Options
    optimizer: str = "adamw-fused"

    @property
    def dtype(self) -> torch.dtype:
        return self.options.dtype

    @property
    def label(self) -> str:
        sizes = f"layers={self.layers} batch={self.batch} seq={self.seq} R={self.options.rank}"
        return f"model={self.architecture.name} {sizes}"

    def shortened(self) -> Architecture:
        """The architecture with `layers` blocks."""
        config = copy.deepcopy(self.architecture.config)
        config.num_hidden_layers = self.layers
        return replace(self.architecture, config=config)

    def tensors(self, device: str) -> dict[str, Tensor]:
        """A batch of random tokens and labels."""
        sizes = self.architecture.batch(self.batch, self.seq)
        high = {name: self.architecture.config.vocab_size for name in sizes}
        if self.architecture.classifier:
            high["labels"] = self.architecture.config.num_labels
        generator = torch.Generator().manual_seed(0)
        return {
            name: torch.randint(high[name], one.shape, generator=generator).to(device) for name, one in sizes.items()
        }


def model_flops(model: nn.Module, tokens: int, trained: bool) -> float:
    """FLOPs of a step's products with the weight matrices: forward and dX, and dW where they are trained.

    Attention's own products, adapters and recomputation are left out: every method is held against the same work.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - {
        id(getattr(head, "weight", None))
    }
    matrices = [p for p in model.parameters() if p.dim() == 2 and id(p) not in looked_up]
    return (6 if trained else 4) * tokens * sum(p.numel() for p in matrices)


def _frozen(model: nn.Module, batch: dict[str, Tensor]) -> Step:
    model.enable_input_require_grads()
    return lambda i: default_loss(model, batch).backward()


def _training(model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> Step:
    def step(i: int) -> None:
        default_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _contender(case: StepCase, base: nn.Module, batch: dict[str, Tensor], method: Method, compiled: bool) -> Contender:
    name = f"{method.name}, torch.compile" if compiled else method.name
    ours = method.name == OURS and not compiled
    found = Contender(name, "ours" if ours else "peer", rival="" if ours else OURS)
    found.missing = method.missing or ("" if method.adapt else f"comes with the primitive {method.comes_with}")
    if not found.missing:
        model = copy.deepcopy(base) if method.name == "full" else sharing_copy(base)
        model = method.adapt(model, case.options).train()
        optimizer = OPTIMIZERS[case.optimizer]([p for p in model.parameters() if p.requires_grad])
        found.step = _training(torch.compile(model) if compiled else model, batch, optimizer)
    return found


def contenders(case: StepCase, device: str, methods: Sequence[Method], compiled: bool) -> list[Contender]:
    """The frozen floor, a contender for each method and, if asked for, each peer compiled."""
    torch.manual_seed(0)
    base = case.shortened().build(case.dtype).to(device).train().requires_grad_(False)
    batch = case.tensors(device)
    floor = Contender(FLOOR, "floor", _frozen(sharing_copy(base), batch), implementation=f"torch {torch.__version__}")
    found = [_contender(case, base, batch, method, False) for method in methods]
    if compiled:
        found += [_contender(case, base, batch, method, True) for method in methods if method.name != OURS]
    return [floor, *found]


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


def fitting_layers(case: StepCase, methods: Sequence[Method], capacity: int) -> int:
    """The most blocks of which every method's predicted step stays within its share of `capacity` bytes."""
    runnable = [method for method in methods if method.adapt and not method.missing]

    def works(layers: int) -> bool:
        shorter = replace(case, layers=layers).shortened()
        asked = vram.Question(shorter, case.options, case.batch, case.seq, False, case.optimizer, 90)
        return all(asked.predict(method).replay.peak.allocated <= _SHARE * capacity for method in runnable)

    whole = case.architecture.config.num_hidden_layers
    return whole if works(whole) else largest(works, whole - 1)


def table(case: StepCase, found: Sequence[rows.Row], counted: dict[str, int], flops: Callable[[bool], float]) -> str:
    lines = []
    for row in found:
        name = row["contender"]
        if not row["ms_p50"]:
            lines.append((name, row["status"], *[""] * 5))
            continue
        seconds = float(row["ms_p50"]) / 1e3
        rate = f"{case.batch * case.seq / seconds:,.0f}"
        achieved = f"{flops(name.startswith('full')) / seconds / 1e12:.3g}"
        peak = f"{int(row['peak_bytes']) / 2**30:.4g}"
        lines.append((name, f"{1e3 * seconds:.4g}", rate, achieved, row["ratio_floor"], peak, f"{counted[name]:,}"))
    headers = ("method", "ms", "tokens/s", "TFLOP/s", "over frozen", "GiB over weights", "launches")
    return tabulate(lines, headers=headers, disable_numparse=True, stralign="right")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = {"model": "llama-3-8b", "method": ["lora", "peft-lora"], "rank": 16}
    vram.add_question(parser, **defaults, batch=1, seq=4096, optimizer="adamw-fused")
    parser.add_argument("--layers", type=int, help="default: as many as fit, by prediction")
    parser.add_argument("--compile", action="store_true", help="each peer under torch.compile too")
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
    except ValueError as error:
        print(f"step: {error}", file=sys.stderr)
        return 2
    chosen = [vram.methods()[name] for name in dict.fromkeys(args.method)]
    if args.layers is None:
        cuda = args.device == "cuda"
        capacity = torch.cuda.get_device_properties(0).total_memory if cuda else psutil.virtual_memory().available
        case = replace(case, layers=fitting_layers(case, chosen, capacity))
        if case.layers == 0:
            print(f"step: not one layer fits {capacity / 2**30:.1f} GiB: a smaller batch or seq?", file=sys.stderr)
            return 2
    field = contenders(case, args.device, chosen, args.compile)
    env = environment.environment(args.device)
    found = cases.run_case("step", case, args.device, env, Effort(args.rounds, 0.0, args.rounds), field, graphs=False)
    counted = {one.name: launches(one.step, args.device) for one in field if one.step}
    with torch.device("meta"):
        model = case.shortened().build(case.dtype)
    print(f"{case.label}, {args.dtype}, {args.optimizer}, on {environment.describe(args.device)}\n")
    print(table(case, found, counted, lambda trained: model_flops(model, args.batch * args.seq, trained)))
    if args.csv:
        rows.write(args.csv, found)
        print(f"wrote {args.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

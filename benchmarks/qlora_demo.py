"""`make demo-qlora`: a real language model in NF4, tuned by QLoRA beside LoRA in 16 bits and PEFT over bitsandbytes."""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

import peft_kernels as pk
from benchmarks import demo_report, environment, models
from benchmarks.bitsandbytes_layers import state_tensors, with_linear4bit
from benchmarks.demo import DTYPES, Demo
from benchmarks.footprint import storage_bytes

LORA, QLORA, PEFT = "LoRA, 16-bit base", "QLoRA", "QLoRA, PEFT over bitsandbytes"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.qlora_demo", description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8, help="LoRA rank; lora_alpha is twice it")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--eval", type=int, default=400, help="held-out snippets to score")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=[*DTYPES, "auto"], default="auto", help="of activations and the 16-bit base")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip-peft", action="store_true", help="leave PEFT over bitsandbytes out")
    parser.add_argument("--out", type=Path, default=Path("out/qlora"))
    args = parser.parse_args()
    for name in ("steps", "batch", "rank", "eval"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; expected at least 1")
    if not args.skip_peft and environment.version("bitsandbytes") == "none":
        parser.error("PEFT over bitsandbytes: pip install bitsandbytes, or --skip-peft")
    return args


def adapt(base: nn.Module, rank: int, seed: int, dtype: torch.dtype, with_peer: bool) -> dict[str, nn.Module]:
    """`base` in 16 bits and in NF4 with double quantisation, ours and the peer's, from the same initial adapter."""
    peft_model = models.with_peft(base, rank, seed)
    quantised = pk.quantize(models.sharing_copy(base), double_quant=True)
    found = {LORA: models.with_fused(base, rank, peft_model), QLORA: models.with_fused(quantised, rank, peft_model)}
    if with_peer:
        found[PEFT] = models.with_peft(with_linear4bit(copy.deepcopy(quantised), dtype), rank, seed)
        with tempfile.TemporaryDirectory() as folder:
            peft_model.save_pretrained(folder)
            found[PEFT].load_adapter(folder, "default", is_trainable=True)
    return found


def base_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of what is not trained: the linear layers in all, and the rest (embeddings, norms)."""
    frozen = {name: tensor for name, tensor in model.named_parameters() if not tensor.requires_grad}
    inside = [tensor for name, tensor in frozen.items() if "_proj" in name]
    rest = storage_bytes(frozen.values()) - storage_bytes(inside)
    inside += [beside for tensor in inside for beside in state_tensors(tensor)]
    return {"linear layers": storage_bytes(inside), "rest": rest}


def print_weights(weights: dict[str, dict[str, int]]) -> None:
    print("\nFrozen weights, MB")
    rows = [
        [name, *(f"{size / 1e6:,.1f}" for size in (*kinds.values(), sum(kinds.values())))]
        for name, kinds in weights.items()
    ]
    print(
        tabulate(
            rows, headers=["", "linear layers", "embeddings and norms", "sum"], disable_numparse=True, stralign="right"
        )
    )


def main() -> None:
    args, start = arguments(), time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    demo = Demo(args)
    print(f"SmolLM2-135M-Instruct in {demo.dtype} on {args.device}, {torch.get_num_threads()} CPU threads")
    demo.base.requires_grad_(False)
    adapted = adapt(demo.base, args.rank, args.seed, DTYPES[demo.dtype], not args.skip_peft)
    weights = {name: base_bytes(model) for name, model in adapted.items()}
    footprints = {name: demo.footprint(model) for name, model in adapted.items()}
    before = {name: demo.accuracy(adapted[name], f"{name}, before") for name in (LORA, QLORA)}
    runs = demo.train(adapted, args.steps, "train")
    accuracy = {name: demo.accuracy(model, name) for name, model in adapted.items()}
    folder = args.out / "adapter"
    pk.save_adapter(adapted[QLORA], folder)

    tokens = demo.tokens()
    demo_report.print_speed(before[LORA], accuracy, runs, tokens, PEFT, len(demo.held_out))
    print(f"Before training, with the base in NF4: {before[QLORA]:.1%}")
    print_weights(weights)
    demo_report.print_memory(footprints, demo.dtype, args.out)
    demo_report.write_losses(runs, {}, args.out)
    summary = {
        "arguments": {k: str(v) for k, v in vars(args).items()} | {"dtype": demo.dtype},
        "environment": environment.environment("cpu" if args.device == "cpu" else "cuda"),
        "accuracy_before": before,
        "accuracy": accuracy,
        "tokens": tokens,
        "seconds_per_step": {name: sum(run.seconds) / len(run.seconds) for name, run in runs.items()},
        "frozen_bytes": weights,
        "memory_bytes": {name: f._asdict() for name, f in footprints.items()},
        "seconds": time.perf_counter() - start,
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\nAdapter saved in {folder}, in PEFT's format. {summary['seconds']:.0f} s in all.")


if __name__ == "__main__":
    main()

"""`make demo`: fine-tune a real language model with FusedLoRALinear, beside the same run with PEFT's own layers."""

import argparse
import copy
import json
import os
import platform
import time
from pathlib import Path

import peft
import torch
import transformers
from tqdm import tqdm

import peft_kernels as pk
from benchmarks import demo_report, finetune, footprint, models, sentiment
from peft_kernels._core.registry import OWNERS

PEFT, FUSED = "PEFT LoRA", "FusedLoRALinear"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8, help="LoRA rank; lora_alpha is twice it")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--eval", type=int, default=400, help="held-out snippets to score")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype", choices=[*DTYPES, "auto"], default="auto", help="auto: the faster one on this device"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip-peft", action="store_true", help="train the fused model only")
    exact = "steps that both also train in fp32, where their curves may differ by fp32 rounding only (0: none)"
    parser.add_argument("--exact-steps", type=int, default=8, help=exact)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    for name in ("steps", "batch", "rank", "eval"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; expected at least 1")
    return args


def faster_dtype(device: str) -> str:
    """Which of bf16 and fp32 multiplies matrices faster here: some CPUs only emulate bf16."""

    def seconds(name: str) -> float:
        x = torch.randn(512, 576, device=device, dtype=DTYPES[name])
        weight = torch.randn(1536, 576, device=device, dtype=DTYPES[name])
        times = []
        for _ in range(10):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight).sum().item()
            times.append(time.perf_counter() - start)
        return min(times)

    return min(DTYPES, key=seconds)


class Demo:
    """The data, the base model and what the steps below share."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.dtype = faster_dtype(args.device) if args.dtype == "auto" else args.dtype
        self.base, tokenizer = models.load_smollm2(DTYPES[self.dtype], args.device)
        self.pad_id = tokenizer.pad_token_id
        train, held_out = sentiment.load_split()
        encoded = [finetune.encode(tokenizer, s.text, s.label) for s in train]
        self.batches = [self.collate(b) for b in finetune.schedule(encoded, args.steps, args.batch, args.seed)]
        held_out = finetune.schedule(held_out, 1, min(args.eval, len(held_out)), seed=0)[0]
        self.held_out = [finetune.encode(tokenizer, s.text, s.label) for s in held_out]

    def collate(self, examples: list[finetune.Example]) -> finetune.Batch:
        return finetune.collate(examples, self.pad_id, self.args.device)

    def accuracy(self, model: torch.nn.Module, name: str) -> float:
        with tqdm(total=len(self.held_out), desc=f"score {name}", unit="snippet") as bar:
            predicted = finetune.predict(model, self.held_out, self.pad_id, 32, self.args.device, bar.update)
        return finetune.accuracy(predicted, self.held_out)

    def footprint(self, model: torch.nn.Module) -> footprint.Footprint:
        longest = max(self.batches, key=lambda batch: batch.input_ids.numel())
        return footprint.measure(model.train(), lambda: finetune.answer_loss(model, longest))

    def adapt(self, base: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """`base` with PEFT's layers and with ours, from the same initial adapter."""
        reference = models.with_peft(base, self.args.rank, self.args.seed)
        return {PEFT: reference, FUSED: models.with_fused(base, self.args.rank, reference)}

    def train(self, adapted: dict[str, torch.nn.Module], steps: int, title: str) -> dict[str, finetune.Run]:
        runs = {name: finetune.start_run(model, self.args.lr) for name, model in adapted.items()}
        batches = self.batches[:steps]
        with tqdm(total=len(batches), desc=title, unit="step") as bar:

            def on_step(losses: dict[str, float]) -> None:
                bar.set_postfix({name: f"{loss:.3f}" for name, loss in sorted(losses.items())})
                bar.update()

            finetune.train(runs, batches, on_step)
        return runs

    def tokens(self) -> int:
        """Tokens trained on, padding left out."""
        return sum(int(batch.attention_mask.sum()) for batch in self.batches)

    @torch.no_grad()
    def check_reload(self, fused: torch.nn.Module, folder: Path) -> float:
        """Load the saved adapter in PEFT and compare answer logits in fp32: largest difference over largest logit.

        Raises:
            SystemExit: they do not agree to half of fp32's digits.
        """
        reloaded = peft.PeftModel.from_pretrained(models.sharing_copy(self.base), folder)
        batch = self.collate([e._replace(answer=[]) for e in self.held_out[:8]])
        ours, theirs = (finetune.logits(copy.deepcopy(m).float().eval(), batch, 1) for m in (fused, reloaded))
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        if not difference <= torch.finfo(torch.float32).eps ** 0.5:
            raise SystemExit(
                f"the adapter in {folder} gives other logits in PEFT: relative difference {difference:.2e}"
            )
        return difference


def summarise(demo: Demo, accuracy: dict, runs: dict, footprints: dict, gaps: dict, reload_difference: float) -> dict:
    """What summary.json holds."""
    tokens = demo.tokens()
    return {
        "arguments": {k: str(v) for k, v in vars(demo.args).items()} | {"dtype": demo.dtype},
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "kernels": {f"{op} {key}": owner for (op, key), owner in OWNERS.items()},
        "accuracy": accuracy,
        "tokens": tokens,
        "tokens_per_second": {name: tokens / sum(run.seconds) for name, run in runs.items()},
        "memory_bytes": {name: f._asdict() for name, f in footprints.items()},
        "loss_difference": {name: {"largest": gap[0], "mean": gap[1]} for name, gap in gaps.items()},
        "reload_relative_difference": reload_difference,
    }


def main() -> None:
    args = arguments()
    start = time.perf_counter()
    os.makedirs(args.out, exist_ok=True)
    demo = Demo(args)
    print(f"SmolLM2-135M-Instruct in {demo.dtype} on {args.device}, {torch.get_num_threads()} CPU threads")
    footprints = {"full fine-tuning": demo.footprint(demo.base)}
    demo.base.requires_grad_(False)
    adapted = demo.adapt(demo.base)
    footprints |= {name: demo.footprint(model) for name, model in adapted.items()}
    exact = {}
    if args.skip_peft:
        del adapted[PEFT]
    elif demo.dtype != "fp32" and args.exact_steps:
        exact = demo.train(demo.adapt(copy.deepcopy(demo.base).float()), args.exact_steps, "train, fp32")
    accuracy = {"before": demo.accuracy(adapted[FUSED], "before")}
    runs = demo.train(adapted, args.steps, "train")
    accuracy |= {name: demo.accuracy(model, name) for name, model in adapted.items()}
    folder = args.out / "adapter"
    pk.save_adapter(adapted[FUSED], folder)
    reload_difference = demo.check_reload(adapted[FUSED], folder)

    demo_report.print_speed(accuracy["before"], accuracy, runs, demo.tokens(), PEFT, len(demo.held_out))
    demo_report.print_memory(footprints, demo.dtype, args.out)
    demo_report.write_losses(runs, exact, args.out)
    gaps = demo_report.curve_gaps(runs, exact, demo.dtype, PEFT, FUSED)
    demo_report.print_gaps(gaps)
    summary = summarise(demo, accuracy, runs, footprints, gaps, reload_difference)
    summary["seconds"] = time.perf_counter() - start
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\nAdapter saved in {folder}; loaded in PEFT it gives the same logits", end=" ")
    print(f"(relative difference {reload_difference:.1e}). {summary['seconds']:.0f} s in all.")


if __name__ == "__main__":
    main()

"""`make demo`: fine-tune a real language model with FusedLoRALinear, beside the same run with PEFT's own layers."""

import argparse
import copy
import csv
import json
import os
import platform
import time
from pathlib import Path

import peft
import torch
import transformers
from tabulate import tabulate
from tqdm import tqdm

import peft_kernels as pk
from benchmarks import finetune, footprint, models, sentiment

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

    def train(self, adapted: dict[str, torch.nn.Module]) -> dict[str, finetune.Run]:
        runs = {name: finetune.start_run(model, self.args.lr) for name, model in adapted.items()}
        with tqdm(total=len(self.batches), desc="train", unit="step") as bar:

            def on_step(losses: dict[str, float]) -> None:
                bar.set_postfix({name: f"{loss:.3f}" for name, loss in sorted(losses.items())})
                bar.update()

            finetune.train(runs, self.batches, on_step)
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


def write_losses(runs: dict[str, finetune.Run], out: Path) -> None:
    """losses.csv and losses.png: one column, one curve, for each run."""
    from matplotlib.figure import Figure

    with open(out / "losses.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(f"{name} {what}" for name in runs for what in ("loss", "seconds"))])
        columns = [column for run in runs.values() for column in (run.losses, run.seconds)]
        writer.writerows([step, *row] for step, row in enumerate(zip(*columns, strict=True)))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=False):
        axes.plot(run.losses, style, label=name)
    axes.set(xlabel="step", ylabel="loss on the answer tokens", title="SmolLM2-135M on movie-review snippets")
    axes.legend()
    figure.savefig(out / "losses.png", dpi=150)


def memory_table(footprints: dict[str, footprint.Footprint], out: Path) -> list[list]:
    """Rows of MB by kind; the exact bytes go to memory.csv."""
    kinds = footprint.Footprint._fields
    with open(out / "memory.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", *(f"{kind}_bytes" for kind in kinds)])
        writer.writerows([name, *f] for name, f in footprints.items())
    return [[name, *(f"{n / 1e6:,.1f}" for n in (*f, f.total))] for name, f in footprints.items()]


def report(demo: Demo, before: float, after: dict, runs: dict, footprints: dict, reload_diff: float) -> dict:
    """Print the tables, write the files, return the summary."""
    out, tokens = demo.args.out, demo.tokens()
    rate = {name: tokens / sum(run.seconds) for name, run in runs.items()}
    print(f"\nHeld-out accuracy on {len(demo.held_out)} snippets, and training speed ({tokens:,} tokens)")
    rows = [["before", f"{before:.1%}", "", "", ""]]
    for name, run in runs.items():
        ratio = f"{rate[name] / rate[PEFT]:.2f}x" if PEFT in rate else ""
        rows.append([name, f"{after[name]:.1%}", f"{rate[name]:,.0f}", f"{sum(run.seconds):.1f}", ratio])
    print(tabulate(rows, headers=["", "accuracy", "tokens/s", "seconds", "speed over PEFT"], stralign="right"))
    print(f"\nPeak memory by kind in MB, one step on the longest batch, {demo.dtype} base")
    headers = ["", "weights", "gradients", "optimizer", "saved activations", "sum"]
    print(tabulate(memory_table(footprints, out), headers=headers, stralign="right", disable_numparse=True))
    write_losses(runs, out)
    summary = {
        "arguments": {k: str(v) for k, v in vars(demo.args).items()} | {"dtype": demo.dtype},
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "accuracy": {"before": before, **after},
        "tokens": tokens,
        "tokens_per_second": rate,
        "memory_bytes": {name: f._asdict() for name, f in footprints.items()},
        "reload_relative_difference": reload_diff,
    }
    if len(runs) == 2:
        gaps = [abs(a - b) for a, b in zip(*(run.losses for run in runs.values()), strict=True)]
        summary["loss_difference"] = {"max": max(gaps), "mean": sum(gaps) / len(gaps)}
        print(f"\nLoss curves: largest difference {max(gaps):.4f}, mean {summary['loss_difference']['mean']:.4f}")
    return summary


def main() -> None:
    args = arguments()
    start = time.perf_counter()
    os.makedirs(args.out, exist_ok=True)
    demo = Demo(args)
    print(f"SmolLM2-135M-Instruct in {demo.dtype} on {args.device}, {torch.get_num_threads()} CPU threads")
    footprints = {"full fine-tuning": demo.footprint(demo.base)}
    demo.base.requires_grad_(False)
    reference = models.with_peft(demo.base, args.rank, args.seed)
    adapted = {PEFT: reference, FUSED: models.with_fused(demo.base, args.rank, reference)}
    footprints |= {name: demo.footprint(model) for name, model in adapted.items()}
    if args.skip_peft:
        del adapted[PEFT]
    before = demo.accuracy(adapted[FUSED], "before")
    runs = demo.train(adapted)
    after = {name: demo.accuracy(model, name) for name, model in adapted.items()}
    pk.save_adapter(adapted[FUSED], args.out / "adapter")
    summary = report(demo, before, after, runs, footprints, demo.check_reload(adapted[FUSED], args.out / "adapter"))
    summary["seconds"] = time.perf_counter() - start
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"Adapter saved in {args.out / 'adapter'}; loaded in PEFT it gives the same logits", end=" ")
    print(f"(relative difference {summary['reload_relative_difference']:.1e}). {summary['seconds']:.0f} s in all.")


if __name__ == "__main__":
    main()

"""`make demo-bitfit`: fine-tune a real encoder by its head alone, by BitFit, by LoRA and whole, on the same reviews.

--choose compares learning rates on a part of the training side: every fifth of its snippets, on which those runs do not
train. The held-out side is only scored, at the end.
"""

import argparse
import copy
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from torch import nn
from tqdm import tqdm

from benchmarks import bitfit_report, classification, encoder, finetune, footprint, sentiment, vram_measure
from benchmarks.bitfit_report import Outcome
from benchmarks.classification import Batch, Example
from benchmarks.encoder_methods import DEFAULT, WAYS
from benchmarks.environment import commit

CHOOSE_ON_EVERY = 5


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bitfit_demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--method", nargs="+", choices=tuple(WAYS), default=list(DEFAULT))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="of the head, the order of the snippets and dropout")
    parser.add_argument("--eval", type=int, help="held-out snippets to score; default: all")
    parser.add_argument("--choose", action="store_true", help="train with every learning rate of each method's grid")
    parser.add_argument("--out", type=Path, default=Path("out/bitfit"))
    args = parser.parse_args(argv)
    for name in ("steps", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; expected at least 1")
    if args.eval is not None and (args.choose or args.eval < 1):
        parser.error(f"--eval is {args.eval}; expected at least 1, and not with --choose, which scores no held-out one")
    return args


class Demo:
    """The data, the base model and what the steps below share. load: (seed) -> (model with a new head, tokenizer)."""

    def __init__(self, args: argparse.Namespace, load: Callable, split: tuple[list, list]):
        self.args, self.load = args, load
        self.base, tokenizer = load(args.seed)
        self.pad_id = tokenizer.pad_token_id
        train, held_out = ([classification.encode(tokenizer, s.text, s.label) for s in part] for part in split)
        self.scored = finetune.schedule(held_out, 1, min(args.eval or len(held_out), len(held_out)), seed=0)[0]
        if args.choose:
            self.scored = train[::CHOOSE_ON_EVERY]
            train = [one for i, one in enumerate(train) if i % CHOOSE_ON_EVERY]
        drawn = classification.schedule(train, args.steps, args.batch, args.seed)
        first = args.seed * args.steps
        self.batches = [self.collate(some, first + step) for step, some in enumerate(drawn)]

    def collate(self, examples: list[Example], seed: int = 0) -> Batch:
        return classification.collate(examples, self.pad_id, seed)

    def adapted(self, name: str) -> nn.Module:
        """A copy of the base model, ready to train; new adapters are the same whatever was made before."""
        torch.manual_seed(self.args.seed)
        return WAYS[name].adapt(copy.deepcopy(self.base))

    def memory(self, model: nn.Module) -> tuple[footprint.Footprint, int]:
        """Bytes by kind, and the most at once, of a step on the longest batch that leaves the model as it was."""
        longest = max(self.batches, key=lambda batch: batch.input_ids.numel())
        kinds = footprint.measure(model.train(), lambda: classification.loss(model, longest))
        still = finetune.start_run(model, lr=0.0).optimizer
        batch = {name: value for name, value in longest._asdict().items() if isinstance(value, torch.Tensor)}
        phases, _ = vram_measure.step(model, batch, still, lambda model, _: classification.loss(model, longest))
        return kinds, max(moment.allocated for moment in phases.values())

    def train(self, models: dict[str, nn.Module], rates: dict[str, float]) -> dict[str, finetune.Run]:
        """Every model on the same batches, step by step in turn; each rate falls linearly to 0."""
        runs = {name: finetune.start_run(model, rates[name]) for name, model in models.items()}
        steps = len(self.batches)
        decays = [torch.optim.lr_scheduler.LinearLR(run.optimizer, 1.0, 0.0, steps) for run in runs.values()]
        with tqdm(total=steps, desc="train", unit="step") as bar:

            def on_step(losses: dict[str, float]) -> None:
                for decay in decays:
                    decay.step()
                bar.set_postfix({name: f"{loss:.3f}" for name, loss in sorted(losses.items())})
                bar.update()

            finetune.train(runs, self.batches, on_step, classification.loss)
        return runs

    def right(self, model: nn.Module, name: str) -> list[bool]:
        with tqdm(total=len(self.scored), desc=f"score {name}", unit="snippet") as bar:
            return classification.right(model, self.scored, self.pad_id, 64, bar.update)

    @torch.no_grad()
    def reload(self, name: str, model: nn.Module, folder: Path) -> float:
        """Store what `model` learned and load it into a new base with another head: largest difference of the logits
        over the largest logit.

        Raises:
            SystemExit: they do not agree to half of fp32's digits.
        """
        WAYS[name].save(model, folder)
        loaded = WAYS[name].load(self.load(self.args.seed + 1)[0], folder)
        batch = self.collate(self.scored[:64])
        ours, theirs = (classification.logits(one.eval(), batch) for one in (model, loaded))
        gap = ((ours - theirs).abs().max() / ours.abs().max()).item()
        if not gap <= torch.finfo(torch.float32).eps ** 0.5:
            raise SystemExit(f"{name}: what is stored in {folder} gives other logits: relative difference {gap:.2e}")
        return gap


def choose(demo: Demo) -> None:
    """Every method with every rate of its grid; the table says which one is best."""
    jobs = {f"{name} {rate:g}": (name, rate) for name in demo.args.method for rate in WAYS[name].rates}
    models = {job: demo.adapted(name) for job, (name, _) in jobs.items()}
    demo.train(models, {job: rate for job, (_, rate) in jobs.items()})
    found = {jobs[job]: classification.share(demo.right(model, job)) for job, model in models.items()}
    bitfit_report.print_rates(found, len(demo.scored))
    bitfit_report.write_rates(found, demo.args.out)


def compare(demo: Demo) -> dict[str, Outcome]:
    """Train every method asked for, score it, store it, load it back."""
    args, names = demo.args, demo.args.method
    models = {name: demo.adapted(name) for name in names}
    memory = {name: demo.memory(model) for name, model in models.items()}
    trained = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in models.items()}
    runs = demo.train(models, {name: WAYS[name].rate for name in names})
    outcomes = {}
    for name, model in models.items():
        folder = args.out / "stored" / name
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier run stored would be counted
        right, gap = demo.right(model, name), demo.reload(name, model, folder)
        stored = sum(file.stat().st_size for file in folder.iterdir())
        run = runs[name]
        sizes = trained[name], stored, *memory[name]
        outcomes[name] = Outcome(WAYS[name].rate, *sizes, run.losses, run.seconds, right, gap)
    return outcomes


def main(argv: Sequence[str] | None = None, load: Callable = encoder.load_minilm, split: tuple | None = None) -> None:
    args = arguments(argv)
    args.method = list(dict.fromkeys(args.method))
    start = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.makedirs(args.out, exist_ok=True)
    demo = Demo(args, load, split or sentiment.load_split())
    total = sum(p.numel() for p in demo.base.parameters())
    sizes = f"{args.steps} steps of {args.batch} snippets, fp32, {torch.get_num_threads()} CPU threads"
    print(f"{type(demo.base).__name__}, {total:,} parameters; {sizes}; {len(demo.scored)} snippets to score")
    if args.choose:
        return choose(demo)
    outcomes = compare(demo)
    about = {
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "versions": {m.__name__: m.__version__ for m in (torch, transformers)},
        "commit": commit(),
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "parameters": total,
        "scored": len(demo.scored),
    }
    bitfit_report.print_outcomes(outcomes, total, len(demo.scored))
    bitfit_report.write(outcomes, total, about | {"seconds": time.perf_counter() - start}, args.out)


if __name__ == "__main__":
    main()

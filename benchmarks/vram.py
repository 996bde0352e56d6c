"""Where the memory of a training step goes, by kind and phase: estimated by formula, predicted, and measured.

    python benchmarks/vram.py --model llama-2-7b --method full lora qlora --rank 8
    python benchmarks/vram.py --model path/to/config.json --method lora peft-lora --batch 4 --seq 2048 --fits 24GB

No GPU and no weights are needed: the model's own code runs on tensors without memory. --measure runs the real step too.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called by its path, it finds its neighbours too

from benchmarks import environment

if __name__ == "__main__" and (
    absent := [name for name in ("transformers", "tabulate", "tqdm") if environment.version(name) == "none"]
):  # before an import of one ends in a traceback
    argparse.ArgumentParser(prog="python benchmarks/vram.py").error(f"not installed: pip install {' '.join(absent)}")

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from benchmarks import cases, rows, vram_fits, vram_measure, vram_report
from benchmarks.architectures import NAMES, Architecture, find, one_line
from benchmarks.lora_linear import arch_here
from benchmarks.memory_methods import BASE_METHODS, DTYPES, NEEDS_CUDA, OPTIMIZERS, Estimate, Method, Options, Unsuited
from peft_kernels.memory.predict import Prediction, predict_memory
from peft_kernels.memory.replay import Replay, check_arch

_FAILURES = (RuntimeError, MemoryError, ValueError, AssertionError)
"""What a method's own step may end in: memory that is out, values read on fake tensors, a model it is not made for."""

_UNBUILT = (*_FAILURES, LookupError, TypeError, AttributeError, ImportError, ArithmeticError)
"""What transformers raises on configurations that do not make sense."""


def methods() -> dict[str, Method]:
    """Every way to fine-tune that there is a row for; a primitive's own replace those that wait for it."""
    found = {method.name: method for method in BASE_METHODS}
    for primitive in cases.PRIMITIVES.values():
        found |= {method.name: method for method in primitive.methods}
    return found


@dataclass
class Result:
    """All that is known of one method."""

    method: Method
    estimate: Estimate | None  # None where the model is not one for the method
    prediction: Prediction | None = None
    measured: Replay | None = None
    notes: list[str] = field(default_factory=list)
    failed: bool = False

    def attempt(self, what: str, action: Callable):
        """What `action` gives; where it fails, nothing, and a note that says why."""
        try:
            return action()
        except _FAILURES as error:
            self.failed = True
            self.notes.append(f"{what} failed: {type(error).__name__}: {one_line(error)}")
            return None


@dataclass(frozen=True)
class Question:
    """One model, one set of options, one kind of step."""

    architecture: Architecture
    options: Options
    batch: int
    seq: int
    checkpointing: bool
    optimizer: str
    arch: int | None

    def model(self, method: Method) -> nn.Module:
        """As it is trained by `method`."""
        base = self.architecture.build(self.options.dtype).requires_grad_(False)
        if self.checkpointing:
            base.gradient_checkpointing_enable()
        model = method.adapt(base, self.options)
        if self.checkpointing and not base.get_input_embeddings().weight.requires_grad:
            base.enable_input_require_grads()  # as Hugging Face's trainers do
        return model

    def predict(self, method: Method, batch: int | None = None, seq: int | None = None) -> Prediction:
        sizes = self.architecture.batch(batch or self.batch, seq or self.seq)
        return predict_memory(
            partial(self.model, method), sizes, optimizer=method.update(self.optimizer), arch=self.arch
        )

    def estimate(self, method: Method) -> Estimate:
        found = method.estimate(self._without_memory, self.options)
        return replace(found, optimizer=0.0) if method.stateless_with(self.optimizer) else found

    @cached_property
    def _without_memory(self) -> nn.Module:
        try:
            with FakeTensorMode():
                return self.architecture.build(self.options.dtype)
        except _UNBUILT as error:
            why = f"{type(error).__name__}: {one_line(error)}"
            raise ValueError(f"model {self.architecture.name}: transformers cannot build it: {why}") from error


def _estimated(question: Question, chosen: Sequence[Method]) -> list[Result]:
    """A result for each method, with its estimate, or a note where the model is not one for it.

    Raises:
        ValueError: the question is wrong for every method that it is about, or no method is for this model.
    """
    results, last = [], None
    for method in chosen:
        try:
            results.append(Result(method, question.estimate(method)))
        except Unsuited as error:
            results.append(Result(method, None, notes=[f"no estimate: {one_line(error)}"], failed=True))
            last = error
    if last and all(result.failed for result in results):
        raise last
    return results


def answer(
    question: Question, chosen: Sequence[Method], measure: str | None, progress: Callable, snapshot: Path | None = None
) -> list[Result]:
    """Estimate first, for all: what is wrong with the question shows before anything takes long."""
    check_arch(question.arch)
    question.architecture.batch(question.batch, question.seq)
    results = _estimated(question, chosen)
    for result in progress([result for result in results if result.estimate]):
        method = result.method
        absent = "" if method.missing == NEEDS_CUDA else method.missing  # which no prediction needs
        if method.unpredicted:
            result.notes.append(f"no prediction: {method.unpredicted}")
        elif not absent:
            result.prediction = result.attempt("prediction", partial(question.predict, method))
        if measure:
            absent = method.missing_on(measure)
        elif method.unpredicted:
            absent = ""
        if absent:
            result.notes.append(absent)
        elif measure:
            file = snapshot and vram_measure.snapshot_of(snapshot, method, len(results))
            run = partial(vram_measure.measure, question, method, measure, file)
            result.measured = result.attempt("measurement", run)
    return results


def add_question(parser: argparse.ArgumentParser, **defaults) -> None:
    """The options that say which step of which model is meant."""
    known = sorted(methods())
    several = f"one or more of {', '.join(known)}"
    names = f"{', '.join(NAMES)}, or the path of a config.json"
    parser.add_argument("--model", required="model" not in defaults, help=names)
    parser.add_argument("--method", nargs="+", choices=known, metavar="NAME", help=several)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--batch", type=int, help="sequences")
    parser.add_argument("--seq", type=int, help="tokens in each")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="of the base model")
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), help="adamw is Torch's default on a GPU: foreach")
    parser.set_defaults(**defaults)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/vram.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_question(parser, method=["full", "lora"], rank=8, batch=1, seq=512, optimizer="adamw")
    parser.add_argument("--targets", nargs="+", default=["all-linear"], help="names of linear layers, or all-linear")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing of every block")
    parser.add_argument("--arch", type=int, default=90, help="compute capability of the GPU: 90 for 9.0 (H100)")
    parser.add_argument("--fits", metavar="SIZE", type=vram_fits.card_bytes,
                        help="find the largest batch that fits a card, such as 24GB: taken as 24 GiB")  # fmt: skip
    parser.add_argument("--measure", choices=("cpu", "cuda"), help="run the real step too: its weights are allocated")
    parser.add_argument("--within", metavar="PERCENT", type=float,
                        help="exit with 1 where a prediction is further off from what --measure finds")  # fmt: skip
    parser.add_argument("--snapshot", metavar="FILE", type=Path,
                        help="write the measured step's memory history, for pytorch.org/memory_viz")  # fmt: skip
    for name in ("csv", "json", "png"):
        parser.add_argument(f"--{name}", type=Path, help=f"write the rows as {name.upper()} too")
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program where options do not go together, or there is no place for a file."""
    if args.fits is not None and (args.measure == "cpu" or args.fits <= vram_fits.CONTEXT):
        left = f"a card of more than {vram_fits.CONTEXT >> 20} MiB, which go to the CUDA context, and no --measure cpu"
        parser.error(f"--fits needs {left}")
    if args.within is not None and not (args.measure and 0 <= args.within < math.inf):
        parser.error("--within needs --measure, and a number of percent from 0 on")
    if args.snapshot and args.measure != "cuda":
        parser.error("--snapshot needs --measure cuda")
    if args.png and environment.version("matplotlib") == "none":
        parser.error("--png needs matplotlib: pip install matplotlib")
    if args.measure == "cuda" and not torch.cuda.is_available():
        parser.error("--measure cuda: there is no CUDA device")
    for name in ("csv", "json", "png", "snapshot"):
        try:
            if path := getattr(args, name):
                rows.make_room(path)
        except OSError as error:
            parser.error(f"--{name} {path} cannot be written: {error.strerror}")


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    transformers.logging.set_verbosity_error()
    targets = args.targets[0] if args.targets == ["all-linear"] else tuple(args.targets)
    arch = arch_here() if args.measure == "cuda" else None if args.measure == "cpu" else args.arch
    try:
        options = Options(args.rank, targets, DTYPES[args.dtype])
        question = Question(find(args.model), options, args.batch, args.seq, args.checkpointing, args.optimizer, arch)
        chosen = [methods()[name] for name in dict.fromkeys(args.method)]
        bar = partial(tqdm, desc="predict", unit="method", disable=len(chosen) < 2, leave=False)
        results = answer(question, chosen, args.measure, bar, args.snapshot)
    except ValueError as error:
        print(f"vram: {error}", file=sys.stderr)
        return 2
    print(vram_report.text(question, results))
    if args.fits is not None:
        print(vram_fits.text(question, [result for result in results if result.prediction], args.fits))
    vram_report.write(question, results, args.csv, args.json, args.png)
    failed = any(result.failed for result in results)
    if args.within is not None:
        right, said = vram_measure.within(args.within, results)
        print(said)
        failed = failed or not right
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

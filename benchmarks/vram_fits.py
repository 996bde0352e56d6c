"""The largest batch that fits a card, by method: predicted, in the allocator's own terms."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

from tabulate import tabulate
from tqdm import tqdm

from peft_kernels.memory.allocator import OutOfMemory
from peft_kernels.memory.predict import Prediction
from peft_kernels.memory.replay import Replay

from .memory_methods import Method

CONTEXT = 2**30
"""Bytes of a card that a process cannot reserve: its CUDA context, kernels, the desktop. Assumed, not measured."""

MOST = 1 << 16  # sequences
UNIT = 64  # tokens, of which a sequence is a multiple
_UNITS = {"GB": 2**30, "GIB": 2**30, "MB": 2**20, "MIB": 2**20}


def card_bytes(size: str) -> int:
    """Bytes of "24GB", taken as 24 GiB, which some cards do not quite have: nvidia-smi says, in MiB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", size)
    if found is None or found[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{size!r} is no size; expected a number and a unit, such as 24GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


class Tries:
    """Predictions, told as they begin: a large model's take long. tell: as a progress bar's set_postfix."""

    def __init__(self, tell: Callable = lambda **words: None):
        self.count, self.tell = 0, tell

    def __call__(self, question, method: Method, batch: int, seq: int) -> Prediction:
        self.count += 1
        self.tell(size=f"{batch} x {seq}", predictions=self.count)
        return question.predict(method, batch, seq)


def _holds(prediction: Prediction, capacity: int) -> bool:
    if prediction.replay.reserved <= capacity:
        return True
    try:  # a full card gives back what is empty
        prediction.as_run_on(prediction.arch, capacity)
    except OutOfMemory:
        return False
    return True


def fits(question, method: Method, batch: int, seq: int, capacity: int, tries: Tries) -> bool:
    return _holds(tries(question, method, batch, seq), capacity)


def largest(works: Callable[[int], bool], most: int, guess: int = 1) -> int:
    """The largest n up to `most` of which `works(n)` is true, 0 when there is none, if what is true of one is true of
    all below. An allocator's is so but for its last few: then an n that works, and whose successor does not. The closer
    the guess, the fewer are tried."""
    at, step = max(1, min(guess, most)), 1
    if works(at):
        good, bad = at, most + 1
        while good < most and bad > most:
            at, step = min(good + step, most), 2 * step
            good, bad = (at, bad) if works(at) else (good, at)
    else:
        good, bad = 0, at
        while good == 0 and bad > 1:
            at, step = max(bad - step, 1), 2 * step
            good, bad = (at, bad) if works(at) else (0, at)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if works(middle) else (good, middle)
    return good


def _guess(one: Replay, two: Replay, capacity: int) -> int:
    """Where a size reaches the capacity if the memory of every phase grows as from the first to the second."""
    found = MOST
    for phase, first in one.phases.items():
        more = two.phases[phase].allocated - first.allocated
        if more > 0:
            found = min(found, 1 + (capacity - first.allocated) // more)
    return found


def _largest(predict: Callable[[int], Prediction], capacity: int, most: int) -> int:
    """`largest`, near where the first two sizes point: activations grow linearly."""
    replays: dict[int, Replay] = {}

    @cache
    def works(n: int) -> bool:
        prediction = predict(n)
        if n <= 2:
            replays[n] = prediction.replay
        return _holds(prediction, capacity)

    if not works(1):
        return 0
    if most == 1 or not works(2):
        return 1
    return largest(works, most, _guess(replays[1], replays[2], capacity))


def _advice(question, method: Method, capacity: int, tries: Tries) -> str:
    """What to change, of which one sequence is predicted to fit; the weights first, which nothing makes smaller."""
    weights = tries(question, method, 1, 1).replay.phases["load"].allocated
    if weights > capacity:
        return f"the weights alone are {weights / 2**30:.2f} GiB: a smaller model, a larger card"
    ideas = {
        "--checkpointing": replace(question, checkpointing=True),
        "--optimizer adamw-fused": replace(question, optimizer="adamw-fused"),
        "both": replace(question, checkpointing=True, optimizer="adamw-fused"),
    }
    others = {name: one for name, one in ideas.items() if one != question}
    good = [name for name, one in others.items() if fits(one, method, 1, question.seq, capacity, tries)]
    return f"fits with {' or '.join(good)}" if good else "nor with --checkpointing --optimizer adamw-fused"


def _row(question, result, capacity: int, tries: Tries) -> tuple[str, str, str]:
    """The largest batch at the sequence length asked for, or the longest one at batch 1."""
    method, there = result.method, {question.batch: result.prediction}
    size = _largest(lambda n: there.get(n) or tries(question, method, n, question.seq), capacity, MOST)
    if size:
        return method.name, f"{size} x {question.seq}", f"{size * question.seq:,} tokens"
    units = _largest(lambda n: tries(question, method, 1, UNIT * n), capacity, max(1, question.seq // UNIT))
    found = f"1 x {UNIT * units}" if units else "nothing"
    return method.name, found, f"not {question.seq}: {_advice(question, method, capacity, tries)}"


def text(question, results: Sequence, card: int) -> str:
    """A table of what is predicted to fit, by method."""
    lines, bar = [], tqdm(results, desc="what fits", unit="method", leave=False)
    tries = Tries(bar.set_postfix)
    for result in bar:
        found = result.attempt("what fits", partial(_row, question, result, card - CONTEXT, tries))
        lines.append(found or (result.method.name, "", result.notes[-1]))
    head = (
        f"\nLargest batch on a card of {card / 2**30:g} GiB, {CONTEXT / 2**30:g} GiB of it left to the CUDA context\n"
    )
    return head + "\n" + tabulate(lines, headers=("method", "batch x seq", ""), disable_numparse=True)

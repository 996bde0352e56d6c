"""The largest batch that fits a card, by method: predicted, in the allocator's own terms."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace

from tabulate import tabulate
from tqdm import tqdm

from peft_kernels.memory.allocator import OutOfMemory

from .memory_methods import Method

CONTEXT = 2**30
"""Bytes of a card that a process cannot reserve: its CUDA context, kernels, the desktop. Assumed, not measured."""

MOST = 1 << 16  # sequences
_UNITS = {"GB": 2**30, "GIB": 2**30, "MB": 2**20, "MIB": 2**20}


def card_bytes(size: str) -> int:
    """Bytes of "24GB", taken as 24 GiB, which some cards do not quite have: nvidia-smi says, in MiB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", size)
    if found is None or found[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{size!r} is no size; expected a number and a unit, such as 24GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def fits(question, method: Method, batch: int, seq: int, capacity: int) -> bool:
    prediction = question.predict(method, batch, seq)
    if prediction.replay.reserved <= capacity:
        return True
    try:  # a full card gives back what is empty
        prediction.as_run_on(question.arch, capacity)
    except OutOfMemory:
        return False
    return True


def largest(works, most: int) -> int:
    """The largest n up to `most` of which `works(n)` is true, 0 when there is none, if what is true of one is true of
    all below. An allocator's is so but for its last few: then an n that works, and whose double does not."""
    if not works(1):
        return 0
    good, bad = 1, 2
    while bad <= most and works(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if works(middle) else (good, middle)
    return good


def _advice(question, method: Method, capacity: int) -> str:
    """What to change, of which one sequence is predicted to fit; the weights first, which nothing makes smaller."""
    weights = question.predict(method, 1, 1).replay.phases["load"].allocated
    if weights > capacity:
        return f"the weights alone are {weights / 2**30:.2f} GiB: a smaller model, a larger card"
    ideas = {
        "--checkpointing": replace(question, checkpointing=True),
        "--optimizer adamw-fused": replace(question, optimizer="adamw-fused"),
        "both": replace(question, checkpointing=True, optimizer="adamw-fused"),
    }
    good = [name for name, one in ideas.items() if one != question and fits(one, method, 1, question.seq, capacity)]
    return f"fits with {' or '.join(good)}" if good else "nor with --checkpointing --optimizer adamw-fused"


def text(question, methods: Sequence[Method], card: int) -> str:
    """A table: per method the largest batch at the sequence length asked for, or the longest one at batch 1."""
    lines = []
    for method in tqdm(methods, desc="what fits", unit="method", leave=False):
        size = largest(lambda n, m=method: fits(question, m, n, question.seq, card - CONTEXT), MOST)
        if size:
            lines.append((method.name, f"{size} x {question.seq}", f"{size * question.seq:,} tokens"))
            continue
        units = largest(lambda n, m=method: fits(question, m, 1, 64 * n, card - CONTEXT), max(1, question.seq // 64))
        found = f"1 x {64 * units}" if units else "nothing"
        lines.append((method.name, found, f"not {question.seq}: {_advice(question, method, card - CONTEXT)}"))
    head = (
        f"\nLargest batch on a card of {card / 2**30:g} GiB, {CONTEXT / 2**30:g} GiB of it left to the CUDA context\n"
    )
    return head + "\n" + tabulate(lines, headers=("method", "batch x seq", ""), disable_numparse=True)

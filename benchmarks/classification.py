"""Sequence classification, small and whole: examples, batches, the loss, what is predicted, and how sure that is."""

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import finetune

LABELS = ("negative", "positive")
_EXCHANGE = 10  # batches that snippets change between
_NORMAL_95 = 1.959964  # of a normal distribution 95 % lie this many deviations around the mean


class Example(NamedTuple):
    tokens: list[int]
    label: int  # of LABELS


class Batch(NamedTuple):
    """input_ids and attention_mask [B, T], right-padded; labels [B]. `seed` is what its dropout masks are drawn from:
    every model that trains on the batch sees the same, whatever else trains beside it."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    seed: int


def encode(tokenizer, text: str, label: str) -> Example:
    return Example(tokenizer(text, truncation=True)["input_ids"], LABELS.index(label))


def collate(examples: list[Example], pad_id: int, seed: int = 0) -> Batch:
    """The examples with T the longest of them."""
    T = max(len(e.tokens) for e in examples)
    ids = torch.tensor([e.tokens + [pad_id] * (T - len(e.tokens)) for e in examples])
    mask = torch.tensor([[1] * len(e.tokens) + [0] * (T - len(e.tokens)) for e in examples])
    return Batch(ids, mask, torch.tensor([e.label for e in examples]), seed)


def schedule(examples: list[Example], steps: int, batch: int, seed: int) -> list[list[Example]]:
    """The batches of a run, in order: drawn as `finetune.schedule` does, then exchanged among neighbouring batches so
    that each is of similar length; half of the tokens would be padding otherwise."""
    drawn, rng, batches = finetune.schedule(examples, steps, batch, seed), random.Random(seed), []
    for first in range(0, steps, _EXCHANGE):
        some = sorted(sum(drawn[first : first + _EXCHANGE], []), key=lambda e: len(e.tokens))
        parts = [some[i : i + batch] for i in range(0, len(some), batch)]
        batches += rng.sample(parts, len(parts))
    return batches


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """[B, classes]."""
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the batch."""
    torch.manual_seed(batch.seed)
    return nn.functional.cross_entropy(logits(model, batch), batch.labels)


@torch.no_grad()
def right(
    model: nn.Module, examples: list[Example], pad_id: int, batch: int, on_batch: Callable = lambda rows: None
) -> list[bool]:
    """Of each example, whether the model's likeliest class is its label. Batches are of similar length: little is
    padding."""
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    found = [False] * len(examples)
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        rows = collate([examples[i] for i in some], pad_id)
        hits = (logits(model, rows).argmax(1) == rows.labels).tolist()
        for i, hit in zip(some, hits, strict=True):
            found[i] = hit
        on_batch(len(some))
    return found


class Share(NamedTuple):
    """A share, or a difference of two, with its 95 % interval."""

    value: float
    low: float
    high: float


def share(found: list[bool]) -> Share:
    """How many are true, with Wilson's interval."""
    n, p, z = len(found), sum(found) / len(found), _NORMAL_95
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Share(p, middle - half, middle + half)


def difference(one: list[bool], other: list[bool]) -> Share:
    """share(one) - share(other) on the same examples: only those on which they differ make it uncertain."""
    gaps = [int(a) - int(b) for a, b in zip(one, other, strict=True)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps)) / len(gaps)
    return Share(mean, mean - _NORMAL_95 * deviation, mean + _NORMAL_95 * deviation)

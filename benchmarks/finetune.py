"""Instruction tuning, small and whole: prompts, batches, the loss on answer tokens, training side by side, accuracy."""

import random
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

IGNORED = -100
LABELS = ("positive", "negative")


class Example(NamedTuple):
    """Token ids of prompt and answer, and which label is right. The prompt's length says where the answer starts."""

    prompt: list[int]
    answer: list[int]
    label: str


class Batch(NamedTuple):
    """Left-padded, so that every answer ends in the last column. All [B, T]; labels are IGNORED outside answers."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor


def question(text: str) -> str:
    return f"Review: {text}\nIs this review positive or negative?"


def encode(tokenizer, text: str, label: str) -> Example:
    """The snippet as a chat turn, and the label with the end-of-turn token as the assistant's answer.

    Prompt and answer are told apart by length, never by the padding id: here padding is the end-of-turn token too.
    """
    messages = [{"role": "user", "content": question(text)}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    answer = tokenizer(label, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return Example(tokenizer(prompt, add_special_tokens=False)["input_ids"], answer, label)


def collate(examples: list[Example], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Prompts with their answers, [B, T] with T the longest of them."""
    T = max(len(e.prompt) + len(e.answer) for e in examples)
    ids, mask, labels = [], [], []
    for e in examples:
        pad = T - len(e.prompt) - len(e.answer)
        ids.append([pad_id] * pad + e.prompt + e.answer)
        mask.append([0] * pad + [1] * (T - pad))
        labels.append([IGNORED] * (T - len(e.answer)) + e.answer)
    input_ids, attention_mask, labels = (torch.tensor(rows, device=device) for rows in (ids, mask, labels))
    return Batch(input_ids, attention_mask, (attention_mask.cumsum(1) - 1).clamp_min(0), labels)


def logits(model: nn.Module, batch: Batch, keep: int) -> Tensor:
    """fp32 logits [B, keep, vocabulary] of the last `keep` positions: the vocabulary is large, the rest is not read."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    return model(**inputs, logits_to_keep=keep, use_cache=False).logits.float()


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the answer tokens of the batch, each predicted from the position before it."""
    answered = (batch.labels != IGNORED).any(0)
    span = int(answered.sum())  # answers end in the last column, so the longest one covers the last `span` columns
    predictions = logits(model, batch, span + 1)[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(predictions, batch.labels[:, -span:].flatten(), ignore_index=IGNORED)


def schedule(examples: list, steps: int, batch: int, seed: int) -> list[list]:
    """The batches of a run, in order: shuffled by `seed`, without repeats until the data is used up."""
    order, rng = [], random.Random(seed)
    while len(order) < steps * batch:
        order += rng.sample(range(len(examples)), len(examples))
    return [[examples[i] for i in order[s * batch : (s + 1) * batch]] for s in range(steps)]


class Run(NamedTuple):
    """A model in training and what has been seen of it so far."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float]
    seconds: list[float]


def start_run(model: nn.Module, lr: float) -> Run:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return Run(model.train(), torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0), [], [])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


Loss = Callable[[nn.Module, Any], Tensor]
"""Of a model and a batch, which has input_ids."""


def train_step(run: Run, batch: Any, loss_of: Loss = answer_loss) -> float:
    """One step: loss, gradients, AdamW. Appends the loss and the seconds it took to `run`; returns the loss."""
    device = batch.input_ids.device
    _synchronize(device)
    start = time.perf_counter()
    loss = loss_of(run.model, batch)
    loss.backward()
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    _synchronize(device)
    run.seconds.append(time.perf_counter() - start)
    run.losses.append(loss.item())
    return run.losses[-1]


def train(
    runs: dict[str, Run],
    batches: Iterable[Any],
    on_step: Callable[[dict[str, float]], None],
    loss_of: Loss = answer_loss,
) -> None:
    """Train every run on the same batches, step by step in turn, and report each step's losses.

    Taking turns, and going first in turns, gives each run the same share of a machine whose speed drifts.
    """
    names = list(runs)
    for step, batch in enumerate(batches):
        turn = names[step % len(names) :] + names[: step % len(names)]
        on_step({name: train_step(runs[name], batch, loss_of) for name in turn})


@torch.no_grad()
def predict(
    model: nn.Module,
    examples: list[Example],
    pad_id: int,
    batch: int,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], object] = lambda rows: None,
) -> list[str]:
    """The label whose first token is the likelier one at the first answer position, for each example.

    Examples run in batches of similar length, so that little of the work is padding.
    """
    model.eval()
    first = {e.label: e.answer[0] for e in examples}
    if len(set(first.values())) != len(first):
        raise ValueError(f"labels must differ in their first token; got {first}")
    labels = sorted(first)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
    predicted = [""] * len(examples)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        prompts = collate([examples[i]._replace(answer=[]) for i in rows], pad_id, device)
        scores = logits(model, prompts, 1)[:, 0, [first[label] for label in labels]]
        for i, choice in zip(rows, scores.argmax(1).tolist(), strict=True):
            predicted[i] = labels[choice]
        on_batch(len(rows))
    return predicted


def accuracy(predicted: list[str], examples: list[Example]) -> float:
    return sum(p == e.label for p, e in zip(predicted, examples, strict=True)) / len(examples)

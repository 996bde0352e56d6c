"""The memory of a real training step: what the device's allocator gave at the worst moment of each phase, and how far
from that the prediction was."""

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.memory.allocator import rounded
from peft_kernels.memory.predict import default_loss, optimizer_states, without_garbage_collection
from peft_kernels.memory.replay import Moment, Replay

from .footprint import storage_bytes
from .held import held_by
from .memory_methods import Method

COUNTED = ("weights", "gradients", "optimizer", "inputs")
"""The kinds that are measured tensor by tensor."""


@contextmanager
def _history(file: Path | None) -> Iterator[None]:
    """Write what the CUDA allocator does inside to `file`, with stacks, for https://pytorch.org/memory_viz."""
    if file is None:
        yield
        return
    torch.cuda.memory._record_memory_history(stacks="python")
    try:
        yield
        torch.cuda.memory._dump_snapshot(str(file))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def snapshot_of(file: Path, method: Method, methods: int) -> Path:
    """The file of a method's memory history: the one asked for, or with several methods one of each's own."""
    return file if methods == 1 else file.with_name(f"{file.stem}-{method.name}{file.suffix}")


def step(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] = default_loss,
    snapshot: Path | None = None,
) -> tuple[dict[str, Moment], int]:
    """The worst moment of each phase of a model's second training step, and the bytes that forward left for backward.

    Weights, inputs, gradients and optimizer states are counted tensor by tensor. What a device allocates besides has no
    label: it is called activations, in the optimizer's step temporaries.
    """
    device = next(model.parameters()).device.type
    loss(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    held = {"weights": storage_bytes((*model.parameters(), *model.buffers())), "inputs": storage_bytes(batch.values())}
    states = [state for state in optimizer_states(optimizer) if state.device.type == device]  # not counters on the host
    held["optimizer"] = storage_bytes(states)
    base = torch.cuda.memory_allocated() if device == "cuda" else sum(held.values())
    blocks = sum(rounded(state.nbytes) for state in states) if device == "cuda" else held["optimizer"]
    with without_garbage_collection(), _history(snapshot):
        values = []
        forward = held_by(lambda: values.append(loss(model, batch)), device)
        backward = held_by(lambda: values.pop().backward(), device)  # the loss goes with its graph
        gradients = storage_bytes(p.grad for p in model.parameters() if p.grad is not None)
        update = held_by(optimizer.step, device)
    optimizer.zero_grad()
    most = {
        "load": base - blocks,  # with the libraries' workspaces, which the first step made
        "forward": base + forward.peak,
        "backward": base + forward.left + backward.peak,
        "step": base + forward.left + backward.left + update.peak,
    }
    rest = {"forward": "activations", "backward": "activations", "step": "temporaries"}
    phases = {}
    for phase, total in most.items():
        kinds = held | {"load": {"optimizer": 0}, "step": {"gradients": gradients}}.get(phase, {})
        if phase in rest:
            kinds[rest[phase]] = total - sum(kinds.values())
        phases[phase] = Moment(total, kinds, "")
    return phases, forward.left


def _clear(device: str) -> None:
    """Drop what nothing refers to any more, and what the allocator keeps of it, with its record of the most."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(question, method: Method, device: str, snapshot: Path | None = None) -> Replay:
    """The step that the question describes, with real weights, on `device` ("cpu" or "cuda")."""
    torch.manual_seed(0)
    _clear(device)  # what the method before left is not this one's
    with torch.device(device):  # where random weights are made in no time
        model = question.model(method)
    model = model.to(device).train()
    _clear(device)  # nor is what making it took
    sizes = question.architecture.batch(question.batch, question.seq)
    batch = {name: tensor.to(device) for name, tensor in sizes.items()}
    optimizer = method.update(question.optimizer)(p for p in model.parameters() if p.requires_grad)
    phases, saved = step(model, batch, optimizer, snapshot=snapshot)
    # Every phase resets the peak, to what is reserved then: all that was since the cache was emptied, on a roomy card.
    return Replay(phases, torch.cuda.max_memory_reserved() if device == "cuda" else None, saved, saved)


class Deviation(NamedTuple):
    """A predicted number of bytes beside the measured one."""

    what: str
    predicted: int
    measured: int

    @property
    def percent(self) -> float:
        """Of what was measured."""
        if self.measured == 0:
            return 0.0 if self.predicted == 0 else math.inf
        return 100 * abs(self.predicted - self.measured) / self.measured

    def __str__(self) -> str:
        return f"{self.what} {self.predicted:,} bytes predicted, {self.measured:,} measured, {self.percent:.4g} % off"


def deviations(name: str, predicted: Replay, measured: Replay) -> list[Deviation]:
    """Every total, and every kind that is counted."""
    found = [Deviation(f"{name}: saved", predicted.saved_blocks, measured.saved)]
    if measured.reserved is not None:
        found.append(Deviation(f"{name}: reserved", predicted.reserved, measured.reserved))
    found.append(Deviation(f"{name}: peak", predicted.peak.allocated, measured.peak.allocated))
    for phase, real in measured.phases.items():
        moment = predicted.phases[phase]
        found.append(Deviation(f"{name}: {phase}", moment.allocated, real.allocated))
        found += (
            Deviation(f"{name}: {kind} in {phase}", moment.kinds.get(kind, 0), real.kinds[kind])
            for kind in COUNTED
            if kind in real.kinds
        )
    return found


def within(percent: float, results) -> tuple[bool, str]:
    """Whether all that was both predicted and measured deviates by `percent` at most, and what to print about it."""
    both = [result for result in results if result.prediction and result.measured]
    found = [d for r in both for d in deviations(r.method.name, r.prediction.replay, r.measured)]
    if not found:
        return False, "--within: nothing was both predicted and measured"
    over = [one for one in found if not one.percent <= percent]
    if over:
        return False, "\n".join(f"over {percent:g} %: {one}" for one in over)
    return True, f"all within {percent:g} %; farthest off is {max(found, key=lambda one: one.percent)}"

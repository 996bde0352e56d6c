"""The memory of a real training step: what the device's allocator gave at the worst moment of each phase."""

import gc
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from peft_kernels.memory.predict import default_loss, optimizer_states, without_garbage_collection
from peft_kernels.memory.replay import Moment, Replay

from .footprint import storage_bytes
from .held import held_by
from .memory_methods import OPTIMIZERS, Method


def step(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] = default_loss,
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
    held["optimizer"] = storage_bytes(optimizer_states(optimizer))
    base = torch.cuda.memory_allocated() if device == "cuda" else sum(held.values())
    with without_garbage_collection():
        values = []
        forward = held_by(lambda: values.append(loss(model, batch)), device)
        backward = held_by(lambda: values.pop().backward(), device)  # the loss goes with its graph
        gradients = storage_bytes(p.grad for p in model.parameters() if p.grad is not None)
        update = held_by(optimizer.step, device)
    optimizer.zero_grad()
    most = {
        "load": base - held["optimizer"],
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


def measure(question, method: Method, device: str) -> Replay:
    """The step that the question describes, with real weights, on `device` ("cpu" or "cuda")."""
    torch.manual_seed(0)
    if device == "cuda":  # what the method before reserved is not this one's
        gc.collect()
        torch.cuda.empty_cache()
    model = question.model(method).to(device).train()
    sizes = question.architecture.batch(question.batch, question.seq)
    batch = {name: tensor.to(device) for name, tensor in sizes.items()}
    optimizer = OPTIMIZERS[question.optimizer](p for p in model.parameters() if p.requires_grad)
    phases, saved = step(model, batch, optimizer)
    return Replay(phases, torch.cuda.max_memory_reserved() if device == "cuda" else None, saved)

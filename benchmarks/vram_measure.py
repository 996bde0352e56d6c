"""The memory of a real training step: what the device's allocator gave at the worst moment of each phase."""

import gc
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from peft_kernels.memory.predict import default_loss, without_garbage_collection
from peft_kernels.memory.replay import Moment, Replay

from .footprint import storage_bytes
from .memory_methods import OPTIMIZERS, Method


def _on_cpu(action: Callable[[], object]) -> tuple[int, int]:
    """The most bytes that `action` held at once beyond those before, and how many it left."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when the profiler first starts: it logs to stderr otherwise
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        action()
    entries = [(e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for _, nbytes in sorted(entries, key=lambda entry: entry[0]):  # nbytes is negative where memory is freed
        held += nbytes
        most = max(most, held)
    return most, held


def _on_cuda(action: Callable[[], object]) -> tuple[int, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before


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
    cuda = next(model.parameters()).device.type == "cuda"
    run = _on_cuda if cuda else _on_cpu
    loss(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    held = {"weights": storage_bytes((*model.parameters(), *model.buffers())), "inputs": storage_bytes(batch.values())}
    held["optimizer"] = storage_bytes(states)
    base = torch.cuda.memory_allocated() if cuda else sum(held.values())
    with without_garbage_collection():
        values = []
        forward, saved = run(lambda: values.append(loss(model, batch)))
        backward, left = run(lambda: values.pop().backward())  # the loss goes with its graph
        gradients = storage_bytes(p.grad for p in model.parameters() if p.grad is not None)
        update, _ = run(optimizer.step)
    optimizer.zero_grad()
    before = {"load": base - held["optimizer"], "forward": base, "backward": base + saved, "step": base + saved + left}
    most = {"load": 0, "forward": forward, "backward": backward, "step": update}
    rest = {"forward": "activations", "backward": "activations", "step": "temporaries"}
    phases = {}
    for phase, start in before.items():
        kinds = held | {"load": {"optimizer": 0}, "step": {"gradients": gradients}}.get(phase, {})
        total = start + most[phase]
        if phase in rest:
            kinds[rest[phase]] = total - sum(kinds.values())
        phases[phase] = Moment(total, kinds, "")
    return phases, saved


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

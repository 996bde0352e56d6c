"""predict_memory: a real training step of a real model on tensors that have no memory, and what it would hold where."""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_leaves

from .._core.registry import planned_for
from ..methods.adapters import trainable_parameters
from .as_on_gpu import as_on_gpu
from .asked import built, check_callables, made_optimizer, without_memory
from .replay import Replay, check_arch, replay
from .trace import Recorder, Trace
from .unpadded import unpadded

_STEPS = 2  # the second runs with what the first left: optimizer states


@dataclass(frozen=True)
class Prediction:
    """The memory of one training step, and what it was predicted for. `as_run_on` shows it for other hardware."""

    parameters: int
    """Scalars of the model; a 4-bit weight counts as what it stands for."""
    trainable: int
    trace: Trace
    arch: int | None
    replay: Replay

    def as_run_on(self, arch: int | None, capacity: int | None = None) -> Replay:
        """The same step on a GPU of compute capability `arch` (90 for 9.0) with `capacity` bytes, or on a CPU (None).
        What this package's kernels take inside stays what it was predicted for.

        Raises:
            OutOfMemory: it does not fit.
        """
        return replay(self.trace, arch, capacity)


def default_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW as Torch runs it on a GPU by default: foreach, with temporaries half as large as the states."""
    return torch.optim.AdamW(parameters, foreach=True)


def default_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """model(**batch), as Hugging Face models compute their loss; a model may also return the loss itself."""
    out = model(**batch)
    loss = getattr(out, "loss", out)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss: model(**batch) gave {got}, expected one number (give labels in batch, or loss=...)")
    return loss


def _output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits of a Hugging Face model, through whatever wraps it."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _watch_head(model: nn.Module, recorder: Recorder) -> list[Any]:
    """Tell the recorder when the output layer begins, forward, and when its input's gradient is made, backward."""
    head = _output_layer(model)
    if head is None:
        return []

    def leave(grad: Tensor) -> None:
        recorder.in_head = False

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        recorder.in_head = True
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(leave)

    return [head.register_forward_pre_hook(enter, with_kwargs=True)]


def _record(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
    optimizer: torch.optim.Optimizer,
) -> Trace:
    recorder = Recorder()
    recorder.hold((*model.parameters(), *model.buffers()), "weights")
    recorder.hold((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), "inputs")
    handles = _watch_head(model, recorder)
    for parameter in model.parameters():
        if parameter.requires_grad:
            handle = parameter.register_post_accumulate_grad_hook(lambda p: recorder.hold((p.grad,), "gradients"))
            handles.append(handle)
    try:
        with recorder, without_garbage_collection():
            for _ in range(_STEPS):
                recorder.phase, recorder.in_head = "forward", False
                value = loss(model, batch)
                recorder.end_of_forward()
                recorder.phase = "backward"
                value.backward()
                del value
                recorder.phase, recorder.in_head = "step", False
                optimizer.step()
                recorder.hold(optimizer_states(optimizer), "optimizer")
                recorder.leave_on_host(_on_host(optimizer))
                optimizer.zero_grad()
                gc.collect()
    finally:
        for handle in handles:
            handle.remove()
    return recorder.trace.finish()


class _OneFakeMode(FakeTensorMode):
    """Modules are copied with their tensors, which would take copies of their mode along."""

    def __deepcopy__(self, memo: dict) -> "_OneFakeMode":
        return self


def _fake_mode() -> FakeTensorMode:
    """One whose tensors can change dtype in place, as module.to() does: nothing else may then refer to them.

    A fake mode keeps a weak reference to what it made, for tensors that are converted twice; here none is.
    """
    fake = _OneFakeMode()
    fake.fake_tensor_converter.set_tensor_memo = lambda tensor, made: None
    return fake


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Inside, what refers to itself lives on, so that memory does not depend on when a collection happens to run."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def optimizer_states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _on_host(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """States that a GPU does not hold: those that the optimizer says are offloaded (`offloaded_adamw`), and step
    counters, which Torch's optimizers keep on the host unless they are fused or capturable."""
    offloaded = getattr(optimizer, "host_states", None)
    found = offloaded() if offloaded else []
    for group in optimizer.param_groups:
        if not (group.get("fused") or group.get("capturable")):
            states = (optimizer.state.get(parameter, {}) for parameter in group["params"])
            found += (v for state in states for v in state.values() if isinstance(v, Tensor) and v.ndim == 0)
    return found


def predict_memory(
    build: Callable[[], nn.Module],
    batch: Mapping[str, Tensor],
    *,
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] = default_loss,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = default_optimizer,
    arch: int | None = 90,
) -> Prediction:
    """The memory of a training step of the model that `build` makes, without a GPU and without its weights.

    Everything runs as it would, the model's own code and this package's operators, on fake tensors: shapes, dtypes and
    lifetimes are real, values are not. A 7B model takes a few seconds and half a gigabyte. Not seen: temporaries inside
    other libraries' operators, and inside this package's where Triton is not installed; the CUDA context; sharding.
    Not for two threads at once.

    Args:
        build: makes the model as it is trained (adapters injected, dtype chosen, checkpointing enabled), called with
            no arguments where every new tensor is fake; so from a configuration, never from a file.
        batch: what the model is called with by keyword, tensors (on the CPU; only shapes and dtypes matter) and
            whatever else. Without attention_mask a Hugging Face model is taken to see no padding, which makes
            attention need less.
        loss: (model, batch) -> one number. Default: model(**batch).loss.
        optimizer: (trainable parameters) -> optimizer. Default: torch.optim.AdamW with foreach, Torch's default on a
            GPU; without a word, others run here as on a CPU, parameter by parameter.
        arch: compute capability of the GPU, 90 for 9.0 (H100), which decides the kernels' temporaries and the
            libraries'; None for a CPU.

    Raises:
        ValueError: arch is no compute capability; build, loss, optimizer or batch is not what is said above; the model
            has tensors from outside build, or none that requires grad; the loss is not one number.
        RuntimeError: the model's code reads values, which fake tensors do not have.
    """
    check_arch(arch)
    check_callables(build, loss, optimizer)
    fake = _fake_mode()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # a training step, also where the caller takes no gradients
        batch = without_memory(batch, fake)
        model = built(build, fake)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        attention = unpadded(model) if batch.get("attention_mask") is None else nullcontext()
        for context in (fake, attention, *(() if arch is None else (planned_for(arch), as_on_gpu()))):
            stack.enter_context(context)
        try:
            trace = _record(model.train(), batch, loss, made_optimizer(optimizer, trainable))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise RuntimeError(f"the model or its loss reads a value, which a prediction has not: {error}") from error
    count = trainable_parameters(model)
    return Prediction(count.total, count.trainable, trace, arch, replay(trace, arch))

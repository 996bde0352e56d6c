"""Bytes of a training step by kind, counted exactly: weights, gradients, optimizer states, saved activations."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.memory.predict import optimizer_states

from .bitsandbytes_layers import state_tensors


class Footprint(NamedTuple):
    """Bytes by kind; each is the most that is held at once during the step."""

    weights: int
    gradients: int
    optimizer: int
    saved: int

    @property
    def total(self) -> int:
        return sum(self)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`: views and tied weights count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class SavedForBackward(torch.autograd.graph.saved_tensors_hooks):
    """Within the context, counts in `bytes` what autograd keeps for backward, beyond the tensors in `known`.

    Storages are counted once however often they are saved. They stay alive until backward, as autograd holds
    them, so an address stands for one storage as long as nothing is freed between saving and reading `bytes`.
    """

    def __init__(self, known: Iterable[Tensor]):
        self._known = {t.untyped_storage().data_ptr() for t in known}
        self._seen: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def __enter__(self) -> "SavedForBackward":
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._seen.values())


def measure(model: nn.Module, loss_fn: Callable[[], Tensor]) -> Footprint:
    """The footprint of one AdamW step on the parameters of `model` that require grad.

    The step has learning rate 0, so the model is left as it was; gradients and states are dropped afterwards.
    """
    held = [*model.parameters(), *model.buffers()]
    held += [tensor for parameter in model.parameters() for tensor in state_tensors(parameter)]
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0)
    with SavedForBackward(held) as saved:
        loss = loss_fn()
    loss.backward()
    optimizer.step()
    footprint = Footprint(
        weights=storage_bytes(held),
        gradients=storage_bytes(p.grad for p in trainable if p.grad is not None),
        optimizer=storage_bytes(optimizer_states(optimizer)),
        saved=saved.bytes,
    )
    model.zero_grad(set_to_none=True)
    return footprint

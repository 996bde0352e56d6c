"""What peers put over a PEFT model, Liger's kernels and Cut Cross Entropy's loss, kept from the models beside it."""

import inspect
import sys
from collections.abc import Callable

import torch
from torch import nn

from .environment import version
from .memory_methods import Unsuited

_ABSENT = object()
_CCE_TYPES = ("gemma2", "llama", "mistral", "phi3", "qwen2")  # those of cut_cross_entropy.transformers.cce_patch


class _Elsewhere:
    """What a patch changed outside of its model: in place from `enter` to `leave`, which may nest."""

    def __init__(self, model: nn.Module):
        """To be made before the patch: remembers the Python modules and classes that the model's own code is in."""
        kinds = {kind for module in model.modules() for kind in type(module).__mro__ if kind is not object}
        files = {sys.modules[kind.__module__] for kind in kinds if kind.__module__ in sys.modules}
        self._before = {owner: dict(vars(owner)) for owner in (*kinds, *files, nn.functional)}
        self._values: list[tuple[object, str, object, object]] = []  # owner, name, its own, the patch's
        self._depth = 0

    def take(self) -> None:
        """After the patch: find what it changed, and put everything back."""
        for owner, own in self._before.items():
            for name, value in list(vars(owner).items()):
                if own.get(name, _ABSENT) is not value:
                    self._values.append((owner, name, own.get(name, _ABSENT), value))
        self._before.clear()
        self._put_back()

    @property
    def names(self) -> set[str]:
        return {name for _, name, _, _ in self._values}

    def _put_back(self) -> None:
        for owner, name, own, _ in self._values:
            if own is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, own)

    def enter(self, *_: object) -> None:
        if not self._depth:
            for owner, name, _, patched in self._values:
                setattr(owner, name, patched)
        self._depth += 1

    def leave(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._put_back()


def _names_in_forward(module: nn.Module) -> set[str]:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return set(code.co_names) if code else set()


def patch_alone(model: nn.Module, patch: Callable[[], object]) -> None:
    """Call `patch`, made for `model`; what it changes in classes and modules is there only while `model` runs.

    Liger's patch of an instance replaces functions of transformers' modules too (apply_rotary_pos_emb), which every
    other model of the process would then call.
    """
    elsewhere = _Elsewhere(model)
    try:
        patch()
    finally:
        elsewhere.take()
    if not elsewhere.names:
        return
    # Activation checkpointing calls the layers again in the backward, past the hooks of the whole.
    users = [module for module in model.modules() if elsewhere.names & _names_in_forward(module)]
    for module in dict.fromkeys((model, *users)):
        module.register_forward_pre_hook(elsewhere.enter)
        module.register_forward_hook(elsewhere.leave, always_call=True)


def _causal(model: nn.Module, package: str, known: tuple[str, ...]) -> nn.Module:
    """The Hugging Face model in a PEFT one.

    Raises:
        Unsuited: not a causal language model of a type that the package knows.
    """
    base = model.get_base_model()
    if base.config.model_type not in known:
        raise Unsuited(f"{package} {version(package)} does not know model type {base.config.model_type}")
    if base.get_output_embeddings() is None:
        raise Unsuited(
            f"{package} {version(package)} is for causal language models, and this is a {type(base).__name__}"
        )
    return base


def with_liger(model: nn.Module) -> nn.Module:
    """A PEFT model with every Liger kernel that its type has, as TrainingArguments(use_liger_kernel=True) applies them.

    Hugging Face's Trainer patches when training starts: over PEFT's layers, not under them.

    Raises:
        Unsuited: Liger has no kernels for the model.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance, monkey_patch  # a peer: only where installed

    base = _causal(model, "liger-kernel", tuple(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN))
    patch_alone(model, lambda: _apply_liger_kernel_to_instance(model=base))
    return model


def with_cce(model: nn.Module) -> nn.Module:
    """A PEFT model whose loss is linear_cross_entropy of the last hidden states and the frozen output layer's weight.

    That is what Apple's cce_patch makes of a model's forward. The patch itself is in no wheel on PyPI, and the one in
    their repository (25.6.4) does not import under transformers 5.

    Raises:
        Unsuited: not a model whose loss is known to be that.
    """
    from cut_cross_entropy import linear_cross_entropy  # a peer: only where installed

    base = _causal(model, "cut-cross-entropy", _CCE_TYPES)
    if base.dtype == torch.float32:
        raise Unsuited("cut-cross-entropy needs a bf16 or fp16 model: its backward has no fp32")
    backbone, head = getattr(base, base.base_model_prefix), base.get_output_embeddings()
    softcap = getattr(base.config, "final_logit_softcapping", None)

    def forward(labels: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        hidden = backbone(**batch)[0]
        return linear_cross_entropy(hidden, head.weight, labels, softcap=softcap, shift=True)

    base.forward = forward
    return model

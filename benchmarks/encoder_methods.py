"""Ways to fine-tune a BERT that classifies, for the real run: what trains, what is stored and loaded back."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

import peft_kernels as pk

HEAD = "classifier"
HEAD_FILE = "head.safetensors"


@dataclass(frozen=True)
class Way:
    """`adapt` makes a model train by it, in place or anew; `load` puts what `save` wrote into a new base model.

    rates: the learning rates to choose from, on a part of the training side (`--choose`); rate: the default.
    """

    adapt: Callable[[nn.Module], nn.Module]
    save: Callable[[nn.Module, Path], None]
    load: Callable[[nn.Module, Path], nn.Module]
    rates: tuple[float, ...]
    rate: float


def _head(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    model.get_submodule(HEAD).requires_grad_(True)
    return model


def _save_head(model: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.get_submodule(HEAD).state_dict(), folder / HEAD_FILE)


def _load_head(model: nn.Module, folder: Path) -> nn.Module:
    model.get_submodule(HEAD).load_state_dict(load_file(folder / HEAD_FILE))
    return model


def _bitfit(model: nn.Module) -> nn.Module:
    return pk.inject(model, pk.BitFitConfig(modules_to_save=[HEAD]))


def _torch_bitfit(model: nn.Module) -> nn.Module:
    """The same parameters by Torch alone."""
    for name, parameter in _head(model).named_parameters():
        if name.rpartition(".")[2] == "bias":
            parameter.requires_grad_(True)
    return model


def _save_trained(model: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / "trained.safetensors")


def _load_trained(model: nn.Module, folder: Path) -> nn.Module:
    missing = model.load_state_dict(load_file(folder / "trained.safetensors"), strict=False)
    if missing.unexpected_keys:
        raise ValueError(f"{folder} has {missing.unexpected_keys}, which the model has not")
    return model


def _lora(model: nn.Module) -> nn.Module:
    config = pk.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")
    return pk.inject(model, config)


def _full(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


def _load_full(model: nn.Module, folder: Path) -> nn.Module:
    return type(model).from_pretrained(folder)


def _load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    return pk.load_adapter(model, folder)


WAYS = {
    "head": Way(_head, _save_head, _load_head, (3e-3, 1e-2, 3e-2), 1e-2),
    "bitfit": Way(_bitfit, pk.save_adapter, _load_adapter, (4e-3, 8e-3, 1.6e-2), 8e-3),
    "lora": Way(_lora, pk.save_adapter, _load_adapter, (1e-3, 2e-3, 4e-3), 2e-3),
    "full": Way(_full, lambda model, folder: model.save_pretrained(folder), _load_full, (1e-4, 2e-4, 4e-4), 2e-4),
    "torch-bitfit": Way(_torch_bitfit, _save_trained, _load_trained, (4e-3, 8e-3, 1.6e-2), 8e-3),
}
"""torch-bitfit is a peer: bitfit's parameters, rate and data with Torch's own layers."""

DEFAULT = ("head", "bitfit", "lora", "full")

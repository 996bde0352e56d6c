"""BitFit's part of save_adapter and load_adapter: keys `base_model.model.<bias>`, as HF PEFT stores bias="all"."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..methods.adapters import biases_to, configs, register, set_adapter, trainable_copies
from ..methods.bias_adapter import bias_adapter
from ..methods.bitfit import carry_out_biases, plan_biases
from ..methods.bitfit_config import BitFitConfig
from .files import PREFIX, of_copies

_CHOOSING = ("target_terms", "exclude_terms", "modules_to_save", "task_type")  # of a config: what is in its files


def _contents(biases: dict[str, Tensor], copies: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {**{f"{PREFIX}{name}": bias for name, bias in biases.items()}, **of_copies(copies)}


def _copies(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    return {name: w.copies[adapter_name] for name, w in trainable_copies(model) if adapter_name in w.copies}


def to_store(model: nn.Module, config: BitFitConfig, adapter_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(settings, contents) of the adapter's files; the trained biases also while the adapter is disabled."""
    adapter = bias_adapter(model)
    biases = adapter.trained if adapter.withdrawn else adapter.parameters(model)
    settings = {
        **config.to_dict(),
        "base_model_name_or_path": config.base_model_name_or_path or vars(model).get("name_or_path"),
        "inference_mode": True,
    }
    return settings, _contents(biases, _copies(model, adapter_name))


def to_load(
    model: nn.Module, config: BitFitConfig, adapter_name: str
) -> tuple[dict[str, Tensor], dict[str, nn.Module], Callable[[], None]]:
    """(live tensors by key, modules that train whole, what changes the model once all is checked)."""
    if adapter_name not in configs(model):
        plan = plan_biases(model, config, adapter_name)
        biases = {name: bias.parameter for name, bias in plan.biases.items()}
        copies = {name: module for name, (_, module) in plan.copies.items()}
        return _contents(biases, copies), copies, lambda: carry_out_biases(model, plan)

    adapter, copies, present = biases_to(model, "load an adapter"), _copies(model, adapter_name), configs(model)
    # What the file holds fits what is there (`check_contents`), by whatever terms: those that chose it stay.
    config = replace(config, **{field: getattr(present[adapter_name], field) for field in _CHOOSING})

    def overwrite() -> None:
        register(model, adapter_name, config)
        set_adapter(model, adapter_name, config.inference_mode)

    return _contents(adapter.parameters(model), copies), copies, overwrite

"""inject: put the adapters of a LoraConfig into a model. Everything is checked and built before the model changes."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..nn.adapter import Adapter, check_name
from ..nn.lora_linear import FusedLoRALinear
from ..nn.trainable_copy import TrainableCopy
from .adapters import configs, fused_layers, register, set_adapter
from .lora_config import LoraConfig
from .targets import pattern_value, resolve


@dataclass
class Plan:
    """An injection, built and checked but not yet carried out. Names are full module names."""

    adapter_name: str
    config: LoraConfig
    adapters: dict[str, tuple[FusedLoRALinear, Adapter]] = field(default_factory=dict)
    copies: dict[str, tuple[TrainableCopy, nn.Module]] = field(default_factory=dict)
    replaced: dict[nn.Module, nn.Module] = field(default_factory=dict)


def _check_adapter_name(model: nn.Module, config: LoraConfig, adapter_name: str) -> None:
    check_name(adapter_name)
    present = configs(model)
    if adapter_name in present:
        raise ValueError(f"adapter_name {adapter_name!r} is already in this model, beside {list(present)}")
    biased = [name for name, other in present.items() if other.bias != "none"]
    if present and (config.bias != "none" or biased):
        raise ValueError(
            f"bias={config.bias!r} for adapter {adapter_name!r} beside {list(present)}: an adapter that trains the "
            "base model's biases changes them for every other one, so it must be the only adapter"
        )
    if any(layer.merged for _, layer in fused_layers(model)):
        raise RuntimeError("cannot add an adapter while adapters are merged: unmerge first")


def plan_injection(
    model: nn.Module,
    config: Any,
    adapter_name: str = "default",
    adapter_dtype: torch.dtype | None = None,
    strict: bool = True,
) -> Plan:
    """Resolve, check and build, leaving `model` as it is. `strict` as in `targets.resolve`."""
    config = LoraConfig.from_peft(config)
    _check_adapter_name(model, config, adapter_name)
    resolution = resolve(model, config, strict)
    plan = Plan(adapter_name, config)
    for name, module in resolution.targets.items():
        layer = module
        if not isinstance(module, FusedLoRALinear):
            layer = plan.replaced[module] = FusedLoRALinear.wrap(module)
        elif adapter_name in module.specs:
            raise ValueError(f"adapter_name {adapter_name!r} is already on layer {name}, beside {list(module.specs)}")
        spec = config.spec(pattern_value(config.rank_pattern, name), pattern_value(config.alpha_pattern, name))
        plan.adapters[name] = layer, layer.new_adapter(spec, adapter_dtype)
    for name, module in resolution.modules_to_save.items():
        wrapper = module
        if not isinstance(module, TrainableCopy):
            wrapper = plan.replaced[module] = TrainableCopy(module).train(module.training)
        plan.copies[name] = wrapper, wrapper.new_copy()
    return plan


def _replace(model: nn.Module, replaced: dict[nn.Module, nn.Module]) -> None:
    """Put each new module everywhere the old one stands: a shared module has several parents."""
    wrappers = set(replaced.values())
    for parent in list(model.modules()):
        if parent in wrappers:
            continue
        for child_name, child in parent._modules.items():
            if child in replaced:
                setattr(parent, child_name, replaced[child])


def _freeze(model: nn.Module, config: LoraConfig) -> None:
    """Freeze the base model but for the biases that config.bias trains."""
    model.requires_grad_(False)
    if config.bias == "all":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2] == "bias" and not config.inference_mode)
    elif config.bias == "lora_only":
        for _, layer in fused_layers(model):
            if layer.bias is not None:
                layer.bias.requires_grad_(not config.inference_mode)


def carry_out(model: nn.Module, plan: Plan) -> None:
    """Change the model as planned. The first adapter becomes the active one, later ones wait for `set_adapter`."""
    first = not configs(model)
    _replace(model, plan.replaced)
    for module, wrapper in plan.replaced.items():
        if isinstance(wrapper, FusedLoRALinear):
            wrapper.take_over(module)
    for layer, adapter in plan.adapters.values():
        layer.attach(plan.adapter_name, adapter)
    if first:
        _freeze(model, plan.config)
    for wrapper, module in plan.copies.values():
        wrapper.attach(plan.adapter_name, module)
    register(model, plan.adapter_name, plan.config)
    if first:
        set_adapter(model, plan.adapter_name, plan.config.inference_mode)


def inject(
    model: nn.Module, config: Any, adapter_name: str = "default", adapter_dtype: torch.dtype | None = None
) -> nn.Module:
    """Put LoRA adapters into `model` in place and return it.

    The targeted nn.Linear and Conv1D layers become FusedLoRALinear on the same Parameters; everything but the
    adapters, modules_to_save and the biases that config.bias names is frozen. Hooks on the layers, HF accelerate's for
    a device_map among them, move to the new ones (see FusedLoRALinear.take_over). If anything is wrong, an error is
    raised before the model is touched. Call it again with another adapter_name to add a further adapter, which stays
    inactive until `set_adapter`.

    Args:
        config: peft_kernels.LoraConfig or peft.LoraConfig.
        adapter_dtype: default fp32 over a 16-bit base layer, else the base layer's dtype.

    Raises:
        ValueError: a target that does not exist or cannot be adapted, a setting not supported, a name that is taken.
        RuntimeError: adapters are merged.
    """
    carry_out(model, plan_injection(model, config, adapter_name, adapter_dtype))
    return model

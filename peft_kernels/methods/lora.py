"""LoRA: put the adapters of a LoraConfig into a model. Everything is checked and built before the model changes."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..nn.adapter import Adapter, check_name
from ..nn.lora_linear import FusedLoRALinear
from ..nn.trainable_copy import TrainableCopy
from .adapters import configs, fused_layers, register, set_adapter
from .bias_adapter import refuse_beside_biases
from .lora_config import LoraConfig
from .quantise import carry_out_quantising, check_settings, check_weights, quantisable
from .targets import pattern_value, resolve
from .walk import new_copies, replace_modules


@dataclass
class Plan:
    """An injection, built and checked but not yet carried out. Names are full module names."""

    adapter_name: str
    config: LoraConfig
    adapters: dict[str, tuple[FusedLoRALinear, Adapter]] = field(default_factory=dict)
    copies: dict[str, tuple[TrainableCopy, nn.Module]] = field(default_factory=dict)
    replaced: dict[nn.Module, nn.Module] = field(default_factory=dict)
    quantised: list[FusedLoRALinear] = field(default_factory=list)
    """Layers whose dense weight goes to 4 bits."""
    others: list[nn.Module] = field(default_factory=list)
    """Dense layers without an adapter that go to 4 bits."""

    @property
    def quantising(self) -> tuple[str, int, bool]:
        return self.config.base, self.config.blocksize, self.config.double_quant


def _check_adapter_name(model: nn.Module, config: LoraConfig, adapter_name: str) -> None:
    check_name(adapter_name)
    present = configs(model)
    if adapter_name in present:
        raise ValueError(f"adapter_name {adapter_name!r} is already in this model, beside {list(present)}")
    refuse_beside_biases(model, adapter_name)
    biased = [name for name, other in present.items() if other.bias != "none"]
    if present and (config.bias != "none" or biased):
        raise ValueError(
            f"bias={config.bias!r} for adapter {adapter_name!r} beside {list(present)}: an adapter that trains the "
            "base model's biases changes them for every other one, so it must be the only adapter"
        )
    if any(layer.merged for _, layer in fused_layers(model)):
        raise RuntimeError("cannot add an adapter while adapters are merged: unmerge first")


def _plan_quantising(model: nn.Module, plan: Plan, saved: dict[str, nn.Module]) -> None:
    """Choose and check what goes to 4 bits: the layers of the adapters, and every other linear that can."""
    layers = {name: layer for name, (layer, _) in plan.adapters.items()}
    for name, layer in layers.items():
        if layer.quantised is not None:
            check_settings(name, layer, plan.quantising)
    dense = {name: layer for name, layer in layers.items() if layer.quantised is None}
    others = {n: m for n, m in quantisable(model, saved.values()).items() if m not in plan.replaced}
    if configs(model) and (dense or others):
        raise ValueError(
            f"base={plan.config.base!r} for adapter {plan.adapter_name!r} beside {list(configs(model))}, which are "
            "there for the dense weights: quantise with the first adapter"
        )
    check_weights({name: module.weight for name, module in {**dense, **others}.items()})
    plan.quantised, plan.others = list(dense.values()), list(others.values())


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
    if config.base is not None:
        _plan_quantising(model, plan, resolution.modules_to_save)
    plan.copies = new_copies(resolution.modules_to_save, plan.replaced)
    return plan


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
    replace_modules(model, plan.replaced)
    for module, wrapper in plan.replaced.items():
        if isinstance(wrapper, FusedLoRALinear):
            wrapper.take_over(module)
    if plan.config.base is not None:
        module = None
        plan.replaced.clear()  # the last that held the dense weights, beside the layers themselves
        carry_out_quantising(model, plan.quantised, plan.others, plan.quantising)
    for layer, adapter in plan.adapters.values():
        layer.attach(plan.adapter_name, adapter)
    if first:
        _freeze(model, plan.config)
    for wrapper, module in plan.copies.values():
        wrapper.attach(plan.adapter_name, module)
    register(model, plan.adapter_name, plan.config)
    if first:
        set_adapter(model, plan.adapter_name, plan.config.inference_mode)

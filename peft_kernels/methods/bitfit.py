"""BitFit: freeze a model but for its biases, which train through our kernels. All is checked before a change."""

from dataclasses import dataclass, field

import torch
from torch import nn

from ..nn.adapter import check_name
from ..nn.base_linear import is_linear, never_called
from ..nn.in_place import fused_class, keeps_class
from ..nn.trainable_copy import TrainableCopy
from .activations import Fusion, find_fusions
from .adapters import configs, fused_layers, register, set_adapter
from .bias_adapter import BiasAdapter, attach, refuse_beside_biases
from .bias_targets import Bias, choose_biases
from .bitfit_config import BitFitConfig
from .walk import (
    check_present,
    check_saved_exist,
    choose_saved,
    new_copies,
    refuse_peft,
    replace_modules,
    saved_trained,
    walk,
)


@dataclass
class BiasPlan:
    """An injection, checked but not yet carried out. Names are full names in the model."""

    adapter_name: str
    config: BitFitConfig
    biases: dict[str, Bias]
    owners: list[str]
    classes: dict[str, type[nn.Module]]
    fusions: list[Fusion]
    reasons: dict[str, str]
    copies: dict[str, tuple[TrainableCopy, nn.Module]] = field(default_factory=dict)
    replaced: dict[nn.Module, nn.Module] = field(default_factory=dict)


def _check_request(model: nn.Module, adapter_name: str, adapter_dtype: torch.dtype | None) -> None:
    check_name(adapter_name)
    if adapter_dtype is not None:
        raise ValueError(f"adapter_dtype is {adapter_dtype}; BitFit trains the model's own biases, in their own dtypes")
    refuse_beside_biases(model, adapter_name)
    present = dict.fromkeys([*configs(model), *(name for _, layer in fused_layers(model) for name in layer.specs)])
    if present:
        raise ValueError(
            f"BitFit adapter {adapter_name!r} beside {list(present)}: an adapter that trains the base model's biases "
            "changes them for every other one, so it must be the only adapter"
        )
    refuse_peft(model)


def _split(
    model: nn.Module, owners: dict[str, nn.Module], saved: dict[str, nn.Module]
) -> tuple[dict[str, type[nn.Module]], list[Fusion], dict[str, str]]:
    """(class of ours by layer, activations that linears compute, why other layers or activations stay Torch's)."""
    bypassed, classes, reasons = never_called(model), {}, {}
    for name, module in owners.items():
        reasons[name] = bypassed.get(id(module)) or keeps_class(module)
        if reasons[name] is None:
            classes[name] = fused_class(module)
    linears = {name: owners[name] for name in classes if is_linear(owners[name])}
    free = {name: module for name, module in linears.items() if getattr(module, "activation", None) is None}
    fusions, apart = find_fusions(model, free)
    for fusion in fusions:
        if fusion.slot_name in saved:
            apart[fusion.linear] = "the activation is one of modules_to_save"
    reasons.update({name: f"activation apart: {reason}" for name, reason in apart.items()})
    fusions = [fusion for fusion in fusions if fusion.linear not in apart]
    return classes, fusions, {name: reason for name, reason in reasons.items() if reason is not None}


def _name_sharers(biases: dict[str, Bias], classes: dict[str, type[nn.Module]], reasons: dict[str, str]) -> None:
    """A head that holds the bias of its decoder, as BERT's does, need not be what computes with it: say who shares."""
    for bias in biases.values():
        for name in bias.owners:
            others = [other for other in bias.owners if other != name]
            if others and name not in classes:
                reasons[name] += f"; it shares the bias with {', '.join(others)}"


def plan_biases(
    model: nn.Module, config: BitFitConfig, adapter_name: str = "default", adapter_dtype: torch.dtype | None = None
) -> BiasPlan:
    """Choose and check, leaving `model` as it is."""
    _check_request(model, adapter_name, adapter_dtype)
    check_saved_exist(config, [name for name, _ in walk(model)])
    saved = choose_saved(model, config)
    biases = choose_biases(model, config, saved)
    owners = {name: module for bias in biases.values() for name, module in bias.owners.items()}
    trained = {f"BitFit trains a bias of {name or 'the model'}": [module] for name, module in owners.items()}
    check_present(model, {**saved_trained(saved), **trained})
    classes, fusions, reasons = _split(model, owners, saved)
    _name_sharers(biases, classes, reasons)
    plan = BiasPlan(adapter_name, config, biases, list(owners), classes, fusions, reasons)
    plan.copies = new_copies(saved, plan.replaced)
    return plan


def carry_out_biases(model: nn.Module, plan: BiasPlan) -> None:
    """Change the model as planned."""
    replace_modules(model, plan.replaced)
    model.requires_grad_(False)
    parameters = {name: bias.parameter for name, bias in plan.biases.items()}
    adapter = BiasAdapter(plan.adapter_name, parameters, plan.owners, plan.classes, plan.fusions, plan.reasons)
    adapter.run_kernels(model)
    attach(model, adapter)
    for wrapper, module in plan.copies.values():
        wrapper.attach(plan.adapter_name, module)
    register(model, plan.adapter_name, plan.config)
    set_adapter(model, plan.adapter_name, plan.config.inference_mode)

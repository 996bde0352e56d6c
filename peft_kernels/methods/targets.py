"""Which modules a LoraConfig adapts: HF PEFT's rules, every choice with its reason, errors that name what is there."""

import re
import warnings
from dataclasses import dataclass, field

from torch import nn

from ..nn.base_linear import read_by_parents
from ..nn.bases import base_refusal, is_base
from ..nn.dispatch import OFFLOADED
from ..nn.lora_linear import FusedLoRALinear
from .lora_config import LoraConfig
from .walk import check_present, check_saved_exist, choose_saved, refuse_peft, saved_trained, walk


@dataclass
class Resolution:
    """What a config means for a model: by full module name, in the model's order."""

    targets: dict[str, nn.Module] = field(default_factory=dict)
    modules_to_save: dict[str, nn.Module] = field(default_factory=dict)


def adaptable(module: nn.Module) -> bool:
    return is_base(module) or isinstance(module, FusedLoRALinear)


def output_head(model: nn.Module, task_type: str | None) -> nn.Module | None:
    """What "all-linear" leaves out: the output embedding of a HF model, or its head under SEQ_CLS."""
    if not callable(getattr(model, "get_output_embeddings", None)):
        return None
    head = model.get_output_embeddings()
    if head is None and task_type == "SEQ_CLS":
        heads = (getattr(model, name, None) for name in ("score", "classifier"))
        head = next((module for module in heads if module is not None), None)
    return head


def _named(names: list[str], name: str) -> bool:
    return any(name == wanted or name.endswith(f".{wanted}") for wanted in names)


def _layer_index(config: LoraConfig, name: str) -> int | None:
    """The first number in the name after a dot, or after one of layers_pattern."""
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        start = r".*?\." if not config.layers_pattern else r"(?:^|.*?\.)"
        match = re.match(rf"{start}{pattern}\.(\d+)\.", name)
        if match:
            return int(match.group(1))
    return None


def is_saved(config: LoraConfig, name: str, saved: tuple[str, ...]) -> bool:
    """Whether the module is, or lies inside, one that trains whole (`saved`, or so named): it takes no adapter."""
    if any(name == outer or name.startswith(outer + ".") for outer in saved):
        return True
    wanted = [*(config.modules_to_save or ()), *config.heads]
    return any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in wanted)


def is_excluded(config: LoraConfig, name: str) -> bool:
    if isinstance(config.exclude_modules, str):
        return bool(config.exclude_modules) and re.fullmatch(config.exclude_modules, name) is not None
    return _named(config.exclude_modules or [], name)


def matches(config: LoraConfig, name: str) -> bool:
    """Whether target_modules and layers_to_transform choose this name (all-linear aside)."""
    if isinstance(config.target_modules, str):
        return re.fullmatch(config.target_modules, name) is not None
    if name in config.target_modules:  # a full name is taken whatever its layer: HF PEFT's rule
        return True
    if not _named(config.target_modules, name):
        return False
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    index = _layer_index(config, name)
    return index is not None and index in ([layers] if isinstance(layers, int) else layers)


def pattern_value(patterns: dict, name: str):
    """Value of the first pattern that matches the end of the name; None if none does."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), None)


def is_all_linear(config: LoraConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def _suffixes(model: nn.Module) -> str:
    found = sorted({name.rpartition(".")[2] for name, module in walk(model) if adaptable(module)})
    return f"linear layers of this model are named: {', '.join(found) or 'none'}"


def _check_request(model: nn.Module, config: LoraConfig, names: list[str]) -> None:
    """Every name asked for must exist: a misspelt one would otherwise be left out without a word."""
    if not isinstance(config.target_modules, str):
        unknown = [wanted for wanted in config.target_modules if not any(_named([wanted], name) for name in names)]
        if unknown:
            raise ValueError(f"target_modules {unknown} match no module; {_suffixes(model)}")
    check_saved_exist(config, names)
    if config.exclude_modules and not any(is_excluded(config, name) for name in names):
        warnings.warn(f"exclude_modules={config.exclude_modules!r} excludes nothing", stacklevel=4)


def _check_patterns(config: LoraConfig, targets: dict) -> None:
    for field_name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field_name):
            if not any(pattern_value({key: True}, name) for name in targets):
                warnings.warn(f"{field_name} {key!r} matches no targeted module", stacklevel=4)


def _choose(
    model: nn.Module, config: LoraConfig, saved: tuple[str, ...]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """(module by name, why it cannot be adapted by name) of all that the config asks for."""
    everything, bypassed = is_all_linear(config), read_by_parents(model)
    head = output_head(model, config.task_type) if everything else None
    chosen, refused, seen = {}, {}, set()
    for name, module in walk(model):
        wanted = adaptable(module) and module is not head if everything else matches(config, name)
        if not wanted or id(module) in seen or is_excluded(config, name) or is_saved(config, name, saved):
            continue
        seen.add(id(module))
        reason = bypassed.get(id(module)) or (None if isinstance(module, FusedLoRALinear) else base_refusal(module))
        if reason is None:
            chosen[name] = module
        else:
            refused[name] = reason
    return chosen, refused


def _trained_besides(model: nn.Module, config: LoraConfig, saved: dict[str, nn.Module]) -> dict[str, list[nn.Module]]:
    trained = saved_trained(saved)
    for name, module in walk(model) if config.bias == "all" else ():
        if module._parameters.get("bias") is not None:
            trained[f"bias='all' trains the bias of {name}"] = [module]
    return trained


def _reasons(refused: dict[str, str]) -> str:
    """Names by reason."""
    names: dict[str, list[str]] = {}
    for name, reason in refused.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(group)}: {reason}" for reason, group in names.items())


def resolve(model: nn.Module, config: LoraConfig, strict: bool = True) -> Resolution:
    """The modules of `model` that `config` adapts and trains whole.

    strict=False accepts names that match nothing, as HF PEFT does (for a checkpoint, whose keys decide).

    Raises:
        ValueError: a name that matches nothing, a module that cannot be adapted, or no module at all.
    """
    refuse_peft(model)
    if not config.target_modules:
        raise ValueError(f"target_modules is {config.target_modules!r}; give names or 'all-linear': {_suffixes(model)}")
    if strict:
        _check_request(model, config, [name for name, _ in walk(model)])
    saved = choose_saved(model, config)
    check_present(model, _trained_besides(model, config, saved))
    targets, refused = _choose(model, config, tuple(saved))
    if is_all_linear(config) and targets:  # left out, but for those that would be adapted on a larger machine
        refused = {name: reason for name, reason in refused.items() if reason == OFFLOADED}
    if refused:
        raise ValueError(f"target_modules chooses modules that cannot be adapted: {_reasons(refused)}")
    if not targets:
        layers = f" with layers_to_transform={config.layers_to_transform}" if config.layers_to_transform else ""
        raise ValueError(f"target_modules {config.target_modules!r}{layers} leaves no module; {_suffixes(model)}")
    _check_patterns(config, targets)
    return Resolution(targets, saved)

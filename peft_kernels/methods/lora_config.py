"""LoraConfig: HF PEFT's LoRA settings, and a clear error for each one that is not implemented here."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from ..formats.nf4 import check_type
from ..nn.adapter import AdapterSpec
from .fields import (
    BOOL,
    NAME_LIST,
    TEXT,
    check_types,
    integer,
    make_plain,
    read_fields,
    strings,
    task_heads,
    text_or_none,
)

UNSUPPORTED: dict[str, tuple] = {
    "use_dora": (False,),
    "alora_invocation_tokens": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "loftq_config": (None, {}),
    "eva_config": (None,),
    "corda_config": (None,),
    "lora_ga_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
    "megatron_config": (None,),
    "ensure_weight_tying": (False,),
}
"""Fields of peft.LoraConfig that are not implemented, with the values that ask for nothing."""

_NO_EFFECT = {"peft_type", "peft_version", "auto_mapping", "megatron_core", "qalora_group_size", "runtime_config"}
_OF_THE_BASE = ("base", "blocksize", "double_quant")
_NAMES = (lambda value: text_or_none(value) or strings(value), "a list of names, a regular expression or None")
_PATTERN = (lambda value: isinstance(value, dict) and strings(list(value)), "a dict from regular expressions")
_TYPES = {
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_pattern": _NAMES,
    "modules_to_save": NAME_LIST,
    "layers_to_transform": (
        lambda value: value is None or integer(value) or (isinstance(value, list) and all(map(integer, value))),
        "an integer, a list of integers or None",
    ),
    "rank_pattern": _PATTERN,
    "alpha_pattern": _PATTERN,
    **dict.fromkeys(("fan_in_fan_out", "use_rslora", "lora_bias", "inference_mode", "double_quant"), BOOL),
    "base": TEXT,
    "blocksize": (integer, "an integer"),
    **dict.fromkeys(("task_type", "base_model_name_or_path", "revision"), TEXT),
}
"""Field -> (whether a value is of its type, the type in words); AdapterSpec checks the other fields."""


def _check_expressions(config: "LoraConfig") -> None:
    """Every string that is matched as a regular expression must be one."""
    used = {name: [*(getattr(config, name) or ())] for name in ("modules_to_save", "rank_pattern", "alpha_pattern")}
    for name in ("target_modules", "exclude_modules"):
        used[name] = [getattr(config, name)] if isinstance(getattr(config, name), str) else []
    layers = config.layers_pattern or []
    used["layers_pattern"] = [layers] if isinstance(layers, str) else layers
    for name, expressions in used.items():
        for expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{name} {expression!r} is not a regular expression: {error}") from error


@dataclass
class LoraConfig:
    """Settings of one adapter over a model; names, meanings and defaults are HF PEFT's.

    target_modules: list of names (a module matches by its full name or by a ".suffix"), a regular expression over the
    full name, or "all-linear". rank_pattern and alpha_pattern: regular expression over the end of the name -> r,
    lora_alpha. bias: "none", "all" or "lora_only", which base biases train. modules_to_save: names of modules that
    train whole.

    base: "nf4" or "fp4" puts the base model's linear layers into 4 bits (QLoRA): those that get an adapter and all
    others, but for the output layer and modules_to_save. blocksize, double_quant: as NF4Linear's. The three are the
    base's settings and not the adapter's: they are not saved with it.

    Raises:
        ValueError: a value that is out of range or not supported, naming the field.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    lora_bias: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    base: str | None = None
    blocksize: int = 64
    double_quant: bool = False

    def __post_init__(self):
        make_plain(self)
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        check_types(self, _TYPES)
        _check_expressions(self)
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias is {self.bias!r}; expected 'none', 'all' or 'lora_only'")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) not in (None, [], ""):
                raise ValueError(f"{name} needs target_modules as a list of names, got {self.target_modules!r}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform")
        if self.base is not None:
            check_type("base", self.base, self.blocksize)
        elif self.double_quant or self.blocksize != 64:
            raise ValueError("blocksize and double_quant are settings of base='nf4' or 'fp4', got base=None")
        self.spec()
        for pattern in {**self.rank_pattern, **self.alpha_pattern}:
            self.spec(self.rank_pattern.get(pattern), self.alpha_pattern.get(pattern))

    def spec(self, r: int | None = None, lora_alpha: float | None = None) -> AdapterSpec:
        """One layer's settings: the config's, with this rank and alpha where given."""
        return AdapterSpec(
            self.r if r is None else r,
            self.lora_alpha if lora_alpha is None else lora_alpha,
            self.lora_dropout,
            self.use_rslora,
            self.lora_bias,
            self.init_lora_weights,
        )

    @property
    def heads(self) -> tuple[str, ...]:
        """Names that the task type adds to modules_to_save, where the model has them."""
        return task_heads(self.task_type)

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json holds."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in _OF_THE_BASE}
        return {**values, "peft_type": "LORA"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LoraConfig":
        """From adapter_config.json. A field that asks for something not implemented here raises ValueError."""
        return read_fields(cls, values, "LORA", _NO_EFFECT, UNSUPPORTED)

    @classmethod
    def from_peft(cls, config: Any) -> "LoraConfig":
        """From a `peft.LoraConfig` object (or one of ours, returned as it is)."""
        if isinstance(config, cls):
            return config
        if not hasattr(config, "peft_type") or not hasattr(config, "to_dict"):
            raise ValueError(
                f"config is a {type(config).__name__}; expected peft_kernels' LoraConfig or BitFitConfig, or peft's "
                "LoraConfig"
            )
        if getattr(config, "_custom_modules", None):
            raise ValueError("the config has custom modules registered, which peft_kernels does not use")
        return cls.from_dict(config.to_dict())

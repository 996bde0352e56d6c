"""One low-rank adapter: its settings, their checks, and its Parameters as HF PEFT initialises them."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

INITIALISATIONS = (True, False, "gaussian")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class AdapterSpec:
    """The settings of one adapter on one layer, under HF PEFT's field names.

    Raises:
        ValueError: r < 1, lora_dropout outside [0, 1), an initialisation that is not supported.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True

    def __post_init__(self):
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r is {self.r!r}; expected an integer of at least 1")
        if not _is_number(self.lora_alpha):
            raise ValueError(f"lora_alpha is {self.lora_alpha!r}; expected a finite number")
        if not _is_number(self.lora_dropout) or not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}; expected a probability in [0, 1)")
        if self.init_lora_weights not in INITIALISATIONS:
            raise ValueError(
                f"init_lora_weights is {self.init_lora_weights!r}; supported: True (kaiming-uniform A, zero B), "
                "'gaussian' (A of standard deviation 1 / r, zero B) and False (both random)"
            )
        if self.lora_bias and self.init_lora_weights == "gaussian":
            raise ValueError("lora_bias=True is defined for init_lora_weights=True or False only, got 'gaussian'")

    @property
    def scaling(self) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class Adapter(NamedTuple):
    """lora_a [R, K], lora_b [N, R] and, with lora_bias, bias [N]: Parameters on the base layer's device."""

    spec: AdapterSpec
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    bias: nn.Parameter | None


def check_name(name: str) -> None:
    """Adapter names become attribute names and parts of state_dict keys."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"adapter_name is {name!r}; expected a non-empty string without '.'")
    if name.startswith("lora_") or hasattr(nn.ParameterDict(), name):
        raise ValueError(f"adapter_name is {name!r}: the name is taken by the layer's own attributes")


def name_list(names: str | list[str]) -> list[str]:
    """One name or several, as a list. An adapter named twice would count twice: ValueError."""
    names = [names] if isinstance(names, str) else list(names)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"adapters {repeated} are named more than once in {names}")
    return names


def default_dtype(base_dtype: torch.dtype) -> torch.dtype:
    """HF PEFT's autocast_adapter_dtype: fp32 adapters over a 16-bit base, otherwise the base's dtype."""
    return torch.float32 if base_dtype in (torch.float16, torch.bfloat16) else base_dtype


def reset(lora_a: nn.Linear, lora_b: nn.Linear, spec: AdapterSpec) -> None:
    """Initialise in place. With init_lora_weights=False nn.Linear's own random initialisation stays."""
    if spec.init_lora_weights is False:
        return
    if spec.init_lora_weights == "gaussian":
        nn.init.normal_(lora_a.weight, std=1 / spec.r)
    else:
        nn.init.kaiming_uniform_(lora_a.weight, a=math.sqrt(5))
    nn.init.zeros_(lora_b.weight)
    if lora_b.bias is not None:
        nn.init.zeros_(lora_b.bias)


def new_adapter(
    spec: AdapterSpec,
    device: torch.device,
    base_dtype: torch.dtype,
    in_features: int,
    out_features: int,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """A freshly initialised adapter for a base layer of `base_dtype`, of `dtype` (default: `default_dtype`).

    Draws from Torch's generator exactly what HF PEFT draws for the layer (two nn.Linear, then A again) and rounds
    through the base's dtype as it does, so that one seed gives both the same adapters.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"adapter_dtype is {dtype}; expected a floating dtype")
    lora_a = nn.Linear(in_features, spec.r, bias=False)
    lora_b = nn.Linear(spec.r, out_features, bias=spec.lora_bias)
    reset(lora_a, lora_b, spec)

    def place(parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        placed = parameter.detach().to(device, base_dtype)
        return nn.Parameter(placed.to(dtype or default_dtype(base_dtype)))

    return Adapter(spec, place(lora_a.weight), place(lora_b.weight), place(lora_b.bias))

"""BitFitConfig: which biases train, and a clear error for each setting that is not one."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from .fields import BOOL, NAME_LIST, TEXT, check_types, make_plain, read_fields, strings, task_heads

_TERMS = (lambda value: value is None or strings(value), "a list of terms or None")
_TYPES = {
    "target_terms": _TERMS,
    "exclude_terms": _TERMS,
    "modules_to_save": NAME_LIST,
    "inference_mode": BOOL,
    **dict.fromkeys(("task_type", "base_model_name_or_path", "revision"), TEXT),
}


@dataclass
class BitFitConfig:
    """Train the biases of a model and nothing else (BitFit: Ben Zaken et al. 2021, arXiv 2106.10199).

    A bias is a one-dimensional Parameter whose own name is "bias", ends in "_bias" or begins with "bias_".

    target_terms: which biases train; None is all. A term is one or more consecutive parts of a bias's full name, which
    dots separate: "query", "intermediate", "attention.output", "LayerNorm", or the whole name. exclude_terms: of these,
    which do not. modules_to_save: names of modules that train whole, as a new classification head; task_type adds the
    heads that HF PEFT adds for it.

    Raises:
        ValueError: a value that is not what the field holds, naming the field.
    """

    target_terms: list[str] | None = None
    exclude_terms: list[str] | None = None
    modules_to_save: list[str] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self):
        make_plain(self)
        check_types(self, _TYPES)
        if self.target_terms == []:
            raise ValueError("target_terms is []; expected terms, or None for all biases")
        for name in ("target_terms", "exclude_terms"):
            for term in getattr(self, name) or ():
                if not all(term.split(".")):
                    raise ValueError(f"{name} has {term!r}; expected parts of a name with single dots between them")

    @property
    def heads(self) -> tuple[str, ...]:
        """Names that the task type adds to modules_to_save, where the model has them."""
        return task_heads(self.task_type)

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json holds."""
        return {**dataclasses.asdict(self), "peft_type": "BITFIT"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BitFitConfig":
        """From adapter_config.json. A field that is not known here raises ValueError."""
        return read_fields(cls, values, "BITFIT", ("peft_type",), {})

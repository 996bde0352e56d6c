"""What the configs of all methods share: plain values, checks of types with clear errors, the heads of task types."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

Check = tuple[Callable[[Any], bool], str]
"""(Whether a value is of its type, the type in words.)"""

# Heads that HF PEFT adds to modules_to_save by itself: they are new, so an adapter without them is worth nothing.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def task_heads(task_type: str | None) -> tuple[str, ...]:
    """Names that the task type adds to modules_to_save, where the model has them."""
    return _TASK_HEADS.get(task_type, ())


def plain(value: Any) -> Any:
    """Sets (PEFT keeps names in them) to sorted lists, enum members to their values."""
    if isinstance(value, set | frozenset | tuple):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    return getattr(value, "value", value)


def strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


NAME_LIST: Check = (lambda value: value is None or strings(value), "a list of names or None")
BOOL: Check = (lambda value: isinstance(value, bool), "True or False")
TEXT: Check = (text_or_none, "a string or None")


def make_plain(config: Any) -> None:
    """`plain` for every field of a dataclass, in place."""
    for entry in dataclasses.fields(config):
        setattr(config, entry.name, plain(getattr(config, entry.name)))


def check_types(config: Any, types: dict[str, Check]) -> None:
    for name, (fits, expected) in types.items():
        if not fits(getattr(config, name)):
            raise ValueError(f"{name} is {getattr(config, name)!r}; expected {expected}")


def read_fields(cls: type, values: Any, peft_type: str, without_effect: Collection[str], off: dict[str, tuple]) -> Any:
    """A config of class `cls` from what adapter_config.json holds.

    `off`: fields that are not implemented, with the values that ask for nothing. One that asks for something raises
    ValueError, as does another peft_type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"the config is a {type(values).__name__}; expected an object with the fields")
    values = {name: plain(value) for name, value in values.items()}
    if values.get("peft_type", peft_type) != peft_type:
        raise ValueError(f"peft_type is {values['peft_type']!r}; expected {peft_type!r}")
    known = {entry.name for entry in dataclasses.fields(cls)}
    for name, value in values.items():
        if name in known or name in without_effect or value in off.get(name, (None, False, "", [], {})):
            continue
        raise ValueError(f"{name}={value!r} is not supported by peft_kernels: leave the field at its default")
    return cls(**{name: value for name, value in values.items() if name in known})

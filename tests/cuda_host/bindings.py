"""The ops of a binding for the CUDA key, run on a CPU."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from .build import Fault, binding


class Ops:
    """The ops of a binding, and which calls it left to the ops named ..._general, which are the reference here."""

    def __init__(
        self, cache: Path, primitive: str, sources: Iterable[str], defined: dict, faults: Iterable[Fault] = ()
    ):
        """`defined`: op -> its reference."""
        namespace = binding(cache, primitive, sources, faults)
        self.general: list[str] = []
        self._libraries = [torch.library.Library(name, "FRAGMENT") for name in (namespace, "peft_kernels")]
        for function, reference_of in defined.items():
            schema = str(function._schema).removeprefix("peft_kernels::")
            name, arguments = schema.split("(", 1)
            self._libraries[0].define(schema)
            if not hasattr(torch.ops.peft_kernels, f"{name}_general"):  # a CUDA build of the extension defines it
                self._libraries[1].define(f"{name}_general({arguments}")
            self._libraries[1].impl(f"{name}_general", self._noting(name, reference_of), "CPU")
            setattr(self, name, getattr(getattr(torch.ops, namespace), name).default)

    def _noting(self, name: str, function: Callable) -> Callable:
        def general(*args):
            self.general.append(name)
            return function(*args)

        return general

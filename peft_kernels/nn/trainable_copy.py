"""TrainableCopy: a module that trains whole beside the adapters (HF PEFT's modules_to_save)."""

import copy

from torch import nn


class TrainableCopy(nn.Module):
    """Keeps the original frozen and runs a trainable deep copy of it, one per adapter.

    Attributes of the module that runs (`weight`, `config`, ...) can be read through the wrapper.
    """

    def __init__(self, original: nn.Module):
        super().__init__()
        self.original = original
        self.copies = nn.ModuleDict()
        self.active: str | None = None
        self.disabled = False

    def new_copy(self) -> nn.Module:
        """A trainable copy of the original, not yet attached."""
        return copy.deepcopy(self.original).requires_grad_(True)

    def attach(self, adapter_name: str, module: nn.Module) -> None:
        """Add a copy: frozen and not run until `set_adapter`."""
        self.original.requires_grad_(False)
        self.copies[adapter_name] = module.requires_grad_(False)

    def set_adapter(self, adapter_name: str | None, inference_mode: bool = False) -> None:
        """Run (and train, unless inference_mode) the copy of this adapter; None: the original."""
        self.active = adapter_name
        for name, module in self.copies.items():
            module.requires_grad_(name == adapter_name and not inference_mode)

    def delete_adapter(self, adapter_name: str, keep: bool = False) -> None:
        """keep: the copy becomes the original."""
        if keep:
            self.original = self.copies[adapter_name].requires_grad_(False)
        del self.copies[adapter_name]
        if self.active == adapter_name:
            self.active = None

    @property
    def running(self) -> nn.Module:
        return self.original if self.disabled or self.active is None else self.copies[self.active]

    def forward(self, *args, **kwargs):
        return self.running(*args, **kwargs)

    def __getattr__(self, name: str):
        modules = self.__dict__.get("_modules", {})
        if name in modules or "original" not in modules:  # the second: half-built, by copy or pickle
            return super().__getattr__(name)
        return getattr(self.running, name)

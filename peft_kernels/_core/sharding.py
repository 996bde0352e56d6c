"""DTensor sharding rules of the ops, handed to PyTorch when (and only when) `torch.distributed.tensor` is there.

Importing DTensor takes longer than importing this package, so it is not imported here: rules given before it are
registered as soon as somebody imports it, rules given after it at once.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

_DTENSOR = "torch.distributed.tensor"

REPLICATE, PARTIAL = "replicate", "partial"
Placement = str | int | None
"""REPLICATE, PARTIAL (a sum over ranks is due), an int (sharded along that dimension) or None (not a tensor)."""

Rule = Callable[..., Sequence[tuple[list[Placement], list[Placement]]]]
"""The op's arguments (tensors as objects with a shape) -> what is allowed: (placements of outputs, of arguments)."""

RULES: dict[Callable, Rule] = {}
"""Op -> its rule."""


def share(op: Callable, rule: Rule) -> None:
    """Give `op` a sharding rule, so that it takes DTensors."""
    RULES[op] = rule
    if _DTENSOR in sys.modules and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        _register(op, rule)


def _register(op: Callable, rule: Rule) -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def placed(placement: Placement):
        if placement is None:
            return None
        named = {REPLICATE: Replicate, PARTIAL: Partial}
        return Shard(placement) if isinstance(placement, int) else named[placement]()

    def acceptable(*args):
        return [([placed(p) for p in outs], [placed(p) for p in ins]) for outs, ins in rule(*args)]

    register_sharding(op)(acceptable)


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands before the real finder of DTensor once, and registers the rules after the module has run."""

    def find_spec(
        self, name: str, path=None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _DTENSOR:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        for op, rule in RULES.items():
            _register(op, rule)


if _DTENSOR not in sys.modules:
    sys.meta_path.insert(0, _AfterImport())

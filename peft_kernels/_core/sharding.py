"""DTensor sharding rules of the ops, handed to PyTorch when (and only when) `torch.distributed.tensor` is there.

Importing DTensor takes longer than importing this package, so it is not imported here: rules given before it are
registered as soon as somebody imports it, rules given after it at once.
"""

import importlib.abc
import importlib.machinery
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
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    def placed(placement: Placement):
        if placement is None:
            return None
        named = {REPLICATE: Replicate, PARTIAL: Partial}
        return Shard(placement) if isinstance(placement, int) else named[placement]()

    def acceptable(*args):
        return [([placed(p) for p in outs], [placed(p) for p in ins]) for outs, ins in rule(*args)]

    register_sharding(op)(acceptable)
    # What a rule gave is kept under the tensors, and other arguments only from the first int on: a backward that once
    # needed no dx would never give one again. There is no public way to say what the result depends on.
    first = next((i for i, a in enumerate(op._schema.arguments) if "Tensor" not in str(a.type)), 100)
    infos = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    infos[op] = RuntimeSchemaInfo(first, needs_pytree=True)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Stands before the real finder of DTensor until the module has run. Being asked for its spec changes nothing."""

    def find_spec(
        self, name: str, path=None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _DTENSOR:
            return None
        for finder in list(sys.meta_path):
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                spec.loader = _Registering(spec.loader, self)
                return spec
        return None


class _Registering:
    """DTensor's own loader, but for registering the rules after the module has run."""

    def __init__(self, loader: importlib.abc.Loader, finder: _AfterImport):
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        for op, rule in RULES.items():
            _register(op, rule)


if _DTENSOR not in sys.modules:
    sys.meta_path.insert(0, _AfterImport())

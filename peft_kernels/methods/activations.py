"""Which linears feed exactly one activation module and nothing else: read from a symbolic trace of their parent."""

import functools
import inspect
from collections.abc import Iterable
from typing import NamedTuple

import torch.nn.functional as F
from torch import fx, nn

from ..nn.dispatch import replaced_forward
from ..nn.hooks import has_hooks
from .plain_forward import not_plain

_TORCH = {nn.ReLU: "relu", nn.SiLU: "silu"}
_TRANSFORMERS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "SiLUActivation": "silu",
}


class Fusion(NamedTuple):
    """`linear` computes `activation` itself, and child `slot` of `parent` stands aside. Names of modules of a model."""

    linear: str
    parent: str
    slot: str
    activation: str

    @property
    def slot_name(self) -> str:
        """The slot's full name."""
        return f"{self.parent}.{self.slot}" if self.parent else self.slot


def activation_of(module: nn.Module) -> str | None:
    """The kernels' name of the function that `module` computes, None where it is another or may be."""
    cls = type(module)
    if replaced_forward(module, cls):
        return None
    if cls is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    if cls in _TORCH:
        return _TORCH[cls]
    if cls.__module__ != "transformers.activations" or cls.__name__ not in _TRANSFORMERS:
        return None
    inner = getattr(module, "act", None)  # those that choose between Torch's function and their own
    known = inner is None or inner is F.gelu or getattr(inner, "__name__", "") in ("_gelu_python", "_gelu_tanh_python")
    tanh = isinstance(inner, functools.partial) and inner.func is F.gelu and inner.keywords == {"approximate": "tanh"}
    return _TRANSFORMERS[cls.__name__] if known or (tanh and "Tanh" in cls.__name__) else None


class _Tracer(fx.Tracer):
    """Runs a parent's own forward and none of its children's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _untraced(parent: nn.Module) -> str | None:
    """Why a trace would not tell what the parent computes."""
    if replaced_forward(parent, type(parent)):
        return "its parent's forward was replaced"
    reason = not_plain(parent)
    if reason is not None:
        return f"its parent's {reason}"
    parameters = list(inspect.signature(type(parent).forward).parameters.values())[1:]
    single = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY
    if len(parameters) != 1 or parameters[0].kind not in single:
        return "its parent's forward takes more than one argument, and its way may depend on them"
    return None


def _trace(parent: nn.Module) -> fx.Graph:
    """Of a shell with the parent's class and children, so that what fx sets is not set on the parent."""
    shell = object.__new__(type(parent))
    vars(shell).update(vars(parent))
    for store in ("_modules", "_parameters", "_buffers"):
        vars(shell)[store] = dict(vars(parent)[store])
    return _Tracer().trace(shell)


def _pairs(graph: fx.Graph, linears: Iterable[str], slots: Iterable[str]) -> dict[str, str]:
    """Linear -> the activation that takes its output: at every call of either, and at no call anything else."""
    linears, slots = set(linears), set(slots)
    read = {str(node.target).partition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    fed: dict[str, set] = {}
    sources: dict[str, set] = {}
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        if node.target in linears:
            users = list(node.users)
            alone = len(users) == 1 and users[0].op == "call_module" and users[0].target in slots
            whole = alone and users[0].args == (node,) and not users[0].kwargs
            fed.setdefault(node.target, set()).add(users[0].target if whole else None)
        elif node.target in slots:
            source = node.args[0] if len(node.args) == 1 else None
            called = isinstance(source, fx.Node) and source.op == "call_module"
            sources.setdefault(node.target, set()).add(source.target if called else None)
    found = {name: next(iter(to)) for name, to in fed.items() if len(to) == 1 and None not in to and name not in read}
    return {name: slot for name, slot in found.items() if sources[slot] <= found.keys()}


def _holders(model: nn.Module) -> dict[int, int]:
    """id of a module -> in how many places of the model it stands."""
    counts: dict[int, int] = {}
    for parent in model.modules():
        for child in parent._modules.values():
            counts[id(child)] = counts.get(id(child), 0) + 1
    return counts


def _of_parent(parent: nn.Module, linears: list[str], slots: dict[str, str]) -> tuple[dict[str, str], str | None]:
    """(linear -> slot, why there is none)."""
    reason = _untraced(parent)
    if reason is not None:
        return {}, reason
    try:
        return _pairs(_trace(parent), linears, slots), None
    except Exception as error:  # it is the model's own code, met with what is not a tensor: it may raise anything
        first = (str(error).splitlines() or [""])[0]
        return {}, f"its parent's forward cannot be traced: {type(error).__name__}: {first}"


def _held_apart(
    linears: list[nn.Module], activation: nn.Module, parent: nn.Module, places: dict[int, int]
) -> str | None:
    """Why an activation and the linears that feed it must stay apart though the trace would have them together."""
    if any(places[id(linear)] > 1 for linear in linears) or list(parent._modules.values()).count(activation) > 1:
        return "it or the activation stands in several places"
    if any(has_hooks(part) for part in (*linears, activation)) or "_hf_hook" in vars(activation):
        return "there are hooks on it or on the activation"
    return None


def find_fusions(model: nn.Module, linears: dict[str, nn.Module]) -> tuple[list[Fusion], dict[str, str]]:
    """(what can be fused, linear -> why the activation beside it cannot be) for layers of the model by name.

    A linear is fused where its parent's forward gives its output to an activation module of the parent's and to nothing
    else, and has no branch or side effect (`plain_forward`). Calls from elsewhere than it are not looked for.
    """
    fusions, reasons, places = [], {}, _holders(model)
    by_parent: dict[str, dict[str, nn.Module]] = {}
    for name, module in linears.items():
        parent_name, _, child = name.rpartition(".")
        if child:  # the model itself has no parent
            by_parent.setdefault(parent_name, {})[child] = module
    for parent_name, own in by_parent.items():
        parent = model.get_submodule(parent_name)
        kinds = {name: activation_of(child) for name, child in parent._modules.items() if child is not None}
        slots = {name: kind for name, kind in kinds.items() if kind is not None}
        if not slots:
            continue
        pairs, why = _of_parent(parent, list(own), slots)
        for child in own:
            slot, reason = pairs.get(child), why
            full = f"{parent_name}.{child}" if parent_name else child
            if slot is not None:
                sharers = [own[other] for other, to in pairs.items() if to == slot]
                reason = _held_apart(sharers, parent._modules[slot], parent, places)
            if reason is not None:
                reasons[full] = reason
            elif slot is not None:
                fusions.append(Fusion(full, parent_name, slot, slots[slot]))
    return fusions, reasons

"""Which biases a BitFitConfig trains, each once under its first name, with errors that name what is there."""

from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .bitfit_config import BitFitConfig
from .walk import walk

LOOKED_FOR = 'one-dimensional floating-point Parameters named "bias", "*_bias" or "bias_*"'


class Bias(NamedTuple):
    """names: all full names it goes by; owners: the modules that hold it, by the first name of each."""

    parameter: nn.Parameter
    names: list[str]
    owners: dict[str, nn.Module]


def is_bias(name: str, parameter: nn.Parameter) -> bool:
    """By its own name in the module that holds it."""
    if name != "bias" and not name.endswith("_bias") and not name.startswith("bias_"):
        return False
    return is_lazy(parameter) or (parameter.dim() == 1 and parameter.is_floating_point())


def _within(name: str, outer: str) -> bool:
    return f"{name}.".startswith(f"{outer}.")


def find_biases(model: nn.Module, saved: dict[str, nn.Module]) -> dict[str, Bias]:
    """First name -> bias, of the model outside `saved` (and outside adapters)."""
    found: dict[int, Bias] = {}
    first: dict[int, str] = {}
    for owner, module in [("", model), *walk(model)]:
        if owner and any(_within(owner, name) for name in saved):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and is_bias(name, parameter):
                bias = found.setdefault(id(parameter), Bias(parameter, [], {}))
                bias.names.append(f"{owner}.{name}" if owner else name)
                bias.owners[first.setdefault(id(module), owner)] = module
    return {bias.names[0]: bias for bias in found.values()}


def _matches(term: str, bias: Bias) -> bool:
    return any(f".{term}." in f".{name}." for name in bias.names)


def _terms(biases: dict[str, Bias]) -> str:
    parts = {part for bias in biases.values() for name in bias.names for part in name.split(".")}
    return f"the names of its biases are made of: {', '.join(sorted(part for part in parts if not part.isdigit()))}"


def _check_terms(config: BitFitConfig, biases: dict[str, Bias]) -> None:
    """Every term must choose something: a misspelt one would otherwise be left out without a word."""
    for field in ("target_terms", "exclude_terms"):
        terms = getattr(config, field) or ()
        unknown = [term for term in terms if not any(_matches(term, bias) for bias in biases.values())]
        if unknown:
            raise ValueError(f"{field} {unknown} match no bias of this model; {_terms(biases)}")


def _check_plain(model: nn.Module, saved: dict[str, nn.Module], chosen: dict[str, Bias]) -> None:
    """A bias must be a tensor of its own that can be trained, kept and given back."""
    copied = {id(p): f"{name}.{own}" for name, module in saved.items() for own, p in module.named_parameters()}
    for name, bias in chosen.items():
        if is_lazy(bias.parameter):
            raise ValueError(f"{name} has no shape yet (lazy module): run one batch first")
        if is_traceable_wrapper_subclass(bias.parameter):
            raise ValueError(
                f"{name} is a {type(bias.parameter).__name__}, not a plain tensor: put BitFit in before it is sharded"
            )
        if bias.parameter.is_inference():
            raise ValueError(f"{name} was made under torch.inference_mode and cannot train: make the model outside it")
        if id(bias.parameter) in copied:
            raise ValueError(
                f"{name} is the same Parameter as {copied[id(bias.parameter)]}, of which modules_to_save would train "
                "a copy: let modules_to_save name a module that holds both, or exclude_terms leave it out"
            )


def choose_biases(model: nn.Module, config: BitFitConfig, saved: dict[str, nn.Module]) -> dict[str, Bias]:
    """First name -> bias of all that `config` trains in place; those inside `saved` train in its copies.

    Raises:
        ValueError: a model without biases, a term that matches none, nothing left, or a bias that is not a plain one.
    """
    biases = find_biases(model, saved)
    if not biases:
        outside = f" outside modules_to_save ({', '.join(saved)})" if saved else ""
        raise ValueError(f"{type(model).__name__} has no biases{outside}: BitFit looked for {LOOKED_FOR}")
    _check_terms(config, biases)
    wanted, excluded = config.target_terms, config.exclude_terms or ()
    chosen = {
        name: bias
        for name, bias in biases.items()
        if (wanted is None or any(_matches(term, bias) for term in wanted))
        and not any(_matches(term, bias) for term in excluded)
    }
    if not chosen:
        raise ValueError(f"exclude_terms {list(excluded)} leave no bias of target_terms {wanted}; {_terms(biases)}")
    _check_plain(model, saved, chosen)
    return chosen

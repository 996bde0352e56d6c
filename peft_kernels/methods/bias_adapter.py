"""BiasAdapter: a model's trained biases as an adapter that can be taken out, put back, merged and forgotten.

The biases are the model's own Parameters. Beside them stand copies of what they were, in host memory (tens of KB), and
what was changed so that they train through our kernels: classes of layers, and activations that a linear computes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..nn.in_place import change_class
from .activations import Fusion
from .bias_values import ASIDE, kept, set_version, write
from .stand_ins import StandIns

_FORGOTTEN = "the original biases were not kept: merged with restorable=False"
_STATE = "peft_kernels_biases"  # attribute of the model


def bias_adapter(model: nn.Module) -> "BiasAdapter | None":
    """The model's BitFit adapter, None where it has none."""
    return getattr(model, _STATE, None)


def refuse_beside_biases(model: nn.Module, adapter_name: str) -> None:
    """BitFit stands alone: a second adapter's outputs would be made with its biases."""
    present = next(filter(None, map(bias_adapter, model.modules())), None)
    if present is not None:
        raise ValueError(
            f"adapter_name {adapter_name!r} beside {present.name!r}, which is BitFit's: an adapter that trains the "
            "base model's biases changes them for every other one, so it must be the only adapter"
        )


class BiasAdapter:
    """What BitFit changed in a model, by name, so that a deep copy or a pickle of the model has its own.

    originals: name -> the bias as it was, None once `merge` forgot them. trained: name -> the trained bias while the
    original stands in its place, else None. held: whether a `disable_adapter` block will put it back (not so in a copy
    made inside). owners: names of the layers that hold them; classes: what those of them become that our kernels run;
    reasons: why the others, or the activations behind them, stay Torch's.
    """

    def __init__(
        self,
        name: str,
        biases: dict[str, nn.Parameter],
        owners: list[str],
        classes: dict[str, type[nn.Module]],
        fusions: list[Fusion],
        reasons: dict[str, str],
    ):
        self.name = name
        self.originals: dict[str, Tensor] | None = {key: kept(bias) for key, bias in biases.items()}
        self.trained: dict[str, Tensor] | None = None
        self.held = False
        self.merged = False
        self._flags: dict[str, bool] = {}
        self._versions: dict[str, int] = {}
        self.names = list(biases)
        self.owners = owners
        self.reasons = reasons
        self.classes = classes
        self._former: dict[str, type] = {}
        self._fusions = fusions
        self._stand_ins = StandIns()

    @property
    def withdrawn(self) -> bool:
        """Whether the model computes with the original biases."""
        return self.trained is not None

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The biases by name.

        Raises:
            RuntimeError: one is not there any more, or has another shape: it was replaced since `inject`.
        """
        found = {name: self._parameter(model, name) for name in self.names}
        for name, original in (self.originals or {}).items():
            if found[name].shape != original.shape:
                raise RuntimeError(
                    f"{name} has shape {list(found[name].shape)}; it was {list(original.shape)} when BitFit came in"
                )
        return found

    @staticmethod
    def _parameter(model: nn.Module, name: str) -> nn.Parameter:
        owner, _, own = name.rpartition(".")
        try:
            return model.get_submodule(owner)._parameters[own]
        except (AttributeError, KeyError):
            raise RuntimeError(f"{name} is not in the model any more, where BitFit was injected") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "held": False}

    def refuse_withdrawn(self, what: str) -> None:
        if self.withdrawn:
            raise RuntimeError(f"cannot {what}: the adapter is disabled, the biases in the model are the original ones")

    def _known(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """The originals; RuntimeError where they are not known."""
        if self.originals is None:
            raise RuntimeError(_FORGOTTEN)
        if any(value.is_meta and not parameters[name].is_meta for name, value in self.originals.items()):
            raise RuntimeError("the original biases are not known: BitFit was injected while they had no values (meta)")
        return self.originals

    def _check_layers(self, model: nn.Module, running: bool) -> None:
        """RuntimeError naming a layer or an activation that was replaced since. running: our kernels run now."""
        for name, cls in self.classes.items():
            self._check_layer(model, name, cls if running else self._former.get(name, cls))
        for linear, parent_name, slot, activation in self._fusions if running else ():
            if getattr(model.get_submodule(linear), "activation", None) != activation:
                raise RuntimeError(f"{linear} does not compute {activation} any more: it was changed since `inject`")
            self._check_layer(model, f"{parent_name}.{slot}".lstrip("."), nn.Identity)

    @staticmethod
    def _check_layer(model: nn.Module, name: str, cls: type) -> None:
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise RuntimeError(f"{name} is not in the model any more, where BitFit was injected") from None
        if not isinstance(layer, cls):
            raise RuntimeError(
                f"{name} is a {type(layer).__name__}; expected {cls.__name__}: it was replaced since `inject`"
            )

    def run_kernels(self, model: nn.Module) -> None:
        """Change the classes of the layers, and let linears compute the activations behind them."""
        for name, cls in self.classes.items():
            layer = model.get_submodule(name)
            if not isinstance(layer, cls):
                self._former[name] = type(layer)
                change_class(layer, cls)
        for linear, parent_name, slot, activation in self._fusions:
            model.get_submodule(linear).activation = activation
            self._stand_ins.put_in(model, parent_name, slot)

    def run_torch(self, model: nn.Module) -> None:
        """Undo `run_kernels`. A layer whose class was changed again since (fully_shard does) keeps it."""
        for linear, *_ in self._fusions:
            del model.get_submodule(linear).activation  # the class's None shows again
        self._stand_ins.take_out(model)
        for name, former in self._former.items():
            layer = model.get_submodule(name)
            if type(layer) is self.classes[name]:
                change_class(layer, former)

    def train(self, model: nn.Module, trainable: bool) -> None:
        for parameter in self.parameters(model).values():
            parameter.requires_grad_(trainable)

    @torch.no_grad()
    def withdraw(self, model: nn.Module) -> None:
        """Put the originals in place, frozen, and run Torch's own layers: the base model bit for bit."""
        parameters = self.parameters(model)
        originals = self._known(parameters)
        self._check_layers(model, running=True)
        self._flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
        self._versions = {name: parameter._version for name, parameter in parameters.items()}
        self.trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            write(parameter, originals[name])
            set_version(parameter, self._versions[name] + ASIDE)
            parameter.requires_grad_(False)
        self.run_torch(model)
        self.held = True

    @torch.no_grad()
    def reinstate(self, model: nn.Module) -> None:
        """Put the trained biases back in place, each with its own requires_grad.

        A graph made before `withdraw` may have saved one: it has its value again, and so its version. One made since
        has saved the original under a version that no trained value will have, so its backward raises.
        """
        parameters = self.parameters(model)
        self._check_layers(model, running=False)
        for name, parameter in parameters.items():
            write(parameter, self.trained[name])
            set_version(parameter, self._versions[name])
            parameter.requires_grad_(self._flags[name])
        self.trained, self.held = None, False
        self.run_kernels(model)

    def merge(self, model: nn.Module, safe_merge: bool, restorable: bool) -> None:
        """Make the trained biases the model's own: there is nothing to add, so nothing is rounded.

        Raises:
            ValueError: with safe_merge, one that is not finite; nothing was changed.
        """
        parameters = self.parameters(model)
        wrong = [name for name, bias in parameters.items() if safe_merge and not bool(torch.isfinite(bias).all())]
        if wrong:
            raise ValueError(f"the biases {wrong} are not finite: nothing was merged")
        self._check_layers(model, running=True)
        self._flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        self.run_torch(model)
        self.merged = True
        if not restorable:
            self.originals = None

    def unmerge(self, model: nn.Module) -> None:
        """Make them an adapter again, as before `merge`.

        Raises:
            RuntimeError: merged with restorable=False.
        """
        parameters = self.parameters(model)
        if self.originals is None:
            raise RuntimeError(_FORGOTTEN)
        self._check_layers(model, running=False)
        self.merged = False
        self.run_kernels(model)
        for name, parameter in parameters.items():
            parameter.requires_grad_(self._flags[name])

    @torch.no_grad()
    def remove(self, model: nn.Module) -> None:
        """Give the model back as it was, frozen; the biases too, unless they were merged for good."""
        if not self.merged:
            parameters = self.parameters(model)
            originals = self._known(parameters)
            self._check_layers(model, running=True)
            for name, parameter in parameters.items():
                write(parameter, originals[name])
                parameter.requires_grad_(False)
            self.run_torch(model)
        delattr(model, _STATE)


def attach(model: nn.Module, adapter: BiasAdapter) -> None:
    setattr(model, _STATE, adapter)

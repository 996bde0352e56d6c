"""StandIns: what stands in the places of activations while linears compute them."""

from torch import nn

from ..nn.hooks import has_hooks, move_call_hooks


class StandIns:
    """nn.Identity in place of each activation; the same one again after the activation was back for a while.

    Hooks set on a stand-in are lent to the activation while that is back, unless it has some of its own. Names of
    modules, so that a deep copy or a pickle of the model has its own.
    """

    def __init__(self):
        self._activations: dict[tuple[str, str], nn.Module] = {}
        self._identities: dict[tuple[str, str], nn.Module] = {}
        self._lent: set[tuple[str, str]] = set()

    def put_in(self, model: nn.Module, parent_name: str, slot: str) -> None:
        """In place of child `slot` of the module `parent_name`; nothing where it stands there already."""
        place, children = (parent_name, slot), model.get_submodule(parent_name)._modules
        if place in self._activations:
            return
        activation, identity = children[slot], self._identities.setdefault(place, nn.Identity())
        self._activations[place] = activation
        children[slot] = identity.train(activation.training)
        if place in self._lent:
            move_call_hooks(activation, identity)
            self._lent.remove(place)

    def take_out(self, model: nn.Module) -> None:
        """Put every activation back in its place."""
        for (parent_name, slot), activation in self._activations.items():
            children = model.get_submodule(parent_name)._modules
            identity, children[slot] = children[slot], activation
            activation.train(identity.training)
            if has_hooks(identity) and not has_hooks(activation):
                move_call_hooks(identity, activation)
                self._lent.add((parent_name, slot))
        self._activations = {}

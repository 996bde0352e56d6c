"""Hooks on the layers that get adapters: they go on working on the fused layer, or the layer is refused by name."""

import copy
import functools
import pickle

import pytest
import torch
from lora_layers import K, N, conv1d, make, randomise
from torch import nn
from torch.nn.utils import prune

import peft_kernels as pk
from peft_kernels import FusedLoRALinear

REGISTER = {
    "forward": lambda m, hook: m.register_forward_hook(hook),
    "forward, prepended": lambda m, hook: m.register_forward_hook(hook, prepend=True),
    "forward, with_kwargs": lambda m, hook: m.register_forward_hook(hook, with_kwargs=True),
    "forward, always_call": lambda m, hook: m.register_forward_hook(hook, always_call=True),
    "forward_pre": lambda m, hook: m.register_forward_pre_hook(hook),
    "forward_pre, with_kwargs": lambda m, hook: m.register_forward_pre_hook(hook, with_kwargs=True),
    "full_backward": lambda m, hook: m.register_full_backward_hook(hook),
    "full_backward_pre": lambda m, hook: m.register_full_backward_pre_hook(hook),
    "state_dict_pre": lambda m, hook: m.register_state_dict_pre_hook(hook),
    "state_dict_post": lambda m, hook: m.register_state_dict_post_hook(hook),
    "load_state_dict_pre": lambda m, hook: m.register_load_state_dict_pre_hook(hook),
    "load_state_dict_post": lambda m, hook: m.register_load_state_dict_post_hook(hook),
}


def use(module: nn.Module) -> None:
    """All that may run a hook: forward, backward, saving, loading."""
    module(torch.randn(3, K, requires_grad=True)).sum().backward()
    module.load_state_dict(module.state_dict())


@pytest.mark.parametrize("build", [lambda: nn.Linear(K, N), conv1d], ids=["linear", "conv1d"])
@pytest.mark.parametrize("kind", REGISTER)
@pytest.mark.parametrize("by", ["from_linear", "inject"])
def test_a_hook_moves_with_its_handle(by, kind, build):
    linear, seen = build(), []
    handle = REGISTER[kind](linear, lambda *args: seen.append(args))
    if by == "from_linear":
        layer = FusedLoRALinear.from_linear(linear, r=2)
    else:
        layer = pk.inject(nn.Sequential(linear), pk.LoraConfig(target_modules=["0"], r=2))[0]
    use(layer)
    assert len(seen) == 1
    # Whatever the kind gives its hook, where that is a module it is the layer that runs now.
    assert {id(arg) for arg in seen[0] if isinstance(arg, nn.Module)} == {id(layer)}
    use(linear)
    assert len(seen) == 1
    handle.remove()
    use(layer)
    assert len(seen) == 1


def test_the_first_argument_of_a_hook_that_loads_is_the_fused_layer_in_a_pickle_too():
    linear = nn.Linear(K, N)
    linear.register_load_state_dict_pre_hook(remember)
    layer = pickle.loads(pickle.dumps(FusedLoRALinear.from_linear(linear, r=2)))
    del linear
    layer.load_state_dict(layer.state_dict())
    assert layer.remembered == "weight"


def remember(module: nn.Module, state_dict: dict, *_) -> None:
    module.remembered = next(iter(state_dict))


def test_hooks_change_input_output_and_gradients_as_before_and_in_their_order():
    torch.manual_seed(0)
    linear, order = nn.Linear(K, N).double(), []

    def doubled(module, args, kwargs):
        order.append("pre")
        return (2 * args[0],), kwargs

    linear.register_forward_hook(lambda module, args, y: order.append("second") or y + 1)
    linear.register_forward_hook(lambda module, args, y: order.append("first") or 4 * y, prepend=True)
    linear.register_forward_pre_hook(doubled, with_kwargs=True)
    linear.register_full_backward_pre_hook(lambda module, dy: order.append("dy") or (8 * dy[0],))
    linear.register_full_backward_hook(lambda module, dx, dy: order.append("dx") or (16 * dx[0],))
    layer = FusedLoRALinear.from_linear(linear, r=2)
    plain = FusedLoRALinear.from_linear(nn.Linear(K, N).double(), r=2)
    randomise(layer)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(4, K, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_(True)
    y, expected = layer(x), 4 * plain(2 * twin) + 1
    y.sum().backward()
    (8 * expected).sum().backward()
    assert order == ["pre", "first", "second", "dy", "dx"]
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, 16 * twin.grad)  # powers of two: no rounding
    assert torch.equal(layer.lora_B["default"].grad, plain.lora_B["default"].grad)


def test_a_backward_hook_is_given_the_gradients_of_the_fused_layer():
    linear, seen = nn.Linear(K, N).double(), {}
    linear.register_full_backward_hook(lambda module, dx, dy: seen.update(dx=dx, dy=dy))
    layer = FusedLoRALinear.from_linear(linear, r=2)
    randomise(layer)
    x, dy = torch.randn(4, K, dtype=torch.float64, requires_grad=True), torch.randn(4, N, dtype=torch.float64)
    layer(x).backward(dy)
    assert torch.equal(seen["dy"][0], dy)
    assert torch.equal(seen["dx"][0], x.grad)


def test_a_hook_finds_what_was_set_on_the_layer():
    model, seen = nn.Sequential(nn.Linear(K, N), nn.Linear(N, N)), []
    for name, linear in model.named_children():
        linear.layer_name, linear.merge = name, "not a method"
        linear.register_forward_hook(lambda module, *_: seen.append(module.layer_name))
    pk.inject(model, pk.LoraConfig(target_modules="all-linear", r=2))
    model(torch.randn(2, K))
    assert seen == ["0", "1"]
    assert callable(model[0].merge)


def test_a_copy_has_hooks_of_its_own():
    linear, seen = nn.Linear(K, N), []
    handle = linear.register_forward_hook(lambda *_: seen.append(1))
    layer = FusedLoRALinear.from_linear(linear, r=2)
    twin = copy.deepcopy(layer)
    handle.remove()
    layer(torch.randn(2, K))
    assert not seen
    twin(torch.randn(2, K))
    assert seen == [1]


def test_a_shared_layer_runs_its_hook_at_both_places_and_a_second_adapter_leaves_it():
    shared, seen = nn.Linear(4, 4), []
    handle = shared.register_forward_hook(lambda *_: seen.append(1))
    model = pk.inject(nn.Sequential(shared, nn.ReLU(), shared), pk.LoraConfig(target_modules=["2"], r=2))
    pk.inject(model, pk.LoraConfig(target_modules=["2"], r=2), "second")
    model(torch.randn(2, 4))
    assert len(seen) == 2
    handle.remove()
    model(torch.randn(2, 4))
    assert len(seen) == 2


def test_a_failing_inject_leaves_the_hooks_where_they_are():
    model, seen = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1)), []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(ValueError, match=r"1: torch\.nn\.modules\.conv\.Conv1d is neither"):
        pk.inject(model, pk.LoraConfig(target_modules=["0", "1"], r=2))
    model[0](torch.randn(2, 4))
    assert seen == [1]
    handle.remove()
    model[0](torch.randn(2, 4))
    assert seen == [1]


def test_compiles_as_one_graph_with_a_hook():
    linear = nn.Linear(K, N).double()
    linear.register_forward_hook(lambda module, args, y: 2 * y)
    layer = FusedLoRALinear.from_linear(linear, r=2)
    randomise(layer)
    x = torch.randn(3, K, dtype=torch.float64)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


class Counting(nn.Linear):
    """A subclass that hooks itself: Torch calls the method with the module and keeps this one as its self."""

    def __init__(self):
        super().__init__(K, N)
        self.register_forward_hook(self.count)

    def count(self, *_):
        self.calls = getattr(self, "calls", 0) + 1


def legacy() -> nn.Module:
    linear = nn.Linear(K, N)
    linear.register_backward_hook(lambda *_: None)
    return linear


def observed() -> nn.Module:
    linear = nn.Linear(K, N)
    linear.register_buffer("largest", torch.zeros(()))
    linear.register_forward_hook(lambda module, args, y: module.largest.copy_(y.max()))
    return linear


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(K, N), "bias", amount=2)


def parametrised() -> nn.Module:
    linear = nn.Linear(K, N)
    nn.utils.parametrize.register_parametrization(linear, "bias", nn.Softplus())
    return linear


def patched() -> nn.Module:
    linear = nn.Linear(K, N)
    linear.forward = lambda x: x
    return linear


def partly_counting() -> nn.Module:
    linear = Counting()
    (handle,) = linear._forward_hooks
    linear._forward_hooks[handle] = functools.partial(linear._forward_hooks[handle])
    return linear


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (legacy, "use register_full_backward_hook"),
        (Counting, "hook count is a method of the layer itself"),
        (partly_counting, "hook count is a method of the layer itself"),
        (observed, "beside weight and bias, largest"),
        (pruned, "its bias is computed at each call"),
        (parametrised, "its bias is computed at each call"),
        (lambda: nn.utils.weight_norm(nn.Linear(K, N)), "its weight is computed at each call"),
        (lambda: nn.utils.spectral_norm(nn.Linear(K, N)), "its weight is computed at each call"),
        (patched, "has a forward of its own"),
    ],
    ids=[
        "legacy",
        "own method",
        "own method, partial",
        "buffer",
        "pruned",
        "parametrised",
        "weight_norm",
        "spectral_norm",
        "forward",
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_what_cannot_move_is_refused_with_the_reason(build, message):
    with pytest.raises(ValueError, match=message):
        FusedLoRALinear.from_linear(build())
    model = nn.Sequential(build())
    with pytest.raises(ValueError, match=f"0: .*{message}"):
        pk.inject(model, pk.LoraConfig(target_modules=["0"]))


def test_make_has_no_hooks():
    assert not any(value for name, value in vars(make()).items() if name.endswith("_hooks"))

"""A linear takes over the activation behind it only where its parent's forward leaves no doubt."""

import pytest
import torch
from bitfit_models import WIDTH, gradients, plain_twin
from tiny_models import bert, gpt2, transformers
from torch import nn

import peft_kernels as pk
from peft_kernels.methods.activations import activation_of, find_fusions

ACT2FN = transformers.activations.ACT2FN


class Mlp(nn.Module):
    """Pieces for forwards that subclasses give."""

    def __init__(self, activation: nn.Module | None = None):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.act = nn.SiLU() if activation is None else activation
        self.skip = False

    def forward(self, x):
        return self.down(self.act(self.up(x)))


def fused(model: nn.Module) -> dict[str, str]:
    own = {name: getattr(module, "activation", None) for name, module in model.named_modules()}
    return {name: activation for name, activation in own.items() if isinstance(activation, str)}


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        *(
            (ACT2FN[key], name)
            for key, name in {"gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh"}.items()
        ),
        *((ACT2FN[key], "gelu_tanh") for key in ("gelu_pytorch_tanh", "gelu_python_tanh")),
        (transformers.activations.SiLUActivation(), "silu"),
        (ACT2FN["silu"], "silu"),
        (ACT2FN["relu"], "relu"),
        *((ACT2FN[key], None) for key in ("quick_gelu", "gelu_fast", "relu2", "mish", "gelu_10", "linear", "tanh")),
        (nn.ReLU6(), None),
        (nn.LeakyReLU(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_each_activation_by_its_function(activation, name):
    assert activation_of(activation) == name
    base = Mlp(activation).double()
    plain = plain_twin(base, {"up.bias", "down.bias"})
    model = pk.inject(base, pk.BitFitConfig())
    assert fused(model) == ({"up": name} if name else {})
    assert type(model.act) is nn.Identity if name else model.act is activation
    x = torch.randn(6, WIDTH, dtype=torch.float64)
    found, expected = gradients(model, x), gradients(plain, x)
    single = gradients(plain.float(), x)
    for key, value in expected.items():
        assert (found[key] - value).abs().max() < (single[key] - value).abs().max(), key
    pk.delete_adapter(model, "default")
    assert model.act is activation and not fused(model) and "activation" not in vars(model.up)


def test_real_models():
    assert fused(pk.inject(bert(), pk.BitFitConfig())) == {
        f"bert.encoder.layer.{i}.intermediate.dense": "gelu" for i in (0, 1)
    }
    assert fused(pk.inject(gpt2(), pk.BitFitConfig())) == {f"transformer.h.{i}.mlp.c_fc": "gelu_tanh" for i in (0, 1)}
    assert not fused(pk.inject(bert(), pk.BitFitConfig(["query"])))  # the others' biases do not train


class Branches(Mlp):
    def forward(self, x):
        h = self.up(x)
        return self.down(self.act(h)) + h


class SharedSlot(Mlp):
    """One activation behind both."""

    def forward(self, x):
        return self.act(self.up(x)) * self.act(self.down(x))


class SlotElsewhere(Mlp):
    def forward(self, x):
        return self.down(self.act(self.up(x)) + self.act(x))


class TwiceWithout(Mlp):
    def forward(self, x):
        return self.down(self.act(self.up(x))) + self.up(x)


class Between(Mlp):
    def forward(self, x):
        return self.down(self.act(self.up(x) + 1))


class ReadsWeight(Mlp):
    def forward(self, x):
        return self.down(self.act(self.up(x))) + nn.functional.linear(x, self.up.weight, self.up.bias)


class Optional(Mlp):
    def forward(self, x, residual=0):
        return self.down(self.act(self.up(x))) + residual


class Branching(Mlp):
    def forward(self, x):
        return self.down(self.act(self.up(x))) if x.sum() > 0 else self.up(x)


class OtherInTraining(Mlp):
    def forward(self, x):
        y = self.up(x)
        return self.down(self.act(y) if self.training else y)


class Unpacks(Mlp):
    def forward(self, x):
        a, b, c, d, e, f = self.act(self.up(x))
        return self.down(a + b + c + d + e + f)


CASES = {
    Mlp: ({"up": "silu"}, None),
    SharedSlot: ({"up": "silu", "down": "silu"}, None),
    Branches: ({}, None),
    SlotElsewhere: ({}, None),
    TwiceWithout: ({}, None),
    Between: ({}, None),
    ReadsWeight: ({}, "has a call of `nn.functional.linear`, which is no module of the parent's"),
    Optional: ({}, "takes more than one argument"),
    Branching: ({}, "has a conditional expression"),
    OtherInTraining: ({}, "has a conditional expression"),
    Unpacks: ({"up": "silu"}, None),
}


@pytest.mark.parametrize("cls", CASES)
def test_only_where_the_forward_leaves_no_doubt(cls):
    expected, reason = CASES[cls]
    base = cls().double()
    plain = plain_twin(base, {"up.bias", "down.bias"})
    before = set(vars(base))
    model = pk.inject(base, pk.BitFitConfig())
    assert fused(model) == expected
    assert vars(model).keys() - before == {"peft_kernels_configs", "peft_kernels_biases"}  # nothing left by the trace
    found = {row.module: row.reason for row in pk.coverage(model)}
    assert ("activation apart: " + reason in found["up"].replace("its parent's forward ", "")) if reason else True
    x = torch.randn(6, WIDTH, dtype=torch.float64)
    for mode in (True, False):
        theirs = gradients(plain.train(mode), x)
        for name, value in gradients(model.train(mode), x).items():
            torch.testing.assert_close(value, theirs[name])


def hooked(part: str) -> nn.Module:
    model = Mlp()
    getattr(model, part).register_forward_hook(lambda module, args, y: 2 * y)
    return model


def patched() -> nn.Module:
    model = Mlp()
    model.forward = lambda x: model.down(model.up(x))
    return model


def patched_activation() -> nn.Module:
    model = Mlp()
    model.act.forward = torch.tanh
    return model


def at_two_places() -> nn.Module:
    shared = nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared)


def one_activation_twice() -> nn.Module:
    act = nn.ReLU()
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), act, nn.Linear(WIDTH, WIDTH), act)


REFUSED = {
    "hook on the linear": (lambda: hooked("up"), "hooks on it or on the activation"),
    "hook on the activation": (lambda: hooked("act"), "hooks on it or on the activation"),
    "parent's forward": (patched, "forward was replaced"),
    "activation's forward": (patched_activation, None),
    "linear at two places": (at_two_places, "stands in several places"),
    "activation at two places": (one_activation_twice, "stands in several places"),
    "norm before the activation": (lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.GELU()), None),
    "saved activation": (lambda: Mlp(), "one of modules_to_save"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_keeps_its_activation_and_why(case):
    make, reason = REFUSED[case]
    saved = ["act"] if case.startswith("saved") else None
    base, x = make(), torch.randn(6, WIDTH)
    expected = base(x)
    model = pk.inject(base, pk.BitFitConfig(modules_to_save=saved))
    assert not fused(model)
    reasons = [row.reason for row in pk.coverage(model)]
    assert reason is None or any(reason in text for text in reasons)
    torch.testing.assert_close(model(x), expected)


def test_a_layer_with_an_activation_of_its_own_gets_no_second():
    model = nn.Sequential(pk.BiasLinear(WIDTH, WIDTH, activation="silu"), nn.ReLU(), pk.BiasLinear(WIDTH, 4), nn.ReLU())
    pk.inject(model, pk.BitFitConfig())
    assert fused(model) == {"0": "silu", "2": "relu"} and type(model[1]) is nn.ReLU
    pk.delete_adapter(model, "default")
    assert fused(model) == {"0": "silu"} and type(model[3]) is nn.ReLU and type(model[2]) is pk.BiasLinear


def test_the_activation_comes_back_in_the_mode_of_its_place():
    model = pk.inject(Mlp().train(), pk.BitFitConfig())
    pk.delete_adapter(model.eval(), "default")
    assert not model.act.training


def test_nothing_is_traced_without_an_activation_beside():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            raise AssertionError

    assert find_fusions(Untraceable(), {"linear": nn.Linear(4, 4)}) == ([], {})

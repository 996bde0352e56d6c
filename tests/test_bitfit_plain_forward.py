"""What may go another way than a trace, or do more than return a value, is not traced at all; ours must run ours."""

import pytest
import torch
from bitfit_models import WIDTH
from torch import nn

import peft_kernels as pk

GATE = nn.Identity()


class Parts(nn.Module):
    """Pieces for forwards that subclasses give."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        self.cache, self.bare, self.scale = [], False, 2.0
        self.register_buffer("count", torch.zeros(()))
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def keep(self, h):
        self.cache.append(h)
        return h

    @property
    def other(self):
        return self.cache.append(1) or 2.0


class Plain(Parts):
    def forward(self, x: "torch.Tensor") -> torch.Tensor:
        """With numbers, Parameters and buffers."""
        h = self.act(self.up(x[:, :8] * self.scale + self.gain))
        y: torch.Tensor = self.down(h) - self.count
        return y


class Stash(Parts):
    def forward(self, x):
        self.pre = self.up(x)
        return self.down(self.act(self.pre))


class Appends(Parts):
    def forward(self, x):
        h = self.up(x)
        self.cache.append(h)
        return self.act(h)


class AppendsInAnExpression(Parts):
    def forward(self, x):
        _ = self.cache.append(x)
        return self.act(self.up(x))


class Helper(Parts):
    def forward(self, x):
        return self.act(self.up(self.keep(x)))


class Property(Parts):
    def forward(self, x):
        return self.act(self.up(x)) + self.other


class Counts(Parts):
    def forward(self, x):
        self.count += 1
        return self.act(self.up(x))


class Draws(Parts):
    def forward(self, x):
        noise = torch.rand(1)
        return self.act(self.up(x + noise))


class Flag(Parts):
    def forward(self, x):
        h = self.up(x)
        return h if self.bare else self.act(h)


class Either(Parts):
    def forward(self, x):
        h = self.up(x)
        return self.bare and h or self.act(h)


class Lists(Parts):
    def forward(self, x):
        if isinstance(x, list):
            return self.up(x[0])
        return self.act(self.up(x))


class NoGrad(Parts):
    def forward(self, x):
        h = self.up(x)
        with torch.no_grad():
            return self.act(h)


class Tries(Parts):
    def forward(self, x):
        try:
            return self.act(self.up(x))
        except ValueError:
            return self.up(x)


class Loops(Parts):
    def forward(self, x):
        for _ in range(2):
            x = self.act(self.up(x))
        return x


class Chooses(Parts):
    def forward(self, x):
        return (self.act, self.down)[self.bare](self.up(x))


class Global(Parts):
    def forward(self, x):
        return self.act(self.up(x)) + GATE.training


class Decorated(Parts):
    @torch.no_grad()
    def forward(self, x):
        return self.act(self.up(x))


class OwnCall(Parts):
    def __call__(self, x):
        return self.forward(x)

    def forward(self, x):
        return self.act(self.up(x))


class Shadowed(Parts):
    def __init__(self):
        super().__init__()
        vars(self)["act"] = nn.GELU()

    def forward(self, x):
        return self.act(self.up(x))


class Variadic(Parts):
    def forward(*args):
        return args[0].act(args[0].up(args[1]))


class Raises(Parts):
    def forward(self, x):
        return self.act(self.up(x)) + 1 / 0


class NoSource(Parts):
    exec("def forward(self, x):\n    return self.act(self.up(x))")


class OtherSource(Parts):
    def forward(self, x):
        return self.act(self.up(x))

    forward.__code__ = (lambda self, x: self.up(x)).__code__


REFUSED = {
    Stash: "an assignment to more than a local variable",
    Appends: "a statement that only calls something",
    AppendsInAnExpression: "a call of `self.cache.append`",
    Helper: "a call of `self.keep`",
    Property: "a use of `self.other`",
    Counts: "an assignment in place",
    Draws: "a call of `torch.rand`",
    Flag: "a conditional expression",
    Either: "a conditional expression",
    Lists: "a branch",
    NoGrad: "a with block",
    Tries: "a try block",
    Loops: "a loop",
    Chooses: "no module of the parent's",
    Global: "a use of `GATE.training`",
    Decorated: "wrapped, or its source is not at hand",
    OwnCall: "changes how it is called",
    Shadowed: "a call of `self.act`",
    Variadic: "its parent's forward names no argument of its own",
    Raises: "its parent's forward cannot be traced: ZeroDivisionError",
    NoSource: "its source is not at hand",
    OtherSource: "its source is not at hand",
}


@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_a_forward_with_a_doubt_is_neither_traced_nor_fused(cls):
    model = nn.Sequential(cls())
    state, before = torch.get_rng_state(), set(vars(model[0]))
    pk.inject(model, pk.BitFitConfig())
    assert type(model[0].act) is nn.GELU and model[0].up.activation is None
    assert set(vars(model[0])) == before and model[0].cache == [] and model[0].count == 0
    assert torch.equal(torch.get_rng_state(), state)
    reasons = {row.module: row.reason for row in pk.coverage(model)}
    assert REFUSED[cls] in reasons["0.up"]


@pytest.mark.parametrize("cls", [Plain, nn.Sequential])
def test_a_plain_forward_is_fused(cls):
    parent = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) if cls is nn.Sequential else cls()
    x = torch.randn(3, WIDTH)
    expected = parent(x)
    model = pk.inject(nn.Sequential(parent), pk.BitFitConfig())
    assert [layer.activation for layer in model.modules() if isinstance(layer, pk.BiasLinear)][0] == "gelu"
    torch.testing.assert_close(model(x), expected)


class Doubles(pk.BiasLinear):
    def forward(self, input):
        return 2 * super().forward(input)


class DoublesNorm(pk.FusedLayerNorm):
    def forward(self, input):
        return 2 * super().forward(input)


class Named(pk.BiasLinear):
    """Runs our forward."""


def test_a_subclass_of_ours_with_a_forward_of_its_own_is_not_ours():
    model = nn.Sequential(Doubles(WIDTH, WIDTH), nn.ReLU(), DoublesNorm(WIDTH), Named(WIDTH, WIDTH), nn.ReLU())
    x = torch.randn(5, WIDTH)
    expected = model(x)
    pk.inject(model, pk.BitFitConfig())
    torch.testing.assert_close(model(x), expected)
    assert type(model[1]) is nn.ReLU and type(model[4]) is nn.Identity
    rows = {row.module: row for row in pk.coverage(model)}
    assert rows["0"].kernel == rows["2"].kernel == "torch" != rows["3"].kernel
    assert "Doubles is a subclass of a linear layer, which may compute something else" in rows["0"].reason
    assert "DoublesNorm is a subclass of nn.LayerNorm, which may compute something else" in rows["2"].reason

"""Small models with biases everywhere, for the tests of BitFit, and one training step of them in plain numbers."""

import copy

import torch
from tiny_models import bert, gpt2, ids, train_a_little
from torch import nn

import peft_kernels as pk

M, WIDTH = 12, 8


class Block(nn.Module):
    """A residual MLP with what BitFit meets besides: attention, a recurrent layer, both with biases of their own."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 20), nn.ReLU(inplace=True), nn.Linear(20, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.recurrent = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x):
        x = self.norm(x + self.attention(x, x, x)[0])
        x = self.norm(x + self.mlp(x))
        return self.recurrent(x)[0]


def mlp(activation: nn.Module | None = None) -> nn.Module:
    activation = nn.GELU() if activation is None else activation
    return nn.Sequential(nn.Linear(WIDTH, 20), activation, nn.Linear(20, WIDTH), nn.LayerNorm(WIDTH))


class OwnNorm(nn.LayerNorm):
    """Not to be replaced."""


BUILD = {
    "bert": bert,
    "gpt2": gpt2,
    "block": Block,
    "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 20, batch_first=True, activation="gelu"),
    "mlp": mlp,
    "own norm": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), OwnNorm(WIDTH), nn.Linear(WIDTH, WIDTH)),
}


def build(name: str) -> nn.Module:
    """Frozen, in eval mode (so without dropout), fp64, and with biases of order 1 where the model starts with zeros."""
    torch.manual_seed(0)
    model = BUILD[name]().double().eval()
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if "bias" in own:
                parameter.normal_()
    return model.requires_grad_(False)


def batch(name: str) -> torch.Tensor:
    torch.manual_seed(1)
    return ids() if name in ("bert", "gpt2") else torch.randn(3, 4, WIDTH, dtype=torch.float64)


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    like = next(model.parameters())
    y = model(x.to(like.device, like.dtype if x.is_floating_point() else x.dtype))
    return getattr(y, "logits", y)


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = output(model, x)
    return (y * torch.cos(torch.arange(float(y.numel()))).view(y.shape).to(y)).sum()


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss and every parameter's gradient by name, of those that got one."""
    model.zero_grad()
    value = loss(model, x)
    value.backward()
    grads = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": value.detach(), **grads}


def plain_twin(model: nn.Module, trained: set[str]) -> nn.Module:
    """A copy for Torch alone, of which the parameters so named train."""
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in trained)
    return twin


def assert_as_torch(found: dict, exact: dict, single: dict) -> None:
    """In fp64: other orders of the same sums are nearer than the same order in fp32."""
    assert found.keys() == exact.keys()
    rounding = {name: (single[name] - value).abs().max() for name, value in exact.items()}
    assert max(rounding.values()) < 1e-3 * max(value.abs().max() for value in exact.values())
    for name, value in exact.items():
        assert (found[name] - value).abs().max() <= rounding[name], name


def bits(model: nn.Module) -> dict[str, list]:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {name: p.detach().view(kinds[p.element_size()]).tolist() for name, p in model.named_parameters()}


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def trained(base: nn.Module, **settings) -> nn.Module:
    model = pk.inject(copy.deepcopy(base), pk.BitFitConfig(**settings))
    train_a_little(model)
    return model

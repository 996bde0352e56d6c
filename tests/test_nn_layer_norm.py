"""FusedLayerNorm and FusedRMSNorm as modules: Torch's face, any normalized_shape, residuals, and from other layers."""

import copy
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

import peft_kernels as pk

SHAPES = [(12,), (3, 4), (2, 3, 2)]
LAYERS = {"layer": (pk.FusedLayerNorm, nn.LayerNorm), "rms": (pk.FusedRMSNorm, nn.RMSNorm)}
SETTINGS = [
    ("layer", {}),
    ("layer", {"bias": False}),
    ("layer", {"elementwise_affine": False}),
    ("layer", {"eps": 0.1}),
]
SETTINGS += [("rms", {}), ("rms", {"elementwise_affine": False}), ("rms", {"eps": 0.1})]


def pair(kind: str, shape, settings) -> tuple[nn.Module, nn.Module]:
    """Ours and Torch's, with the same random parameters."""
    ours, theirs = (cls(shape, **settings) for cls in LAYERS[kind])
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def step(layer: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None, ours: bool = True) -> dict:
    """Outputs and every gradient; Torch's layer adds the residual first."""
    leaves = {"x": x, **({} if residual is None else {"residual": residual})}
    leaves = {name: value.clone().requires_grad_(True) for name, value in leaves.items()}
    if residual is None:
        outputs = {"y": layer(*leaves.values())}
    elif ours:
        outputs = dict(zip(("y", "total"), layer(*leaves.values()), strict=True))
    else:
        total = leaves["x"] + leaves["residual"]
        outputs = {"y": layer(total), "total": total}
    layer.zero_grad()
    sum(
        (value * torch.cos(torch.arange(float(value.numel())).view(value.shape))).sum() for value in outputs.values()
    ).backward()
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    grads.update({f"d{name}": p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad})
    return {**{name: value.detach() for name, value in outputs.items()}, **grads}


def assert_same_function(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, residual=None) -> None:
    """In fp64: other orders of the same sums are nearer than the same order in fp32."""
    narrow = [None if t is None else t.float() for t in (x, residual)]
    single = step(copy.deepcopy(theirs).float(), *narrow, ours=False)
    found, expected = step(ours.double(), x, residual), step(theirs.double(), x, residual, ours=False)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name != "total":
            assert (found[name] - value).abs().max() < (single[name] - value).abs().max(), name
    if residual is not None:
        assert torch.equal(found["total"], x + residual)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_is_torchs_layer(kind, settings, shape, with_residual):
    ours, theirs = pair(kind, shape, settings)
    assert isinstance(ours, LAYERS[kind][1])
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x, residual = (torch.randn(5, 3, *shape, dtype=torch.float64) for _ in range(2))
    assert_same_function(ours, theirs, x, residual if with_residual else None)


@pytest.mark.parametrize("trained", [("bias",), ("weight",), ("weight", "bias"), ()], ids=str)
def test_only_what_trains_gets_a_gradient(trained):
    ours, theirs = pair("layer", (12,), {})
    for layer, name in product((ours, theirs), ("weight", "bias")):
        getattr(layer, name).requires_grad_(name in trained)
    assert_same_function(ours, theirs, torch.randn(7, 12, dtype=torch.float64))


def test_saves_nothing_where_the_bias_alone_trains():
    layer, kept = pk.FusedLayerNorm(12), []
    layer.weight.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(7, 12)).sum().backward()
    assert not kept
    assert torch.equal(layer.bias.grad, torch.full((12,), 7.0))


@pytest.mark.parametrize("kind", LAYERS)
def test_copies_compile_and_print(kind):
    ours, theirs = pair(kind, (12,), {})
    assert repr(ours) == f"Fused{theirs!r}"
    x = torch.randn(4, 12)
    expected = step(ours, x, x)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), compiled):
        found = step(twin, x, x)
        assert all(torch.equal(value, expected[name.replace("_orig_mod.", "")]) for name, value in found.items())
    assert ours.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", LAYERS)
def test_a_shape_that_does_not_fit_is_named(kind):
    layer = LAYERS[kind][0]((3, 4))
    for args, name in (((torch.ones(4),), "input"), ((torch.ones(5, 3, 4), torch.ones(5, 12)), "residual")):
        with pytest.raises(ValueError, match=rf"{type(layer).__name__}: {name} is .*; expected \[\.\.\., 3, 4\]"):
            layer(*args)
    with pytest.raises(ValueError, match="input is 3; expected"):
        layer(3)


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
def test_from_layer_norm_shares_parameters_and_takes_the_hooks(settings):
    norm, seen = nn.LayerNorm((3, 4), eps=0.25, **settings).eval(), []
    norm.register_forward_hook(lambda module, args, y: seen.append(module))
    layer = pk.FusedLayerNorm.from_layer_norm(norm)
    assert layer.weight is norm.weight and layer.bias is norm.bias
    assert not layer.training and layer.eps == 0.25 and layer.elementwise_affine == norm.elementwise_affine
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(layer(x), norm(x))
    assert seen == [layer]


class Own(nn.LayerNorm):
    def forward(self, input):
        return input


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.BatchNorm1d(4), "replace a BatchNorm1d: it is not nn.LayerNorm"),
        (lambda: Own(4), "replace this Own: it has a forward of its own"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.LayerNorm(4), dim=None), "a forward of its own|is computed"),
    ],
    ids=["batch", "forward", "weight_norm"],
)
def test_from_layer_norm_refuses_with_the_reason(build, message):
    with pytest.raises(ValueError, match=message):
        pk.FusedLayerNorm.from_layer_norm(build())


def hf_norm(model: str, name: str, **settings) -> nn.Module:
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    norm = getattr(module, name)(12, **settings)
    with torch.no_grad():
        norm.weight.normal_()
    return norm


@pytest.mark.parametrize(
    ("model", "name"), [("llama", "LlamaRMSNorm"), ("t5", "T5LayerNorm"), ("qwen2", "Qwen2RMSNorm")]
)
def test_from_rms_norm_of_transformers(model, name):
    norm = hf_norm(model, name, eps=0.125)
    layer = pk.FusedRMSNorm.from_rms_norm(norm)
    assert layer.weight is norm.weight and layer.eps == 0.125
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), norm(x))
    assert torch.equal(pk.FusedRMSNorm.from_rms_norm(nn.RMSNorm((3, 4))).weight, torch.ones(3, 4))
    assert pk.FusedRMSNorm.from_rms_norm(nn.RMSNorm(4, elementwise_affine=False)).weight is None


def test_from_rms_norm_refuses_another_formula_under_the_same_names():
    with pytest.raises(ValueError, match=r"GemmaRMSNorm: its output is not weight \* x / rms\(x\)"):
        pk.FusedRMSNorm.from_rms_norm(hf_norm("gemma", "GemmaRMSNorm"))
    for other in (nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU()):
        with pytest.raises(ValueError, match="it is not nn.RMSNorm, and not a layer with a weight"):
            pk.FusedRMSNorm.from_rms_norm(other)


class Odd(nn.Module):
    """LlamaRMSNorm's names, and a forward that a test chooses."""

    def __init__(self, weight: torch.Tensor | None = None, eps: float | None = 1e-6, forward=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4) if weight is None else weight)
        self.eps, self.compute = eps, forward

    def forward(self, x):
        return self.compute(x)


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (Odd(torch.ones(2, 2)), r"a weight \[K\] alone"),
        (Odd(torch.tensor(1.0)), r"a weight \[K\] alone"),
        (Odd(eps=None), "variance_epsilon or eps"),
        (Odd(), r"a try of a copy on \[3, 4\] raised TypeError"),
        (Odd(forward=lambda x: (x, x)), "its output is not one tensor of its input's shape"),
        (Odd(forward=lambda x: x.sum(-1)), "its output is not one tensor of its input's shape"),
        (Odd(forward=lambda x: x), r"its output is not weight \* x / rms\(x\)"),
        (None, "replace a NoneType: it is no module"),
    ],
    ids=["matrix", "scalar", "no eps", "raises", "two", "sum", "identity", "none"],
)
def test_from_rms_norm_says_what_a_layer_lacks(norm, message):
    with pytest.raises(ValueError, match=message):
        pk.FusedRMSNorm.from_rms_norm(norm)


def test_from_rms_norm_anywhere():
    class Plain(nn.Module):
        def __init__(self, eps):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), eps

        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    with torch.device("meta"):
        assert pk.FusedRMSNorm.from_rms_norm(Plain(1e-6)).weight.is_meta
    for eps in (0, 1, np.float32(1e-6)):
        assert pk.FusedRMSNorm.from_rms_norm(Plain(eps)).eps == eps

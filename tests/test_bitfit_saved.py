"""What a BitFit step keeps for its backward, counted exactly, beside Torch with the same requires_grad."""

import copy

import pytest
import torch
from bitfit_models import plain_twin
from test_saved_bytes import saved_bytes
from tiny_models import transformers
from torch import nn

import peft_kernels as pk

B, T, H, N, HEADS, LAYERS = 3, 16, 32, 88, 4, 2
M = B * T


def kept(model: nn.Module, x: torch.Tensor) -> int:
    return saved_bytes(lambda: model(x), list(model.parameters()))


def both(base: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Bytes kept by ours, by Torch."""
    model = pk.inject(copy.deepcopy(base), pk.BitFitConfig())
    plain = plain_twin(base, {name for name, p in model.named_parameters() if p.requires_grad})
    return kept(model, x), kept(plain, x)


KEEPS = {
    "relu": (nn.ReLU, lambda size: M * (N // 8), lambda size: M * N * size),
    "gelu": (nn.GELU, lambda size: M * N * size, lambda size: M * N * size),
    "silu": (nn.SiLU, lambda size: M * N * size, lambda size: M * N * size),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KEEPS)
def test_mlp(name, dtype):
    """z, or one bit per element of it; the norm's input and its two numbers per row; no layer's input besides."""
    act, ours, theirs = KEEPS[name]
    model = nn.Sequential(nn.Linear(H, N), act(), nn.Linear(N, H), nn.LayerNorm(H), nn.Linear(H, H)).to(dtype)
    size = dtype.itemsize
    norm = M * H * size
    x = torch.randn(B, T, H).to(dtype)
    found, plain = both(model, x)
    assert found == ours(size) + norm + 2 * M * 4
    assert plain == theirs(size) + norm + 2 * M * (4 if dtype == torch.float32 else size)


def bert(hidden_act: str) -> nn.Module:
    sizes = {"hidden_size": H, "intermediate_size": N, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
    config = transformers.BertConfig(vocab_size=40, hidden_act=hidden_act, **sizes)
    return transformers.BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_new"])
def test_bert_step(act):
    """The embeddings' norm, whose input needs no gradient, keeps nothing; the activations keep one tensor at most."""
    found, plain = both(bert(act), torch.randint(40, (B, T)))
    embedding_norm = M * H * 4 + 2 * M * 4
    # Of NewGELU's composition Torch keeps pow's z and tanh's y, and both factors of its last product.
    of_torch = {"relu": M * N * 4, "gelu": M * N * 4, "gelu_new": 4 * M * N * 4}[act]
    of_ours = M * N // 8 if act == "relu" else M * N * 4
    assert plain - found == embedding_norm + LAYERS * (of_torch - of_ours)


def test_where_no_gradient_is_taken_nothing_is_kept():
    model = pk.inject(bert("gelu"), pk.BitFitConfig())
    with torch.no_grad():
        assert kept(model, torch.randint(40, (B, T))) == 0
    pk.set_adapter(model, "default", inference_mode=True)
    assert kept(model, torch.randint(40, (B, T))) == 0


def test_only_layers_above_the_first_trained_bias_keep_anything():
    """Biases of the last layer alone: what lies below has no gradient to pass."""
    base, x = bert("gelu"), torch.randint(40, (B, T))
    every = kept(pk.inject(copy.deepcopy(base), pk.BitFitConfig()), x)
    last = kept(pk.inject(copy.deepcopy(base), pk.BitFitConfig([f"layer.{LAYERS - 1}", "pooler", "classifier"])), x)
    assert last < every / LAYERS + M * H * 4


def test_the_prediction_saves_the_same():
    """Its tensors without memory go through inject, the copies of the biases and the search for activations too."""
    batch = {"input_ids": torch.randint(40, (B, T)), "labels": torch.randint(2, (B,))}

    def injected() -> nn.Module:
        return pk.inject(bert("relu"), pk.BitFitConfig())

    def plain() -> nn.Module:
        names = {name for name, p in injected().named_parameters() if p.requires_grad}
        return plain_twin(bert("relu"), names)

    ours, theirs = (pk.predict_memory(build, batch, arch=None).replay for build in (injected, plain))
    masks = LAYERS * (M * N * 4 - M * N // 8)
    assert theirs.saved - ours.saved == M * H * 4 + 2 * M * 4 + masks
    assert theirs.phases["step"].kinds["gradients"] == ours.phases["step"].kinds["gradients"]

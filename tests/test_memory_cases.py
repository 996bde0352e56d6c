"""The memory predictor where a GPU, a window or a copy makes a difference, and what it leaves as it was."""

import functools
import gc

import pytest
import torch
from test_memory import Toy, foreach, tokens, transformers, vram_measure
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels import predict_memory


class Drops(Toy):
    def forward(self, x):
        return nn.functional.dropout(self.a(x), 0.1, self.training).sum()


class Attends(Toy):
    def forward(self, x):
        heads = self.a(x).view(1, 256, 8, 128).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.1).sum()


def test_dropout_on_a_gpu_keeps_a_byte_and_attention_draws_again():
    batch = {"x": torch.zeros(256, 1024)}
    elements = 256 * 1024
    assert predict_memory(Drops, batch, arch=90).replay.saved == elements + 4
    assert predict_memory(Drops, batch, arch=None).replay.saved > elements + 4
    matrix = 8 * 256 * 256 * 4
    assert predict_memory(Attends, batch, arch=90).replay.saved < 3 * 4 * elements + matrix
    assert predict_memory(Attends, batch, arch=None).replay.saved > 2 * matrix


def test_what_is_computed_again_is_as_on_a_gpu_too():
    class Again(Drops):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    assert predict_memory(Again, {"x": torch.zeros(256, 1024)}, arch=90).replay.saved == 4


def test_modules_may_be_copied_while_a_model_is_built():
    def build():
        return nn.Sequential(nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 64, 0.0), 2), nn.Flatten(0))

    found = predict_memory(build, {"input": torch.zeros(4, 2, 64)}, loss=lambda m, b: m(b["input"]).sum(), arch=None)
    assert found.parameters == sum(p.numel() for p in build().parameters())


def test_a_window_that_the_sequence_exceeds_needs_its_mask():
    config = transformers.MistralConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=1000, sliding_window=16, use_cache=False,
    )  # fmt: skip
    build = functools.partial(transformers.AutoModelForCausalLM.from_config, config)
    for length in (8, 64):
        predicted = predict_memory(build, tokens(1, length), optimizer=foreach, arch=None).replay
        model = build().train()
        phases, saved = vram_measure.step(model, tokens(1, length), foreach(model.parameters()))
        assert predicted.saved == saved
        assert predicted.phases["forward"].allocated == phases["forward"].allocated


def test_a_step_that_allocates_nothing_is_a_phase_too():
    sgd = functools.partial(torch.optim.SGD, lr=0.1, foreach=True)
    step = predict_memory(Toy, {"x": torch.zeros(8, 1024)}, optimizer=sgd, arch=None).replay.phases["step"]
    assert step.kinds["gradients"] == 2 * 4 * 1024 * 1024


@pytest.mark.parametrize("arch", [0, 9, 905, "90", (9, 0)])
def test_an_arch_is_a_compute_capability(arch):
    with pytest.raises(ValueError, match="arch is .*; expected a compute capability such as 90"):
        predict_memory(None, {}, arch=arch)  # said before anything is built


def test_garbage_collection_stays_as_it_was():
    gc.disable()
    try:
        predict_memory(Toy, {"x": torch.zeros(8, 1024)})
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("on_gpu", [{"fused": True}, {"foreach": True, "capturable": True}])
@pytest.mark.parametrize("on_host", [{"foreach": True}, {"foreach": False}, {"capturable": False, "fused": False}])
def test_step_counters_are_where_torch_keeps_them(on_gpu, on_host):
    """A block of 512 bytes each where the optimizer is fused or capturable, no memory of a GPU otherwise."""

    def forward(settings, arch):
        make = functools.partial(torch.optim.AdamW, **settings)
        found = predict_memory(Toy, {"x": torch.zeros(8, 1024)}, optimizer=make, arch=arch)
        return found.replay.phases["forward"]

    states = 2 * 2 * 4 * 1024 * 1024
    device, host = forward(on_gpu, 90), forward(on_host, 90)
    assert (device.kinds["optimizer"], host.kinds["optimizer"]) == (states + 2 * 4, states)
    assert device.allocated - host.allocated == 2 * 512
    assert forward(on_host, None).kinds["optimizer"] == states + 2 * 4


def test_a_cpu_s_optimizer_is_not_capturable():
    capturable = functools.partial(torch.optim.AdamW, capturable=True)
    predict_memory(Toy, {"x": torch.zeros(8, 1024)}, optimizer=capturable)
    with pytest.raises(AssertionError, match="If capturable=True, .* supported devices"):
        predict_memory(Toy, {"x": torch.zeros(8, 1024)}, optimizer=capturable, arch=None)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_4_bit_weight_counts_as_the_parameters_that_it_stands_for(double_quant):
    def found(base, double_quant=False):
        def build():
            model = nn.Sequential(nn.Linear(96, 65), nn.ReLU(), nn.Linear(65, 33))
            config = pk.LoraConfig(r=2, target_modules=["0"], base=base, double_quant=double_quant)
            return pk.inject(model, config)

        return predict_memory(build, {"input": torch.zeros(4, 96)}, loss=lambda m, b: m(b["input"]).sum(), arch=None)

    small, dense = found("nf4", double_quant), found(None)
    assert (small.parameters, small.trainable) == (dense.parameters, dense.trainable)
    assert small.trainable == 2 * (96 + 65) and small.parameters == 96 * 65 + 65 + 65 * 33 + 33 + small.trainable

"""inject with base="nf4" and quantize / dequantize, on whole models."""

import copy
import weakref

import pytest
import torch
from lora_layers import randomise
from tiny_models import bert, gpt2, ids, llama, nested, outputs
from torch import nn

import peft_kernels as pk
from peft_kernels.methods import quantise
from peft_kernels.methods.adapters import fused_layers

QLORA = {"base": "nf4", "double_quant": True}


def kinds(model: nn.Module) -> dict[str, str]:
    """Name of a linear -> its class."""
    names = ("Linear", "Conv1D", "NF4Linear", "FusedLoRALinear", "TrainableCopy")
    return {n: type(m).__name__ for n, m in model.named_modules() if type(m).__name__ in names}


def small(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if getattr(m, "quantised", None) is not None}


def with_adapters(build=llama, **settings) -> nn.Module:
    settings = {"target_modules": "all-linear", "r": 3, **QLORA, **settings}
    model = pk.inject(build(), pk.LoraConfig(**settings))
    randomise(nn.ModuleList(part for _, layer in fused_layers(model) for part in (layer.lora_A, layer.lora_B)))
    return model


def assert_same_function(ours: nn.Module, dense: nn.Module) -> None:
    """Two models in fp64 that compute the same sums agree better than one of them does with itself in fp32."""
    tokens = ids()
    expected = outputs(copy.deepcopy(dense).double(), tokens)
    rounding = (outputs(copy.deepcopy(dense).float(), tokens) - expected).abs().max()
    assert (outputs(copy.deepcopy(ours).double(), tokens) - expected).abs().max() < rounding


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "c_attn", "up_proj"]])
def test_every_linear_but_the_head_goes_to_four_bits(build, target_modules):
    model = build().bfloat16()
    if isinstance(target_modules, list):
        target_modules = [n for n in target_modules if any(name.endswith(n) for name, _ in model.named_modules())]
    before = kinds(model)
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    pk.inject(model, pk.LoraConfig(target_modules=target_modules, **QLORA))
    after = kinds(model)
    assert after.keys() == before.keys() and after["lm_head"] == "Linear"
    assert small(model) == set(before) - {"lm_head"}
    adapted = {name for name, kind in after.items() if kind == "FusedLoRALinear"}
    assert adapted == {n for n in small(model) if target_modules == "all-linear" or n.endswith(tuple(target_modules))}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained) and len(trained) == 2 * len(adapted)
    now = dict(model.named_parameters())
    assert all(now[name] is bias for name, bias in biases.items())


@pytest.mark.parametrize("build", [llama, gpt2])
def test_computes_what_the_dequantised_model_does(build):
    model = with_adapters(build)
    dense = pk.dequantize(copy.deepcopy(model))
    assert not small(dense)
    assert_same_function(model, dense)
    model.train()(ids(), labels=ids()).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_" in name), name
    with pk.disable_adapter(model), pk.disable_adapter(dense):
        assert_same_function(model, dense)


@pytest.mark.parametrize("adapted", [True, False])
def test_a_dense_weight_is_free_before_the_next_is_quantised(adapted, monkeypatch):
    model = llama()
    total = sum(isinstance(m, nn.Linear) for m in model.modules()) - 1
    alive = weakref.WeakSet(m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head)
    seen, bars = [], []

    def counted(original):
        def run(*args):
            seen.append(len(alive))
            return original(*args)

        return run

    monkeypatch.setattr(pk.FusedLoRALinear, "quantize_base", counted(pk.FusedLoRALinear.quantize_base))
    monkeypatch.setattr(quantise.NF4Linear, "from_linear", counted(quantise.NF4Linear.from_linear))
    bar = quantise.tqdm
    monkeypatch.setattr(quantise, "tqdm", lambda work, **settings: bars.append(len(work)) or bar(work, **settings))
    if adapted:
        pk.inject(model, pk.LoraConfig(target_modules=["q_proj", "down_proj"], **QLORA))
    else:
        pk.quantize(model)
    assert seen == list(range(total, 0, -1)) and len(alive) == 0
    assert bars == [total]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_seed_draws_the_same_adapters_over_any_base(dtype):
    """In 16 bits, in 4 bits made of it before or now: rounded through its dtype, as HF PEFT does, then fp32."""
    found = []
    for prepare, settings in ((lambda model: model, {}), (lambda model: model, QLORA), (pk.quantize, {})):
        torch.manual_seed(1)
        model = prepare(llama().to(dtype))
        torch.manual_seed(5)
        pk.inject(model, pk.LoraConfig(target_modules="all-linear", **settings))
        found.append([layer.lora_A["default"] for _, layer in fused_layers(model)])
    assert len(found[0]) == 21 and found[0][0].dtype == torch.float32
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_modules_to_save_and_task_heads_stay_dense_and_train():
    model = pk.inject(bert(), pk.LoraConfig(target_modules=["query"], task_type="SEQ_CLS", **QLORA))
    assert kinds(model)["classifier"] == "TrainableCopy" and not any("classifier" in name for name in small(model))
    assert "bert.pooler.dense" in small(model)
    model = pk.inject(llama(), pk.LoraConfig(target_modules=["q_proj"], modules_to_save=["up_proj"], **QLORA))
    assert not any("up_proj" in name for name in small(model))
    assert any("down_proj" in name for name in small(model))


def test_a_weight_that_an_embedding_holds_too_stays():
    model = nested()
    model.append(nn.Embedding(2, 6))
    model[4].weight = model[3].weight
    pk.quantize(model)
    assert "3" not in small(model) and len(small(model)) == 6


def test_a_layer_in_two_places_is_one_layer_still():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    pk.quantize(model)
    assert model[0] is model[2] and isinstance(model[0], pk.NF4Linear)


def test_a_model_that_is_in_four_bits_takes_any_lora_config():
    model = pk.quantize(llama(), blocksize=128)
    pk.inject(model, pk.LoraConfig(target_modules=["q_proj"]))
    assert {layer.quantised.blocksize for _, layer in fused_layers(model)} == {128}
    pk.inject(model, pk.LoraConfig(target_modules=["q_proj"], base="nf4", blocksize=128), "second")
    with pytest.raises(ValueError, match="q_proj is in 4 bits already, with quant_type='nf4', blocksize=128"):
        pk.inject(model, pk.LoraConfig(target_modules=["q_proj"], base="nf4"), "third")
    peft = pytest.importorskip("peft")
    theirs = pk.inject(pk.quantize(llama()), peft.LoraConfig(target_modules=["q_proj"]))
    assert len(fused_layers(theirs)) == 3


def broken(model: nn.Module, name: str) -> nn.Module:
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] = torch.inf
    return model


ERRORS = {
    "a target": (lambda: broken(llama(), "model.layers.1.self_attn.q_proj"), {}, "layers.1.self_attn.q_proj: its we"),
    "another": (
        lambda: broken(llama(), "model.layers.2.mlp.up_proj"),
        {},
        "layers.2.mlp.up_proj: its weight holds NaN",
    ),
    "float64": (lambda: llama().double(), {}, "its weight is torch.float64; expected float16, bfloat16 or float32"),
    "beside": (
        lambda: pk.inject(llama(), pk.LoraConfig(target_modules=["q_proj"])),
        {"adapter_name": "second"},
        "base='nf4' for adapter 'second' beside .'default'.",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_leave_the_model_as_it_was(error):
    build, settings, message = ERRORS[error]
    model = build()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    with pytest.raises(ValueError, match=message):
        pk.inject(model, pk.LoraConfig(target_modules=["q_proj"], **QLORA), **settings)
    assert dict(model.named_modules()) == modules
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert not small(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "int4"}, "base: quant_type is 'int4'"),
        ({"base": "nf4", "blocksize": 48}, "base: blocksize is 48"),
        ({"base": True}, "base is True; expected a string or None"),
        ({"base": "nf4", "double_quant": 1}, "double_quant is 1; expected True or False"),
        ({"double_quant": True}, "blocksize and double_quant are settings of base"),
        ({"blocksize": 32}, "blocksize and double_quant are settings of base"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        pk.LoraConfig(target_modules=["q_proj"], **settings)


def test_merging_is_refused_whole_until_the_base_is_dequantised():
    model = with_adapters()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="model.layers.0.self_attn.q_proj: cannot merge into a 4-bit weight"):
        pk.merge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    pk.dequantize(model)
    unmerged = copy.deepcopy(model)
    pk.merge(model)
    assert_same_function(model.double(), unmerged)


def test_coverage_names_the_kernel_of_every_layer():
    model = with_adapters(target_modules=["q_proj"], lora_dropout=0.1)
    rows = {row.module: row for row in pk.coverage(model)}
    adapted, plain = rows["model.layers.0.self_attn.q_proj"], rows["model.layers.0.mlp.up_proj"]
    assert adapted.path == "nf4 base + default in one call" and adapted.kernel != "torch"
    assert plain.path == "nf4 linear" and plain.kernel != "torch" and "no adapter: not targeted" in plain.reason
    assert "21 of 22 layers run our kernels" in str(pk.coverage(model))
    with pk.disable_adapter(model):
        row = next(row for row in pk.coverage(model) if row.module == adapted.module)
    assert row.path == "nf4 linear" and "adapters disabled" in row.reason
    assert "21 of 22 linear layers run qlora_linear" in str(pk.coverage(with_adapters()))


def test_counts_what_the_four_bits_stand_for():
    expected = pk.trainable_parameters(pk.inject(llama(), pk.LoraConfig(target_modules=["q_proj"])))
    assert pk.trainable_parameters(pk.inject(llama(), pk.LoraConfig(target_modules=["q_proj"], **QLORA))) == expected

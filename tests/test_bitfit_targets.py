"""Which biases BitFitConfig trains: terms, what counts as a bias, and an error that names what is there."""

import copy
import warnings

import pytest
import torch
from bitfit_models import Block, mlp
from tiny_models import bert, llama, transformers
from torch import nn

import peft_kernels as pk


def trains(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def inject(model: nn.Module, *terms: str, **settings) -> set[str]:
    return trains(pk.inject(model, pk.BitFitConfig(target_terms=list(terms) or None, **settings)))


LAYERS = [f"bert.encoder.layer.{i}" for i in (0, 1)]


def test_terms_are_consecutive_parts_of_the_name():
    assert inject(bert(), "query", "intermediate") == {
        f"{layer}.{part}.bias" for layer in LAYERS for part in ("attention.self.query", "intermediate.dense")
    }
    assert inject(bert(), "attention.output", exclude_terms=["LayerNorm"]) == {
        f"{layer}.attention.output.dense.bias" for layer in LAYERS
    }
    assert inject(bert(), "layer.1.output.dense") == {f"{LAYERS[1]}.output.dense.bias"}
    assert inject(bert(), "classifier.bias") == {"classifier.bias"}
    assert inject(bert(), "0") == {name for name in inject(bert()) if name.startswith(LAYERS[0])}
    assert inject(bert()) == {name for name, _ in bert().named_parameters() if name.endswith("bias")}


def test_what_counts_as_a_bias():
    assert inject(Block(), "attention", "recurrent") == {
        *("attention.in_proj_bias", "attention.out_proj.bias", "recurrent.bias_ih_l0", "recurrent.bias_hh_l0")
    }
    model = nn.MultiheadAttention(8, 2, add_bias_kv=True)  # bias_k, bias_v are [1, 1, 8]: tokens, not biases
    model.debias = nn.Parameter(torch.ones(8))
    model.bias_table = nn.Parameter(torch.ones(2, 2))
    model.bias_count = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    assert inject(model) == {"in_proj_bias", "out_proj.bias"}


def test_a_layer_alone_is_a_model_too():
    layer = nn.Linear(3, 4)
    assert inject(layer) == {"bias"} and type(layer) is pk.BiasLinear
    assert [row.module for row in pk.coverage(layer)] == [""]
    pk.delete_adapter(layer, "default")
    assert type(layer) is nn.Linear


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=40, **sizes))


@pytest.mark.parametrize("build_one", [llama, t5], ids=["llama", "t5"])
def test_a_model_without_biases_says_so_and_what_was_looked_for(build_one):
    model = build_one()
    with pytest.raises(
        ValueError, match=r'For\w+ has no biases: .*one-dimensional .* named "bias", "\*_bias" or "bias_\*"'
    ):
        pk.inject(model, pk.BitFitConfig())
    assert all(p.requires_grad for p in model.parameters())


def tied_outside() -> nn.Module:
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "body": nn.Linear(4, 4)})
    model["head"].bias = model["body"].bias
    return model


ERRORS = {
    "missing term": (
        bert,
        {"target_terms": ["query", "qeury"]},
        r"target_terms \['qeury'\] match no .*key.*query",
    ),
    "part of a part": (bert, {"target_terms": ["quer"]}, r"\['quer'\] match no bias"),
    "missing exclusion": (bert, {"exclude_terms": ["pool"]}, r"exclude_terms \['pool'\] match no bias .*pooler"),
    "nothing left": (bert, {"target_terms": ["query"], "exclude_terms": ["self"]}, "exclude_terms .* leave no bias"),
    "missing module": (bert, {"modules_to_save": ["clasifier"]}, r"modules_to_save \['clasifier'\] match no module"),
    "all saved": (lambda: mlp()[:1], {"modules_to_save": ["0"]}, r"has no biases outside modules_to_save \(0\)"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), {}, r"0.bias has no shape yet \(lazy module\)"),
    "tied": (tied_outside, {"modules_to_save": ["head"]}, r"body.bias is the same Parameter as head.bias, .*a copy"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_is_there_and_leave_the_model(case):
    build_one, settings, message = ERRORS[case]
    model = build_one()
    before = repr(model), trains(model), set(vars(model))
    with pytest.raises(ValueError, match=message):
        pk.inject(model, pk.BitFitConfig(**settings))
    assert before == (repr(model), trains(model), set(vars(model)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_terms": "query"}, "target_terms is 'query'; expected a list of terms or None"),
        ({"target_terms": []}, r"target_terms is \[\]; expected terms"),
        ({"target_terms": [3]}, r"target_terms is \[3\]; expected a list"),
        ({"target_terms": ["a", ".b"]}, "target_terms has '.b'; expected parts of a name"),
        ({"exclude_terms": [""]}, "exclude_terms has ''"),
        ({"modules_to_save": "classifier"}, "modules_to_save is 'classifier'; expected a list of names"),
        ({"inference_mode": 1}, "inference_mode is 1; expected True or False"),
        ({"task_type": 5}, "task_type is 5; expected a string"),
        ({"peft_type": "LORA"}, "peft_type is 'LORA'; expected 'BITFIT'"),
        ({"r": 8}, "r=8 is not supported"),
        ([], "the config is a list"),
    ],
    ids=str,
)
def test_bad_configs_name_the_field(settings, message):
    with pytest.raises(ValueError, match=message):
        pk.BitFitConfig.from_dict(settings)


def test_configs_convert_without_loss():
    config = pk.BitFitConfig(("query",), ["LayerNorm"], {"score", "classifier"}, "SEQ_CLS", "name", "main", True)
    assert config.target_terms == ["query"] and config.modules_to_save == ["classifier", "score"]
    assert pk.BitFitConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["peft_type"] == "BITFIT"


def test_it_stands_alone():
    model = pk.inject(bert(), pk.BitFitConfig())
    for config in (pk.BitFitConfig(), pk.LoraConfig(target_modules=["query"])):
        for name in ("default", "second"):
            with pytest.raises(ValueError, match="must be the only adapter|already in this model"):
                pk.inject(model, config, name)
    lora = pk.inject(bert(), pk.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"BitFit adapter 'second' beside \['default'\]: .* must be the only adapter"):
        pk.inject(lora, pk.BitFitConfig(), "second")
    pk.delete_adapter(lora, "default")
    assert "bert.encoder.layer.0.attention.self.query.bias" in inject(lora)
    assert "FusedLoRALinear" in {row.path for row in pk.coverage(lora) if row.kernel == "torch"}.pop()


def test_it_sees_adapters_of_a_part_of_the_model():
    model = nn.Sequential(mlp(), nn.Linear(8, 8))
    pk.inject(model[0], pk.BitFitConfig())
    for config in (pk.BitFitConfig(), pk.LoraConfig(target_modules=["1"])):
        with pytest.raises(ValueError, match="beside 'default', which is BitFit's"):
            pk.inject(model, config, "second")
    model = nn.Sequential(pk.FusedLoRALinear.from_linear(nn.Linear(4, 4), r=2, adapter_name="own"))
    with pytest.raises(ValueError, match=r"beside \['own'\]"):
        pk.inject(model, pk.BitFitConfig())


def test_a_head_that_holds_its_decoders_bias():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, **sizes))
    head = model.cls.predictions
    assert head.bias is head.decoder.bias
    names = inject(model, "decoder")
    assert names == {"cls.predictions.bias"}
    rows = {row.module: row for row in pk.coverage(model)}
    assert rows["cls.predictions.decoder"].path == "bias_grad"
    assert rows["cls.predictions"].reason.endswith("it shares the bias with cls.predictions.decoder")


def test_other_requests_that_are_refused():
    with pytest.raises(ValueError, match="adapter_dtype is torch.float32; BitFit trains the model's own biases"):
        pk.inject(mlp(), pk.BitFitConfig(), adapter_dtype=torch.float32)
    with pytest.raises(ValueError, match="adapter_name is 'a.b'"):
        pk.inject(mlp(), pk.BitFitConfig(), "a.b")
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="is HF PEFT's"):
        pk.inject(wrapped, pk.BitFitConfig())


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def odd_layers() -> nn.Module:
    layers = {"plain": nn.Linear(4, 4), "scaled": Scaled(4, 4), "patched": nn.Linear(4, 4), "conv": nn.Conv1d(4, 4, 1)}
    layers |= {"pruned": nn.utils.spectral_norm(nn.Linear(4, 4)), "named": nn.Linear(4, 4), "legacy": nn.Linear(4, 4)}
    model = nn.ModuleDict(layers)
    model["patched"].forward = lambda x: 3 * x + model["patched"].bias
    model["named"].activation = "linear"
    model["empty"] = nn.Linear(4, 0)
    model["legacy"].register_backward_hook(lambda *_: None)
    return model


def test_layers_that_cannot_change_class_train_through_torch_and_say_why():
    model = pk.inject(odd_layers(), pk.BitFitConfig())
    rows = {row.module: row for row in pk.coverage(model)}
    assert rows["plain"].kernel != "torch" and rows["plain"].path == "bias_grad"
    for name, text in {
        "scaled": "is a subclass of a linear layer",
        "patched": "has a forward of its own",
        "conv": "no kernel here for torch.nn.modules.conv.Conv1d",
        "pruned": "its weight is computed at each call",
        "named": "an attribute `activation`",
        "empty": "it is empty",
        "legacy": "use register_full_backward_hook",
    }.items():
        assert rows[name].kernel == "torch" and text in rows[name].reason, name
    x = torch.randn(3, 4)
    for name, layer in model.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the legacy hook
            layer(x if name != "conv" else x[..., None]).sum().backward()
        assert layer.bias.grad is not None, name
    assert "1 of 8 layers with biases that train run our kernels" in str(pk.coverage(model))
    model["plain"].forward = lambda x: x
    assert "its forward was replaced" in next(iter(pk.coverage(model))).reason


def test_a_copied_config_is_kept_by_name():
    model = pk.inject(mlp(), pk.BitFitConfig(["0"]), "biases")
    assert trains(model) == {"0.bias"}
    twin = copy.deepcopy(model)
    pk.delete_adapter(model, "biases")
    pk.set_adapter(twin, "biases")

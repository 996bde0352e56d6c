"""Which modules a LoraConfig chooses and what trains then: the same as HF PEFT on the same models."""

import copy

import pytest
from tiny_models import bert, gpt2, llama, nested
from torch import nn

import peft_kernels as pk
from peft_kernels.methods.adapters import fused_layers
from peft_kernels.methods.lora_config import LoraConfig
from peft_kernels.methods.targets import resolve

peft = pytest.importorskip("peft")

RESOLUTIONS = [
    (llama, {"target_modules": "all-linear"}),
    (llama, {"target_modules": ["q_proj", "v_proj"]}),
    (llama, {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["1.self_attn.q_proj"]}),
    (llama, {"target_modules": r".*\.1\.self_attn\.(q|k)_proj"}),
    (llama, {"target_modules": ["q_proj", "model.layers.2.mlp.up_proj"], "layers_to_transform": [0, 1]}),
    (llama, {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    (llama, {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": ["h", "layers"]}),
    (llama, {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}),
    (llama, {"target_modules": "all-linear", "exclude_modules": ["up_proj", "model.layers.0.self_attn.q_proj"]}),
    (llama, {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}),
    (llama, {"target_modules": ["lm_head", "down_proj"]}),
    (llama, {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["layers.1"]}),
    (gpt2, {"target_modules": "all-linear"}),
    (gpt2, {"target_modules": ["c_attn", "attn.c_proj"]}),
    (bert, {"target_modules": "all-linear"}),
    (bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    (bert, {"target_modules": ["query", "dense"], "modules_to_save": ["pooler"]}),
    (nested, {"target_modules": ["1.1", "3"]}),
    (nested, {"target_modules": r"(1\.0|2)\.[02]"}),
]


@pytest.mark.parametrize(("build", "settings"), RESOLUTIONS, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_resolves_the_modules_that_peft_does(build, settings):
    model = build()
    ours = resolve(model, LoraConfig(**settings))
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    assert set(ours.targets) == set(wrapped.base_model.targeted_module_names)
    saved = {
        name.removeprefix("base_model.model.")
        for name, module in wrapped.named_modules()
        if type(module).__name__ == "ModulesToSaveWrapper"
    }
    assert set(ours.modules_to_save) == saved
    assert ours.targets


def test_rank_and_alpha_patterns_are_those_of_peft():
    patterns = {
        "rank_pattern": {"q_proj": 3, r"layers\.[01]\.mlp\.up_proj": 5, "layers.2.mlp.up_proj": 6, "k_proj": 7},
        "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 9, "mlp.up_proj": 11.5},
    }
    settings = {"target_modules": ["q_proj", "k_proj", "up_proj"], "r": 2, "lora_alpha": 5, "use_rslora": True}
    model = llama()
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings, **patterns)).base_model.model
    pk.inject(model, LoraConfig(**settings, **patterns))
    layers = fused_layers(model)
    assert len(layers) == 9
    assert len({layer.scaling["default"] for _, layer in layers}) == 5
    for name, layer in layers:
        theirs = wrapped.get_submodule(name)
        assert (layer.specs["default"].r, layer.scaling["default"]) == (theirs.r["default"], theirs.scaling["default"])


def experts() -> nn.Module:
    """Numbers at two depths and names that end alike, as in a mixture of experts."""

    def layer() -> nn.Module:
        blocks = [nn.ModuleDict({"up": nn.Linear(4, 4), "gate_up": nn.Linear(4, 4)}) for _ in range(3)]
        return nn.ModuleDict({"experts": nn.ModuleList(blocks)})

    return nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(layer() for _ in range(2))})})


@pytest.mark.parametrize("layers_pattern", [None, "layers", "experts"])
def test_layers_to_transform_counts_layers_not_experts(layers_pattern):
    settings = {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": layers_pattern}
    ours = resolve(experts(), LoraConfig(**settings)).targets
    wrapped = peft.get_peft_model(experts(), peft.LoraConfig(**settings))
    assert set(ours) == set(wrapped.base_model.targeted_module_names)
    assert len(ours) == (2 if layers_pattern == "experts" else 3)


def test_a_rank_pattern_matches_whole_names():
    config = LoraConfig(target_modules="all-linear", r=2, rank_pattern={"up": 1, "experts.0.gate_up": 3})
    ranks = {}
    for name, layer in fused_layers(pk.inject(experts(), config)):
        ranks.setdefault(name.rpartition(".")[2], []).append(layer.specs["default"].r)
    assert ranks == {"up": [1] * 6, "gate_up": [3, 2, 2] * 2}


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_what_a_config_says_in_vain_is_warned_of(field):
    with pytest.warns(UserWarning, match=f"{field} 'nowhere' matches no targeted module"):
        resolve(experts(), LoraConfig(target_modules=["up"], **{field: {"nowhere": 1}}))
    with pytest.warns(UserWarning, match=r"exclude_modules=\['down'\] excludes nothing"):
        resolve(experts(), LoraConfig(target_modules=["up"], exclude_modules=["down"]))


TRAINING = [
    (llama, {"target_modules": ["q_proj"]}),
    (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    (gpt2, {"target_modules": ["c_attn"], "bias": "lora_only"}),
    (gpt2, {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_f"]}),
    (bert, {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS", "lora_bias": True}),
    (bert, {"target_modules": ["query"], "inference_mode": True}),
]


@pytest.mark.parametrize(("build", "settings"), TRAINING, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_trains_what_peft_trains(build, settings):
    model = build()
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    assert pk.inject(model, peft.LoraConfig(**settings)) is model
    trained, total = wrapped.get_nb_trainable_parameters()
    count = pk.trainable_parameters(model)
    assert count == (trained, total)
    assert f"{trained:,} ||" in str(count)
    theirs = {
        n.removeprefix("base_model.model.").replace("base_layer.", "")
        for n, p in wrapped.named_parameters()
        if p.requires_grad
    }
    ours = {n.replace(".copies.", ".modules_to_save.") for n, p in model.named_parameters() if p.requires_grad}
    theirs = {
        n.replace("lora_B.default.bias", "lora_bias.default").replace("lora_A.default.weight", "lora_A.default")
        for n in theirs
    }
    assert ours == {n.replace("lora_B.default.weight", "lora_B.default") for n in theirs}


def test_all_linear_means_the_linears_even_where_names_are_suffixes_of_others():
    # HF PEFT turns "all-linear" into names, and its "0" then also chooses the Sequential named "1.0": it raises here.
    targets = resolve(nested(), LoraConfig(target_modules="all-linear")).targets
    assert list(targets) == ["0", "1.0.0", "1.0.2", "1.1", "2.0", "2.2", "3"]


BAD = [
    ({"target_modules": None}, r"target_modules is None.*down_proj, gate_proj, k_proj, lm_head"),
    ({"target_modules": ["q_proj", "qproj"]}, r"\['qproj'\] match no module; linear layers .*q_proj"),
    ({"target_modules": "nothing"}, "'nothing' leaves no module"),
    ({"target_modules": ["q_proj"], "layers_to_transform": [9]}, r"layers_to_transform=\[9\] leaves no module"),
    ({"target_modules": ["embed_tokens"]}, "Embedding is neither nn.Linear"),
    ({"target_modules": ["q_proj"], "modules_to_save": ["head2"]}, r"modules_to_save \['head2'\] match no module"),
    ({"target_modules": ["q_proj"], "modules_to_save": ["layers.0", "norm"]}, "which contains it"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=str)
def test_a_failing_inject_changes_nothing(settings, message):
    model = llama()
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        pk.inject(model, LoraConfig(**settings))
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


UNSUPPORTED = [
    {"use_dora": True},
    {"target_parameters": ["experts"]},
    {"layer_replication": [(0, 1)]},
    {"trainable_token_indices": [1]},
    {"alora_invocation_tokens": [1]},
    {"use_qalora": True},
    {"ensure_weight_tying": True},
    {"init_lora_weights": "pissa"},
]


@pytest.mark.parametrize("settings", UNSUPPORTED, ids=str)
def test_peft_settings_that_are_not_implemented_are_named(settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=name):
        LoraConfig.from_peft(peft.LoraConfig(target_modules=["q_proj"], **settings))
    with pytest.raises(ValueError, match=name):
        LoraConfig.from_dict({"peft_type": "LORA", "target_modules": ["q_proj"], name: value})


def test_configs_convert_without_loss():
    settings = {
        "r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.2,
        "target_modules": ["b", "a"],
        "exclude_modules": ["c"],
        "bias": "lora_only",
        "use_rslora": True,
        "rank_pattern": {"a": 2},
        "alpha_pattern": {"b": 7},
        "task_type": "CAUSAL_LM",
        "layers_to_transform": [1],
        "layers_pattern": ["h"],
        "lora_bias": True,
    }
    theirs = LoraConfig.from_peft(peft.LoraConfig(**settings))
    ours = LoraConfig(**{**settings, "target_modules": ["a", "b"]})
    assert theirs == ours
    assert LoraConfig.from_dict(ours.to_dict()) == ours
    assert LoraConfig.from_peft(ours) is ours
    assert peft.LoraConfig(**ours.to_dict()).to_dict()["rank_pattern"] == {"a": 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"new_method_of_2030": {"on": 1}}, "new_method_of_2030"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"r": 0}, "r is 0"),
        ({"rank_pattern": {"a": 0}}, "r is 0"),
        ({"target_modules": "a|b", "layers_to_transform": [1]}, "layers_to_transform needs target_modules as a list"),
        ({"target_modules": ["a"], "layers_pattern": "h"}, "layers_pattern needs layers_to_transform"),
        ([], "the config is a list; expected an object"),
        ({"target_modules": 5}, "target_modules is 5; expected a list of names"),
        ({"target_modules": [5]}, r"target_modules is \[5\]; expected a list of names"),
        ({"target_modules": "("}, r"target_modules '\(' is not a regular expression"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern '\(' is not a regular expression"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]; expected a dict"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; expected a list"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1'; expected an integer"),
        ({"use_rslora": "no"}, "use_rslora is 'no'; expected True or False"),
        ({"task_type": 1}, "task_type is 1; expected a string"),
    ],
    ids=str,
)
def test_bad_configs_name_the_field(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig.from_dict(settings)


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="config is a dict"):
        pk.inject(nn.Sequential(nn.Linear(2, 2)), {"r": 4})

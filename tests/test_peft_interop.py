"""Adapter checkpoints: saved here and read by HF PEFT, saved by HF PEFT and read here, with the same logits."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from lora_layers import randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import bert, gpt2, ids, llama, nested, outputs, train_a_little
from torch import nn

import peft_kernels as pk
from peft_kernels.methods.adapters import fused_layers, trainable_copies

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor"),  # PEFT warns of lora_B.bias, which is 1-D by nature
]

CASES = {
    "llama": (llama, {"target_modules": "all-linear", "r": 3, "lora_alpha": 5}),
    "llama-pattern": (
        llama,
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"1.mlp.up_proj": 3}},
    ),
    "llama-rslora": (llama, {"target_modules": r".*\.(k_proj|down_proj)", "use_rslora": True, "r": 5}),
    "llama-saved": (llama, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"], "lora_bias": True}),
    "gpt2": (gpt2, {"target_modules": "all-linear", "r": 3, "lora_dropout": 0.5}),
    "gpt2-lora-bias": (gpt2, {"target_modules": ["c_attn", "mlp.c_proj"], "lora_bias": True, "use_rslora": True}),
    "gpt2-bias-all": (gpt2, {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_f"]}),
    "gpt2-bias-lora": (gpt2, {"target_modules": ["c_fc"], "bias": "lora_only", "layers_to_transform": [1]}),
    "bert-head": (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all", "lora_bias": True}),
}


def assert_same_logits(ours: nn.Module, theirs: nn.Module, base: nn.Module) -> None:
    """Two fp64 models that compute the same sums agree better than one of them does with itself in fp32."""
    tokens = ids()
    expected = outputs(theirs, tokens)
    rounding = (outputs(copy.deepcopy(theirs).float(), tokens) - expected).abs().max()
    assert (outputs(ours, tokens) - expected).abs().max() < rounding
    # ... while the adapter moves them by far more, so that leaving a part of it out would show.
    assert (outputs(base, tokens) - expected).abs().max() > 1e3 * rounding


@pytest.mark.parametrize("case", CASES)
def test_saved_here_loads_in_peft(case, tmp_path):
    build, settings = CASES[case]
    base = build().double()
    ours = pk.inject(copy.deepcopy(base), pk.LoraConfig(**settings))
    train_a_little(ours)
    pk.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_same_logits(ours, theirs, base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        keys = set(file.keys())
    theirs.save_pretrained(tmp_path / "theirs")
    doubles = (".original_module.", ".modules_to_save.")  # PEFT's extra copies of biases inside modules_to_save
    expected = {key for key in load_file(tmp_path / "theirs" / "adapter_model.safetensors")}
    assert keys == {key for key in expected if not any(double in key for double in doubles)}


@pytest.mark.parametrize("case", CASES)
def test_saved_by_peft_loads_here(case, tmp_path):
    build, settings = CASES[case]
    base = build().double()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path)
    ours = pk.load_adapter(copy.deepcopy(base), tmp_path)
    assert_same_logits(ours, theirs, base)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    trainable = pk.load_adapter(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert pk.trainable_parameters(trainable) == theirs.get_nb_trainable_parameters()
    pk.save_adapter(ours, tmp_path / "again")
    again = pk.load_adapter(copy.deepcopy(base), tmp_path / "again")
    tokens = ids()
    assert torch.equal(outputs(again, tokens), outputs(ours, tokens))


def injected(tmp_path, **settings) -> nn.Module:
    model = pk.inject(gpt2(), pk.LoraConfig(**{"target_modules": ["c_attn"], "r": 2, **settings}))
    train_a_little(model)
    pk.save_adapter(model, tmp_path)
    return model


def test_loads_over_an_adapter_and_beside_one(tmp_path):
    model, tokens = injected(tmp_path, lora_alpha=6), ids()
    expected = outputs(model, tokens)
    train_a_little(model)
    lora_a = fused_layers(model)[0][1].lora_A["default"]
    assert not torch.equal(outputs(model, tokens), expected)
    pk.load_adapter(model, tmp_path, is_trainable=True)
    assert torch.equal(outputs(model, tokens), expected)
    assert fused_layers(model)[0][1].lora_A["default"] is lora_a  # in place: optimizers keep their Parameters
    pk.load_adapter(model, tmp_path, "second")
    randomise(nn.ModuleList(layer.lora_B for _, layer in fused_layers(model)))
    pk.load_adapter(model, tmp_path, "second")
    assert not torch.equal(outputs(model, tokens), expected)
    pk.set_adapter(model, "second")
    assert torch.equal(outputs(model, tokens), expected)


def test_a_file_brings_its_own_alpha(tmp_path):
    model, tokens = injected(tmp_path, lora_alpha=6), ids()
    expected = outputs(model, tokens)
    other = pk.inject(gpt2(), pk.LoraConfig(target_modules=["c_attn"], r=2, lora_alpha=40))
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k}, strict=False)
    pk.load_adapter(other, tmp_path)
    assert torch.equal(outputs(other, tokens), expected)


def test_all_linear_is_saved_as_exactly_the_modules_it_chose(tmp_path):
    model = nested().double()
    ours = pk.inject(copy.deepcopy(model), pk.LoraConfig(target_modules="all-linear", r=2))
    train_a_little(ours)
    pk.save_adapter(ours, tmp_path)
    x = torch.randn(3, 6, dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    again = pk.load_adapter(copy.deepcopy(model), tmp_path)
    assert torch.equal(again(x), ours(x))
    single = (copy.deepcopy(theirs).float()(x.float()) - theirs(x)).abs().max()
    assert (theirs(x) - ours(x)).abs().max() < single


def rewrite(path, change) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


FIRST = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
LAST = "base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"


def damage(tensors) -> None:
    del tensors[FIRST]
    tensors[LAST] = torch.ones(48, 3)
    tensors["base_model.model.transformer.wte.lora_embedding_A"] = torch.ones(1)


@pytest.mark.parametrize("present", [False, True])
def test_a_file_that_does_not_fit_loads_nothing_and_lists_every_problem(present, tmp_path):
    model = injected(tmp_path)
    rewrite(tmp_path, damage)
    target = model if present else gpt2()
    before = {name: (id(p), p.clone(), p.requires_grad) for name, p in target.named_parameters()}
    with pytest.raises(ValueError) as error:
        pk.load_adapter(target, tmp_path)
    for text in (f"missing key {FIRST}", f"{LAST} has shape [48, 3], expected [48, 2]", "lora_embedding_A"):
        assert text in str(error.value)
    assert before.keys() == {name for name, _ in target.named_parameters()}
    for name, parameter in target.named_parameters():
        identity, value, requires_grad = before[name]
        assert id(parameter) == identity
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == requires_grad


def test_missing_files_and_unsupported_configs_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        pk.load_adapter(gpt2(), tmp_path / "nowhere")
    injected(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True}))
    model = gpt2()
    with pytest.raises(ValueError, match="use_dora=True is not supported"):
        pk.load_adapter(model, tmp_path)
    assert not fused_layers(model)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only safetensors is read\); found: .*adapter_model.bin"):
        pk.load_adapter(model, tmp_path)


def test_saving_says_what_it_cannot_save(tmp_path):
    model = pk.inject(gpt2(), pk.LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(ValueError, match=r"no adapter 'other'.*\['default'\]"):
        pk.save_adapter(model, tmp_path, "other")
    fused_layers(model)[0][1].set_scale("default", 2.0)
    with pytest.raises(ValueError, match="h.0.attn.c_attn: set_scale changed"):
        pk.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    model = injected(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train_a_little(model)

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("peft_kernels.interop.files.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        pk.save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".tmp"} == before


def test_without_safetensors_the_package_imports_and_saving_names_the_package():
    code = (
        "import sys; sys.modules['safetensors'] = None; import peft_kernels as pk\n"
        "assert 'transformers' not in sys.modules and 'peft' not in sys.modules\n"
        "assert hasattr(pk, 'inject') and not hasattr(pk, 'nothing')\n"
        "try: pk.save_adapter\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "peft_kernels.save_adapter needs safetensors: pip install safetensors"


def test_copies_of_saved_modules_keep_the_original_apart(tmp_path):
    model = pk.inject(gpt2(), pk.LoraConfig(target_modules=["c_attn"], modules_to_save=["ln_f"]))
    train_a_little(model)
    ((name, wrapper),) = trainable_copies(model)
    assert name == "transformer.ln_f"
    assert not torch.equal(wrapper.copies["default"].weight, wrapper.original.weight)
    pk.save_adapter(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.transformer.ln_f.weight"], wrapper.copies["default"].weight)

"""Models that HF accelerate dispatched by a device_map: its hooks move, offloaded weights are refused by name."""

import copy

import pytest
import torch
from lora_layers import K, N, randomise
from tiny_models import gpt2, ids, llama
from torch import nn

import peft_kernels as pk
from peft_kernels.methods.adapters import fused_layers

accelerate = pytest.importorskip("accelerate", reason="needs HF accelerate: pip install accelerate")
hooks = pytest.importorskip("accelerate.hooks")

LINEARS = pk.LoraConfig(target_modules="all-linear", r=2)


def dispatched(model: nn.Module, device: str) -> nn.Module:
    """As from_pretrained(device_map=...) leaves a model whose parts all have a device."""
    device_map = {name: device for name, _ in model.named_children()}
    return accelerate.dispatch_model(model, device_map, main_device=device, force_hooks=True)


def fresh(build, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return build().double().to(device).eval()


@pytest.fixture
def calls(monkeypatch) -> list[nn.Module]:
    """The modules that an AlignDevicesHook runs before."""
    found, original = [], hooks.AlignDevicesHook.pre_forward

    def recorded(self, module, *args, **kwargs):
        found.append(module)
        return original(self, module, *args, **kwargs)

    monkeypatch.setattr(hooks.AlignDevicesHook, "pre_forward", recorded)
    return found


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_dispatched_model_trains_as_one_that_is_not(build, device, calls):
    plain, model, tokens = fresh(build, device), dispatched(fresh(build, device), device), ids()
    linears = {name: (module, module._hf_hook) for name, module in model.named_modules() if hasattr(module, "weight")}
    for one in (plain, model):
        torch.manual_seed(1)
        pk.inject(one, LINEARS)
        randomise(nn.ModuleList(layer.lora_B for _, layer in fused_layers(one)))
    layers = dict(fused_layers(model))
    for name, layer in layers.items():
        linear, hook = linears[name]
        assert layer._hf_hook is hook
        assert layer.weight is linear.weight
        assert not {"_hf_hook", "_old_forward", "forward"} & vars(linear).keys()
    y, expected = model(tokens).logits, plain(tokens.to(device)).logits  # the hooks move the tokens
    assert set(layers.values()) <= set(calls)
    assert torch.equal(y.to(device), expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for (name, found), (_, wanted) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (found.grad is None) == (wanted.grad is None) == ("lora_" not in name), name
        assert found.grad is None or torch.equal(found.grad, wanted.grad), name
    hooks.remove_hook_from_submodules(model)
    calls.clear()
    assert torch.equal(model(tokens.to(device)).logits, expected)
    assert not calls


def test_one_layer_moves_its_input(device, calls):
    linear, seen = nn.Linear(K, N), []
    hooks.add_hook_to_module(linear, hooks.AlignDevicesHook(device, io_same_device=True))
    hooks.add_hook_to_module(linear, hooks.AlignDevicesHook(device), append=True)
    handle = linear.register_forward_hook(lambda module, *_: seen.append(module))
    layer = pk.FusedLoRALinear.from_linear(linear, r=2)
    assert layer.lora_A["default"].device.type == device
    y = layer(torch.randn(3, K))
    assert y.device.type == "cpu"
    assert calls == [layer, layer]
    twin = copy.deepcopy(layer)
    calls.clear()
    twin(torch.randn(3, K))
    assert calls == [twin, twin]
    handle.remove()
    layer(torch.randn(3, K))
    assert len(seen) == 2
    assert linear(torch.randn(3, K, device=device)).shape == (3, N)
    assert pk.FusedLoRALinear.from_linear(linear, r=2).weight is linear.weight


def test_tied_weights_stay_tied(device):
    model = dispatched(fresh(lambda: llama(tie_word_embeddings=True), device), device)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    pk.inject(model, pk.LoraConfig(target_modules=["lm_head", "q_proj"], r=2))
    assert isinstance(model.lm_head, pk.FusedLoRALinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model(ids())


def test_modules_to_save_of_a_dispatched_model_train(device):
    model = dispatched(fresh(llama, device), device)
    pk.inject(model, pk.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"]))
    model(ids()).logits.sum().backward()
    assert model.lm_head.copies["default"].weight.grad is not None
    assert model.lm_head.original.weight.grad is None


def test_a_weight_that_is_nowhere_is_refused(device):
    linear = nn.Linear(K, N)
    hooks.add_hook_to_module(linear, hooks.AlignDevicesHook(device))
    linear.to("meta")
    with pytest.raises(ValueError, match="accelerate offloads its weights, which are on no device"):
        pk.FusedLoRALinear.from_linear(linear, r=2)
    assert linear._hf_hook is not None


def half_offloaded(device: str, **settings) -> nn.Module:
    """gpt2 with its second block in host memory, brought to the device at each call."""
    model = fresh(gpt2, device)
    block = model.transformer.h[1]
    accelerate.cpu_offload(block, torch.device(device), **settings)
    assert {parameter.device.type for parameter in block.parameters()} == {"meta"}
    return model


REFUSED = [
    ({"target_modules": ["c_attn"]}, r"transformer\.h\.1\.attn\.c_attn: accelerate offloads its weights"),
    ({"target_modules": "all-linear"}, r"h\.1\.attn\.c_attn, .*h\.1\.mlp\.c_proj: accelerate .*device_map.*exclude"),
    ({"target_modules": r".*h\.0.*c_attn", "modules_to_save": ["h.1.ln_1"]}, r"modules_to_save chooses .*h\.1\.ln_1: "),
    ({"target_modules": r".*h\.0.*c_attn", "bias": "all"}, r"bias='all' trains the bias of transformer\.h\.1\.ln_1: "),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["by layer", "by block"])
def test_offloaded_layers_are_refused_by_name(settings, message, whole, device):
    model = half_offloaded(device, preload_module_classes=["GPT2Block"] if whole else None)
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        pk.inject(model, pk.LoraConfig(**settings))
    assert {name: id(module) for name, module in model.named_modules()} == before
    model(ids().to(device))


def test_what_is_not_offloaded_can_still_be_adapted(device):
    model = half_offloaded(device)
    pk.inject(model, pk.LoraConfig(target_modules="all-linear", r=2, exclude_modules=r".*h\.1\..*"))
    assert len(fused_layers(model)) == 4
    model(ids().to(device)).logits.sum().backward()
    assert fused_layers(model)[0][1].lora_B["default"].grad.any()


class OtherHook(hooks.ModelHook):
    pass


def test_other_hooks_of_accelerate_and_forwards_put_over_it_are_refused():
    for hook, message in (
        (OtherHook(), "hook OtherHook on it"),
        (hooks.AlignDevicesHook("cpu", offload=True), "offloads its weights"),
        (hooks.SequentialHook(hooks.AlignDevicesHook("cpu"), OtherHook()), "hook OtherHook on it"),
    ):
        linear = hooks.add_hook_to_module(nn.Linear(K, N), hook)
        with pytest.raises(ValueError, match=message):
            pk.FusedLoRALinear.from_linear(linear)
        assert linear._hf_hook is hook
    linear = hooks.add_hook_to_module(nn.Linear(K, N), hooks.AlignDevicesHook("cpu"))
    linear.forward = torch.relu
    with pytest.raises(ValueError, match="has a forward of its own"):
        pk.FusedLoRALinear.from_linear(linear)
    linear = nn.Linear(K, N)
    linear.forward = torch.relu
    hooks.add_hook_to_module(linear, hooks.AlignDevicesHook("cpu"))
    with pytest.raises(ValueError, match="has a forward of its own"):
        pk.FusedLoRALinear.from_linear(linear)

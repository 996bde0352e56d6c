"""accelerate: a model wrapped by HF PEFT gives the same numbers through our op, and stays HF PEFT's in all else."""

import copy
import pickle

import pytest
import torch
from tiny_models import bert, gpt2, ids, llama
from torch import nn

import peft_kernels as pk

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:`lora_bias")


def wrapped(build, **settings) -> nn.Module:
    model = peft.get_peft_model(build().double(), peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def loss_and_gradients(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = model(tokens).logits
    logits.square().mean().backward()
    return {"logits": logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


CASES = [
    (llama, {"target_modules": "all-linear", "use_rslora": True}),
    (gpt2, {"target_modules": "all-linear", "lora_bias": True, "bias": "lora_only"}),
    (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
]


@pytest.mark.parametrize(("build", "settings"), CASES, ids=["llama", "gpt2", "bert"])
@pytest.mark.parametrize("adapters", [1, 2])
def test_same_numbers_gradients_and_state_dict(build, settings, adapters):
    theirs, tokens = wrapped(build, **settings).eval(), ids()
    if adapters == 2:
        if settings.get("bias"):
            settings = {**settings, "bias": "none"}
        theirs.add_adapter("second", peft.LoraConfig(**{**settings, "r": 2, "init_lora_weights": False}))
        theirs.base_model.set_adapter(["default", "second"] if build is not bert else ["default"])
    ours = copy.deepcopy(theirs)
    assert pk.accelerate(ours) is ours
    assert pk.accelerate(ours) is ours
    assert list(ours.state_dict()) == list(theirs.state_dict())
    found, expected = loss_and_gradients(ours, tokens), loss_and_gradients(theirs, tokens)
    rounding = loss_and_gradients(copy.deepcopy(theirs).float(), tokens)
    assert found.keys() == expected.keys() == rounding.keys()
    for name, value in expected.items():
        # Another order of the same fp64 sums: nearer than the same order in fp32.
        assert (found[name] - value).abs().max() < (rounding[name] - value).abs().max(), name


@pytest.fixture
def op_calls(monkeypatch) -> list:
    calls, original = [], torch.ops.peft_kernels.lora_linear_fwd.default
    monkeypatch.setattr(
        "peft_kernels.kernels.lora_linear.op.lora_linear_fwd", lambda *args: calls.append(1) or original(*args)
    )
    return calls


def test_our_op_really_runs(op_calls):
    model = pk.accelerate(wrapped(llama, target_modules="all-linear"))
    model(ids())
    assert len(op_calls) == 21
    rows = pk.coverage(model)
    assert sum(row.kernel != "torch" for row in rows) == 21
    assert {row.reason for row in rows if row.kernel == "torch"} == {"not targeted"}


def test_dropout_disabling_merging_and_saving_stay_those_of_peft(tmp_path):
    theirs = wrapped(gpt2, target_modules=["c_attn"], lora_dropout=0.5)
    ours, tokens = pk.accelerate(copy.deepcopy(theirs)), ids()
    ours.train()
    assert not torch.equal(ours(tokens).logits, ours(tokens).logits)
    ours.eval(), theirs.eval()
    for model in (ours, theirs):
        model.merge_adapter()
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    for model in (ours, theirs):
        model.unmerge_adapter()
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    adapter_names = ["default", "__base__"]
    assert torch.equal(
        ours(input_ids=tokens, adapter_names=adapter_names).logits,
        theirs(input_ids=tokens, adapter_names=adapter_names).logits,
    )
    twin = pickle.loads(pickle.dumps(ours.base_model.model.transformer.h[0].attn.c_attn))
    assert type(twin).__name__ == "FusedPeftLinear"
    ours.save_pretrained(tmp_path)
    again = pk.load_adapter(gpt2().double(), tmp_path)
    assert [row.module for row in pk.coverage(again) if row.kernel != "torch"]


def test_what_it_does_not_do_is_left_to_peft_and_said():
    theirs = wrapped(llama, target_modules=["q_proj"], use_dora=True).eval()
    ours, tokens = copy.deepcopy(theirs), ids()
    pk.accelerate(ours)
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    reasons = [row.reason for row in pk.coverage(ours) if row.module.endswith("q_proj")]
    assert reasons == ["adapter default is a DoraLinearVariant"] * 3
    with pytest.raises(
        ValueError, match=r"embed_tokens: peft\.tuners\.lora\.layer\.Embedding is not peft's lora\.Linear"
    ):
        pk.accelerate(wrapped(llama, target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="no HF PEFT layer"):
        pk.accelerate(llama())


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
def test_hooks_registered_later_on_a_part_fire(part):
    model, tokens = pk.accelerate(wrapped(llama, target_modules=["q_proj"]).eval()), ids()
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    before, fired = model(tokens).logits, []
    handle = model.get_submodule(f"{name}.{part}").register_forward_hook(lambda *_: fired.append(part))
    model(tokens)
    assert fired == [part]
    reasons = {row.module: row.reason for row in pk.coverage(model) if row.path == "HF PEFT"}
    assert reasons == {name: f"{part} has forward or backward hooks"}
    handle.remove()
    assert torch.equal(model(tokens).logits, before)
    assert fired == [part]


Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj"


def fp32_error(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """What fp32 would be off by: another order of the same fp64 sums is nearer."""
    return (copy.deepcopy(model).float()(tokens).logits - model(tokens).logits).abs().max()


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
def test_hooks_registered_before_on_a_part_fire_and_without_them_the_kernels_run(part):
    model, tokens, fired = wrapped(llama, target_modules=["q_proj"]).eval(), ids(), []
    expected, rounding = model(tokens).logits, fp32_error(model, tokens)
    handle = model.get_submodule(f"{Q_PROJ}.{part}").register_forward_hook(lambda *_: fired.append(part))
    pk.accelerate(model)
    assert (model(tokens).logits - expected).abs().max() < rounding
    assert fired == [part]
    assert {row.module for row in pk.coverage(model) if row.path == "HF PEFT"} == {Q_PROJ}
    handle.remove()
    assert (model(tokens).logits - expected).abs().max() < rounding
    assert fired == [part]
    assert not [row for row in pk.coverage(model) if row.path == "HF PEFT"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_hooks_on_the_peft_layer_itself_leave_it_on_the_kernels(moment):
    model, tokens, fired = wrapped(llama, target_modules=["q_proj"]).eval(), ids(), []
    layer = model.get_submodule(Q_PROJ)
    if moment == "after":
        pk.accelerate(model)
    handle = layer.register_forward_hook(lambda module, args, y: fired.append(module) or 0 * y)
    pk.accelerate(model)
    assert not layer(torch.ones(16, dtype=torch.float64)).any()
    model(tokens)
    assert fired == [layer, layer]
    assert all(row.path != "HF PEFT" for row in pk.coverage(model))
    handle.remove()
    assert layer(torch.ones(16, dtype=torch.float64)).any()


@pytest.mark.parametrize("order", ["dispatched, then wrapped", "wrapped, then dispatched"])
def test_a_dispatched_model_runs_the_kernels(order, op_calls, device):
    hf = pytest.importorskip("accelerate", reason="needs HF accelerate: pip install accelerate")

    def dispatch(model: nn.Module) -> nn.Module:
        device_map = {name: device for name, _ in model.named_children()}
        return hf.dispatch_model(model, device_map, main_device=device, force_hooks=True)

    if order.startswith("dispatched"):
        model = wrapped(lambda: dispatch(llama()), target_modules=["q_proj"])
    else:
        model = dispatch(wrapped(llama, target_modules=["q_proj"]))
    tokens = ids().to(device)
    expected, rounding = loss_and_gradients(model, tokens), loss_and_gradients(copy.deepcopy(model).float(), tokens)
    layer = model.get_submodule(Q_PROJ)
    pk.accelerate(model)
    ran, hook = [], layer.base_layer._hf_hook
    pre_forward = hook.pre_forward
    hook.pre_forward = lambda module, *args, **kwargs: ran.append(module) or pre_forward(module, *args, **kwargs)
    found = loss_and_gradients(model, tokens)
    assert len(op_calls) == 3
    assert ran == [layer.base_layer]
    assert not [row for row in pk.coverage(model) if row.path == "HF PEFT"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < (rounding[name] - value).abs().max(), name


def test_a_part_that_accelerate_offloads_is_left_to_peft():
    hf = pytest.importorskip("accelerate", reason="needs HF accelerate: pip install accelerate")
    model, tokens = wrapped(llama, target_modules=["q_proj"]).eval(), ids()
    expected, rounding = model(tokens).logits, fp32_error(model, tokens)
    hf.cpu_offload(model.get_submodule(Q_PROJ).base_layer, torch.device("cpu"))
    pk.accelerate(model)
    assert type(model.get_submodule(Q_PROJ)).__name__ == "Linear"
    hf.cpu_offload(model.get_submodule(Q_PROJ.replace("1", "2")).base_layer, torch.device("cpu"))
    reasons = {row.module: row.reason for row in pk.coverage(model) if row.path == "HF PEFT"}
    assert reasons.keys() == {Q_PROJ, Q_PROJ.replace("1", "2")}
    assert "base_layer must be called: accelerate offloads its weights" in reasons[Q_PROJ.replace("1", "2")]
    assert (model(tokens).logits - expected).abs().max() < rounding
    model = wrapped(llama, target_modules=["layers.1.self_attn.q_proj"])
    hf.cpu_offload(model.get_submodule(Q_PROJ).base_layer, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj: base_layer: accelerate offloads its weights"):
        pk.accelerate(model)


def test_a_forward_that_was_replaced_goes_on_running():
    model = wrapped(llama, target_modules=["q_proj"]).eval()
    layer = model.get_submodule(Q_PROJ)
    layer.forward = torch.relu
    pk.accelerate(model)
    assert type(layer).__name__ == "Linear"
    other = model.get_submodule(Q_PROJ.replace("1", "2"))
    other.base_layer.forward = torch.zeros_like
    reasons = {row.module: row.reason for row in pk.coverage(model) if row.path == "HF PEFT"}
    assert reasons[Q_PROJ.replace("1", "2")] == "base_layer has a forward of its own"

"""BitFit in models that HF accelerate dispatched by a device_map, or FSDP2 sharded."""

import copy
import os

import pytest
import torch
from bitfit_models import batch, build, gradients, kinds, mlp, output
from tiny_models import gpt2, ids, train_a_little
from torch import nn

import peft_kernels as pk

accelerate = pytest.importorskip("accelerate", reason="needs HF accelerate: pip install accelerate")
hooks = pytest.importorskip("accelerate.hooks")


def own_hooks(model: nn.Module) -> dict:
    return {name: module._hf_hook for name, module in model.named_modules() if hasattr(module, "_hf_hook")}


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_dispatched_model_trains_as_one_that_is_not(name):
    plain, model = build(name), build(name)
    device_map = {child: "cpu" for child, _ in model.named_children()}
    accelerate.dispatch_model(model, device_map, main_device="cpu", force_hooks=True)
    former, own = kinds(model), own_hooks(model)
    base = output(model, batch(name)).detach()
    for one in (plain, model):
        pk.inject(one, pk.BitFitConfig())
        torch.manual_seed(2)
        train_a_little(one)
    assert [row.kernel for row in pk.coverage(model)] == [row.kernel for row in pk.coverage(plain)]
    assert kinds(model) == kinds(plain) != former
    found, expected = gradients(model, batch(name)), gradients(plain, batch(name))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    with pk.disable_adapter(model):
        assert torch.equal(output(model, batch(name)), base)
    pk.delete_adapter(model, "default")
    assert kinds(model) == former and torch.equal(output(model, batch(name)), base)
    assert own_hooks(model) == own


def test_what_dispatch_sets_on_the_place_of_an_activation_stays_there():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    x = torch.randn(3, 8)
    expected = model(x)
    pk.inject(model, pk.BitFitConfig())
    accelerate.dispatch_model(model, {"0": "cpu", "1": "cpu", "2": "cpu"}, main_device="cpu", force_hooks=True)
    pk.delete_adapter(model, "default")
    torch.testing.assert_close(model(x), expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert type(model[1]) is nn.GELU
    torch.testing.assert_close(model(x), expected)


def test_the_hook_runs_around_the_new_forward():
    """An instance's own forward, which accelerate sets, must not go on running the old class's."""
    layer, seen = nn.Linear(4, 4), []

    class Watching(hooks.AlignDevicesHook):
        def post_forward(self, module, output):
            seen.append(type(output.grad_fn).__name__)
            return super().post_forward(module, output)

    Watching.__module__, Watching.__name__ = "accelerate.hooks", "AlignDevicesHook"
    model = nn.Sequential(hooks.add_hook_to_module(layer, Watching("cpu")))
    model(torch.randn(2, 4))
    pk.inject(model, pk.BitFitConfig())
    model(torch.randn(2, 4))
    hooks.remove_hook_from_module(layer)
    assert seen == ["AddmmBackward0", "_BiasLinearBackward"] and type(layer) is pk.BiasLinear
    assert model(torch.randn(2, 4)).grad_fn.name().startswith("_BiasLinear")


@pytest.mark.parametrize("whole", [False, True], ids=["by layer", "by block"])
def test_offloaded_biases_are_refused_by_name(whole):
    model = gpt2()
    block = model.transformer.h[1]
    accelerate.cpu_offload(block, torch.device("cpu"), preload_module_classes=["GPT2Block"] if whole else None)
    former = kinds(model)
    with pytest.raises(ValueError, match=r"BitFit trains a bias of transformer\.h\.1\.ln_1: accelerate offloads"):
        pk.inject(model, pk.BitFitConfig())
    assert kinds(model) == former
    pk.inject(model, pk.BitFitConfig(exclude_terms=["h.1"]))
    model(ids()).logits.sum().backward()


def test_a_hook_that_may_do_anything_keeps_the_class():
    class Other(hooks.ModelHook):
        pass

    model = nn.Sequential(hooks.add_hook_to_module(nn.Linear(4, 4), Other()))
    pk.inject(model, pk.BitFitConfig())
    (row,) = pk.coverage(model)
    assert type(model[0]) is nn.Linear and row.kernel == "torch" and "hook Other on it" in row.reason


@pytest.fixture
def one_rank(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # of Torch's distributed parts, about themselves
def test_sharded_by_fsdp_after_inject(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base = mlp().requires_grad_(False)
    x = torch.randn(5, 8)
    start = output(base, x)
    model, plain = (pk.inject(copy.deepcopy(base), pk.BitFitConfig()) for _ in range(2))
    mesh = init_device_mesh("cpu", (1,))
    for layer in (model[0], model):
        fully_shard(layer, mesh=mesh)
    found, wanted = gradients(model, x), gradients(plain, x)
    for name, value in wanted.items():
        got = found[name]
        assert torch.equal(got.full_tensor() if hasattr(got, "full_tensor") else got, value), name
    former = kinds(model)
    assert type(model[0]).__name__ == "FSDPBiasLinear" and model[0].activation == "gelu"
    with torch.no_grad():
        adapted = output(model, x)
        for bias in (p for name, p in model.named_parameters() if p.requires_grad):
            bias.add_(1.0)
        assert not torch.equal(output(model, x), adapted)
        for _ in range(2):
            with pk.disable_adapter(model):
                torch.testing.assert_close(output(model, x), start)
                assert type(model[1]) is nn.GELU
            assert kinds(model) == former
    pk.delete_adapter(model, "default")
    torch.testing.assert_close(output(model, x), start)

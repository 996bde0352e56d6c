"""BitFit on whole models: losses, gradients and steps are Torch's with the same requires_grad; hooks, compile."""

import copy

import pytest
import torch
from bitfit_models import BUILD, assert_as_torch, batch, build, gradients, loss, mlp, output, plain_twin
from tiny_models import train_a_little
from torch import nn

import peft_kernels as pk

ALL = pk.BitFitConfig()


def bias_names(model: nn.Module) -> set[str]:
    """Told apart from the package's own rule: by shape and by Torch's names for them."""
    owned = ("bias", "in_proj_bias", "bias_ih_l0", "bias_hh_l0")
    return {name for name, p in model.named_parameters() if name.rpartition(".")[2] in owned and p.dim() == 1}


@pytest.mark.parametrize("name", BUILD)
def test_loss_and_every_gradient_are_torchs(name, device):
    base, x = build(name).to(device), batch(name)
    plain = plain_twin(base, bias_names(base))
    model = pk.inject(copy.deepcopy(base), ALL)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == bias_names(base)
    exact = gradients(plain, x)
    assert exact.keys() - {"loss"} == bias_names(base)
    assert_as_torch(gradients(model, x), exact, gradients(copy.deepcopy(plain).float(), x))
    with torch.no_grad():  # nn.TransformerEncoderLayer reads its layers' weights then
        torch.testing.assert_close(output(model, x), output(plain, x))


@pytest.mark.parametrize("name", ["bert", "gpt2", "block"])
def test_a_few_steps_are_torchs(name):
    base, x = build(name), batch(name)
    plain = plain_twin(base, bias_names(base))
    single, model = copy.deepcopy(plain).float(), pk.inject(copy.deepcopy(base), ALL)
    trained = []
    for one in (model, plain, single):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.05, eps=1e-3)
        for _ in range(4):
            optimizer.zero_grad()
            loss(one, x).backward()
            optimizer.step()
        trained.append({n: p.detach() for n, p in one.named_parameters() if n in bias_names(base)})
    assert_as_torch(*trained)
    for n, parameter in base.named_parameters():
        moved = not torch.equal(model.get_parameter(n), parameter)
        assert moved == (n in bias_names(base)), n


@pytest.mark.parametrize("name", ["bert", "gpt2", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_trains(name, dtype, device):
    model = pk.inject(build(name).to(device, dtype).train(), ALL)
    x = batch(name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first = output(model, x).float().square().mean()
    for _ in range(5):
        optimizer.zero_grad()
        value = output(model, x).float().square().mean()
        value.backward()
        optimizer.step()
    assert all(p.dtype == dtype for p in model.parameters())
    assert output(model.eval(), x).float().square().mean() < first


def test_modules_to_save_train_a_copy_whole_and_their_biases_only_there():
    base, x = build("bert"), batch("bert")
    model = pk.inject(copy.deepcopy(base), pk.BitFitConfig(task_type="SEQ_CLS"))
    head = model.classifier
    gradients(model, x)
    assert head.original.bias.grad is None and not head.original.bias.requires_grad
    assert head.copies["default"].weight.grad.any() and head.copies["default"].bias.grad.any()
    by_name = pk.inject(copy.deepcopy(base), pk.BitFitConfig(modules_to_save=["classifier"]))
    assert pk.trainable_parameters(by_name) == pk.trainable_parameters(model)
    biases = sum(base.get_parameter(n).numel() for n in bias_names(base) if "classifier" not in n)
    assert pk.trainable_parameters(model).trainable == biases + base.classifier.weight.numel() + 2


def test_layers_stay_themselves_with_their_hooks_modes_and_places():
    base = build("block")
    before = {name: id(module) for name, module in base.named_modules()}
    parameters = {name: id(p) for name, p in base.named_parameters()}
    seen, modes = [], {name: module.training for name, module in base.named_modules()}
    handle = base.norm.register_forward_hook(lambda module, args, y: seen.append(module))
    base.mlp[2].register_full_backward_hook(lambda module, dx, dy: seen.append(module))
    model = pk.inject(base, ALL)
    assert isinstance(model.mlp[0], pk.BiasLinear) and isinstance(model.norm, pk.FusedLayerNorm)
    found = {name: id(module) for name, module in model.named_modules()}
    assert {name for name in before if found[name] != before[name]} == {"mlp.1"}
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert {name: module.training for name, module in model.named_modules()} == modes
    gradients(model, batch("block"))
    assert seen == [model.norm, model.norm, model.mlp[2]]
    handle.remove()
    pk.delete_adapter(model, "default")
    assert {name: id(module) for name, module in model.named_modules()} == before
    gradients(model.requires_grad_(True), batch("block"))
    assert len(seen) == 4


def test_modules_that_stand_at_two_places_and_tied_biases():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.GELU(), shared, nn.Linear(8, 8)).double()
    model[3].bias = shared.bias
    base, x = copy.deepcopy(model), torch.randn(3, 8, dtype=torch.float64)
    pk.inject(model, ALL)
    assert type(model[0]) is pk.BiasLinear and model[0] is model[2] and model[3].bias is model[0].bias
    assert model[0].activation is None and type(model[1]) is nn.GELU
    plain = plain_twin(base, {"0.bias"})
    assert_as_torch(gradients(model, x), gradients(plain, x), gradients(copy.deepcopy(plain).float(), x))
    assert pk.trainable_parameters(model).trainable == 8


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_activation_checkpointing_changes_nothing(name, reentrant):
    model, x = pk.inject(build(name), ALL), batch(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = gradients(model.train(), x)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model, x)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_compiled_and_disabled_in_between():
    base, x = mlp().double(), torch.randn(5, 8, dtype=torch.float64)
    model = pk.inject(copy.deepcopy(base), ALL)
    train_a_little(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = gradients(model, x)
    for _ in range(2):
        found = {name.removeprefix("_orig_mod."): value for name, value in gradients(compiled, x).items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        with pk.disable_adapter(model):
            assert torch.equal(compiled(x), base(x))


def test_autocast_trains_fp32_biases():
    model, x = pk.inject(build("gpt2").float(), ALL), batch("gpt2")
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model, x)
    value.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def test_a_second_derivative_says_what_to_do():
    model, x = pk.inject(mlp(), ALL), torch.randn(3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()

"""Bytes kept for the backward, counted exactly, beside HF PEFT's own layer."""

import pytest
import torch
from cases import Case, inputs
from public_call import LEAVES, call, leaves

M, N, K, R = 256, 96, 136, 16
ADAPTERS = ("lora_a", "lora_b")


def saved_bytes(function, parameters) -> int:
    """Bytes of the distinct storages that `function()` saves for its backward, those of `parameters` left out."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for storage in kept.values())


def ours(case: Case, needed, device: str) -> int:
    args = leaves(inputs(case, device), needed)
    parameters = [args[name] for name in LEAVES if name != "x" and args[name] is not None]
    return saved_bytes(lambda: call(args, case), parameters)


@pytest.mark.parametrize("adapters", [None, torch.float32], ids=["same", "fp32-adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("k", [K, 131])
def test_exact_bytes(device, dtype, adapters, p, k):
    """X + S, one bit per element with dropout, nothing else; only what the wanted gradients are made of."""
    size = torch.empty(0, dtype=dtype).element_size()
    x, s, mask = M * k * size, M * R * size, M * -(-k // 8) * bool(p)
    case = Case(M, N, k, R, dtype, adapters=adapters, dropout=p)
    assert ours(case, ("x", *ADAPTERS), device) == x + s + mask
    assert ours(case, ADAPTERS, device) == x + s + mask
    assert ours(case, ("x", "lora_b"), device) == s + mask  # LoRA-FA: lora_a is frozen
    assert ours(case, ("lora_b",), device) == s
    assert ours(case, ("lora_a",), device) == x + mask
    assert ours(case, ("x",), device) == mask
    assert ours(case, ("bias",), device) == 0
    assert ours(case, LEAVES, device) == x + s + mask


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fewer_than_peft(device, dtype, p):
    """The peer keeps a float32 copy of a 16-bit input, and with dropout the dropped copy and a mask besides."""
    peft = pytest.importorskip("peft", reason="HF PEFT is the peer that is measured beside, not a dependency")
    base = torch.nn.Sequential(torch.nn.Linear(K, N, device=device, dtype=dtype))
    config = peft.LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=p, target_modules=["0"])
    layer = peft.get_peft_model(base, config).base_model.model[0].train()
    assert next(layer.lora_A.parameters()).dtype == torch.float32
    x = torch.randn(M, K, device=device, dtype=dtype, requires_grad=True)
    theirs = saved_bytes(lambda: layer(x), list(layer.parameters()))
    mine = ours(Case(M, N, K, R, dtype, adapters=torch.float32, dropout=p), ("x", *ADAPTERS), device)
    print(f"saved for backward, M={M} N={N} K={K} r={R} {dtype} dropout={p}: {mine} bytes, PEFT {theirs}")
    assert mine <= theirs if dtype == torch.float32 and not p else mine < theirs

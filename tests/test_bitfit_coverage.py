"""coverage of models with BitFit, of what holds them and of their parts."""

from bitfit_models import build
from torch import nn

import peft_kernels as pk


def test_coverage_of_whole_models():
    model = build("block")
    rows = {row.module: row for row in pk.coverage(pk.inject(model, pk.BitFitConfig()))}
    assert rows["mlp.0"].path == "act_bwd relu + bias" and rows["mlp.2"].path == "bias_grad"
    assert rows["norm"].path == "norm"
    assert rows["attention.out_proj"].reason == "nn.MultiheadAttention reads its weight and never calls it"
    assert rows["attention"].kernel == rows["recurrent"].kernel == "torch"
    assert "LSTM" in rows["recurrent"].reason
    with pk.disable_adapter(model):
        assert {row.reason for row in pk.coverage(model)} == {"adapter disabled"}
    pk.merge(model)
    assert {(row.kernel, row.reason) for row in pk.coverage(model)} == {("torch", "merged into the model")}
    assert "0 of 6 layers" in str(pk.coverage(model))


def test_coverage_of_what_holds_it_and_of_what_it_holds():
    whole = nn.ModuleDict({"encoder": build("mlp"), "head": nn.Linear(8, 2), "norm": pk.FusedLayerNorm(8)})
    before = {row.module: row for row in pk.coverage(whole)}
    assert set(before) == {"encoder.0", "encoder.2", "head", "norm"}
    assert before["norm"].path == "norm" and before["norm"].kernel != "torch"
    own = {row.module: row for row in pk.coverage(pk.inject(whole["encoder"], pk.BitFitConfig()))}
    found = pk.coverage(whole)
    rows = {row.module: row for row in found}
    assert {name: rows[f"encoder.{name}"]._replace(module=name) for name in own} == own
    assert (rows["head"], rows["norm"]) == (before["head"], before["norm"]) and len(rows) == len(own) + 2
    assert "4 of 5 layers run our kernels" in str(found)
    (inner,) = pk.coverage(nn.ModuleList([whole["encoder"][0]]))
    assert inner == own["0"]
    without = pk.coverage(nn.Sequential(pk.BiasLinear(4, 4, bias=False), pk.FusedRMSNorm(4, elementwise_affine=False)))
    assert [row.reason for row in without] == ["no bias to make a gradient of"]


def test_layers_put_in_by_hand_where_they_do_not_run_or_have_no_adapter():
    attention = nn.MultiheadAttention(8, 2)
    attention.out_proj = pk.BiasLinear(8, 8)
    (row,) = pk.coverage(nn.Sequential(attention))
    assert (row.kernel, row.reason) == ("torch", "nn.MultiheadAttention reads its weight and never calls it")
    both = nn.ModuleDict({"lora": nn.Linear(8, 8), "own": pk.BiasLinear(8, 8)})
    pk.inject(both, pk.LoraConfig(r=2, target_modules="all-linear"))
    rows = {row.module: row for row in pk.coverage(both)}
    assert rows["own"].kernel == "torch" and "its bias is frozen; no adapter: " in rows["own"].reason
    both["own"].bias.requires_grad_(True)
    assert {row.module: row for row in pk.coverage(both)}["own"].kernel != "torch"
    (row,) = pk.coverage(nn.Sequential(pk.BiasLinear(4, 4).requires_grad_(False)))
    assert (row.kernel, row.reason) == ("torch", "its bias is frozen")


def test_a_layer_is_listed_once():
    part = pk.inject(build("mlp"), pk.BitFitConfig())
    rows = list(pk.coverage(nn.ModuleDict({"first": part[0], "whole": part})))
    assert len(rows) == len(list(pk.coverage(part))) and all(row.module.startswith("whole.") for row in rows)

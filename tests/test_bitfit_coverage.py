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

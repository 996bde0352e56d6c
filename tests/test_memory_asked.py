"""What predict_memory is asked: mistakes are named with what came and what was expected, the rest works."""

from functools import partial

import pytest
import torch
from test_memory import Toy
from torch import nn

from peft_kernels import predict_memory
from peft_kernels.memory.predict import _fake_mode

X = torch.zeros(8, 1024)


def same(model: nn.Module) -> nn.Module:
    return model


def of_another_prediction() -> nn.Module:
    with _fake_mode():
        return Toy()


class HalfReal(Toy):
    """All fake but for a buffer made elsewhere."""

    def __init__(self, buffer: torch.Tensor):
        super().__init__()
        self.register_buffer("offset", buffer)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Toy()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (None, "build is of type NoneType; expected a function without arguments that makes the model"),
        (Toy(), "build is of type Toy; expected a function"),
        (lambda: "model", "build returned a value of type str; expected a torch.nn.Module"),
        (partial(same, Toy()), r"build .* whose a\.weight was made outside it, a Parameter \[1024, 1024\]; "),
        (partial(same, of_another_prediction()), r"build .* whose a\.weight was made outside it"),
        (partial(HalfReal, torch.zeros(3)), r"build .* whose offset was made outside it, a Tensor \[3\]"),
        (on_meta, r"build put a\.weight on meta; expected cpu: .* arch says which GPU"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_build(build, message):
    with pytest.raises(ValueError, match=message):
        predict_memory(build, {"x": X})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"batch": [X]}, "batch is of type list; expected a mapping of argument names to tensors"),
        ({"batch": X}, "batch is of type Tensor; expected a mapping"),
        ({"batch": {"x": X.to("meta")}}, r"batch\['x'\] is on meta; expected cpu: only its shape and dtype matter"),
        ({"batch": {"x": (X, X.to("meta"))}}, r"batch\['x'\]\[1\] is on meta"),
        ({"loss": 1.0}, "loss is of type float; expected a function of the model and the batch"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(X)], lr=1.0)}, "optimizer is of type SGD; expected a function"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_built(more, message):
    built = []
    with pytest.raises(ValueError, match=message):
        predict_memory(lambda: built.append(1) or Toy(), **{"batch": {"x": X}, **more})
    assert not built


def test_an_optimizer_is_one():
    with pytest.raises(ValueError, match="optimizer returned a value of type list; expected a torch.optim.Optimizer"):
        predict_memory(Toy, {"x": X}, optimizer=list)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_no_gradients_are_taken(mode):
    with mode():
        batch = {"x": torch.zeros(8, 1024)}  # of inference mode autograd keeps nothing
        found = predict_memory(Toy, batch, arch=None).replay
        assert not torch.is_grad_enabled()
    assert found == predict_memory(Toy, {"x": X}, arch=None).replay


def test_what_is_no_tensor_reaches_the_model_as_it_is():
    class Asks(Toy):
        def forward(self, x, *, twice: bool, names: list[str], nothing: None):
            assert twice is True and names == ["a"] and nothing is None
            return super().forward(x)

    batch = {"x": X, "twice": True, "names": ["a"], "nothing": None}
    assert predict_memory(Asks, batch, arch=None).replay == predict_memory(Toy, {"x": X}, arch=None).replay


def test_what_the_model_raises_stays_as_it_is():
    class Own(Exception):
        pass

    class Raises(Toy):
        def forward(self, x):
            raise Own("said by the model")

    with pytest.raises(Own, match="^said by the model$"):
        predict_memory(Raises, {"x": X})
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        predict_memory(Toy, {"x": X, "y": X})

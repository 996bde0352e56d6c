"""What every linear with a low-rank branch asks of the branch's tensors before anything runs."""

from torch import Tensor

from ..._core.checks import check_kind, refuse


def check_branch(function: str, x: Tensor, lora_a: Tensor, lora_b: Tensor, weight_shape: tuple | None) -> None:
    """Raise ValueError unless x [..., K], lora_a [R, K] and lora_b [N, R] fit each other, R at least 1.

    weight_shape: where lora_a fits the weight and x does not, it is x that is named.
    """
    check_kind(function, "x", x, getattr(x, "device", None))
    check_kind(function, "lora_a", lora_a, x.device)
    check_kind(function, "lora_b", lora_b, x.device)
    if x.dim() < 1:
        refuse(function, "x", x, "at least one dimension, [..., K]")
    K = x.shape[-1]
    both = weight_shape is not None and lora_a.dim() == len(weight_shape) == 2
    if both and weight_shape[1] == lora_a.shape[1] != K:
        refuse(function, "x", x, f"[..., {weight_shape[1]}] to match weight {list(weight_shape)}")
    if lora_a.dim() != 2 or lora_a.shape[1] != K:
        refuse(function, "lora_a", lora_a, f"[R, {K}] to match x [..., {K}]")
    R = lora_a.shape[0]
    if R < 1:
        refuse(function, "lora_a", lora_a, "a rank R of at least 1")
    if lora_b.dim() != 2 or lora_b.shape[1] != R:
        refuse(function, "lora_b", lora_b, f"[N, {R}] to match lora_a [{R}, {K}]")


def check_bias_and_dropout(function: str, x: Tensor, bias: Tensor | None, N: int, dropout_p: float) -> None:
    """Raise ValueError unless bias is None or [N] beside x, and dropout_p a probability."""
    if bias is not None:
        check_kind(function, "bias", bias, x.device)
        if bias.shape != (N,):
            refuse(function, "bias", bias, f"[{N}]")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{function}: dropout_p is {dropout_p}; expected a probability in [0, 1]")

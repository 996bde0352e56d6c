"""The linear layer over a 4-bit weight: forward and the gradient of its input."""

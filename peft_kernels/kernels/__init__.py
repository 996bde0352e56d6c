"""One folder per primitive: reference, configs, Triton kernels, op, autograd."""

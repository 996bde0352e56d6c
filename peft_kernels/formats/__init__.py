"""Storage formats of quantised weights: what their bytes mean. Data and plain PyTorch; kernels stand above."""

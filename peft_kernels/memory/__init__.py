"""The memory of a training step, predicted on fake tensors: by kind, by phase, and as a GPU would reserve it."""

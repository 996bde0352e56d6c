"""The LoRA linear: y = x @ weight.T + bias + scaling * dropout(x) @ lora_a.T @ lora_b.T, and every gradient."""

"""The LoRA linear over a 4-bit base: QLoRA."""

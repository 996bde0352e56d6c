"""Quantising to 4 bits and back: NF4 and FP4, bitsandbytes' bytes."""

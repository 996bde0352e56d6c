"""Triton functions that more than one primitive uses."""

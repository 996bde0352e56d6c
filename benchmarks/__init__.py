"""Measuring the kernels: cases, honest timing, and the scripts whose figures the README prints."""

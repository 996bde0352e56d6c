"""Runs CUDA kernels on a CPU: simt.h and simt.cpp stand in for CUDA, build.py compiles .cu files against them."""

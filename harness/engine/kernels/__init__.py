"""Triton kernels; importing one needs Triton, so only CUDA code paths and their tests do."""

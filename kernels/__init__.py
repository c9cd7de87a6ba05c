"""Compute kernels: CUDA sources with their host wrappers, and cpu/ with C++ headers for jt.code."""

"""Kernels that compute from packed tensors as they lie in the file, chosen per shape and machine."""

"""Doing it: packed weights inside a transformers model, the KV cache, streaming, calibration, measuring."""

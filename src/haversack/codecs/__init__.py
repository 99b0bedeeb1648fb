"""What weights, caches, moments and activations share: bit packing and block scales."""

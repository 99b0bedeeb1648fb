"""A lean decode loop: one traced step of the model, compiled, with static buffers, over the same weights and cache."""

"""Parts of the KV cache: which tokens are held, and how they are stored."""

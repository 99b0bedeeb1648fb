"""Files: safetensors written and read tensor by tensor, and the packed folder."""

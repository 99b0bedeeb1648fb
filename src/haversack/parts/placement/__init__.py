"""Where a site's stored tensors lie while the model runs, one placement per file."""

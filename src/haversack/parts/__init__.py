"""Parts: one idea per file, found by walking this package; nothing lists them by hand."""

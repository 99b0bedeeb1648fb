"""One self-contained page per plan: pictures as inline SVG, no network."""

"""Parts of the optimizer's state: what is kept of a gradient's history, in which subspace and how precisely."""

"""Parts of the weights resident."""

"""How the reference models are made: text, tokenizer, curriculum, training and the measured model cards."""

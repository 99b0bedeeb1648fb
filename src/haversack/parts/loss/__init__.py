"""Parts of the loss: how the head's logits and the log-likelihoods under them come about."""

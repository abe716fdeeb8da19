"""How the time of the loss grows with the logits, on one thread and on all."""

"""The loss of given logits, beside stock PyTorch, its peers and a copy of the logits."""

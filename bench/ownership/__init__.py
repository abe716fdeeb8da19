"""Training steps that hold their logits until after the backward, and steps that do not."""

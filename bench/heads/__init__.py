"""The loss of a language model's head, `fused_ce.linear_cross_entropy`, beside that of others."""

"""Row statistics: log-probability and entropy of logits and of heads."""

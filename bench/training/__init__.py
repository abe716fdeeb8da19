"""Whole steps of training, with the loss as torch has it and in the ways to take up fused_ce."""

"""Two builds of fused_ce side by side, to see whether a change costs speed."""

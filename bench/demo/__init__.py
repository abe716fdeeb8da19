"""Trains two real models with the stock loss and with fused_ce, and shows that nothing changed."""

"""What the programs share: devices, processes, rounds, and how figures are written and drawn."""

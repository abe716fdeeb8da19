"""`python -m bench.demo`, or `python bench/demo`: trains with both losses and compares."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Threads that spin while they wait make a small model tens of times slower on a machine that
    # has other work. Read when torch loads, and the same for both losses.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Run as a folder, Python looks for modules in it; `bench` and `fused_ce` are two folders up.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

    from bench.demo.program import main

    sys.exit(main())

"""`python -m bench`: measures the loss beside stock PyTorch; see bench/README.md."""

import sys

# Imported only when run: the processes that measure memory load this file too, and have no use for
# the tables and charts.
if __name__ == "__main__":
    from bench.program import main

    sys.exit(main())

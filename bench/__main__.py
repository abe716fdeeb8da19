"""`python -m bench`: measures the loss beside stock PyTorch; see bench/README.md."""

import sys

from bench.program import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # what a shell expects of a program that Ctrl-C has ended

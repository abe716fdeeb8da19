"""`python -m bench.cliffs`: looks for calls that stock PyTorch answers sooner; bench/README.md."""

import sys

from bench.cliffs.program import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # what a shell expects of a program that Ctrl-C has ended

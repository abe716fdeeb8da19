"""`python -m bench`: measures the loss beside stock PyTorch; see bench/README.md."""

import sys

if __name__ == "__main__":
    # Here, because each process that measures imports this file, and none of the program.
    from bench.program import main

    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # what a shell expects of a program that Ctrl-C has ended

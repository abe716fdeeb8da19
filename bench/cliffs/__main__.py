"""`python -m bench.cliffs`: looks for calls that stock PyTorch answers sooner; bench/README.md."""

import sys

if __name__ == "__main__":
    # Here, because each process that measures imports this file, and none of the program.
    from bench.cliffs.program import main

    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # what a shell expects of a program that Ctrl-C has ended

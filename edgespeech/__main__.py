"""`python -m edgespeech`: the command line."""

import sys

from edgespeech.cli import main

if __name__ == "__main__":
    sys.exit(main())

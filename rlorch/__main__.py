"""`python -m rlorch`: the command line from a bare checkout, as on a cluster where nothing is installed."""

import sys

from rlorch.cli import main

if __name__ == "__main__":
    sys.exit(main())

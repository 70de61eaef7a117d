"""`python -m loramux` is the `loramux` command."""

import sys

from loramux.cli import main

if __name__ == "__main__":
    sys.exit(main())

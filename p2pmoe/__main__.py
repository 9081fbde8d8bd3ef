"""`python -m p2pmoe` and the console script: run the command line and exit with its code."""

import sys
from typing import NoReturn

from p2pmoe.cli.app import run


def main() -> NoReturn:
    """Run the command line with this process's arguments."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()

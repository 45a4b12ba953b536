"""``python -m nnterp`` is the same as ``nnterp``."""

import sys

from nnterp.command_line import main

if __name__ == "__main__":
    sys.exit(main())

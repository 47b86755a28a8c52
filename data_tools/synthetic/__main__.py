"""The command `python -m data_tools.synthetic`."""

import sys

from data_tools.synthetic.generate import main

if __name__ == "__main__":
    sys.exit(main())

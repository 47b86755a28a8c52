"""The command `python -m data_tools.tokenizer`."""

import sys

from data_tools.tokenizer.train import main

if __name__ == "__main__":
    sys.exit(main())

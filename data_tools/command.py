"""Runs a command line tool: a user's error becomes one line on stderr and exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

from dsmoe_vl.errors import DsmoeVlError


def run(command: Callable[[], int]) -> int:
    """The exit status of `command`: its own, 2 after a `DsmoeVlError`, 130 after Ctrl-C."""
    try:
        return command()
    except DsmoeVlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130

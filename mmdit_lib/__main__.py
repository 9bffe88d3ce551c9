"""Starts the `mmdit` command: Ctrl-C is answered in one line from the first moment, while libraries are imported."""

import os
import signal
import sys

from .files import INTERRUPTED


def main() -> None:
    """Entry point."""
    # Until the libraries are there nothing is written. A KeyboardInterrupt would be lost inside their own imports.
    signal.signal(signal.SIGINT, _end)
    from . import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # the name of a folder need not be printable
    cli.main()


def _end(number, frame) -> None:
    os.write(2, f"mmdit: {INTERRUPTED}\n".encode())
    os._exit(130)


if __name__ == "__main__":
    main()

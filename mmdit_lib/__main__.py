"""Start the `mmdit` command. Ctrl-C prints one line even while libraries are being imported."""

import os
import signal
import sys

from .files import INTERRUPTED


def main() -> None:
    """Entry point."""
    # Nothing is written before the libraries are imported. Their imports might swallow a KeyboardInterrupt.
    signal.signal(signal.SIGINT, _end)
    from . import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name need not be printable
    cli.main()


def _end(number, frame) -> None:
    os.write(2, f"mmdit: {INTERRUPTED}\n".encode())
    os._exit(130)


if __name__ == "__main__":
    main()

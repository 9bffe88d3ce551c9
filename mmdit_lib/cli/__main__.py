"""The same as `mmdit`."""

from . import main

main()

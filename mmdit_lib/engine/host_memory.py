"""Returning freed host memory to the system."""

from __future__ import annotations

import ctypes
import sys
from functools import cache


def return_freed_memory() -> None:
    """Give the system back what glibc's malloc keeps of freed buffers; does nothing with another C library.

    Buffers of ever other sizes leave holes that malloc keeps: a process that serves many image sizes grows.
    """
    if trim := _malloc_trim():
        trim(0)


@cache
def _malloc_trim():
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None

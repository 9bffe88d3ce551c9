"""Flags that both scripts have."""

from __future__ import annotations

import argparse

LOG_LEVELS = ("internal_error", "error", "warning", "info", "verbose", "debug", "trace")
"""TensorRT-LLM's, from few messages to many."""


def add_log_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log_level", default="info", choices=LOG_LEVELS, help="below info, conversion shows no progress bar"
    )


def shows_progress(log_level: str) -> bool:
    return LOG_LEVELS.index(log_level) >= LOG_LEVELS.index("info")

"""The `mmdit` command. Every option is an argument of the function behind its subcommand."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Any

import tyro

from .. import __version__
from ..checkpoint import convert, export
from ..engine.build import build
from ..engine.onnx_file import export_onnx
from ..tiny.demo import demo
from .images import generate_command
from .reports import bench_command, doctor_command, inspect_command, parity_command, traffic_command
from .usage import TYRO, UsageError, console, one_line_errors, parsed

COMMANDS = {
    "doctor": doctor_command,
    "convert": convert,
    "export": export,
    "build": build,
    "onnx": export_onnx,
    "inspect": inspect_command,
    "parity": parity_command,
    "generate": generate_command,
    "bench": bench_command,
    "traffic": traffic_command,
    "demo": demo,
}


def main() -> None:
    """Entry point of `mmdit`."""
    with one_line_errors("mmdit"):
        result = called(sys.argv[1:])
        if isinstance(result, Path):
            console.print(f"written: {result}")


def called(arguments: list[str]) -> Any:
    """The result of a subcommand. Raises `UsageError` if its arguments cannot be parsed."""
    name, *rest = arguments or [""]
    if name in COMMANDS:
        return parsed(COMMANDS[name], f"mmdit {name}", rest)()
    if name == "--version":
        return console.print(f"mmdit {__version__}")
    if name in ("-h", "--help") or name.startswith("--tyro"):
        return tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="mmdit", args=arguments, config=TYRO)
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"did you mean {near[0]}?" if near else f"use {', '.join(COMMANDS)}"
    raise UsageError(f"{f'no command {name!r}' if name else 'no command given'}; {hint} (see mmdit --help)")

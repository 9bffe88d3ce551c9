"""Command lines: options from a function's arguments, mistakes as one line."""

from __future__ import annotations

import difflib
import inspect
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial, wraps
from itertools import groupby
from typing import Annotated, Any, get_type_hints

import tyro
from rich.console import Console

from ..files import INTERRUPTED
from ..parallel import guard

console = Console(highlight=False, markup=False)  # a path may look like markup

Loras = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="lora", metavar="PATH:SCALE")]
Prompts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT|FILE")]
DTYPE_ALIASES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}
OPTIONS = {"loras": Loras, "calibration_prompts": Prompts}  # arguments that have another type on the command line


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """A user's mistake is one line and exit code 1, or 2 if it is one of usage.

    Under mpirun one rank's error ends all ranks.
    """
    # Silences transformers' warning of a long prompt; diffusers says which words were cut.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler: when it starts and stops
    logging.getLogger("diffusers.pipelines.pipeline_utils").addFilter(not_about_the_hub)
    with guard():
        try:
            yield
        except UsageError as error:
            print(f"{program}: {error}", file=sys.stderr)
            sys.exit(2)
        except (ValueError, OSError, ImportError) as error:
            sys.exit(f"{program}: {first_line(error)}")
        except KeyboardInterrupt:
            print(f"{program}: {INTERRUPTED}", file=sys.stderr)
            sys.exit(130)


def not_about_the_hub(record: logging.LogRecord) -> bool:
    """False for diffusers' two lines on a hub out of reach: without a cached copy its error says the same."""
    return not record.getMessage().startswith("Couldn't connect to the Hub")


TYRO = (tyro.conf.OmitArgPrefixes,)


class UsageError(Exception):
    """What is wrong with a command line, in one line."""


def parsed(function: Callable, prog: str, arguments: list[str]) -> Callable[[], Any]:
    """`function` with its options from the command line. Raises `UsageError`; `--help` prints tyro's text and exits."""

    @wraps(function)
    def later(*args, **options):
        return partial(function, *args, **options)

    del later.__wrapped__  # tyro would take the types from there
    later.__signature__ = inspect.signature(function)
    later.__annotations__ = types = get_type_hints(function, include_extras=True)
    types |= {name: OPTIONS[name] for name in OPTIONS.keys() & types.keys()}
    try:
        with redirect_stderr(io.StringIO()) as box:
            return tyro.cli(later, prog=prog, args=arguments, config=TYRO)
    except SystemExit as exit:
        if not exit.code:
            raise
        raise UsageError(f"{usage_fault(box.getvalue(), prog)} (see {prog} --help)") from None


def usage_fault(box: str, prog: str) -> str:
    """The message in tyro's box of several sections, as one line, with what was probably meant."""
    box = re.sub(r"\x1b\[[\d;]*m", "", box)  # colors, on a terminal
    rows = [row.strip("│| ") for row in box.strip().splitlines()[1:-1]]
    sections = [" ".join(group) for rule, group in groupby(rows, lambda row: set(row) <= set("─-")) if not rule]
    fault = next((text for text in sections if text.startswith("Unrecognized")), sections[0])
    if unknown := re.match(r"Unrecognized options: (--[\w-]+)", fault):
        others = set(re.findall(r"--[\w-]+", box)) - {unknown[1], "--help"}
        near = difflib.get_close_matches(unknown[1].replace("_", "-"), others, 1)
        fault = f"unknown option {unknown[1]}{f'; did you mean {near[0]}?' if near else ''}"
    elif fault.startswith("Missing from") and (missing := missing_options(box)):
        fault = f"{prog.removeprefix('mmdit ')} needs {' and '.join(missing)}"
    elif fault.startswith("Unrecognized") and prog == "mmdit generate":
        fault = f"{fault}; put the prompt in quotes"
    elif (chosen := re.match(r"[Ii]nvalid choice '(\w+)'.*--dtype", fault)) and chosen[1] in DTYPE_ALIASES:
        fault = f"{fault.rstrip('.')}; did you mean {DTYPE_ALIASES[chosen[1]]}?"
    return fault[0].lower() + fault[1:].rstrip(".")


def missing_options(box: str) -> list[str]:
    """The options, spelled as in the documentation, and positional arguments that tyro's box lists as missing."""
    section = box.partition("Missing from")[2].partition("For full helptext")[0]
    found = re.findall(r"^[│| ] {5}(--)?(\S+)", section, re.MULTILINE)
    return [dashes + name.replace("-", "_") for dashes, name in found]


def first_line(error: Exception) -> str:
    """Our messages have one line; those of diffusers and the hub continue with advice that does not apply here."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)

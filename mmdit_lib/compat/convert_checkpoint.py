"""`convert_checkpoint.py` of TensorRT-LLM's MMDiT example: `mmdit convert` with the original's flags and layout.

`docs/from-tensorrt-llm.md` says what each flag does here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..checkpoint import convert
from ..cli.usage import console, one_line_errors
from .flags import add_log_level, shows_progress


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convert_checkpoint", allow_abbrev=False)
    parser.add_argument("--model_path", default="stabilityai/stable-diffusion-3.5-medium", help="as for mmdit convert")
    parser.add_argument("--tp_size", type=int, default=1, help="ranks of tensor parallelism")
    parser.add_argument("--cp_size", type=int, default=1, help="ranks of context parallelism")
    dtypes = ("auto", "float16", "bfloat16", "float32")
    parser.add_argument("--dtype", default="float16", choices=dtypes, help="auto keeps the source's")
    parser.add_argument("--output_dir", default="tllm_checkpoint", help="the checkpoint folder to write")
    parser.add_argument("--workers", type=int, default=1, help="no effect: the files of all ranks are written at once")
    add_log_level(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert as the original does: in TensorRT-LLM's layout, by default to float16."""
    options = make_parser().parse_args(arguments)
    with one_line_errors("convert_checkpoint"):
        folder = convert(
            options.model_path,
            options.output_dir,
            dtype=options.dtype,
            tp_size=options.tp_size,
            cp_size=options.cp_size,
            tp_layout="trtllm",
            progress=shows_progress(options.log_level),
        )
        console.print(f"written: {folder}")


if __name__ == "__main__":
    main()

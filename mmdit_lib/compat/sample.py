"""`sample.py` of TensorRT-LLM's MMDiT example: `mmdit generate` with the original's flags, steps and guidance.

`docs/from-tensorrt-llm.md` says what each flag does here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..cli.images import generate_command
from ..cli.usage import one_line_errors
from ..engine.folder import EngineFolder
from .flags import add_log_level

PROMPT = "A capybara holding a sign that reads 'Hello World' in the forrest."  # spelled as in the original


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sample", allow_abbrev=False)
    parser.add_argument("prompt", nargs="*", default=[PROMPT], help="what to draw, in quotes")
    parser.add_argument("--tllm_model_dir", default="./engine_outputs/", help="the engine folder")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="no effect: MPI numbers the ranks of a node")
    add_log_level(parser)
    parser.add_argument("--debug_mode", action="store_true", help="not available: use mmdit parity")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate `sd3.5-mmdit.png` as the original does, at the resolution that the engine is optimized for."""
    options = make_parser().parse_args(arguments)
    with one_line_errors("sample"):
        if options.debug_mode:
            raise ValueError("--debug_mode saves no tensors here: `mmdit parity` compares every layer with diffusers")
        if len(options.prompt) > 1:
            raise ValueError(
                f"{len(options.prompt)} prompts: the original draws all and saves the first; give one, in quotes"
            )
        generate_command(
            options.prompt[0],
            model_path=_pipeline(options.tllm_model_dir),
            engine_dir=options.tllm_model_dir,
            num_inference_steps=40,
            guidance_scale=4.5,
        )


def _pipeline(engine_dir: str) -> str:
    """The pipeline that the checkpoint was converted from, as the engine folder's config names it."""
    model_path = EngineFolder.open(engine_dir).config["pretrained_config"].get("model_path")
    if not model_path:
        raise ValueError(f"{engine_dir}: config.json names no model_path; use mmdit generate --model_path")
    return model_path


if __name__ == "__main__":
    main()

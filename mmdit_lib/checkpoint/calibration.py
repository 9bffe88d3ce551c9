"""Static activation scales: a pipeline runs on a few prompts, and each linear layer's largest input is recorded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ..architecture import Architecture
from ..config import TORCH_DTYPES, dtype_option
from ..files import read_json
from .hub import INDEX_FILE
from .lora import Lora, fuse
from .source import Source

STEPS = 10
"""Denoising steps for each prompt, from pure noise to the image."""
PROMPTS_FILE = "calibration_prompts.txt"
"""In a pipeline's folder: the prompts to use if none are given, one on each line."""
MAX_PROMPTS = 4096


def read_prompts(given: Sequence[str], pipeline: str) -> list[str]:
    """The prompts, from text or from files with one on each line; by default the pipeline's own.

    Raises `ValueError` if there are none, or if one looks like the path of a file that does not exist.
    """
    if not given:
        own = Path(pipeline) / PROMPTS_FILE
        if not own.is_file():
            raise ValueError(
                "quantization fp8 needs prompts like those that the model will get: --calibration_prompts TEXT or FILE "
                "(one prompt on each line)"
            )
        given = [str(own)]
    prompts = [prompt for text in given for prompt in _prompts_of(text) if prompt]
    if not 0 < len(prompts) <= MAX_PROMPTS:
        raise ValueError(f"calibration_prompts: give 1 to {MAX_PROMPTS} prompts, found {len(prompts)}")
    return prompts


def _prompts_of(text: str) -> list[str]:
    path = os.path.expanduser(text)
    if os.path.isfile(path):
        return _lines(path)
    in_a_folder = "/" in text and os.path.isdir(os.path.dirname(path))
    if (text.endswith(".txt") or in_a_folder) and not any(map(str.isspace, text)):
        raise ValueError(f"calibration_prompts: {text} does not exist")
    return [text.strip()]


def _lines(path: str) -> list[str]:
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"calibration_prompts: {path} is not a text file") from None


def require_pipeline(path: str, architecture: Architecture) -> None:
    """Raises `ValueError` if a local `path` is not a pipeline folder with text encoders."""
    folder = Path(path)
    if not folder.exists():  # a hub id
        return
    if not (folder / INDEX_FILE).is_file():
        raise ValueError(
            f"quantization fp8 runs the pipeline to calibrate: {path} has no {INDEX_FILE}; give the folder of the "
            "whole pipeline, with its text encoders"
        )
    index = read_json(folder / INDEX_FILE)
    encoders = [name for name in architecture.pipelines.TEXT_ENCODERS if any(index.get(name) or ())]
    missing = [name for name in encoders if not (folder / name).is_dir()]
    if missing or not encoders:
        raise ValueError(
            f"quantization fp8 runs the pipeline to calibrate: {path} has no "
            f"{missing[0] if missing else 'text encoder'}; give the folder of the whole pipeline"
        )


@torch.inference_mode()
def calibrate(
    source: Source,
    path: str,
    modules: Sequence[str],
    prompts: Sequence[str],
    loras: tuple[Lora, ...],
    *,
    variant: str | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """The largest magnitude of the inputs of each linear layer, by our path, over all prompts and steps.

    diffusers' pipeline runs with its default guidance and image size, in float32 on a CPU, on a GPU in the source's
    dtype. LoRAs are fused first.
    """
    architecture = source.architecture
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = TORCH_DTYPES[source.dtype] if device == "cuda" else torch.float32
    options = {"use_safetensors": True, "variant": variant, **dtype_option(dtype)}
    if not Path(path).exists():
        options["revision"] = source.revision
    pipe = architecture.pipelines.default_class().from_pretrained(path, **options).to(device)
    pipe.set_progress_bar_config(disable=True)
    if loras:
        for name, parameter in pipe.transformer.named_parameters():
            parameter.copy_(fuse(architecture.keys.from_diffusers(name), parameter, loras))
    largest: dict[str, torch.Tensor] = {}
    for module in modules:
        linear = pipe.transformer.get_submodule(architecture.keys.to_diffusers(module))
        linear.register_forward_pre_hook(_recorder(largest, module))
    with tqdm(total=len(prompts) * STEPS, unit="step", desc=_described(prompts), disable=not progress) as bar:

        def step_done(pipe, step, timestep, values):
            bar.update()
            return values

        for seed, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(seed)
            pipe(prompt, num_inference_steps=STEPS, generator=generator, output_type="latent",
                 callback_on_step_end=step_done)  # fmt: skip
    assert set(largest) == set(modules), "a layer never ran"
    return {module: value.item() for module, value in largest.items()}


def _described(prompts: Sequence[str]) -> str:
    return f"calibrate on {len(prompts)} prompt{'s' * (len(prompts) != 1)}"


def _recorder(largest: dict[str, torch.Tensor], module: str) -> Callable:
    def record(_, inputs) -> None:
        found = inputs[0].abs().max().float()
        largest[module] = torch.maximum(largest[module], found) if module in largest else found

    return record

"""The object that goes into `pipe.transformer`, and a pipeline with it in place."""

from __future__ import annotations

import logging
from collections.abc import Mapping as Inputs
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from .engine.folder import EngineFolder, plan_file
from .engine.profile import check_profile
from .engine.pytorch_backend import PyTorchBackend
from .engine.torch_ops import DTYPES
from .tiny.package import resolve_model

log = logging.getLogger("mmdit_lib")

BackendName = Literal["auto", "tensorrt", "pytorch"]
INPUTS = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")


class MMDiTRunner:
    """Stands in for `SD3Transformer2DModel` in diffusers' SD3 pipelines (text to image, img2img, inpainting).

    Attributes:
        config: diffusers' fields, by attribute and by key.
        backend: the backend at work; `backend.name` is 'tensorrt' or 'pytorch'.
        reason: why that backend, in words.
        rank: which rank of the engine folder's mapping this is.
    """

    def __init__(self, folder: EngineFolder, backend, reason: str, *, rank: int = 0, check_finite: bool = True):
        from diffusers.configuration_utils import FrozenDict

        self.folder = folder
        self.backend = backend
        self.reason = reason
        self.rank = rank
        self.check_finite = check_finite
        self.config = FrozenDict(folder.model.to_diffusers())
        self.dtype = DTYPES[folder.dtype]
        self.device = backend.device

    @classmethod
    def from_engine(
        cls,
        engine_dir: str | Path,
        *,
        backend: BackendName = "auto",
        checkpoint_dir: str | Path | None = None,
        device: str | torch.device | None = None,
        compile: bool = False,
        cuda_graph: bool = False,
        check_finite: bool = True,
        verify: bool = True,
    ) -> MMDiTRunner:
        """Open an engine folder; under `mpirun`, every rank opens its own part of it.

        Args:
            engine_dir: as `build` wrote it.
            backend: tensorrt runs the plan, pytorch the graph file with the checkpoint's tensors; auto
                takes tensorrt where the plan can run.
            checkpoint_dir: where the checkpoint is, if it was moved away from the engine folder.
            device: a CUDA device where there is one, else the CPU, if not given.
            compile: pytorch: compile the graph with `torch.compile`.
            cuda_graph: capture and replay a CUDA graph per set of input shapes.
            check_finite: look for NaN and infinity in every input and output.
            verify: compare the checksums of the files that are read.

        Raises:
            ValueError: in one line, where the folder does not fit, or the backend cannot run here.
        """
        folder = EngineFolder.open(engine_dir)
        team = None
        if folder.mapping.world_size > 1:
            from . import parallel

            team = parallel.join(folder, device)
            device = team.device
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        name, reason = choose_backend(folder, backend, device)
        if team:
            team.agree("backend", name)
        log.info("backend %s: %s", name, reason)
        rank = team.rank if team else 0
        if name == "tensorrt":
            from .engine.tensorrt_backend import TensorRTBackend

            if verify:
                folder.verify(plan_file(rank))
            made = TensorRTBackend(
                folder.folder / plan_file(rank),
                folder.tensorrt,
                device=device,
                communicator=team.nccl_communicator() if team else None,
                cuda_graph=cuda_graph,
            )
        else:
            tp_rank = folder.mapping.at(rank).tp_rank
            weights = folder.open_checkpoint(checkpoint_dir, verify=verify, tp_rank=tp_rank).weights(tp_rank)
            groups = team.groups if team else None
            made = PyTorchBackend(
                folder.graph(rank, verify=verify),
                weights,
                device=device,
                groups=groups,
                compile=compile,
                cuda_graph=cuda_graph,
            )
        return cls(folder, made, reason, rank=rank, check_finite=check_finite)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        block_controlnet_hidden_states=None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        skip_layers: list[int] | None = None,
    ):
        """One denoising step, with diffusers' arguments.

        Args:
            hidden_states: latents [B, C, H, W].
            encoder_hidden_states: text [B, T, J].
            pooled_projections: [B, P].
            timestep: [B], 0 to 1000, float32 at any stride.

        Returns the prediction [B, C, H, W] in `hidden_states`' dtype, as `Transformer2DModelOutput` or,
        with `return_dict=False`, in a tuple.

        Raises:
            ValueError: for a shape outside the engine's profile, an argument that is not supported, or NaN.
        """
        self._refuse(block_controlnet_hidden_states, joint_attention_kwargs, skip_layers)
        inputs = {
            "hidden_states": hidden_states,
            "encoder_hidden_states": encoder_hidden_states,
            "pooled_projections": pooled_projections,
            "timestep": timestep,
        }
        output = self.run(inputs).to(hidden_states.dtype)
        if not return_dict:
            return (output,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output)

    def run(self, inputs: Inputs[str, torch.Tensor]) -> torch.Tensor:
        """`inputs` by name, as for a call, on any device -> output [B, C, H, W] in the engine's dtype.

        Raises `ValueError` as a call does.
        """
        prepared, batch = self.prepare(inputs)
        output = self.backend(prepared)[:batch]
        if self.check_finite:
            self._check_finite({**prepared, "output": output})
        return output

    def intermediates(self, inputs: Inputs[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Every named value of the network, by module path or layer name (pytorch backend only)."""
        if not isinstance(self.backend, PyTorchBackend):
            raise ValueError("intermediates: the tensorrt backend keeps none; open the engine with backend='pytorch'")
        return self.backend.intermediates(self.prepare(inputs)[0])

    def prepare(self, inputs: Inputs[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
        """Inputs checked against the profile, on the engine's device and in its dtypes; and their batch."""
        missing = [name for name in INPUTS if inputs.get(name) is None]
        if missing:
            raise ValueError(f"missing input {', '.join(missing)}")
        check_profile(self.folder, {name: tuple(value.shape) for name, value in inputs.items()})
        batch = inputs["hidden_states"].shape[0]
        odd = batch % self.folder.mapping.cfg_size
        prepared = {}
        for name, value in inputs.items():
            dtype = torch.float32 if name == "timestep" else self.dtype
            value = value.to(self.device, dtype)
            # CFG parallelism halves the batch; a single row (guidance off) is calculated twice.
            prepared[name] = torch.cat([value, value[-1:]]) if odd else value.contiguous()
        return prepared, batch

    def _check_finite(self, tensors: Inputs[str, torch.Tensor]) -> None:
        finite = torch.stack([value.isfinite().all() for value in tensors.values()]).tolist()
        bad = [name for name, fine in zip(tensors, finite, strict=True) if not fine]
        if not bad:
            return
        if bad == ["output"] and self.folder.dtype == "float16":
            raise ValueError(
                "the output holds NaN or infinity: float16 overflowed in the network; convert with --dtype bfloat16"
            )
        raise ValueError(f"{' and '.join(bad)} hold{'s' * (len(bad) == 1)} NaN or infinity")

    def _refuse(self, controlnet, joint_attention_kwargs, skip_layers) -> None:
        if controlnet is not None:
            raise ValueError("block_controlnet_hidden_states: the engine has no ControlNet inputs")
        if skip_layers:
            raise ValueError(f"skip_layers={list(skip_layers)}: the engine always runs every layer")
        for name, value in (joint_attention_kwargs or {}).items():
            if name == "scale" and value == 1.0:
                continue
            what = "LoRA scale" if name == "scale" else "argument"
            raise ValueError(f"joint_attention_kwargs['{name}']: the engine does not support this {what}")

    def cache_context(self, name: str):
        """diffusers' hook for caching between steps; nothing is cached here."""
        return nullcontext()


def choose_backend(folder: EngineFolder, asked: BackendName, device: torch.device | str = "cuda") -> tuple[str, str]:
    """The backend's name and why. Raises `ValueError` for 'tensorrt' where the plan cannot run on `device`."""
    if asked not in ("auto", "tensorrt", "pytorch"):
        raise ValueError(f"backend '{asked}': use auto, tensorrt or pytorch")
    if asked == "pytorch":
        return "pytorch", "asked for"
    from .engine.tensorrt_backend import refusal

    why_not = refusal(folder.tensorrt, device)
    if why_not is None:
        return "tensorrt", f"{folder.tensorrt} can run the plan here"
    if asked == "tensorrt":
        raise ValueError(f"backend tensorrt: {why_not}")
    return "pytorch", why_not


def load_pipeline(
    model: str | Path,
    engine_dir: str | Path,
    *,
    pipeline_class=None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    runner_options: dict[str, Any] | None = None,
    **options,
):
    """A diffusers pipeline whose transformer is an engine; diffusers' own transformer weights are not read.

    Args:
        model: pipeline folder, hub id or tiny, for the text encoders, the VAE and the scheduler.
        engine_dir: as `build` wrote it.
        pipeline_class: `StableDiffusion3Pipeline` if not given; the img2img and inpaint pipelines work too.
        device: of all components; CUDA where there is one, if not given.
        dtype: of the other components; if not given, the engine's on a GPU and float32 on a CPU, where half
            precision is slower.
        runner_options: passed to `MMDiTRunner.from_engine`.
        options: passed to `from_pretrained`.

    Raises:
        ValueError: in one line, where the engine folder does not fit, or the backend cannot run here.
        OSError: diffusers', where `model` cannot be found or fetched.
    """
    import diffusers

    pipeline_class = pipeline_class or diffusers.StableDiffusion3Pipeline
    runner = MMDiTRunner.from_engine(engine_dir, device=device, **(runner_options or {}))
    dtype = dtype or (runner.dtype if runner.device.type == "cuda" else torch.float32)
    options = {"use_safetensors": True, "transformer": None, **dtype_option(dtype), **options}
    pipe = pipeline_class.from_pretrained(resolve_model(model), **options)
    return install(pipe.to(runner.device), runner)


def install(pipe, runner: MMDiTRunner):
    """Put `runner` into a pipeline that has another transformer, or none. Returns the pipeline."""
    pipe.transformer = runner
    # With transformer=None at load diffusers assumes 2 and 128, whatever the model.
    pipe.patch_size = runner.config.patch_size
    pipe.default_sample_size = runner.config.sample_size
    return pipe


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """`from_pretrained`'s option for the dtype, which diffusers 0.42 renamed."""
    import diffusers
    from packaging import version

    return {"dtype" if version.parse(diffusers.__version__) >= version.parse("0.42") else "torch_dtype": dtype}

"""Small models, folders created from them, and helpers shared by test files."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch

from mmdit_lib import Checkpoint, MMDiTRunner, build, cli, convert
from mmdit_lib.checkpoint.random_weights import randomize
from mmdit_lib.config import Sizes
from mmdit_lib.engine.graph import Graph
from mmdit_lib.engine.inputs import draw_inputs
from mmdit_lib.parallel import mpi_environment
from mmdit_lib.parallel.launch import session_environment
from mmdit_lib.sd3 import SD3, SD3Config
from mmdit_lib.sd3.keys import from_diffusers

if TYPE_CHECKING:  # the ranks of parallel tests import this file, and not all of them need diffusers
    from diffusers import SD3Transformer2DModel

TESTS = Path(__file__).parent

# These models are too small to benefit from threads, and threads that wait for a busy core are 100 times slower.
torch.set_num_threads(1)


def model_config(heads: int = 4, head_dim: int = 16, **fields) -> SD3Config:
    values = dict(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=head_dim,
        num_attention_heads=heads, joint_attention_dim=40, caption_projection_dim=heads * head_dim,
        pooled_projection_dim=48, pos_embed_max_size=24, dual_attention_layers=(), qk_norm="rms_norm",
    )  # fmt: skip
    return SD3Config(**values | fields)


MODELS = {
    # The three published architectures: the same flags, few layers, small widths.
    "sd3-medium": model_config(qk_norm=None),
    "sd3.5-medium": model_config(dual_attention_layers=(0, 1), pos_embed_max_size=48),
    "sd3.5-large": model_config(heads=2, head_dim=24, num_layers=4),
    # Two that are unlike any published model.
    "three-heads-of-8": model_config(
        heads=3, head_dim=8, num_layers=2, dual_attention_layers=(1,), in_channels=5, out_channels=7
    ),
    "patch-3-table-20": model_config(
        heads=5, head_dim=12, patch_size=3, pos_embed_max_size=20, sample_size=30, qk_norm=None,
        dual_attention_layers=(0, 2),
    ),
}  # fmt: skip


def random_transformer(config: SD3Config, seed: int = 0) -> SD3Transformer2DModel:
    """Every parameter random (biases and norms too), activations near unit size: each weight affects the output."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(**config.to_diffusers()).eval()
    return randomize(model, torch.Generator().manual_seed(seed))


TINY = {
    "sample_size": 32, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 4, "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 40,
    "pos_embed_max_size": 12, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm",
}  # fmt: skip
NO_NORM = TINY | {
    "attention_head_dim": 64,
    "num_attention_heads": 1,
    "caption_projection_dim": 64,
    "dual_attention_layers": (),
    "qk_norm": None,
}


def tiny_model(seed: int = 0, **overrides) -> SD3Transformer2DModel:
    return random_transformer(SD3Config(**TINY | overrides), seed)


@dataclass
class Case:
    """A model and what is derived from it on first use: diffusers' folder, checkpoints, engines, runners."""

    config: SD3Config
    root: Path
    _cache: dict = field(default_factory=dict)

    @cached_property
    def reference(self) -> SD3Transformer2DModel:
        return random_transformer(self.config)

    def reference_in(self, dtype: str) -> SD3Transformer2DModel:
        if dtype == "float32":
            return self.reference
        return self._once(("reference", dtype), lambda: random_transformer(self.config).to(getattr(torch, dtype)))

    @cached_property
    def transformer(self) -> Path:
        self.reference.save_pretrained(self.root / "transformer")
        return self.root / "transformer"

    def checkpoint(self, dtype: str = "float32") -> Path:
        output = self.root / f"checkpoint-{dtype}"
        return self._once(output, lambda: convert(str(self.transformer), str(output), dtype=dtype, progress=False))

    @property
    def step(self) -> int:
        return 8 * self.config.patch_size

    def engine(self, dtype: str = "float32", *, plan: bool = True, **options) -> Path:
        """An engine folder, with other options of `build` too."""
        named = "".join(f"-{name}-{value}" for name, value in options.items())
        output = self.root / f"{'engine' if plan else 'graph'}-{dtype}{named}"
        options |= dict(
            max_batch_size=3, min_resolution=str(2 * self.step), opt_resolution=str(8 * self.step),
            max_resolution=str(20 * self.step), progress=False, plan=plan,
        )  # fmt: skip
        return self._once(output, lambda: build(str(self.checkpoint(dtype)), str(output), **options))

    def runner(self, dtype: str = "float32") -> MMDiTRunner:
        return self._once(("runner", dtype), lambda: self.open(dtype))

    def open(self, dtype: str = "float32", **options) -> MMDiTRunner:
        return MMDiTRunner.from_engine(
            self.engine(dtype, plan=False), **{"backend": "pytorch", "device": "cpu"} | options
        )

    def inputs(
        self, *, patches=(8, 8), tokens: int = 154, batch: int = 2, seed: int = 0, dtype: str = "float32"
    ) -> dict:
        """Inputs by name, `patches` rows by columns; `timestep` is fractional."""
        sizes = Sizes(batch, patches[0] * self.step, patches[1] * self.step, tokens)
        return draw_inputs(SD3, self.config, sizes, dtype, seed=seed)

    def _once(self, key, make):
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


_folders = tempfile.TemporaryDirectory(prefix="mmdit-test-")  # removed when the tests end


@cache
def case(name: str) -> Case:
    """One of `MODELS`; everything derived from it is created once for all tests."""
    root = Path(_folders.name, name)
    root.mkdir()
    return Case(MODELS[name], root)


@torch.inference_mode()
def diffusers_output(model: SD3Transformer2DModel, inputs: dict) -> torch.Tensor:
    moved = {name: value if name == "timestep" else value.to(model.dtype) for name, value in inputs.items()}
    return model(**moved, return_dict=False)[0]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference divided by the norm."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm()).item()


# Conversion ------------------------------------------------------------------------------------------


def quiet(source, output, **options) -> Checkpoint:
    return Checkpoint.open(convert(str(source), str(output), progress=False, **options), verify=True)


def assert_same(weights: dict, reference: SD3Transformer2DModel, dtype: torch.dtype = torch.float32) -> None:
    expected = {from_diffusers(name): tensor.to(dtype) for name, tensor in reference.state_dict().items()}
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert weights[name].dtype == dtype
        assert torch.equal(weights[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


# The original layout: name in a block, and the diffusers modules whose rows it concatenates.
STREAMS = {
    "x_block": {
        "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "attn.proj": ("attn.to_out.0",),
        "attn.ln_q": ("attn.norm_q",), "attn.ln_k": ("attn.norm_k",),
        "attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "attn2.proj": ("attn2.to_out.0",),
        "attn2.ln_q": ("attn2.norm_q",), "attn2.ln_k": ("attn2.norm_k",),
        "adaLN_modulation.1": ("norm1.linear",), "mlp.fc1": ("ff.net.0.proj",), "mlp.fc2": ("ff.net.2",),
    },
    "context_block": {
        "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "attn.proj": ("attn.to_add_out",),
        "attn.ln_q": ("attn.norm_added_q",), "attn.ln_k": ("attn.norm_added_k",),
        "adaLN_modulation.1": ("norm1_context.linear",),
        "mlp.fc1": ("ff_context.net.0.proj",), "mlp.fc2": ("ff_context.net.2",),
    },
}  # fmt: skip
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj", "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2", "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
}  # fmt: skip


def original_layout(model: SD3Transformer2DModel, prefix: str = "model.diffusion_model.") -> dict[str, torch.Tensor]:
    state, out = model.state_dict(), {}

    def put(name: str, modules: tuple[str, ...], swap: bool = False) -> None:
        for kind in ("weight", "bias"):
            if f"{modules[0]}.{kind}" in state:
                joined = torch.cat([state.pop(f"{m}.{kind}") for m in modules])
                # Stability AI keeps (shift, scale), diffusers (scale, shift).
                out[f"{prefix}{name}.{kind}"] = torch.cat(joined.chunk(2)[::-1]) if swap else joined

    out[f"{prefix}pos_embed"] = state.pop("pos_embed.pos_embed")
    for name, module in OUTSIDE.items():
        put(name, (module,), swap=module == "norm_out.linear")
    for i in range(model.config.num_layers):
        for stream, modules in STREAMS.items():
            for name, parts in modules.items():
                swap = i == model.config.num_layers - 1 and parts == ("norm1_context.linear",)
                put(f"joint_blocks.{i}.{stream}.{name}", tuple(f"transformer_blocks.{i}.{p}" for p in parts), swap)
    assert not state, sorted(state)
    return out


# The command -----------------------------------------------------------------------------------------


def mmdit(*arguments) -> tuple[int, str, str]:
    """Run the command in this process; returns its exit code and what it wrote to stdout and stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    words = ["mmdit", *map(str, arguments)]
    with mock.patch.object(sys, "argv", words), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            if isinstance(end.code, str):
                print(end.code, file=err)
    return code, out.getvalue(), err.getvalue()


SHAPES = ("group", "shape", "reshape_dims", "start", "stride", "values", "weight", "crop")


def kinds_of_layers(graph: Graph) -> set[str]:
    """Layers without what depends on a shape or a rank."""
    values = {x.name: x for x in [*graph.inputs, *(layer.output for layer in graph.layers)]}
    found = set()
    for layer in graph.layers:
        given = [(values[name].dtype, len(values[name].shape)) if name else None for name in layer.inputs]
        made, options = layer.output, {k: v for k, v in layer.attributes.items() if k not in SHAPES}
        found.add(repr((layer.type, sorted(options.items()), given, made.dtype, len(made.shape))))
    return found


# Ranks -----------------------------------------------------------------------------------------------


def mpirun_command(ranks: int, *arguments, session: str) -> tuple[list[str], dict[str, str]]:
    """`mpirun -n ranks python arguments` and its environment; `session`: a folder for mpirun's own files."""
    beside = Path(sys.executable).parent / "mpirun"
    command = [str(beside) if beside.exists() else "mpirun", "-n", str(ranks), sys.executable, *map(str, arguments)]
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    paths_and_ranks = mpi_environment(ranks) | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return command, os.environ | paths_and_ranks | session_environment(session)


def mpirun(ranks: int, *arguments, timeout: float) -> subprocess.CompletedProcess:
    """`mpirun -n ranks python arguments` in its own process group, which is killed on a timeout."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as session:
        command, environment = mpirun_command(ranks, *arguments, session=session)
        with subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        ) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.terminate()  # mpirun ends its ranks
                out, err = process.communicate(timeout=20)
                raise AssertionError(f"{ranks} ranks did not end within {timeout} s\n{err[-3000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)

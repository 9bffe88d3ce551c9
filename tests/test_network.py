"""The network is diffusers' transformer: for every architecture, size and dtype, and TensorRT builds each of them.

Tolerances: float32 5e-6 of the output's norm (forty units in the last place; what is seen is below
ten). In the half precisions a bound in units would say little, so the yardstick is diffusers in the same
dtype: both are measured against diffusers in float32.
"""

from itertools import product

import pytest
import torch
from helpers import MODELS, case, diffusers_output, model_config, relative_error

from mmdit_lib.engine.folder import EngineFolder, plan_file
from mmdit_lib.reports.parity import all_ok, compare, verdict
from mmdit_lib.sd3 import KNOWN_MODELS
from mmdit_lib.sd3.keys import from_diffusers
from mmdit_lib.sd3.transformer import MMDiT

FLOAT32_LIMIT = 5e-6
HALF_RATIO = 1.1
SEEDS = range(5)
SHAPES = [(8, 8), (3, 17), (20, 2)]
"""Square, wide and tall, in patches: rows by columns."""
BATCHES = (1, 2, 3)
TOKENS = (154, 333, 589)
SIZES = list(zip(SHAPES, BATCHES, TOKENS, strict=True))
"""Every shape, batch and length once; the output is checked for all 27."""

each_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name != "sd3.5-medium" else []) for name in MODELS]
)
"""`make quick` runs one of them."""


def test_the_cases_are_the_published_flags():
    for name, known in zip(
        ("sd3-medium", "sd3.5-medium", "sd3.5-large", "sd3.5-large"), KNOWN_MODELS.values(), strict=True
    ):
        small = MODELS[name]
        assert (small.qk_norm, small.patch_size, small.in_channels) == (
            known.qk_norm,
            known.patch_size,
            known.in_channels,
        )
        assert bool(small.dual_attention_layers) == bool(known.dual_attention_layers)
        assert small.num_layers - 1 not in small.dual_attention_layers  # as in the published model


@each_model
def test_float32_output(name):
    c = case(name)
    errors = {}
    for patches, batch, tokens in product(SHAPES, BATCHES, TOKENS):
        inputs = c.inputs(patches=patches, batch=batch, tokens=tokens, seed=batch)
        errors[patches, batch, tokens] = relative_error(c.runner().run(inputs), diffusers_output(c.reference, inputs))
    assert max(errors.values()) <= FLOAT32_LIMIT, errors


@pytest.mark.parametrize(("patches", "batch", "tokens"), SIZES)
@each_model
def test_float32_every_module(name, patches, batch, tokens):
    c = case(name)
    table = compare(
        c.reference, c.runner(), c.inputs(patches=patches, batch=batch, tokens=tokens), tolerance=FLOAT32_LIMIT
    )
    assert all_ok(table), verdict(table)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@each_model
def test_half_precision_is_no_further_from_float32_than_diffusers(name, dtype):
    c = case(name)
    ours, theirs = [], []
    for seed in SEEDS:
        patches, batch, tokens = SIZES[seed % len(SIZES)]
        inputs = c.inputs(patches=patches, batch=batch, tokens=tokens, seed=seed, dtype=dtype)
        exact = diffusers_output(c.reference, {key: value.float() for key, value in inputs.items()})
        ours.append(relative_error(c.runner(dtype).run(inputs), exact))
        theirs.append(relative_error(diffusers_output(c.reference_in(dtype), inputs), exact))
    assert sum(ours) <= HALF_RATIO * sum(theirs), (ours, theirs)
    table = compare(c.reference_in(dtype), c.runner(dtype), inputs)
    assert all_ok(table), verdict(table)


PLANS = {"sd3-medium": ["float16"], "sd3.5-medium": ["bfloat16"], "sd3.5-large": ["float32"]}
"""The other six pairs are built in test_controlnet and test_skip_layers, with the same layers and some more."""


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[pytest.mark.slow] if name != "sd3.5-medium" else [])
        for name in MODELS
        for dtype in PLANS.get(name, ["float32", "float16", "bfloat16"])
    ],
)
def test_tensorrt_builds_the_plan(name, dtype):
    folder = EngineFolder.open(case(name).engine(dtype))
    weights = sum(t.numel() * t.element_size() for t in folder.open_checkpoint().weights().values())
    assert (folder.path / plan_file(0)).stat().st_size == folder.files[plan_file(0)].nbytes > 0.3 * weights
    assert folder.tensorrt and folder.dtype == dtype


@each_model
def test_output_depends_on_every_input_and_weight(name):
    """Otherwise the errors above would prove nothing: perturbing any one tensor changes the output."""
    c = case(name)
    inputs = c.inputs(patches=(2, 3), batch=1, tokens=77)
    inputs |= {"timestep": torch.tensor([417.25])}
    before = c.runner().run(inputs)
    for key, value in inputs.items():
        assert relative_error(c.runner().run(inputs | {key: value * 1.05}), before) > 1e-4, key
    module = c.runner().backend.module
    buffers = {node.meta["weight"]: node.target for node in module.graph.nodes if node.meta.get("weight")}
    assert set(buffers) == {from_diffusers(key) for key in c.reference.state_dict()}
    last = f"transformer_blocks.{c.config.num_layers - 1}"
    generator = torch.Generator().manual_seed(0)
    for weight, buffer in buffers.items():
        # A key's bias adds the same to all scores of a query, which softmax does not see, unless other keys lack it
        # (joint attention: the text's) or a norm follows.
        if weight.endswith("attn2.to_k.bias") and c.config.qk_norm is None:
            continue
        # The last block only attends to the text, so the result of the text's queries is not used.
        if weight.startswith(f"{last}.attn.") and ("add_q_proj" in weight or "norm_added_q" in weight):
            continue
        original = getattr(module, buffer)
        setattr(module, buffer, original + 0.1 * torch.randn(original.shape, generator=generator))
        try:
            assert relative_error(c.runner().run(inputs), before) > 1e-4, weight
        finally:
            setattr(module, buffer, original)


def test_timestep_with_stride_0_and_fractions():
    c = case("sd3.5-medium")
    inputs = c.inputs(batch=3)
    expanded = torch.tensor(999.4375).expand(3)  # as diffusers' pipelines pass it
    assert expanded.stride() == (0,)
    one = c.runner().run(inputs | {"timestep": expanded})
    assert torch.equal(one, c.runner().run(inputs | {"timestep": expanded.contiguous()}))
    assert relative_error(one, diffusers_output(c.reference, inputs | {"timestep": expanded})) <= FLOAT32_LIMIT
    assert not torch.equal(one, c.runner().run(inputs | {"timestep": torch.full((3,), 999.5)}))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_timestep_is_not_rounded_to_half_precision(dtype):
    """Near 1000, float16 has steps of 0.5 and bfloat16 of 4: these two timesteps would be equal."""
    a, b = torch.tensor([998.1]), torch.tensor([998.2])
    assert torch.equal(a.to(getattr(torch, dtype)), b.to(getattr(torch, dtype)))
    c = case("sd3.5-medium")
    runner, inputs = c.runner(dtype), c.inputs(batch=1, dtype=dtype)
    sines = [runner.intermediates(inputs | {"timestep": t})["time_text_embed.time_proj"] for t in (a, b)]
    assert not torch.equal(*sines)


def test_intermediates():
    c = case("sd3.5-medium")
    runner, inputs = c.runner(), c.inputs(patches=(4, 6), batch=2)
    found = runner.intermediates(inputs)
    assert torch.equal(found["output"], runner.run(inputs))
    assert found["transformer_blocks.0.attn.norm_q"].shape == (2, 4, 24, 16)
    assert found["transformer_blocks.1.ff.net.0.proj"].shape == (2, 24, 256)
    assert found["transformer_blocks.0.attn/attention"].shape == (2, 4, 24 + 154, 16)
    named = {name for names in runner.backend.graph.modules.values() for name in names}
    assert named - {"output"} <= set(found), "every module's outputs are kept"


def test_only_the_centre_of_the_position_table_is_in_the_engine():
    c = case("sd3.5-medium")
    (layer,) = [x for x in c.runner().backend.graph.layers if x.attributes.get("weight") == "pos_embed.pos_embed"]
    assert layer.output.shape == (1, 20, 20, 64)  # of 48 x 48


def test_parameters_do_not_need_tensorrt():
    names = MMDiT(model_config()).named_parameters()
    assert names["transformer_blocks.0.ff.net.1.weight"] == (64, 256)

"""The text on a second stream: the same operators in another order, where it pays, and the same bits on a GPU."""

import operator
from collections import Counter

import fp8
import pytest
import torch
from helpers import case
from torch import fx

from mmdit_lib import MMDiTRunner
from mmdit_lib.checkpoint.quantization import Quantization
from mmdit_lib.config import Layout
from mmdit_lib.engine import kernels, torch_ops, two_streams
from mmdit_lib.engine.attention import has_flash_attention_3
from mmdit_lib.engine.cuda_graph import GraphedStep
from mmdit_lib.engine.dry_graph import NoWeights, dry_graph
from mmdit_lib.engine.fp8_passes import FP8_ATTENTION, FP8_EPILOGUES, FP8_GEMMS, FP8_KERNELS
from mmdit_lib.engine.inputs import sample_inputs
from mmdit_lib.engine.lowering import lower
from mmdit_lib.engine.pytorch_backend import GPU_PASSES
from mmdit_lib.engine.rehearsal import meta_weights
from mmdit_lib.engine.two_streams import begin, enter, leave, worthwhile
from mmdit_lib.reports.traffic import group_names
from mmdit_lib.sd3 import SD3

MODELS = ("sd3-medium", "sd3.5-medium", "sd3.5-large")


def lowered(name: str, dtype: str = "float32", **options):
    runner = case(name).runner(dtype)
    graph = dry_graph(runner.folder.model, Layout().at(0), runner.folder.build_config.model_copy(update=options), dtype)
    weights = runner.folder.open_checkpoint(verify=False).weights()
    return runner, lower(graph, weights, passes=GPU_PASSES)


def calls(module) -> list:
    return [node for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("options", [{}, {"skip_layers": True, "controlnet_residuals": 2}], ids=["", "more inputs"])
@pytest.mark.parametrize("name", MODELS)
def test_the_order_changes_and_the_result_does_not(name, options):
    runner, module = lowered(name, **options)
    changed = two_streams.two_streams(module)
    blocks = runner.folder.model.num_layers
    before, after = (Counter(node.target for node in calls(x)) for x in (module, changed))
    assert after[begin] == after[enter] == after[leave] == blocks - 1, "the last block has no text"
    assert after[kernels.projected_attention] == before[kernels.projected_attention] - (blocks - 1)
    added = {begin, enter, leave, getattr, kernels.projected_attention}
    assert {k: n for k, n in before.items() if k not in added} == {k: n for k, n in after.items() if k not in added}
    inside, names = False, []
    for node in calls(changed):
        inside = node.target is enter or (inside and node.target is not leave)
        if inside and node.target is not enter:
            names.append(node.meta["tensor"])
    text = ("to_add_out", "ff_context", "norm2_context", "norm1_context")
    assert {part for part in text if any(part in name for name in names)} >= {"to_add_out", "ff_context"}
    assert not any(part in name for name in names for part in ("to_out", ".ff.", "norm1:", "attn2"))
    given = case(name).inputs(patches=(6, 9), tokens=97, batch=2)
    given["kept_layers"] = torch.arange(blocks) != 1
    names = [node.target for node in module.graph.find_nodes(op="placeholder")]
    residual = torch.randn(2, 6 * 9, runner.folder.model.hidden_size, generator=torch.Generator().manual_seed(0))
    inputs = [given.get(name, residual) for name in names]
    with torch.inference_mode():
        assert torch.equal(changed(*inputs), module(*inputs))


FP8 = FP8_GEMMS + GPU_PASSES + FP8_KERNELS + FP8_EPILOGUES


@pytest.mark.parametrize("name", MODELS[1:])
def test_the_result_is_the_same_with_attention_in_fp8(name):
    """It has two results: all rows without the mean of the values, and that mean, which both streams read."""
    folder = fp8.engine(name, "bfloat16", fp8_attention=True)
    runner = MMDiTRunner.from_engine(folder, backend="pytorch", device="cpu")
    module = lower(runner.backend.graph, runner.backend._weights, passes=FP8_ATTENTION + FP8)
    assert begun(module) == runner.folder.model.num_layers - 1
    inputs, _ = runner.prepare(sample_inputs(runner.folder, batch=2, text_tokens=97))
    given = [inputs[node.target] for node in module.graph.find_nodes(op="placeholder")]
    with torch.inference_mode():
        assert torch.equal(two_streams.two_streams(module)(*given), module(*given))
    joint = next(node for node in module.graph.nodes if two_streams._is_joint(node))
    mean = next(node for node in joint.users if node.kwargs["index"] == 1)
    with module.graph.inserting_after(mean):
        copy = module.graph.call_function(torch.clone, (mean,))
    next(iter(mean.users)).replace_input_with(mean, copy)
    assert begun(module) == runner.folder.model.num_layers - 2, "the second stream would not wait for it"


def computed_on(module) -> dict:
    """The stream on which each call runs, by node: 0 and, for the text, 1."""
    streams, inside = {}, 0
    for node in calls(module):
        inside = {enter: 1, leave: 0}.get(node.target, inside)
        streams[node] = inside
    return streams


VIEWS = (torch_ops.item, torch_ops.slice_, torch_ops.shuffle, torch_ops.unbind, getattr)


@pytest.mark.parametrize("attention", [False, True], ids=["", "attention in FP8"])
@pytest.mark.parametrize("excluded", [(), ("*.norm1*.linear",)], ids=["", "modulation in FP8"])
def test_the_text_reads_nothing_that_the_first_stream_computes_beside_it(excluded, attention):
    """The second stream waits for the image's attention only."""
    folder = fp8.engine("sd3.5-medium", "bfloat16", fp8_attention=attention)
    runner = MMDiTRunner.from_engine(folder, backend="pytorch", device="cpu")
    model, build = runner.folder.model, runner.folder.build_config
    scheme = Quantization.fp8(SD3)
    kept = tuple(pattern for pattern in scheme.exclude_modules if pattern not in excluded)
    scheme = scheme.model_copy(update={"exclude_modules": kept})
    graph = dry_graph(model, Layout().at(0), build, "bfloat16", scheme)
    weights = NoWeights(model, "bfloat16", Layout(), scheme).weights(0)
    module = two_streams.two_streams(lower(graph, weights, passes=FP8_ATTENTION + FP8 if attention else FP8))
    streams, since = computed_on(module), {}
    for node in calls(module):
        if node.target is begin:
            since = {}
        since[node] = streams[node]
        if streams[node] == 1:
            sources = list(node.all_input_nodes)
            while sources:
                source = sources.pop()
                if source.target in VIEWS:
                    sources += source.all_input_nodes
                elif source.target not in (begin, torch_ops.shape_of) and source in since:
                    assert since[source] == 1, (node, source)
    assert begin in {node.target for node in streams}


def begun(module) -> int:
    return Counter(node.target for node in calls(two_streams.two_streams(module)))[begin]


def test_streams_that_cannot_be_separated_stay_on_one():
    """In the first of three blocks, an operator reads image and text, or the slices are not those of the streams."""
    _, module = lowered("sd3.5-large")
    image, _ = next(node for node in module.graph.nodes if node.target is kernels.projected_attention).users
    assert begun(module) == 3
    span = list(module.graph.nodes)[list(module.graph.nodes).index(image) :]
    of_image = next(node for node in span if node.target is torch_ops.linear)
    of_text = [node for node in span if node.target is kernels.gated_norm][1]
    before = of_text.args
    of_text.args = (of_image, *before[1:])
    assert begun(module) == 2
    of_text.args = before
    assert begun(module) == 3
    joint, _, length = image.args
    for wrong in ((joint, (1,), length), (joint,)):
        image.args = wrong
        assert begun(module) == 2


@pytest.mark.parametrize(
    ("layout", "moves"), [(dict(cfg_size=2), True), (dict(tp_size=2), False), (dict(cp_size=2), False)], ids=str
)
def test_several_ranks(layout, moves):
    """cfg: as on one rank. tp and cp: the operators exchange data, so nothing moves."""
    layout = Layout(**layout)
    runner = case("sd3.5-medium").runner()
    config, model = runner.folder.build_config.model_copy(update={"max_batch_size": 2}), runner.folder.model
    graph = dry_graph(model, layout.at(0), config, "float32")
    weights = meta_weights(SD3, model, layout, "float32")
    module = lower(graph, weights, device="meta", groups=group_names(graph), passes=GPU_PASSES)
    assert (two_streams.two_streams(module) is not module) is moves


def test_a_network_without_fused_attention_stays():
    _, module = lowered("sd3.5-medium")
    plain = lower(case("sd3.5-medium").runner().backend.graph, case("sd3.5-medium").runner().backend._weights)
    assert two_streams.two_streams(plain) is plain and two_streams.two_streams(module) is not module


@pytest.mark.parametrize(
    ("batch", "heads", "image", "expected"),
    [
        (1, 24, 4096, True),  # SD3.5-medium: 4.4 rounds, 4.0 for the image
        (2, 24, 4096, False),  # 8.7 and 8.0
        (1, 38, 4096, False),  # SD3.5-large: 6.9 and 6.3
        (2, 38, 4096, False),  # 13.8 and 12.7
        (1, 24, 1024, False),  # 512x512: 1.5 and 1.1
    ],
)
def test_where_it_pays(batch, heads, image, expected):
    """On an H100 with its 132 multiprocessors."""
    assert worthwhile(batch, heads, image, 333, 132) is expected


def add_mean(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return x + mean.flatten(1)[:, None]


def blocks(count: int, heads: int, image: int, text: int, in_fp8: bool) -> fx.GraphModule:
    """Joint attention, output projections and MLPs of both streams, with random weights, without TensorRT."""
    size, generator = 64, torch.Generator().manual_seed(0)
    root, graph, width = torch.nn.Module(), fx.Graph(), heads * 64

    def weight(*shape: int) -> fx.Node:
        name = f"w{len(root._buffers)}"
        root.register_buffer(name, (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).bfloat16().cuda())
        return graph.get_attr(name)

    def linear(x: fx.Node, out: int, inner: int) -> fx.Node:
        return graph.call_function(torch_ops.linear, (x, weight(1, out, inner), weight(1, 1, out)))

    streams = [graph.placeholder("x"), graph.placeholder("c")]
    root.register_buffer("value_scale", torch.tensor(2.0**-4).cuda())
    as_slice = dict(axes=[2], start=None, shape=None, stride=[1], mode="STRICT_BOUNDS")
    as_rows = dict(first_transpose=[0, 2, 1, 3], reshape_dims=[0, 0, width])
    as_rows |= dict(second_transpose=None, zero_is_placeholder=True)
    for _ in range(count):
        parts = [
            y for x in streams
            for y in (x, weight(1, 3 * width, width), weight(1, 1, 3 * width), weight(size), weight(size))
        ]  # fmt: skip
        options = dict(inputs=3, heads=heads, eps=1e-6, scale=size**-0.5)
        value_scale = [graph.get_attr("value_scale")] if in_fp8 else []
        joint = graph.call_function(kernels.projected_attention, (*parts, *value_scale), options)
        if in_fp8:
            joint, mean = (graph.call_function(torch_ops.item, (joint,), {"index": i}) for i in range(2))
        starts = ((0,), (image,)), ((image,), (text,))
        rows = [graph.call_function(torch_ops.slice_, (joint, *span), as_slice) for span in starts]
        rows = [
            graph.call_function(torch_ops.shuffle, (x,), {"first_transpose": [0, 2, 1, 3], **as_rows}) for x in rows
        ]
        if in_fp8:
            rows = [graph.call_function(add_mean, (x, mean)) for x in rows]
        rows = [linear(x, width, width) for x in rows]
        streams = [graph.call_function(operator.add, pair) for pair in zip(streams, rows, strict=True)]
        rows = [graph.call_function(torch_ops.gelu_tanh, (linear(x, 4 * width, width),)) for x in streams]
        rows = [linear(x, width, 4 * width) for x in rows]
        streams = [graph.call_function(operator.add, pair) for pair in zip(streams, rows, strict=True)]
    graph.output(graph.call_function(torch.cat, (streams, 1)))
    return fx.GraphModule(root, graph)


@pytest.mark.gpu
@pytest.mark.parametrize("in_fp8", [False, True])
def test_a_cuda_graph_gives_the_same_bits(in_fp8):
    """At SD3.5-medium's sizes, for 20 images. If memory were reused too early, some bits would differ."""
    if not has_flash_attention_3(torch.device("cuda")):
        pytest.skip("needs a Hopper GPU and fa3-fwd")
    heads, image, text = 24, 4096, 333
    module = blocks(4, heads, image, text, in_fp8)
    changed = two_streams.two_streams(module)
    assert Counter(node.target for node in calls(changed))[begin] == 3, "the last block's text has no block after it"
    assert worthwhile(1, heads, image, text, two_streams.processors_of(torch.device("cuda", 0)))
    step = GraphedStep(lambda inputs: changed(*inputs.values()))
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.inference_mode():
        for _ in range(20):
            inputs = {
                name: torch.randn(1, tokens, heads * 64, device="cuda", generator=generator).bfloat16()
                for name, tokens in (("x", image), ("c", text))
            }
            assert torch.equal(step(inputs), module(*inputs.values()))

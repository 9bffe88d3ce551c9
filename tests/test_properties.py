"""Properties of the validators and mappings, on inputs that Hypothesis makes up."""

import json
import string

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from mmdit_lib.checkpoint.manifest import CheckpointConfig
from mmdit_lib.checkpoint.source import VaeConfig, WeightIndex
from mmdit_lib.checkpoint.tensor_file import read_header
from mmdit_lib.config import BuildConfig, Layout, Resolution
from mmdit_lib.engine.folder import EngineConfig
from mmdit_lib.engine.graph import Graph
from mmdit_lib.files import FileRecord, Files, read_json
from mmdit_lib.files.records import to_json
from mmdit_lib.sd3 import SD3, SD3Config
from mmdit_lib.sd3.config import infer_config
from mmdit_lib.sd3.keys import from_diffusers, to_diffusers

# The same inputs in every run, and no deadline: a busy machine must not fail a test.
properties = settings(max_examples=60, deadline=None, derandomize=True, database=None)

sizes = st.integers(1, 12)
layouts = st.builds(Layout, tp_size=sizes, cp_size=sizes, cfg_size=st.sampled_from([1, 2]))


@st.composite
def configs(draw) -> SD3Config:
    """Any small model."""
    heads, head_dim, layers = draw(st.integers(1, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    some = st.integers(1, 30)
    return SD3Config(
        sample_size=draw(some), patch_size=draw(st.integers(1, 4)), in_channels=draw(some), out_channels=draw(some),
        num_layers=layers, attention_head_dim=head_dim, num_attention_heads=heads, joint_attention_dim=draw(some),
        caption_projection_dim=heads * head_dim, pooled_projection_dim=draw(some), pos_embed_max_size=draw(some),
        dual_attention_layers=tuple(sorted(draw(st.sets(st.integers(0, layers - 1))))),
        qk_norm=draw(st.sampled_from([None, "rms_norm"])),
    )  # fmt: skip


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def refused_or(function, *arguments):
    """The result, or None if a one-line `ValueError` of our own is raised; any other exception fails the test."""
    try:
        return function(*arguments)
    except ValueError as error:
        assert type(error) is ValueError and str(error).isprintable(), repr(error)
        return None


# Layouts ---------------------------------------------------------------------------------------------


@properties
@given(layouts)
def test_ranks_are_positions_in_a_grid(layout):
    grid = np.arange(layout.world_size).reshape(layout.cfg_size, layout.cp_size, layout.tp_size)
    for mapping in layout.ranks():
        cfg, cp, tp = mapping.cfg_rank, mapping.cp_rank, mapping.tp_rank
        assert grid[cfg, cp, tp] == mapping.rank
        assert mapping.tp_group == tuple(grid[cfg, cp, :])
        assert mapping.cp_group == tuple(grid[cfg, :, tp])
        assert mapping.output_group == tuple(grid[:, :, tp].flatten())


@properties
@given(layouts)
def test_groups_of_a_kind_partition_the_ranks(layout):
    for kind in range(3):
        groups = {mapping.groups[kind] for mapping in layout.ranks()}
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))


@properties
@given(configs(), st.sampled_from(["megatron", "trtllm"]), st.data())
def test_shards_put_together_are_the_tensor(config, name, data):
    """Concatenated where a shard is smaller than the tensor; whole where it is not."""
    sharding, parameters = SD3.shardings[name], SD3.parameters(config)
    heads, rows = config.num_attention_heads, config.patch_size**2 * config.out_channels
    legal = [t for t in range(1, heads + 1) if heads % t == 0 and (name == "megatron" or rows % t == 0)]
    tp_size = data.draw(st.sampled_from(legal))
    config.check_layout(Layout(tp_size=tp_size, tp_layout=name))
    for tensor in data.draw(st.lists(st.sampled_from(sorted(parameters)), min_size=1, max_size=8)):
        full = torch.randn(parameters[tensor])
        parts = [sharding.shard(tensor, full, tp_size, rank) for rank in range(tp_size)]
        assert {tuple(p.shape) for p in parts} == {sharding.local_shape(tensor, tuple(full.shape), tp_size)}
        smaller = [dim for dim in range(full.dim()) if parts[0].shape[dim] < full.shape[dim]]
        assert len(smaller) <= 1
        assert torch.equal(torch.cat(parts, smaller[0]) if smaller else parts[-1], full)


# Names -----------------------------------------------------------------------------------------------


@properties
@given(configs())
def test_names_of_parameters_there_and_back(config):
    names = list(SD3.parameters(config))
    assert [from_diffusers(to_diffusers(name)) for name in names] == names
    assert len({to_diffusers(name) for name in names}) == len(names)


parts = st.sampled_from(["transformer_blocks", "ff", "ff_context", "net", "proj", "weight", "0", "1", "2", "17", ""])


@properties
@given(st.lists(parts, max_size=6).map(".".join) | st.text())
def test_any_name_there_and_back(name):
    for there, back in ((from_diffusers, to_diffusers), (to_diffusers, from_diffusers)):
        try:
            other = there(name)
        except ValueError:
            continue
        assert back(other) == name


# Sizes -----------------------------------------------------------------------------------------------


@properties
@given(st.integers(1, 65536), st.integers(1, 65536))
def test_resolutions_there_and_back(height, width):
    resolution = Resolution(height=height, width=width)
    assert Resolution.read(str(resolution)) == Resolution.read(resolution) == resolution
    assert Resolution.read(f" {height} X {width} ") == resolution
    assert Resolution.read(height) == Resolution(height=height, width=height)


@properties
@given(st.text(string.digits + "xX -.²") | st.text() | st.integers())
def test_what_is_read_as_a_resolution(text):
    found = refused_or(Resolution.read, text)
    if found is not None:
        numbers = [int(part) for part in str(text).lower().split("x")]
        assert (found.height, found.width) == (numbers[0], numbers[-1])


small = st.integers(-1, 9)


@properties
@given(st.lists(small, min_size=3, max_size=3), st.lists(small, min_size=6, max_size=6), small, st.sampled_from([1, 2]))
def test_profiles_are_ordered(tokens, sides, batch, cfg_size):
    ends = ("min", "opt", "max")
    values = {f"{end}_text_tokens": count for end, count in zip(ends, tokens, strict=True)}
    pairs = zip(ends, sides[::2], sides[1::2], strict=True)
    values |= {f"{end}_resolution": {"height": h, "width": w} for end, h, w in pairs} | {"max_batch_size": batch}
    legal = batch >= 1 and min(*tokens, *sides) >= 1 and all(sorted(x) == x for x in (tokens, sides[::2], sides[1::2]))
    found = refused_or(BuildConfig.parse, values, "profile")
    assert (found is not None) == legal
    if found and batch % cfg_size == 0:
        low, middle, high = found.sizes(cfg_size)
        assert all(a <= b <= c for a, b, c in zip(low, middle, high, strict=True))
        assert [size.batch % cfg_size for size in (low, middle, high)] == [0, 0, 0] and high.batch == batch


# Configs ---------------------------------------------------------------------------------------------


@properties
@given(configs())
def test_model_configs_there_and_back(config):
    text = json.dumps(config.to_diffusers())
    assert SD3Config.from_diffusers(json.loads(text)) == config
    written = json.loads(json.dumps(config.to_trtllm("somewhere")))
    assert SD3Config.parse_known(written, "config.json") == config
    assert infer_config(SD3.parameters(config), config) == config


@properties
@given(configs(), st.sampled_from(sorted(SD3Config.model_fields)), json_values)
def test_any_value_in_a_model_config(config, key, value):
    """A replaced value is refused in a line that names its key, or kept as it is."""
    values = config.to_diffusers() | {key: value}
    try:
        found = SD3Config.from_diffusers(json.loads(json.dumps(values)))
    except ValueError as error:
        assert key in str(error) and str(error).isprintable()
    else:
        kept = getattr(found, key)
        assert (list(kept) if isinstance(kept, tuple) else kept) == value or (key == "out_channels" and value is None)


@pytest.mark.parametrize("kind", [CheckpointConfig, EngineConfig, WeightIndex, VaeConfig, Layout, BuildConfig])
def test_any_json_as_a_config(kind):
    @properties
    @given(json_values | st.dictionaries(st.sampled_from(sorted(kind.model_fields)), json_values))
    def check(values):
        refused_or(kind.parse, values, "config.json")

    check()


@properties
@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9_.-]{0,20}", fullmatch=True), st.integers(0, 2**50)))
def test_manifests_there_and_back(contents):
    files = {name: FileRecord(name, nbytes, f"{nbytes:064x}") for name, nbytes in contents.items()}
    stored = json.loads(json.dumps(to_json(files)))
    assert TypeAdapter(Files).validate_python(stored) == files


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("any") / "file"


def test_any_bytes_as_a_file(file):
    headers = json_values.map(json.dumps).map(str.encode).map(lambda text: len(text).to_bytes(8, "little") + text)

    @properties
    @given(st.binary() | json_values.map(json.dumps).map(str.encode) | headers)
    def check(content):
        file.write_bytes(content)
        for read in (read_json, read_header, Graph.load):
            refused_or(read, file)

    check()


entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I64", "F8_E4M3", "X"]),
        "shape": st.lists(st.integers(-1, 4), max_size=3),
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2),
    }
)


def test_tensors_of_a_header_cover_the_data(file):
    """Whatever offsets a header has: the tensors that are read cover the data, each byte once."""

    @properties
    @given(st.dictionaries(st.sampled_from("abc"), entry), st.integers(0, 40))
    def check(header, nbytes):
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(nbytes))
        tensors = refused_or(read_header, file)
        if tensors is not None:
            covered = [byte for t in tensors.values() for first, n in t.spans for byte in range(first, first + n)]
            assert sorted(covered) == list(range(8 + len(text), file.stat().st_size))

    check()

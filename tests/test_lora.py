"""LoRAs fused by `convert`: equal to diffusers' `load_lora_weights` and `fuse_lora`, from every format it reads."""

import json
import logging
import re
from pathlib import Path

import helpers
import loras
import pytest
import torch
from helpers import diffusers_output, mmdit, quiet, random_transformer, relative_error
from safetensors.torch import load_file, save_file

from mmdit_lib import Checkpoint, MMDiTRunner, build, convert, export
from mmdit_lib.checkpoint.lora_source import find_lora, with_scale, with_scales
from mmdit_lib.sd3 import SD3
from mmdit_lib.sd3.keys import from_diffusers

BOUND = 5e-6
"""Of a relative error in float32: 40 times the machine epsilon, as for every parity test."""
EPSILON = torch.finfo(torch.float32).eps
needs_peft = pytest.mark.skipif(not loras.has_peft(), reason="diffusers needs peft for LoRAs: pip install peft")


@pytest.fixture(scope="module")
def case() -> helpers.Case:
    return helpers.case("sd3.5-medium")


@pytest.fixture(scope="module")
def state(case) -> loras.TENSORS:
    return case.reference.state_dict()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="module")
def style(root, state) -> Path:
    return loras.write(root / "style.safetensors", loras.random_lora(state))


def assert_equal(checkpoint: Checkpoint, expected: loras.TENSORS, bound: float = 0.0) -> None:
    found = checkpoint.weights()
    assert len(found) == len(expected)
    errors = {name: relative_error(found[from_diffusers(name)], tensor) for name, tensor in expected.items()}
    assert max(errors.values()) <= bound, max(errors, key=errors.get)


# Equal to diffusers ----------------------------------------------------------------------------------


def lora_config(**fields):
    from peft import LoraConfig

    return LoraConfig(**dict(r=4, lora_alpha=6, target_modules=["to_q"]) | fields)


def written_by_diffusers(folder: Path, lora: loras.TENSORS, **fields) -> Path:
    from diffusers import StableDiffusion3Pipeline

    modules = sorted({name.partition(".lora_")[0] for name in lora})
    config = lora_config(target_modules=modules, **fields).to_dict()
    StableDiffusion3Pipeline.save_lora_weights(
        folder, transformer_lora_layers=lora, transformer_lora_adapter_metadata=config
    )
    return folder / "pytorch_lora_weights.safetensors"


def with_biases(state: loras.TENSORS) -> loras.TENSORS:
    lora = loras.random_lora(state)
    biases = {f"{m}.lora_B.bias": torch.full((len(w),), 0.1) for m, w in loras.layers(state).items()}
    return dict(sorted((lora | biases).items()))


def with_magnitudes(state: loras.TENSORS) -> loras.TENSORS:
    lora = loras.random_lora(state)
    for module, weight in loras.layers(state).items():
        norms = 1.1 * weight.flatten(1).norm(dim=1)
        lora[f"{module}.lora_magnitude_vector"] = norms if weight.dim() == 2 else norms.view(1, -1, 1, 1)
    return lora


def with_two_ranks(state: loras.TENSORS) -> loras.TENSORS:
    return loras.random_lora(state) | loras.random_lora(state, rank=2, only="to_k")


def older(lora: loras.TENSORS) -> loras.TENSORS:
    """diffusers' names before 0.22, for the attention's projections."""
    spelled = {}
    for name, tensor in lora.items():
        module, part = re.fullmatch(r"(.*)\.lora_([AB])\.weight", name).groups()
        path, layer = re.fullmatch(r"(.*\.attn)\.(to_[qkv]|to_out)(?:\.0)?", module).groups()
        spelled[f"{path}.processor.{layer}_lora.{'down' if part == 'A' else 'up'}.weight"] = tensor
    return spelled


def down_and_up(lora: loras.TENSORS) -> loras.TENSORS:
    return {n.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): t for n, t in lora.items()}


PROJECTIONS = r"\.attn\.(to_[qkv]|to_out)"
ALPHAS = {"^proj_out": 3, "to_v": 5, "attn2.to_q": 7}
FORMATS = {
    "no metadata": lambda folder, state: loras.write(folder / "a.safetensors", loras.random_lora(state)),
    "two ranks": lambda folder, state: loras.write(folder / "a.safetensors", with_two_ranks(state)),
    "biases": lambda folder, state: loras.write(folder / "a.safetensors", with_biases(state)),
    "float16": lambda folder, state: loras.write(
        folder / "a.safetensors", {name: t.half() for name, t in loras.random_lora(state).items()}
    ),
    "older names": lambda folder, state: loras.write(
        folder / "a.safetensors",
        older({n: t for n, t in loras.random_lora(state).items() if re.search(PROJECTIONS, n)}),
    ),
    "down and up": lambda folder, state: loras.write(
        folder / "a.safetensors", down_and_up(loras.random_lora(state, only="to_"))
    ),
    "alpha": lambda folder, state: written_by_diffusers(folder, loras.random_lora(state)),
    "alphas": lambda folder, state: written_by_diffusers(
        folder, with_two_ranks(state), alpha_pattern=ALPHAS, rank_pattern={"to_k": 2}
    ),
    "rank-stabilized": lambda folder, state: written_by_diffusers(folder, loras.random_lora(state), use_rslora=True),
    "biases with alpha": lambda folder, state: written_by_diffusers(folder, with_biases(state), lora_bias=True),
    "dora": lambda folder, state: written_by_diffusers(folder, with_magnitudes(state), use_dora=True),
}


@needs_peft
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_diffusers_weights(case, state, root, tmp_path, name):
    path = FORMATS[name](root / name, state)
    reference = loras.fused_by_diffusers(random_transformer(case.config), [(path, 0.7)]).state_dict()
    changed = [n for n, w in reference.items() if not torch.equal(w, state[n])]
    assert len(changed) >= 12, "diffusers did not use the LoRA"
    assert_equal(quiet(case.transformer, tmp_path / "checkpoint", loras=[(path, 0.7)]), reference, EPSILON)


@needs_peft
def test_a_file_of_a_transformer_alone(case, state, tmp_path):
    """`transformer.save_lora_adapter` writes names without a prefix."""
    theirs = random_transformer(case.config)
    theirs.add_adapter(lora_config(target_modules=["to_q", "proj_out"]), "mine")
    lora = loras.random_lora(state, only="to_q") | loras.random_lora(state, only="proj_out")
    theirs.load_state_dict({n.replace(".weight", ".mine.weight"): t for n, t in lora.items()}, strict=False)
    theirs.save_lora_adapter(tmp_path / "lora", "mine")
    theirs.fuse_lora(lora_scale=0.7)
    theirs.unload_lora()
    assert_equal(
        quiet(case.transformer, tmp_path / "checkpoint", loras=[(tmp_path / "lora", 0.7)]), theirs.state_dict()
    )


@needs_peft
def test_a_folder_of_peft(case, state, tmp_path):
    from peft import get_peft_model

    model = get_peft_model(random_transformer(case.config), lora_config(target_modules=["to_q", "net.2"]))
    lora = loras.random_lora(state, only="to_q") | loras.random_lora(state, only="net.2")
    named = {f"base_model.model.{n}".replace(".weight", ".default.weight"): t for n, t in lora.items()}
    model.load_state_dict(named, strict=False)
    model.save_pretrained(tmp_path / "lora")
    expected = model.merge_and_unload().state_dict()
    assert_equal(quiet(case.transformer, tmp_path / "checkpoint", loras=[(tmp_path / "lora", 1)]), expected)


@needs_peft
@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium", "sd3.5-large", "patch-3-table-20"])
@pytest.mark.parametrize("scales", [(0.8,), (0.8, -0.5)], ids=["one", "two"])
def test_outputs_are_diffusers(name, scales, tmp_path):
    case = helpers.case(name)
    state = case.reference.state_dict()
    files = [loras.write(tmp_path / f"{i}.safetensors", loras.random_lora(state, seed=i)) for i in range(len(scales))]
    given = list(zip(files, scales, strict=True))
    reference = loras.fused_by_diffusers(random_transformer(case.config), given)
    convert(case.transformer, tmp_path / "checkpoint", loras=given, progress=False)
    sizes = dict(
        min_resolution=str(2 * case.step), opt_resolution=str(8 * case.step), max_resolution=str(9 * case.step)
    )
    build(tmp_path / "checkpoint", tmp_path / "engine", max_batch_size=3, plan=False, progress=False, **sizes)
    runner = MMDiTRunner.from_engine(tmp_path / "engine", backend="pytorch", device="cpu")
    for batch, patches, tokens in [(1, (3, 5), 154), (2, (7, 9), 333), (3, (8, 8), 77)]:
        inputs = case.inputs(batch=batch, patches=patches, tokens=tokens)
        expected = diffusers_output(reference, inputs)
        assert relative_error(runner.run(inputs), expected) < BOUND
        assert relative_error(diffusers_output(case.reference, inputs), expected) > 0.05, "the LoRA changes nothing"


# sd-scripts ------------------------------------------------------------------------------------------


def kohya(original: loras.TENSORS, seed: int = 0, rank: int = 4, alpha: float = 6.0) -> loras.TENSORS:
    """A LoRA of every layer of the original layout, as sd-scripts names it."""
    found = {}
    for name, tensor in loras.random_lora(original, seed, rank).items():
        module, part = re.fullmatch(r"(.*)\.lora_([AB])\.weight", name).groups()
        module = f"lora_unet_{module.replace('.', '_')}"
        found[f"{module}.lora_{'down' if part == 'A' else 'up'}.weight"] = tensor
        if alpha:
            found[f"{module}.alpha"] = torch.tensor(alpha)
    return found


@pytest.mark.parametrize("alpha", [6.0, 0.0], ids=["alpha", "no alpha"])
def test_sd_scripts_names_are_those_of_the_original_layout(case, tmp_path, alpha):
    """Fusing before and after diffusers' conversion of the layout gives the same weights."""
    original = helpers.original_layout(case.reference, prefix="")
    lora = loras.random_lora(original)
    save_file(kohya(original, alpha=alpha), tmp_path / "lora.safetensors")
    scale = 0.7 * (alpha or 4) / 4
    changed = {n: t.float() for n, t in loras.fused(original, [(lora, scale)]).items()}
    save_file({n: t.contiguous() for n, t in changed.items()}, tmp_path / "changed.safetensors")
    expected = quiet(tmp_path / "changed.safetensors", tmp_path / "expected").weights()
    found = quiet(case.transformer, tmp_path / "found", loras=[(tmp_path / "lora.safetensors", 0.7)]).weights()
    # The expected weights were rounded once, from float64; the sum in float32 is rounded two or three times.
    assert max(relative_error(found[name], tensor) for name, tensor in expected.items()) < 2 * EPSILON
    before = Checkpoint.open(case.checkpoint()).weights()
    changed = [name for name, weight in before.items() if not torch.equal(weight, found[name])]
    assert len(changed) == len(loras.layers(case.reference.state_dict()))


# Whatever convert does ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["megatron", "trtllm"])
def test_ranks_hold_their_parts_of_the_fused_weights(case, style, tmp_path, layout):
    whole = quiet(case.transformer, tmp_path / "whole", loras=[(style, 0.7)]).weights()
    options = dict(tp_size=2, tp_layout=layout, loras=[(style, 0.7)])
    parts = quiet(case.transformer, tmp_path / "parts", **options)
    sharding = SD3.shardings[layout]
    for rank in range(2):
        found = parts.weights(rank)
        assert all(torch.equal(found[n], sharding.shard(n, w, 2, rank)) for n, w in whole.items())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_sum_is_rounded_once(case, state, style, tmp_path, dtype):
    found = quiet(case.transformer, tmp_path / "checkpoint", dtype=dtype, loras=[(style, 0.7)]).weights()
    exact = loras.fused(state, [(loras.random_lora(state), 0.7)])
    # Half the machine epsilon for the cast; the rounding of the sum in float32 is far below the other half.
    bound = torch.finfo(getattr(torch, dtype)).eps
    for name, weight in exact.items():
        error = (found[from_diffusers(name)] - weight).abs()
        assert (error <= bound * weight.abs().clamp(min=1e-3)).all(), name


def test_a_single_file_in_the_original_layout(case, style, tmp_path):
    save_file(helpers.original_layout(case.reference), tmp_path / "model.safetensors")
    found = quiet(tmp_path / "model.safetensors", tmp_path / "found", loras=[(style, 0.7)]).weights()
    expected = quiet(case.transformer, tmp_path / "expected", loras=[(style, 0.7)]).weights()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_without_loras_nothing_is_recorded(case):
    assert "loras" not in json.loads((case.checkpoint() / "config.json").read_text())["mmdit_lib"]


def test_from_the_command_to_inspect_parity_and_export(case, state, style, tmp_path):
    options = ["--model_path", case.transformer, "--output_dir", tmp_path / "checkpoint", "--no-progress"]
    code, out, err = mmdit("convert", *options, "--lora", f"{style}:0.7", "--lora", style)
    assert code == 0, err
    records = Checkpoint.open(tmp_path / "checkpoint").manifest.loras
    assert [(lora.source, lora.scale) for lora in records] == [(str(style), 0.7), (str(style), 1.0)]
    build(tmp_path / "checkpoint", tmp_path / "engine", plan=False, progress=False)
    for folder in ("checkpoint", "engine"):
        _, out, _ = mmdit("inspect", tmp_path / folder)
        assert out.count(records[0].sha256[:12]) == 2 and "(scale 0.7, sha256" in " ".join(out.split())
    code, out, err = mmdit("parity", "--model_path", case.transformer, "--engine_dir", tmp_path / "engine")
    assert code == 0 and "agree" in out, out + err
    export(tmp_path / "checkpoint", tmp_path / "exported", progress=False)
    lora = loras.random_lora(state)
    exported = load_file(tmp_path / "exported" / "diffusion_pytorch_model.safetensors")
    exact = loras.fused(state, [(lora, 0.7), (lora, 1.0)])
    assert max(relative_error(exported[name], weight) for name, weight in exact.items()) < 3 * EPSILON


def test_parity_notices_another_lora(case, state, tmp_path):
    path = loras.write(tmp_path / "lora.safetensors", loras.random_lora(state))
    convert(case.transformer, tmp_path / "checkpoint", loras=[path], progress=False)
    build(tmp_path / "checkpoint", tmp_path / "engine", plan=False, progress=False)
    loras.write(path, loras.random_lora(state, seed=1))
    code, _, err = mmdit("parity", "--model_path", case.transformer, "--engine_dir", tmp_path / "engine")
    assert code == 1 and "lora.safetensors has changed since it was fused" in err


def test_text_encoders_are_left_out_with_a_warning(case, state, style, tmp_path, caplog):
    extra = {f"text_encoder.layers.{i}.lora_{part}.weight": torch.ones(2, 2) for i in range(3) for part in "AB"}
    extra |= {"lora_te3_encoder.alpha": torch.tensor(1.0)}
    lora = loras.prefixed(loras.random_lora(state)) | extra
    path = loras.write(tmp_path / "lora.safetensors", lora, prefix="")
    with caplog.at_level(logging.WARNING, logger="mmdit_lib"):
        found = quiet(case.transformer, tmp_path / "found", loras=[path]).weights()
    assert [r.getMessage() for r in caplog.records] == [
        f"LoRA {path}: ignoring 7 tensors for text encoders; only the transformer's are fused"
    ]
    expected = quiet(case.transformer, tmp_path / "expected", loras=[style]).weights()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


# Where LoRAs are -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("style.safetensors", ("style.safetensors", 1.0)),
        ("style.safetensors:0.8", ("style.safetensors", 0.8)),
        ("owner/name:-1.5", ("owner/name", -1.5)),
        ("owner/name/file.safetensors:2", ("owner/name/file.safetensors", 2.0)),
        ("C:/styles/a", ("C:/styles/a", 1.0)),
        ("a:b:1e-1", ("a:b", 0.1)),
        (":0.5", (":0.5", 1.0)),
        (("a:0.5", 0.3), ("a:0.5", 0.3)),
        (["a", "2"], ("a", 2.0)),
    ],
)
def test_a_scale_is_the_number_after_the_last_colon(text, expected):
    assert with_scale(text) == expected


def test_a_file_with_a_colon_and_a_number_in_its_name(tmp_path):
    (tmp_path / "style:0.5").touch()
    assert with_scale(tmp_path / "style:0.5") == (tmp_path / "style:0.5", 1.0)
    assert with_scale(f"{tmp_path}/style:0.5:0.25") == (f"{tmp_path}/style:0.5", 0.25)


@pytest.mark.parametrize(
    "lora", [("a", "b"), ("a", None), ("a",), ("a", 1, 2), ("a", 10**400), (1, 1), None, 0.5, {"a": 1, "b": 2}]
)
def test_neither_a_path_nor_a_pair(lora):
    with pytest.raises(ValueError, match=r"LoRA .*: give a path, or a path and a number as its scale"):
        with_scales([lora])


def test_a_path_is_not_a_list_of_loras():
    with pytest.raises(ValueError, match=r"LoRA ab: give a list of LoRAs, for instance \['ab'\]"):
        with_scales("ab")
    with pytest.raises(ValueError, match=r"LoRAs None: give a list; an empty one for none"):
        with_scales(None)


def test_the_file_of_a_folder(tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    for name in ("another.safetensors", "pytorch_lora_weights.safetensors"):
        (folder / name).touch()
        assert find_lora(folder).path.name == name
    (folder / "pytorch_lora_weights.safetensors").rename(folder / "x.safetensors")
    with pytest.raises(ValueError, match="lora has 2 safetensors files; give the file"):
        find_lora(folder)


def test_hub_ids(tmp_path, monkeypatch):
    asked = []

    def download(repository, patterns, revision):
        asked.append((repository, patterns))
        return tmp_path, "c0ffee"

    monkeypatch.setattr("mmdit_lib.checkpoint.hub.download", download)
    for name in ("pytorch_lora_weights.safetensors", "b.safetensors"):
        (tmp_path / name).touch()
    known = ["pytorch_lora_weights.safetensors", "adapter_model.safetensors"]
    assert find_lora("owner/name") == (tmp_path / known[0], "c0ffee")
    assert find_lora("owner/name/b.safetensors") == (tmp_path / "b.safetensors", "c0ffee")
    assert asked == [("owner/name", [*names, "adapter_config.json"]) for names in (known, ["b.safetensors"])]
    with pytest.raises(ValueError, match=r"owner/name has no file c\.safetensors"):
        find_lora("owner/name/c.safetensors")
    for missing in ("missing.safetensors", "styles/missing.safetensors", "/styles/missing.safetensors"):
        with pytest.raises(ValueError, match=f"^{missing} does not exist and is not a hub id"):
            find_lora(missing)

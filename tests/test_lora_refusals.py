"""Bad LoRAs: one line that names the tensor, a non-zero exit code, and nothing written or changed."""

import re
from pathlib import Path

import helpers
import loras
import pytest
import torch
from helpers import mmdit

from mmdit_lib import convert
from mmdit_lib.checkpoint.lora import Lora
from mmdit_lib.sd3 import SD3


@pytest.fixture(scope="module")
def case() -> helpers.Case:
    return helpers.case("sd3.5-medium")


@pytest.fixture(scope="module")
def state(case) -> loras.TENSORS:
    return case.reference.state_dict()


@pytest.fixture(scope="module")
def style(tmp_path_factory, state) -> Path:
    return loras.write(tmp_path_factory.mktemp("loras") / "style.safetensors", loras.random_lora(state))


Q = "transformer_blocks.0.attn.to_q"


def without(name: str):
    return lambda lora: {n: t for n, t in lora.items() if n != name}


def changed(name: str, change):
    return lambda lora: lora | {name: change(lora[name])}


def nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = float("nan")
    return tensor


A, B = f"transformer.{Q}.lora_A.weight", f"transformer.{Q}.lora_B.weight"
BAD = {
    "no B": (without(B), f"tensor '{A}' has no matching lora_B (lora_up)"),
    "no A": (without(A), f"tensor '{B}' has no matching lora_A (lora_down)"),
    "rank-deficient": (
        changed(B, lambda b: b[:, :3]), f"tensors '{A}' [4, 64] and '{B}' [64, 3] have different ranks: 4 and 3"
    ),
    "another width": (
        changed(A, lambda a: a[:, :63]), f"tensor '{A}' is [4, 63], expected [4, 64]: the LoRA is for a different model"
    ),
    "another height": (
        changed(B, lambda b: b[:48]), f"tensor '{B}' is [48, 4], expected [64, 4]: the LoRA is for a different model"
    ),
    "a vector": (changed(A, lambda a: a[0]), f"tensor '{A}' is [64], expected [64, 64]"),
    "NaN": (changed(A, nan), f"tensor '{A}' contains NaN or infinity"),
    "float64": (changed(A, torch.Tensor.double), f"tensor '{A}' is F64; only float32, float16 or bfloat16"),
    "B is a vector": (changed(B, lambda b: b[:, 0]), f"tensor '{B}' is [64], expected [64, 4]"),
    "unknown names": (
        lambda lora: lora | {f"x.{i}": torch.ones(2) for i in range(3)}, "unknown tensor 'x.0' (and 2 more)"
    ),
    "a block that the model lacks": (
        lambda lora: lora | {n.replace("s.0.", "s.24."): t for n, t in lora.items() if Q in n},
        f"tensor '{A.replace('s.0.', 's.24.')}' (and 1 more) is for a layer that",
    ),
    "a norm": (
        lambda lora: lora | {f"{Q[:-4]}norm_q.lora_A.weight": torch.ones(4, 16)},
        f"tensor '{Q[:-4]}norm_q.lora_A.weight' is for a layer that",
    ),
    "another model's names": (
        lambda lora: {"lora_unet_down_blocks_0_attn_to_q.alpha": torch.ones(())},
        "sd-scripts' name 'lora_unet_down_blocks_0_attn_to_q' matches no module of the transformer",
    ),
    "the same weight twice": (
        lambda lora: lora | {f"{Q}.lora_down.weight": lora[A].clone()}, f"tensors '{A}' and '{Q}.lora_down.weight' are"
    ),
    "text encoders only": (
        lambda lora: {"text_encoder.x.lora_A.weight": torch.ones(2, 2)}, "no tensors for the transformer"
    ),
    "dora_scale": (lambda lora: lora | {f"{Q}.dora_scale": torch.ones(64)}, f"tensor '{Q}.dora_scale': DoRA is"),
    "a vector of alphas": (
        lambda lora: lora | {f"{Q}.alpha": torch.ones(2)}, f"tensor '{Q}.alpha' is [2], expected a single number"
    ),
    "alpha NaN": (lambda lora: lora | {f"{Q}.alpha": torch.tensor(torch.nan)}, f"tensor '{Q}.alpha' contains NaN"),
}  # fmt: skip


def refused(case, tmp_path, *arguments) -> str:
    """The one line of `mmdit convert`, which must leave an older checkpoint as it was."""
    older = tmp_path / "older"
    convert(case.transformer, older, progress=False)
    before = {path.name: path.read_bytes() for path in older.iterdir()}
    words = ["--model_path", case.transformer, "--output_dir", older, "--no-progress", *arguments]
    code, _, err = mmdit("convert", *words)
    assert code != 0 and err.count("\n") == 1, err
    assert {path.name: path.read_bytes() for path in older.iterdir()} == before
    assert not list(tmp_path.glob(".older.partial"))
    return err


@pytest.mark.parametrize("name", BAD)
def test_a_bad_lora_is_one_line_and_nothing_is_written(case, state, tmp_path, name):
    change, message = BAD[name]
    lora = change(loras.prefixed(loras.random_lora(state)))
    path = loras.write(tmp_path / "bad.safetensors", lora, prefix="")
    assert f"mmdit: {path}: {message}" in refused(case, tmp_path, "--lora", path)


def test_a_truncated_file(case, style, tmp_path):
    path = tmp_path / "short.safetensors"
    path.write_bytes(style.read_bytes()[:-100])
    assert re.search(r"short\.safetensors is truncated: expected \d+ bytes", refused(case, tmp_path, "--lora", path))


@pytest.mark.parametrize("ending", ["bin", "pt", "ckpt"])
def test_a_pickle_is_code(case, state, tmp_path, ending):
    path = tmp_path / f"lora.{ending}"
    torch.save(loras.random_lora(state), path)
    assert f"{path} is a pickle, which can run code" in refused(case, tmp_path, "--lora", path)


@pytest.mark.parametrize("scale", ["nan", "inf", "-1e400"])
def test_a_scale_that_is_no_number(case, style, tmp_path, scale):
    assert "give a finite number" in refused(case, tmp_path, "--lora", f"{style}:{scale}")


def test_a_scale_that_overflows(case, style, tmp_path):
    assert "more than float16 can represent" in refused(case, tmp_path, "--dtype", "float16", "--lora", f"{style}:1e6")
    assert "contains NaN or infinity after fusing" in refused(case, tmp_path, "--lora", f"{style}:1e40")


METADATA = {
    "not JSON": ("{", "does not parse"),
    "rank": ('{"transformer.r": 8}', f"tensor '{A}': its rank is 4, but its config has 8"),
    "rank 0": ('{"transformer.r": 0}', "r: Input should be greater than or equal to 1, found 0"),
    "alpha": ('{"transformer.r": 4, "transformer.lora_alpha": "many"}', "lora_alpha: Input should be a valid number"),
    "pattern": ('{"transformer.r": 4, "transformer.alpha_pattern": {"(a+)+$": 1}}', "alpha_pattern.(a+)+$"),
    "PiSSA": (
        '{"transformer.r": 4, "transformer.init_lora_weights": "pissa"}',
        "init_lora_weights 'pissa' also",
    ),
    "LoKr": ('{"transformer.r": 4, "transformer.peft_type": "LOKR"}', "peft_type 'LOKR': only LORA"),
    "modules": ('{"transformer.r": 4, "transformer.modules_to_save": ["x"]}', "modules_to_save ['x'] cannot be fused"),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_cannot_be_used(case, state, tmp_path, name):
    content, message = METADATA[name]
    lora = loras.random_lora(state, only=Q)
    path = loras.write(tmp_path / "lora.safetensors", lora, metadata={"lora_adapter_metadata": content})
    assert message in refused(case, tmp_path, "--lora", path)


def test_metadata_of_text_encoders_says_nothing_about_the_transformer(case, state, tmp_path):
    metadata = {"lora_adapter_metadata": '{"text_encoder.r": 8, "text_encoder.lora_alpha": 1}'}
    path = loras.write(tmp_path / "lora.safetensors", loras.random_lora(state), metadata=metadata)
    lora = Lora.open(path, 1.0, SD3, case.config)
    assert {change.scaling for change in lora.changes.values()} == {1.0}


def test_a_bad_lora_stops_a_hub_download_of_the_weights(case, tmp_path, monkeypatch):
    """The transformer's config is enough to check a LoRA."""
    asked = []

    def download(repository, patterns, revision):
        asked.append(patterns)
        return case.transformer.parent, "c0ffee"

    monkeypatch.setattr("mmdit_lib.checkpoint.hub.download", download)
    path = loras.write(tmp_path / "bad.safetensors", {"x.lora_A.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="is for a layer that"):
        convert("owner/model", tmp_path / "checkpoint", loras=[path], progress=False)
    assert len(asked) == 1 and not any("diffusion_pytorch_model" in pattern for pattern in asked[0])

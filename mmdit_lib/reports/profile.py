"""Where the time of one denoising step goes: times of layers, by the module that they belong to."""

from __future__ import annotations

import re

import pandas as pd
from rich.table import Table

from ..config import Resolution
from ..engine.inputs import sample_inputs
from ..runner import MMDiTRunner

OUTSIDE = "outside any module"
OWN = "own layers"
"""Of a block: its gates and sums, which belong to none of its modules."""


def profile_step(
    runner: MMDiTRunner, *, resolution: Resolution, batch: int, text_tokens: int, repeats: int
) -> pd.DataFrame:
    """Times of the layers of one step, in order of execution; under mpirun, of this rank.

    Returns:
        Columns layer, module (the innermost module that it belongs to, '' if there is none) and ms.

    Raises:
        ValueError: the sizes are outside the profile, or the backend cannot time single layers.
    """
    inputs = sample_inputs(runner.folder, resolution=resolution, batch=batch, text_tokens=text_tokens)
    times = runner.backend.profile(runner.prepare(inputs)[0], repeats)
    modules = {path for path, _ in runner.folder.architecture.module(runner.folder.model).named_modules()}
    rows = [(layer, module_of(layer, modules), ms) for layer, ms in times.items()]
    return pd.DataFrame(rows, columns=["layer", "module", "ms"])


def module_of(layer: str, modules: set[str]) -> str:
    """The innermost module of a layer, or of the first layer of a fused one; '' if it belongs to none.

    A layer is named `module.path/suffix`, its module's output `module.path` or `module.path:0`; TensorRT joins the
    names of fused layers, with signs of its own between and around them.
    """
    for path in re.findall(r"\w[\w.]*", layer):
        while path and path not in modules:
            path = path.rpartition(".")[0]
        if path:
            return path
    return ""


def by_module(times: pd.DataFrame, blocks: str) -> pd.DataFrame:
    """Sums of `profile_step` by block and by module inside it.

    Args:
        blocks: path of the list of repeated blocks.

    Returns:
        Columns block (its number; -1 outside the blocks), part (the first name of the path inside the block, such as
        'attn', or from the top), layers and ms.
    """
    inside = times.module.str.extract(rf"^{re.escape(blocks)}\.(\d+)\.?(.*)$")
    rest = inside[1].where(inside[0].notna(), times.module)
    part = rest.str.split(".").str[0]
    part = part.where(part != "", OWN).where(times.module != "", OUTSIDE)
    keyed = pd.DataFrame({"block": inside[0].fillna("-1").astype(int), "part": part, "layers": 1, "ms": times.ms})
    return keyed.groupby(["block", "part"], sort=False, as_index=False).sum()


def profile_table(times: pd.DataFrame, blocks: str, title: str) -> Table:
    """One row per kind of module, summed over all blocks, the slowest first."""
    groups = by_module(times, blocks)
    inside = (f"{blocks}.*." + groups.part).str.replace(f".{OWN}", f" ({OWN})", regex=False)
    groups["module"] = groups.part.where(groups.block < 0, inside)
    sums = groups.groupby("module", sort=False)[["layers", "ms"]].sum().sort_values("ms", ascending=False)
    caption = "all: the sum of layers timed one by one, not the time of a step"
    table = Table("module", title=title, caption=caption)
    for column in ("layers", "ms", "share"):
        table.add_column(column, justify="right")
    for module, row in sums.iterrows():
        table.add_row(str(module), f"{row.layers:.0f}", f"{row.ms:.3f}", f"{row.ms / times.ms.sum():.1%}")
    table.add_section()
    table.add_row("all", str(len(times)), f"{times.ms.sum():.3f}", "", style="bold")
    return table

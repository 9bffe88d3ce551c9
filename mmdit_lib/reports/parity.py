"""Layer parity: diffusers' transformer and our network, module by module, on the same inputs.

Both use the same module paths (except for those in the model's key table), and the graph file lists the
tensors that each module returned, so values are matched by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import pandas as pd
import torch
from rich import box
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from ..config import TORCH_DTYPES, Dtype, RankMapping, Resolution, either
from ..engine.inputs import sample_inputs
from ..engine.precision import without_tf32
from ..runner import MMDiTRunner
from . import fp8_parity
from .reference import check_same_model, load_reference

TOLERANCES: dict[str, float] = {"float32": 5e-6, "float16": 1e-2, "bfloat16": 8e-2}
"""Largest relative error (norm of the difference over norm) that is accepted as rounding.

float32: 40 times the machine epsilon (1.2e-7), for long sums in a different order, through all blocks.
float16 and bfloat16: 10 times the machine epsilon (9.8e-4, 7.8e-3): both sides round every stored value,
and a difference of one unit in the last place spreads to later blocks. A swapped, missing or wrongly sharded weight
causes an error of order one.
"""

NOT_FINITE = "diffusers' own value is not finite on these random inputs: try another seed, or bfloat16"

BY_FLOAT64 = "from float64:"

FAILING_SHOWN = 20
"""One wrong module makes all later ones wrong, so only the first failing rows are informative."""

COLUMNS = (
    "module", "output", "status", "max_abs_error", "relative_error", "tolerance", "depth", "dtype", "shape", "note"
)  # fmt: skip


FP8_COLUMNS = ("fp8_error", "dtype_error")
"""Of a quantized engine."""


def compare_layers(
    model_path: str | Path,
    engine_dir: str | Path,
    *,
    resolution: str | int | Resolution | None = None,
    text_tokens: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    reference_dtype: Dtype | None = None,
    tolerance: float | None = None,
    variant: str | None = None,
    revision: str | None = None,
    checkpoint_dir: str | Path | None = None,
    device: str | torch.device | None = None,
) -> pd.DataFrame:
    """Run diffusers' transformer and the engine's network (`pytorch` backend) on the same random inputs.

    LoRAs that `convert` fused are fused into diffusers' transformer too. Of a quantized engine, status and errors are
    against diffusers in float32 with the same values rounded to FP8; the columns `fp8_error` and `dtype_error` compare
    the engine, and diffusers in the network's dtype, with diffusers in float32 without this rounding.
    Both sides keep every module's outputs in memory, so use a small resolution for a large model; it runs the
    same operations.

    Args:
        model_path: the checkpoint that was converted.
        engine_dir: an engine folder written by `build`.
        resolution: HEIGHTxWIDTH in pixels; by default what the engine is optimized for.
        text_tokens: number of text tokens; by default the engine's optimal one.
        batch: rows; by default the engine's optimal batch.
        seed: seed of the random inputs.
        reference_dtype: diffusers' dtype; by default the engine's, or float32 if it is quantized. Use float32 to see
            all rounding.
        tolerance: largest accepted relative error; by default `TOLERANCES` of the coarser dtype.
        variant: variant of the files in `model_path`.
        revision: revision of a hub id.
        checkpoint_dir: the checkpoint, if it is no longer at its path relative to the engine folder.
        device: by default CUDA if available.

    Returns:
        One row per output of each module, in the order in which diffusers finishes them: module,
        output (its number), status (ok, mismatch, shape, missing), max_abs_error, relative_error,
        tolerance, depth, dtype, shape, note. `attrs` has the inputs' shapes and the reason for each omission.

    Raises:
        ValueError: if model and engine do not match, or the sizes are outside the profile.
    """
    runner = MMDiTRunner.from_engine(engine_dir, backend="pytorch", checkpoint_dir=checkpoint_dir, device=device)
    folder = runner.folder
    dtype = TORCH_DTYPES[reference_dtype or ("float32" if folder.quantization.quant_algo else folder.dtype)]
    reference = load_reference(
        model_path, folder.architecture, dtype, runner.device, variant=variant, revision=revision, loras=folder.loras
    )
    inputs = sample_inputs(folder, resolution=resolution, text_tokens=text_tokens, batch=batch, seed=seed)
    found = compare(reference, runner, inputs, tolerance=tolerance)
    found.attrs |= {"model": str(model_path), "engine": str(engine_dir), "seed": seed}
    return found


def compare(
    reference: torch.nn.Module, runner: MMDiTRunner, inputs: dict[str, torch.Tensor], *, tolerance: float | None = None
) -> pd.DataFrame:
    """As `compare_layers`, with both sides already loaded. Under `mpirun`, every rank compares its own part.

    Raises `ValueError` as `compare_layers` does, and if `tolerance` is not given for a reference in float64.
    """
    folder = runner.folder
    architecture, mapping = folder.architecture, folder.layout.at(runner.rank)
    check_same_model(reference, folder)
    reference_dtype = str(reference.dtype).removeprefix("torch.")
    quantized = folder.quantization.quant_algo is not None
    if tolerance is None:
        if reference_dtype not in TOLERANCES:
            raise ValueError(f"a reference in {reference_dtype} needs `tolerance`: only {either(TOLERANCES)} have one")
        tolerances = fp8_parity.TOLERANCES if quantized else TOLERANCES
        tolerance = max(tolerances[folder.dtype], tolerances[reference_dtype])
    ours, others = runner.intermediates(inputs), {}
    with without_tf32():
        if quantized:
            checkpoint = folder.open_checkpoint(runner.checkpoint_dir, verify=False)
            theirs, left_out, others = fp8_parity.reference_outputs(reference, folder, checkpoint, inputs)
        else:
            theirs, left_out = architecture.reference.outputs(reference, inputs, folder.model, folder.build_config)
    modules = {**runner.backend.modules, architecture.output.name: (architecture.output.name,)}

    rows = []
    for depth, (path, outputs) in enumerate(theirs.items()):
        values = [ours.get(name) for name in modules.get(path, ())]
        for number, (value, expected) in enumerate(zip_longest(values, outputs)):
            row = {"module": path, "output": number, "depth": depth, "tolerance": tolerance}
            rows.append(row | _compare(value, expected, mapping, tolerance))
            if quantized:
                rows[-1] |= _without_fp8(value, others, path, number, mapping)
    for path in modules.keys() - theirs.keys():
        rows.append({"module": path, "output": 0, "status": "missing", "note": "diffusers ran no such module"})
    if (
        not quantized
        and reference_dtype == folder.dtype == "float32"
        and any(row["status"] == "mismatch" for row in rows)
    ):
        exact, _ = architecture.reference.outputs(reference.double(), inputs, folder.model, folder.build_config)
        reference.float()
        for row in rows:
            path, number = row["module"], row["output"]
            if row["status"] == "mismatch" and not row["note"]:
                found = ours[modules[path][number]], theirs[path][number]
                row |= _judge_by_float64(*found, exact[path][number], mapping, tolerance)
    table = pd.DataFrame(rows, columns=COLUMNS + (FP8_COLUMNS if quantized else ()))
    table.attrs = {
        "dtype": folder.dtype,
        "reference_dtype": reference_dtype,
        "rank": mapping.rank,
        "inputs": {name: tuple(value.shape) for name, value in inputs.items()},
        "left_out": left_out,
        "quantized": quantized,
    }
    return table


def _without_fp8(ours: torch.Tensor | None, others: dict, path: str, number: int, mapping: RankMapping) -> dict:
    """The error of the engine, and of diffusers in its dtype, against diffusers in float32 without FP8."""
    plain, narrow = (found[path][number] for found in (others["plain"], others["dtype"]))
    errors = [_compare(x, plain, mapping, 0.0) for x in (ours, narrow)]
    return dict(zip(FP8_COLUMNS, (error.get("relative_error", float("nan")) for error in errors), strict=True))


def _judge_by_float64(
    ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, mapping: RankMapping, tolerance: float
) -> dict:
    """Accept a mismatch in which float32 itself is at fault.

    A GPU's sine, cosine and exponential differ from a CPU's in their last bits, and where a function magnifies
    that (the sine of an angle of 1000 rad), two correct float32 results are further apart than the tolerance.
    Diffusers in float64 decides: our error against it may exceed that of diffusers in float32 by no more than
    the tolerance.
    """
    mine, its = (_compare(x, exact, mapping, tolerance)["relative_error"] for x in (ours, theirs))
    accepted = mine <= its + tolerance  # NaN is not
    return {"status": "ok", "note": f"{BY_FLOAT64} ours {mine:.1e}, diffusers {its:.1e}"} if accepted else {}


def _compare(ours: torch.Tensor | None, theirs: torch.Tensor | None, mapping: RankMapping, tolerance: float) -> dict:
    if ours is None or theirs is None:
        side = "our network" if ours is None else "diffusers"
        return {"status": "missing", "note": f"{side} has no such value"}
    row = {"dtype": str(ours.dtype).removeprefix("torch."), "shape": tuple(ours.shape), "note": ""}
    expected = align(theirs, tuple(ours.shape), mapping)
    if expected is None:
        return row | {"status": "shape", "note": f"diffusers has {tuple(theirs.shape)}"}
    if not expected.isfinite().all():
        return row | {"status": "mismatch", "note": NOT_FINITE}
    ours = ours[tuple(slice(size) for size in expected.shape)].double()  # without the padded rows of the last cp ranks
    difference = ours - expected.double()
    if difference.numel() == 0:
        return row | {"status": "ok", "max_abs_error": 0.0, "relative_error": 0.0, "note": "no rows on this rank"}
    most, relative = difference.abs().max().item(), relative_error(ours, expected)
    status = "ok" if relative <= tolerance else "mismatch"  # NaN is a mismatch
    return row | {"status": status, "max_abs_error": most, "relative_error": relative}


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference over the norm of `wanted`, in float64; of zeros, 0 or infinity."""
    difference, scale = (found.double() - wanted.double()).norm().item(), wanted.double().norm().item()
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))


def align(reference: torch.Tensor, shape: Sequence[int], mapping: RankMapping) -> torch.Tensor | None:
    """The part of a full reference tensor that a rank holds, given the shape of the rank's tensor.

    A dimension is sliced only if the two sizes differ: dim 0 over cfg; tokens (dim 1 of [B, N, C], dim 2
    of [B, heads, N, d]) over cp; features or heads (the last dim, or dim 1 of [B, heads, N, d]) over tp.
    The padded rows of the last cp ranks are part of `shape` but not of the result.

    Returns None if no slicing makes the shapes agree.
    """
    if reference.dim() == len(shape) - 1 and shape[1] == 1:
        reference = reference.unsqueeze(1)  # modulation vectors: [B, D] there, [B, 1, D] here
    rank = reference.dim()
    if rank != len(shape):
        return None
    features = 1 if rank == 4 else rank - 1
    for dim, parts, part in ((0, mapping.cfg_size, mapping.cfg_rank), (features, mapping.tp_size, mapping.tp_rank)):
        if shape[dim] != reference.shape[dim] == shape[dim] * parts:
            reference = reference.chunk(parts, dim)[part]
    tokens = {3: 1, 4: 2}.get(rank)
    wanted = list(shape)
    if tokens is not None and shape[tokens] != reference.shape[tokens]:
        length, local = reference.shape[tokens], shape[tokens]
        if local != -(-length // mapping.cp_size):
            return None
        first = min(local * mapping.cp_rank, length)
        reference = reference.narrow(tokens, first, min(local, length - first))
        wanted[tokens] = reference.shape[tokens]
    return reference if list(reference.shape) == wanted else None


# The report ------------------------------------------------------------------------------------------


def all_ok(table: pd.DataFrame) -> bool:
    return bool(len(table)) and bool((table.status == "ok").all())


def first_bad(table: pd.DataFrame) -> pd.Series | None:
    """The first row that is not ok, in order of execution; later rows may only inherit its error."""
    bad = table[table.status != "ok"].sort_values("depth", kind="stable", na_position="last")
    return None if bad.empty else bad.iloc[0]


def verdict(table: pd.DataFrame) -> str:
    """A one-line summary."""
    modules, values = table.module.nunique(), len(table)
    bad = first_bad(table)
    if bad is None:
        judged = table.note.str.startswith(BY_FLOAT64)
        worst = table.loc[table.relative_error[~judged].idxmax()]
        by_float64 = "; float64 decided on " + ", ".join(table.module[judged].unique()) if judged.any() else ""
        return (
            f"all {values} values of {modules} modules agree: worst relative error {worst.relative_error:.2g} "
            f"in {worst.module} (tolerance {worst.tolerance:.2g}{by_float64})"
        )
    count = int((table.status != "ok").sum())
    how = bad.note or f"relative error {bad.relative_error:.2g}, tolerance {bad.tolerance:.2g}"
    return (
        f"{count} of {values} values are not ok. The first in order of execution is {bad.module} "
        f"({bad.status}: {how}): look there first, the modules after it inherit its error"
    )


def parity_report(table: pd.DataFrame, *, full: bool = False) -> Group:
    """A table for a terminal (`rich.print(...)`): all rows, or the worst of each block and the first not ok."""
    failing = table.index[table.status != "ok"][:FAILING_SHOWN]
    shown = table if full else table.loc[sorted(_worst_per_block(table) | set(failing))]
    extra = ("with FP8", "without") if table.attrs.get("quantized") else ()
    numbers = (Column(name, justify="right", no_wrap=True) for name in ("relative", "max abs", *extra))
    grid = Table(
        Column("module", overflow="fold"), Column("status", no_wrap=True), *numbers, Column("shape", overflow="fold"),
        title=_title(table), title_justify="left",
        caption=_caption(table, full),
        caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0), show_edge=False,
    )  # fmt: skip
    for row in shown.itertuples():
        several = (table.module == row.module).sum() > 1
        errors = (row.relative_error, row.max_abs_error, *(getattr(row, name) for name in FP8_COLUMNS if extra))
        numbers = [f"{x:.1e}" if pd.notna(x) else "" for x in errors]
        shape = "x".join(map(str, row.shape)) if isinstance(row.shape, tuple) else row.note
        grid.add_row(
            f"{row.module} ({row.output})" if several else row.module,
            Text(row.status, style="green" if row.status == "ok" else "bold red"),
            *numbers,
            row.note if row.status == "shape" else shape,
        )
    lines = [Text(verdict(table), style="green" if all_ok(table) else "bold red")]
    return Group(grid, *lines, *([Text(fp8_parity.summary(table))] if extra else []))


def _title(table: pd.DataFrame) -> str:
    about = table.attrs
    shapes = Counter("x".join(map(str, shape)) for shape in about["inputs"].values())
    sizes = ", ".join(shape if count == 1 else f"{count} of {shape}" for shape, count in shapes.items())
    quantized = about.get("quantized")
    engine, how = ("FP8 engine in ", " with the same rounding to FP8") if quantized else ("", "")
    name = f"{engine}{about['dtype']}" if quantized else f"{about['dtype']} engine"
    return f"errors of the {name} against diffusers in {about['reference_dtype']}{how}; inputs {sizes}"


def _caption(table: pd.DataFrame, full: bool) -> str:
    """Which rows are shown, and how many of diffusers' modules have no value to compare."""
    values, failing, skipped = len(table), int((table.status != "ok").sum()), len(table.attrs.get("left_out", {}))
    failures = f" and the {f'first {FAILING_SHOWN} failures' if failing > FAILING_SHOWN else 'failures'}"
    shown = "all" if full else f"the largest error in each block{failures if failing else ''}, of"
    more = f" {skipped} more (lists, dropouts, unused outputs) do not exist in the engine and were skipped."
    return f"Shown: {shown} {values} values compared.{more if skipped else ''}"


def _worst_per_block(table: pd.DataFrame) -> set[int]:
    """The rows with the largest error of each block, and of each module outside the blocks with all below it."""
    known = table[table.relative_error.notna()]
    blocks = known.module.str.extract(r"^(\w+(?:\.\d+)?)", expand=False)
    return set(known.groupby(blocks).relative_error.idxmax())

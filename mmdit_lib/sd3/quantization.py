"""Which linear layers keep the checkpoint's dtype if the others are quantized, and why."""

from __future__ import annotations

from ..architecture import Kept

VECTOR = "runs once per step on a vector per sample: no time to gain, and its error reaches every token"
FULL_PRECISION: tuple[Kept, ...] = (
    Kept("time_text_embed.*", VECTOR),
    Kept("*.norm1*.linear", VECTOR),
    Kept("norm_out.linear", VECTOR),
    Kept("context_embedder", "runs once per step, and every block reads its output"),
    Kept("proj_out", "its error is the output's, and it has few rows"),
)

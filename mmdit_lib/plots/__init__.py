"""The figures of the notebooks and the `mmdit` command. Each function returns a matplotlib `Figure`."""

from .bars import time_bars, traffic_bars
from .block import block_diagram
from .errors import error_by_depth
from .images import images_side_by_side
from .layers import time_by_block
from .mlp import sharded_mlp
from .shards import shard_map
from .tokens import attention_grids, gathered_rows

__all__ = [
    "attention_grids",
    "block_diagram",
    "error_by_depth",
    "gathered_rows",
    "images_side_by_side",
    "shard_map",
    "sharded_mlp",
    "time_bars",
    "time_by_block",
    "traffic_bars",
]

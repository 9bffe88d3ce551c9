"""The figures of the notebooks and the `mmdit` command. Each function returns a matplotlib `Figure`."""

from .bars import time_bars, traffic_bars
from .block import block_diagram
from .errors import error_by_depth
from .fp8 import error_of_fp8
from .images import images_side_by_side
from .layers import time_by_block
from .shards import shard_map

__all__ = [
    "block_diagram",
    "error_by_depth",
    "error_of_fp8",
    "images_side_by_side",
    "shard_map",
    "time_bars",
    "time_by_block",
    "traffic_bars",
]

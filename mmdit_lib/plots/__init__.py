"""The figures of the notebooks and the `mmdit` command. Each function returns a matplotlib `Figure`."""

from .bars import time_bars, traffic_bars
from .block import block_diagram
from .errors import error_by_depth
from .images import image_grid, images_side_by_side
from .layers import time_by_block
from .roofline import roofline
from .shards import shard_map

__all__ = [
    "block_diagram",
    "error_by_depth",
    "image_grid",
    "images_side_by_side",
    "roofline",
    "shard_map",
    "time_bars",
    "time_by_block",
    "traffic_bars",
]

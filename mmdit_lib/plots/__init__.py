"""The figures of the notebooks and the `mmdit` command. Each function returns a matplotlib `Figure`."""

from .attention import attention_quadrants, word_maps
from .bars import time_bars, traffic_bars
from .block import block_diagram
from .errors import error_by_depth
from .film import film_strip
from .images import images_side_by_side
from .layers import time_by_block
from .memory import memory_over_time
from .network import network_diagram
from .parts import parameters_by_part
from .positions import position_maps
from .rounding import rounding_costs, rounding_error
from .images import image_grid, images_side_by_side
from .layers import time_by_block
from .roofline import roofline
from .mlp import sharded_mlp
from .shards import shard_map
from .tokens import attention_grids, gathered_rows

__all__ = [
    "attention_quadrants",
    "block_diagram",
    "error_by_depth",
    "film_strip",
    "attention_grids",
    "block_diagram",
    "error_by_depth",
    "gathered_rows",
    "images_side_by_side",
    "memory_over_time",
    "network_diagram",
    "parameters_by_part",
    "position_maps",
    "rounding_costs",
    "rounding_error",
    "image_grid",
    "images_side_by_side",
    "roofline",
    "shard_map",
    "sharded_mlp",
    "time_bars",
    "time_by_block",
    "traffic_bars",
    "word_maps",
]

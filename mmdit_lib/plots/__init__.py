"""The figures of the notebooks and the `mmdit` command. Each function returns a matplotlib `Figure`."""

from .attention import attention_quadrants, word_maps
from .bars import time_bars, traffic_bars
from .block import block_diagram
from .errors import error_by_depth
from .film import film_strip
from .fp8 import error_of_fp8
from .grids import number_grids
from .images import image_grid, images_side_by_side
from .layers import time_by_block
from .memory import memory_over_time
from .mlp import sharded_mlp
from .network import network_diagram
from .parts import parameters_by_part
from .positions import position_maps
from .predictions import predicted_and_measured
from .ranks import rank_grid
from .roofline import roofline
from .rounding import rounding_costs, rounding_error
from .sensitivity import error_and_work
from .shards import shard_map
from .timeline import timeline
from .tokens import attention_grids, gathered_rows

__all__ = [
    "attention_grids",
    "attention_quadrants",
    "block_diagram",
    "error_and_work",
    "error_by_depth",
    "error_of_fp8",
    "film_strip",
    "gathered_rows",
    "image_grid",
    "images_side_by_side",
    "memory_over_time",
    "network_diagram",
    "number_grids",
    "parameters_by_part",
    "position_maps",
    "predicted_and_measured",
    "rank_grid",
    "roofline",
    "rounding_costs",
    "rounding_error",
    "shard_map",
    "sharded_mlp",
    "time_bars",
    "time_by_block",
    "timeline",
    "traffic_bars",
    "word_maps",
]

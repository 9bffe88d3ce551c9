"""The figures of the notebooks and the `mmdit` command. Each function returns a matplotlib `Figure`."""

from .bars import time_bars, traffic_bars
from .block import block_diagram
from .errors import error_by_depth
from .images import images_side_by_side
from .layers import time_by_block
from .predictions import predicted_and_measured
from .ranks import rank_grid
from .shards import shard_map
from .timeline import timeline

__all__ = [
    "block_diagram",
    "error_by_depth",
    "images_side_by_side",
    "predicted_and_measured",
    "rank_grid",
    "shard_map",
    "time_bars",
    "time_by_block",
    "timeline",
    "traffic_bars",
]

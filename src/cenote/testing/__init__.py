"""Public contract checks: what every class of a room promises, runnable on your own classes."""

from cenote.testing.explainers import check_explainer
from cenote.testing.graphs import check_graph_pool
from cenote.testing.layers import check_layer_pool
from cenote.testing.live import LiveReport, check_live
from cenote.testing.mixers import check_mixer
from cenote.testing.pools import PLAIN_MODULE, ContractError, check_pool
from cenote.testing.reducers import check_reducer
from cenote.testing.spatial import check_spatial_pool

__all__ = [
    "PLAIN_MODULE",
    "ContractError",
    "LiveReport",
    "check_explainer",
    "check_graph_pool",
    "check_layer_pool",
    "check_live",
    "check_mixer",
    "check_pool",
    "check_reducer",
    "check_spatial_pool",
]

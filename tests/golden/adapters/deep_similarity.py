from torch import Tensor

from cenote.explain.deep_similarity.maps import pair_map, terms
from tests.golden.cases import Case, adapter

POOLING = {"average": "average", "avg": "average", "max": "max"}


@adapter("deep-similarity", "similarity_ops.compute_spatial_similarity")
def spatial(case: Case) -> dict[str, Tensor]:
    side, pooling = case.config["side"], POOLING[case.config["pooling"]]
    grid = (side, side)
    a, b = (terms(case.inputs[name][None], pooling=pooling, grid=grid) for name in ("conv1", "conv2"))  # type: ignore[arg-type]
    found = pair_map(a, b)
    first, second = found.on_grids()
    return {"similarity1": first[0], "similarity2": second[0], "cosine": found.cosine}

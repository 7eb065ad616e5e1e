from torch import Tensor

from cenote.pool import EfficientProbing
from tests.golden.cases import Case, adapter, load_parameters


@adapter("efficient-probing", "EfficientProbing")
def efficient_probing(case: Case) -> dict[str, Tensor]:
    config = case.config
    pool = EfficientProbing(config["dim"], queries=config.get("num_queries", 1), d_out=config.get("d_out", 1))
    return {"y": load_parameters(pool, case.params)(case.inputs["x"])}

import torch
from torch import Tensor

from cenote.pool import GatedPool2d, TreePool2d
from tests.golden.cases import Case, adapter, load_parameters

# the authors number gates upwards to the root, ours begin with it
GATES = {2: ("gate1",), 3: ("gate3", "gate1", "gate2")}


def window(case: Case) -> dict[str, object]:
    return {k: case.config[k] for k in ("kernel_size", "stride", "padding", "ceil_mode") if k in case.config}


@adapter("mixed-gated-tree", "TreepoolMaxAve (gated max-average)")
def gated(case: Case) -> dict[str, Tensor]:
    x = case.inputs["x"]
    pool = GatedPool2d(**window(case))
    load_parameters(pool, {"gate": case.params["gate_mask"].expand_as(pool.gate)})
    return {"y": pool(x), "gate": pool.gates(x), "max": pool.windows.max(x), "avg": pool.windows.mean(x)}


def tree(case: Case) -> dict[str, Tensor]:
    leaves = [case.params[f"leaf{i}"] for i in range(1, 1 + sum(k.startswith("leaf") for k in case.params))]
    levels = len(leaves).bit_length()
    pool = TreePool2d(**window(case), levels=levels)
    gates = [case.params[name] for name in GATES[levels]]
    params = {"leaves": torch.stack(leaves), "gates": torch.stack(gates)}
    load_parameters(pool, {k: v.reshape(getattr(pool, k).shape) for k, v in params.items()})
    return {"y": pool(case.inputs["x"])}


adapter("mixed-gated-tree", "TreepoolKernel1L")(tree)
adapter("mixed-gated-tree", "TreepoolKernel2L")(tree)

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from cenote.explain.craft.craft import Craft
from cenote.explain.craft.sobol import sobol_masks, total_indices
from tests.golden.cases import Case, adapter


@adapter("craft", "sobol.sampler.*Sequence + sobol.estimators.*Estimator")
def sobol(case: Case) -> dict[str, Tensor]:
    concepts, points = case.config["dimension"], case.config["nb_design"]
    y = case.inputs["outputs"].detach()
    a, c = y[:points], y[2 * points :].view(concepts, points)
    indices: dict[str, Any] = {e: total_indices(y, concepts, e) for e in ("jansen", "homma", "saltelli")}
    # the authors divide squares by N - 1 and their mean by N, and a covariance by N - 1 and its variances by N
    squares, middle = (a**2 + c**2).sum(1) / 2, ((a + c) / 2).mean(1) ** 2
    off = (squares / points - middle) / (squares / (points - 1) - middle)
    indices["janon"] = 1 - (1 - total_indices(y, concepts, "janon")) * off
    indices["glen"] = 1 - (1 - total_indices(y, concepts, "glen")) * points / (points - 1)
    masks = {f"masks_{sampler}": sobol_masks(concepts, points, sampler) for sampler in ("halton", "sobol")}
    return masks | {f"sti_{name}": value.float() for name, value in indices.items()}


# their non-negative least squares stop at 1e-4 of the first violation of optimality, ours go on
@adapter("craft", "craft_torch.Craft", loose={"U": 1e-2, "W": 1e-2, "U_images": 1e-2, "importances": 2e-2})
def end_to_end(case: Case) -> dict[str, Tensor]:
    p, images, config = case.params, case.inputs["images"].detach(), case.config

    def g(x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, p["g.c.weight"], p["g.c.bias"], stride=2, padding=1))

    def h(a: Tensor) -> Tensor:
        return F.linear(a.mean((2, 3)), p["h.f.weight"], p["h.f.bias"]).tanh()

    found = Craft(g, h, config["number_of_concepts"], config["patch_size"]).fit(images)
    importance = found.importance(images, config["class_id"], config["nb_design"])
    return {
        "crops": found.crops,
        "U": found.u,
        "W": found.w,
        "U_images": found.transform(images),
        "importances": importance.mean(0),
    }

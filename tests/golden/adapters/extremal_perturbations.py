import torch
import torch.nn.functional as F
from torch import Tensor

from cenote.explain.extremal_perturbations.masks import Pyramid, SmoothMask
from cenote.explain.extremal_perturbations.optimise import extremal_masks
from tests.golden.cases import Case, adapter


@adapter(
    "extremal-perturbations",
    "torchray.attribution.extremal_perturbation (MaskGenerator, Perturbation, extremal_perturbation)",
)
def extremal(case: Case) -> dict[str, Tensor]:
    config, image = case.config, case.inputs["input"][0].detach()
    height, width = config["shape"]
    mask = {"step": config["step"], "sigma": config["sigma"]}
    pyramid = {"levels": config["num_levels"], "blur": config["max_blur"]}
    full, cropped = SmoothMask(height, width, **mask)(case.inputs["mask_param"])
    (gradient,) = torch.autograd.grad(full.sum(), case.inputs["mask_param"], retain_graph=True)
    shown = Pyramid(image, config["perturbation"], **pyramid)
    seen: list[Tensor] = []

    def scores(x: Tensor) -> Tensor:
        seen.append(_scores(x, case.params))
        return seen[-1]

    found = extremal_masks(
        scores,
        image,
        config["target"],
        config["areas"],
        variant=config["variant"],
        perturbing=config["perturbation"],
        kind=config["reward"],
        iterations=config["max_iter"],
        jitter=config["jitter"],
        **mask,
        **pyramid,
    )
    return {
        "mask_full": full,
        "mask_cropped": cropped,
        "mask_param_grad": gradient,
        "apply_out": shown(case.inputs["apply_mask"]),
        "pyramid": shown.levels[: len(case.expected["pyramid"])],
        "final_mask": found.masks,
        "hist": _history(case, found.history, seen),
    }


def _history(case: Case, history: Tensor, seen: list[Tensor]) -> Tensor:
    """Of several areas the authors' contrastive reward is written down as the mean score minus each one's largest other."""
    target, areas = case.config["target"], len(case.config["areas"])
    if case.config["reward"] != "contrastive" or areas == 1:
        return history
    theirs = history.clone()
    for n in range(history.shape[2]):
        own = seen[n].detach()[:, target]
        others = seen[n].detach().index_fill(1, torch.tensor([target]), -100.0).amax(1)
        if case.config["variant"] == "dual":
            own, others = own[:areas] - own[areas:], others[:areas] - others[areas:]
        sign = -1 if case.config["variant"] == "delete" else 1
        theirs[:, 0, n] = sign * (own.mean() - others)
    return theirs


def _scores(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    x = F.relu(F.conv2d(x, p["c1.weight"], p["c1.bias"], padding=1))
    x = F.relu(F.conv2d(x, p["c2.weight"], p["c2.bias"], stride=2, padding=1))
    return F.linear(x.mean((2, 3)), p["fc.weight"], p["fc.bias"])

import torch
from torch import Tensor

from cenote.mix.long_context_heads.criterion import Masses, Moments, expected, local_keys, masses
from tests.golden.cases import Case, adapter


@adapter("long-context-heads", "QAdA criterion")
def criterion(case: Case) -> dict[str, Tensor]:
    q, k = case.inputs["q"].detach()[:, None], case.inputs["k"].detach()
    scale = q.shape[-1] ** -0.5
    keys = k.shape[-2]
    near = local_keys(torch.arange(keys), torch.tensor([keys - 1]), case.config["n_sink"], case.config["n_local"])
    exact = masses(q @ k.mT * scale, near)
    moments = Moments.of(k, ~near)
    estimated = Masses(exact.near, expected(q, moments))
    found = {
        "local_mass": exact.near.exp(),
        "bulk_mass": exact.far.exp(),
        "local_fraction": exact.share,
        "bulk_mass_est": estimated.far.exp(),
        "local_fraction_est": estimated.share,
        "score_mean": (q @ moments.mean[..., None])[..., 0] * scale,
        "score_var": (q @ moments.covariance @ q.mT)[..., 0] * scale**2,
        "oracle_is_local": exact.local(case.config["tau"]).to(torch.uint8),
        "qada_is_local": estimated.local(case.config["tau"]).to(torch.uint8),
    }
    found = {name: value[:, 0] for name, value in found.items()}
    return found | {"mu": moments.mean, "cov": moments.covariance, "is_local": near[0].to(torch.uint8)}

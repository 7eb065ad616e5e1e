from typing import Any

from torch import Tensor

from cenote.pool import DenseCRF, PermutohedralLattice
from cenote.pool.spatial.deeplab.dense_crf import mean_field, pixel_features
from tests.golden.cases import Case, adapter

NORMALIZATIONS: dict[str, Any] = {
    "NO_NORMALIZATION": "none",
    "NORMALIZE_BEFORE": "before",
    "NORMALIZE_AFTER": "after",
    "NORMALIZE_SYMMETRIC": "symmetric",
}


def pair(sigma: Any) -> tuple[float, float]:
    return tuple(sigma) if isinstance(sigma, list | tuple) else (sigma, sigma)


@adapter("deeplab", "pydensecrf.densecrf.DenseCRF2D")
def dense_crf(case: Case) -> dict[str, Tensor]:
    config = case.config
    normalization = NORMALIZATIONS[config.get("normalization", "NORMALIZE_SYMMETRIC")]
    unary, image = case.inputs["unary"].detach(), case.inputs["image"].movedim(-1, 0)
    near, far = (pair(config[k]) for k in ("sxy_gaussian", "sxy_bilateral"))
    crf = DenseCRF(
        config["compat_bilateral"],
        far,
        config["srgb"],
        config["compat_gaussian"],
        near,
        config["iterations"],
        method="exact",
        normalization=normalization,
    )
    exact = crf(unary.double().unsqueeze(0), image.unsqueeze(0)).squeeze(0).float()
    # theirs has both kernels on a lattice, in float32
    height, width = unary.shape[1:]
    kernels = [
        (config["compat_gaussian"], PermutohedralLattice(pixel_features(height, width, near))),
        (
            config["compat_bilateral"],
            PermutohedralLattice(pixel_features(height, width, far, image.float(), config["srgb"])),
        ),
    ]
    q = mean_field(unary.flatten(1).T, kernels, config["iterations"], normalization)
    lattice = q.T.reshape(unary.shape)
    agreement = (exact.argmax(0) == lattice.argmax(0)).float().mean()
    assert agreement >= 0.98, f"exact and lattice agree on {agreement:.3f} of the pixels"
    # the truth that the case was made from is no output of anything
    given = {"labels_true": case.expected["labels_true"]} if "labels_true" in case.expected else {}
    return {"Q_exact": exact, "Q_lattice": lattice, **given}

import torch
from torch import Tensor

from cenote.pool import SoftPool1d, SoftPool2d, SoftPool3d
from tests.golden.cases import Case, adapter


@adapter("softpool", "SoftPool2dForward/Backward (CUDA kernel)")
def cuda_kernel(case: Case) -> dict[str, Tensor]:
    x, g = case.inputs["x"], case.inputs["g"]

    def pooled_and_gradient(**options: str) -> tuple[Tensor, Tensor]:
        y = SoftPool2d(case.config["kernel_size"], case.config.get("stride"), **options)(x)
        return y, torch.autograd.grad(y, x, g.detach(), retain_graph=True)[0]

    y, true = pooled_and_gradient()
    same, by_weights = pooled_and_gradient(grad="weights")
    assert torch.equal(y, same)
    return {"y": y, "grad_autograd": true, "grad_kernel": by_weights}


def fallback(case: Case) -> dict[str, Tensor]:
    x = case.inputs["x"]
    cls = {3: SoftPool1d, 4: SoftPool2d, 5: SoftPool3d}[x.dim()]
    pool = cls(case.config["kernel_size"], case.config.get("stride"), weights="shared", clamp_output=True)
    return {"y": pool(x)}


for name in ("soft_pool1d", "soft_pool2d", "soft_pool3d"):
    adapter("softpool", f"{name} (CPU fallback)")(fallback)

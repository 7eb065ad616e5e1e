import torch
from torch import Tensor

from cenote.pool import AdaPool2d, EDSCWPool2d, IDWPool2d, SoftPool2d
from tests.golden.cases import Case, adapter


@adapter("adapool", "AdaPool2d (native=False), EDSCW/EM/IDW kernels")
def adapool(case: Case) -> dict[str, Tensor]:
    x, g = case.inputs["x"], case.inputs["g"].detach()
    window = {"kernel_size": case.config["kernel_size"], "stride": case.config.get("stride")}
    pool = AdaPool2d(**window, beta=case.inputs["beta"])
    y = pool(x)
    grad_x, grad_beta = torch.autograd.grad(y, [x, pool.beta], g, retain_graph=True)
    held = AdaPool2d(**window, beta=case.inputs["beta"], grad="weights")(x)
    return {
        "y": y,
        "edscw": EDSCWPool2d(**window)(x),
        "em": SoftPool2d(**window)(x),
        "idw": IDWPool2d(**window)(x),
        "grad_autograd_x": grad_x,
        "grad_kernel_x": torch.autograd.grad(held, x, g)[0],
        "grad_beta": grad_beta,
    }

from typing import Any

from torch import Tensor

from cenote.pool.attention.deep_set import DeepSet
from cenote.pool.attention.pma import PMA
from cenote.pool.attention.set_attention import ISAB, MAB, SAB
from cenote.pool.attention.set_transformer.clustering import GaussianMixtures
from cenote.pool.attention.set_transformer.model import SetTransformer
from tests.golden.cases import Case, adapter, load_parameters

SLUG = "set-transformer"


@adapter(SLUG, "MAB")
def mab(case: Case) -> dict[str, Tensor]:
    c = case.config
    module = MAB(c["dim_Q"], c["dim_K"], c["dim_V"], c["num_heads"], c.get("ln", False))
    return {"y": load_parameters(module, case.params)(case.inputs["Q"], case.inputs["K"])}


@adapter(SLUG, "SAB")
def sab(case: Case) -> dict[str, Tensor]:
    c = case.config
    module = SAB(c["dim_in"], c["dim_out"], c["num_heads"], c.get("ln", False))
    return {"y": load_parameters(module, case.params)(only_input(case))}


@adapter(SLUG, "ISAB")
def isab(case: Case) -> dict[str, Tensor]:
    c = case.config
    module = ISAB(c["dim_in"], c["dim_out"], c["num_heads"], c["num_inds"], c.get("ln", False))
    return {"y": load_parameters(module, case.params)(only_input(case))}


@adapter(SLUG, "PMA")
def pma(case: Case) -> dict[str, Tensor]:
    c = case.config
    module = PMA(c["dim"], c["num_seeds"], c["num_heads"], c.get("ln", False))
    load_parameters(module, case.params)
    return {"y": with_seeds(module(only_input(case)))}


@adapter(SLUG, "SetTransformer")
def set_transformer(case: Case) -> dict[str, Tensor]:
    c = case.config
    module = SetTransformer(
        c["dim_input"],
        **outputs(c),
        hidden=c.get("dim_hidden", 128),
        heads=c.get("num_heads", 4),
        inducing=c.get("num_inds", 32),
        ln=c.get("ln", False),
        decoder_blocks=2,
    )
    rename = {"dec.0.": "pma.", "dec.1.": "dec.0.", "dec.2.": "dec.1.", "dec.3.": "out."}
    load_parameters(module, case.params, rename)
    return {"y": with_seeds(module(only_input(case)))}


@adapter(SLUG, "DeepSet")
def deep_set(case: Case) -> dict[str, Tensor]:
    c = case.config
    module = DeepSet(c["dim_input"], **outputs(c), hidden=c.get("dim_hidden", 128))
    return {"y": with_seeds(load_parameters(module, case.params)(only_input(case)))}


@adapter(SLUG, "MixtureOfMVNs(MultivariateNormalDiag).log_prob")
def mixture_log_prob(case: Case) -> dict[str, Tensor]:
    x = case.inputs["X"]
    mixtures = GaussianMixtures.from_raw(case.inputs["raw"])
    likelihood = {"ll": mixtures.log_likelihood(x), "labels": mixtures.labels(x)}
    return likelihood | mixtures._asdict()


def outputs(config: dict[str, Any]) -> dict[str, int]:
    return {"out_dim": config["dim_output"], "seeds": config["num_outputs"]}


def only_input(case: Case) -> Tensor:
    (x,) = case.inputs.values()
    return x


def with_seeds(y: Tensor) -> Tensor:
    """The authors keep the axis of the seeds when there is only one."""
    return y.unsqueeze(1) if y.dim() == 2 else y

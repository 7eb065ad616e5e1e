from torch import Tensor

from cenote.core import PaddedTokens
from cenote.pool import DraspPool
from tests.golden.cases import Case, adapter, load_parameters


class ZeroFilledDrasp(DraspPool):
    """The authors' form without a mask: the last segment is filled up with zeros that count as frames."""

    def cut(self, tokens):
        if tokens.mask is not None:
            return super().cut(tokens)
        cut, (segment, share) = super().cut(tokens)
        last = tokens.values.shape[1] % self.segment
        if not last:
            return cut, (segment, share)
        means = cut.values.clone()
        means[:, -1] = means[:, -1] * (last / self.segment)
        return PaddedTokens(means), (segment, share)


def drasp(case: Case, statistics: str, branch: str) -> dict[str, Tensor]:
    config = case.config
    pool = ZeroFilledDrasp(config["dim"], segment=config.get("segment_size", 1), statistics=statistics)
    load_parameters(pool, case.params, {f"{branch}.": ""})
    x = case.inputs["x"].double()
    outputs = {"nomask": pool(x)}
    if "mask" in case.inputs:
        outputs["masked"] = pool(x, case.inputs["mask"].squeeze(-1) > 0)
    return {k: v.to(case.inputs["x"].dtype) for k, v in outputs.items()}


@adapter("drasp", "Dual_Resolution_Statistics_Pooling")
def statistics(case: Case) -> dict[str, Tensor]:
    return drasp(case, "mean_std", "gasp")


@adapter("drasp", "Dual_Resolution_Attentive_Pooling")
def means(case: Case) -> dict[str, Tensor]:
    return drasp(case, "mean", "gsap")

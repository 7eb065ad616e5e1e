import torch
from torch import Tensor

from cenote.explain.answer_attentiveness.mass import mass_on_choices
from tests.golden.cases import Case, adapter


@adapter("answer-attentiveness", "analysis.compute_bounds.parse_csv")
def bounds(case: Case) -> dict[str, Tensor]:
    found = mass_on_choices(case.inputs["choice_probs"].detach().log())
    # theirs is rounded to four decimals before it is a percentage
    percent = 100 * round(found.percent_unaffectable / 100, 4)
    return {"pmv": found.mass, "percent_unaffectable": torch.tensor([percent], dtype=torch.float64)}

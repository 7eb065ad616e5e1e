import copy

import pytest
from torch.utils.flop_counter import FlopCounterMode

from cenote.features import digits
from cenote.jobs.probe.cost import multiply_adds
from cenote.jobs.probe.module import build_probe


@pytest.mark.parametrize("method", ["mean", "abmil", "pma", "siglip", "dinovit"])
def test_products_are_those_that_torchs_counter_counts(method: str) -> None:
    data = digits()
    probe = build_probe(method, data)
    alone = copy.deepcopy(probe).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        alone(data.x[:1])
    assert multiply_adds(probe, data) == counter.get_total_flops() // 2 > 0

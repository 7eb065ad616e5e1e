import inspect

import pytest

import cenote
from cenote.testing import check_layer_pool

LAYERS = 5


@pytest.mark.parametrize("name", [m.name for m in cenote.methods(room="pool", kind="layers")])
def test_layer_pool_keeps_its_contract(name: str) -> None:
    taken = inspect.signature(cenote.method(name).load()).parameters
    # the published widths and numbers of latents would take minutes of finite differences
    small = {"layers": LAYERS, "channels": 16, "hidden": 32, "latents": 12}
    sized = {argument: size for argument, size in small.items() if argument in taken}
    check_layer_pool(cenote.create(name, dim=16, **sized), layers=LAYERS)

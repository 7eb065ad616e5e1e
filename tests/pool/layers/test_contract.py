import inspect

from tests.pools import by_base

import cenote
from cenote.testing import check_layer_pool

LAYERS = 5

# the largest last: the first with each base is tried whole
METHODS = [m.name for m in cenote.methods(room="pool", kind="layers")][::-1]


@by_base(check_layer_pool, METHODS)
def test_layer_pool_keeps_its_contract(name: str, left_out: tuple[str, ...]) -> None:
    taken = inspect.signature(cenote.method(name).load()).parameters
    # the published widths and numbers of latents would take minutes of finite differences
    small = {"layers": LAYERS, "channels": 8, "hidden": 16, "latents": 12, "out_dim": 8}
    sized = {argument: size for argument, size in small.items() if argument in taken}
    check_layer_pool(cenote.create(name, dim=16, **sized), layers=LAYERS, leave_out=left_out)

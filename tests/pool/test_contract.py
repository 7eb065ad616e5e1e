import inspect

from tests.pools import QUICK_SETTINGS, by_base

import cenote
import cenote.pool
from cenote.testing import check_pool

TOKENS = 9

METHODS = [m.name for m in cenote.methods(room="pool", kind="sets")]


@by_base(check_pool, METHODS)
def test_pool_keeps_its_contract(name: str, left_out: tuple[str, ...]) -> None:
    signature = inspect.signature(cenote.method(name).load())
    sized = {"tokens": TOKENS} if "tokens" in signature.parameters else {}
    check_pool(cenote.create(name, dim=16, **sized, **QUICK_SETTINGS.get(name, {})), tokens=TOKENS, leave_out=left_out)

"""The jaxtyping shapes on public functions are true: every pool runs with them checked.

In a process of its own, because the checks replace the errors that users see and hide functions from torch.compile.
"""

import subprocess
import sys

import cenote

PROGRAM = """
import inspect, sys
from jaxtyping import install_import_hook
install_import_hook("cenote", "beartype.beartype")
import torch, cenote
for name in sys.argv[1:]:
    sized = {"tokens": 9} if "tokens" in inspect.signature(cenote.method(name).load()).parameters else {}
    pool = cenote.create(name, dim=16, **sized).eval()
    x, mask = torch.randn(3, 9, 16), torch.rand(3, 9) > 0.3
    pool(x), pool(x, mask), pool.attend(x, mask), pool.attend(x.transpose(1, 2).unflatten(2, (3, 3)))
    if not pool.fixed_tokens:
        pool.attend(cenote.Bags.from_padded(x, mask))
print("shapes hold")
"""


def test_shapes_hold() -> None:
    names = [m.name for m in cenote.methods(room="pool", kind="sets")]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *names], capture_output=True, text=True, check=False)
    assert done.stdout == "shapes hold\n", done.stderr[-2000:]

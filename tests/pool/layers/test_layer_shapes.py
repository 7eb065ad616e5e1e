"""The jaxtyping shapes of the layer pools are true; in a process of its own, because the checks replace functions."""

import subprocess
import sys

import cenote

PROGRAM = """
import inspect, sys
from jaxtyping import install_import_hook
install_import_hook("cenote", "beartype.beartype")
import torch, cenote
for name in sys.argv[1:]:
    taken = inspect.signature(cenote.method(name).load()).parameters
    pool = cenote.create(name, dim=16, **({"layers": 5} if "layers" in taken else {})).eval()
    x, mask = torch.randn(3, 5, 9, 16), torch.rand(3, 9) > 0.3
    pool(x), pool(x, mask), pool.attend(x, mask)
cenote.pool.stack_layers([torch.zeros(2, 3, 4)] * 3)
print("shapes hold")
"""


def test_shapes_hold() -> None:
    names = [m.name for m in cenote.methods(room="pool", kind="layers")]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *names], capture_output=True, text=True, check=False)
    assert done.stdout == "shapes hold\n", done.stderr[-2000:]

"""Every pool of layer stacks."""

import inspect

import torch

import cenote
import cenote.pool

for name in [m.name for m in cenote.methods(room="pool", kind="layers")]:
    taken = inspect.signature(cenote.method(name).load()).parameters
    pool = cenote.create(name, dim=16, **({"layers": 5} if "layers" in taken else {})).eval()
    x, mask = torch.randn(3, 5, 9, 16), torch.rand(3, 9) > 0.3
    pool(x), pool(x, mask), pool.attend(x, mask)
cenote.pool.stack_layers([torch.zeros(2, 3, 4)] * 3)

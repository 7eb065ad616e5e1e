"""Every pool of token sets, called as users call it."""

import inspect

import torch

import cenote

for name in [m.name for m in cenote.methods(room="pool", kind="sets")]:
    sized = {"tokens": 9} if "tokens" in inspect.signature(cenote.method(name).load()).parameters else {}
    pool = cenote.create(name, dim=16, **sized).eval()
    x, mask = torch.randn(3, 9, 16), torch.rand(3, 9) > 0.3
    pool(x), pool(x, mask), pool.attend(x, mask), pool.attend(x.transpose(1, 2).unflatten(2, (3, 3)))
    if not pool.fixed_tokens:
        pool.attend(cenote.Bags.from_padded(x, mask))

"""What was computed of segments, kept by what it depends on.

Source: Milbauer et al. (2023), arXiv 2305.19585.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core import InputError, files
from cenote.core.requirements import require_at_least, require_one_of

Key = tuple[tuple[tuple[Any, ...], ...], int, str, int]
"""Tokens by the name of the input, P, digest of the model, offset (-1 where positions start anew)."""
FORMAT = 1


class SegmentCache:
    """States of segments by tokens, P, model, and place where that matters; those used least recently go first.

    Args:
        limit: bytes that are kept at most.
        dtype: float32, or float16, which takes half and rounds.

    Attributes:
        hits, misses: segments that were asked for and known, or not; a segment that is asked for twice at once is known the
            second time.

    Source: Milbauer et al. (2023), arXiv 2305.19585.
    """

    def __init__(self, limit: int = 2**30, dtype: torch.dtype = torch.float32) -> None:
        require_at_least(0, limit=limit)
        require_one_of((torch.float32, torch.float16, torch.float64), dtype=dtype)
        self.limit, self.dtype = limit, dtype
        self.hits = self.misses = self.nbytes = 0
        self._kept: OrderedDict[Key, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, keys: Sequence[Key]) -> dict[Key, Float[Tensor, "_tokens dim"]]:
        """What is known of these."""
        found: dict[Key, Tensor] = {}
        asked: set[Key] = set()
        for key in keys:
            if key in self._kept:
                self._kept.move_to_end(key)
                found[key] = self._kept[key]
            known = key in found or key in asked
            self.hits, self.misses = self.hits + known, self.misses + (not known)
            asked.add(key)
        return found

    def keep(self, key: Key, states: Float[Tensor, "tokens dim"]) -> None:
        """Of one segment."""
        own = states.detach().to(self.dtype).clone()
        size = own.numel() * own.element_size()
        if size > self.limit:
            return
        if key in self._kept:
            self.nbytes -= _bytes(self._kept.pop(key))
        while self.nbytes + size > self.limit:
            self.nbytes -= _bytes(self._kept.popitem(last=False)[1])
        self._kept[key] = own
        self.nbytes += size

    def save(self, path: str | Path) -> None:
        """Write what is kept to one safetensors file."""
        states = {str(n): t.cpu() for n, t in enumerate(self._kept.values())}
        card = {"format": FORMAT, "keys": list(self._kept)}
        files.write_tensors(Path(path), states, {"segments": json.dumps(card)})

    def load(self, path: str | Path) -> SegmentCache:
        """Keep what `save` wrote, too; gives itself.

        Raises:
            InputError: naming the file, where it holds something else.
        """
        try:
            found = files.read_tensors(Path(path))
            card = json.loads(found.metadata["segments"])
            keys = [
                (tuple(tuple(part) for part in ids), split, digest, offset)
                for ids, split, digest, offset in card["keys"]
            ]
            states = [found.tensors[str(n)] for n in range(len(keys))]
        except FileNotFoundError:
            raise InputError(f"{path}: is not there") from None
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: does not hold segments that were kept ({str(error)[:200]})") from None
        for key, own in zip(keys, states, strict=True):
            self.keep(key, own)
        return self


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()

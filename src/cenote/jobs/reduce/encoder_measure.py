"""What is measured of an encoder that goes on with fewer tokens: features, a probe's answers, multiply-adds, time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.digests import weights_sha256
from cenote.core.reduced import Reduced
from cenote.core.threads import one_thread
from cenote.models.live import BlockEdit, Place, Shorten, StateRecorder, Where, attentions, edited
from cenote.models.live.places import blocks as blocks_of

Read = Literal["cls", "mean"]
FOLDS = 5
DECAYS = (1e-4, 1e-2, 1.0)
"""Weight decays that a probe chooses from, times the number of items."""
TIMED, TRIES = 8, 3
"""Images of one pass that is timed, and how often each way is tried, in turn."""


class Seen(NamedTuple):
    """Of images: features, and how many tokens each block read, padding among them."""

    features: Float[Tensor, "images dim"]
    tokens: dict[int, int]


class Counter(BlockEdit):
    """How many tokens each block reads."""

    def __init__(self, at: Where) -> None:
        self.at = at
        self.tokens: dict[int, int] = {}

    def begins(self) -> None:
        self.tokens.clear()

    def enters(self, place: Place, h: Tensor) -> Tensor:
        self.tokens[place.block] = h.shape[1]
        return h


class Timed:
    """A reducer that tells how long it took."""

    def __init__(self, reducer: Any) -> None:
        self.reducer, self.needs = reducer, frozenset(reducer.needs)
        self.seconds, self.items = 0.0, 0

    def __call__(self, x: Tensor, **given: Any) -> Reduced:
        start = time.perf_counter()
        found: Reduced = self.reducer(x, **given)
        self.seconds += time.perf_counter() - start
        self.items += len(x)
        return found

    @property
    def milliseconds(self) -> float:
        """Of one item."""
        return 1000 * self.seconds / max(self.items, 1)


@dataclass(frozen=True, eq=False)
class Bench:
    """An encoder, its images and their classes.

    Attributes:
        model: in eval mode.
        images: as it takes them.
        labels: numbers of the classes.
        read: `"cls"`, the first token, or `"mean"`, of all behind the prefix, by their sizes.
        prefix: leading tokens that are never reduced.
        state: whose tokens are read; of the last block where None.
        batch: images at once.
        stack: the list of blocks.
    """

    model: nn.Module
    images: Float[Tensor, "images *form"]
    labels: Int[Tensor, "images"]
    read: Read
    prefix: int
    state: int
    batch: int
    stack: str
    _known: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        read: Read,
        prefix: int,
        state: int | None,
        batch: int,
        stack: str | None,
    ) -> Bench:
        """Raises `InputError` where the blocks cannot be told."""
        there = {place.stack for place in attentions(model) if place.kind == "self" and place.stack}
        if stack is None and len(there) == 1:
            (stack,) = there
        if stack not in there:
            raise InputError(f"stack: {stack!r} is none of {', '.join(sorted(there)) or 'the model, which has none'}")
        count = sum(place.stack == stack for place in blocks_of(model))
        if state is not None and not 1 <= state <= count:
            raise InputError(f"state: expected one of 1 to {count}, got {state}")
        return cls(model, images, labels, read, prefix, count if state is None else state, batch, stack)

    @property
    def blocks(self) -> int:
        """How many there are up to the state that is read."""
        return self.state

    @torch.inference_mode()
    def seen(self, cut: Callable[[], Shorten] | None = None, images: Tensor | None = None) -> Seen:
        """All images, with fewer tokens behind a block or with all."""
        images = self.images if images is None else images
        found, tokens = [], dict[int, int]()
        for some in images.split(self.batch):
            states = StateRecorder(Where([self.state - 1], stack=self.stack))
            counter = Counter(Where(range(self.state), stack=self.stack))
            shorten = None if cut is None else cut()
            with edited(self.model, *([] if shorten is None else [shorten]), counter, states):
                self._run(some)
            ((h,),) = states.written.values()
            found.append(self._read(h, shorten))
            tokens = {block: max(tokens.get(block, 0), n) for block, n in counter.tokens.items()}
        return Seen(torch.cat(found), tokens)

    def _run(self, images: Tensor) -> None:
        self.model(images)

    def _read(self, h: Float[Tensor, "batch tokens dim"], shorten: Shorten | None) -> Float[Tensor, "batch dim"]:
        if self.read == "cls":
            return h[:, 0].float().clone()
        sizes = torch.ones_like(h[..., 0])
        if shorten is not None and shorten.found is not None and shorten.found.sizes is not None:
            sizes = shorten.found.sizes.to(h)
        weights = sizes[:, self.prefix :, None]
        return ((h[:, self.prefix :] * weights).sum(1) / weights.sum(1).clamp(min=1e-6)).float()

    @property
    def whole(self) -> Seen:
        """With all tokens; once."""
        if "whole" not in self._known:
            self._known["whole"] = self.seen()
        found: Seen = self._known["whole"]
        return found

    @property
    def probes(self) -> list[Probe]:
        """One for each fold, trained on the unreduced features of the others; once."""
        if "probes" not in self._known:
            x, folds = self.whole.features, self.folds
            self._known["probes"] = [
                Probe.fitted(x[folds != k], self.labels[folds != k]) for k in range(int(folds.max()) + 1)
            ]
        found: list[Probe] = self._known["probes"]
        return found

    @property
    def folds(self) -> Int[Tensor, "images"]:
        """The fold in which each image is tested: those of a class are dealt out in turn."""
        folds = torch.zeros_like(self.labels)
        for label in self.labels.unique():
            own = (self.labels == label).nonzero()[:, 0]
            order = torch.randperm(len(own), generator=torch.Generator().manual_seed(0))
            folds[own[order]] = torch.arange(len(own)) % FOLDS
        return folds

    def answers(self, features: Float[Tensor, "images dim"]) -> Int[Tensor, "images"]:
        """The class that the probe which has not seen an image gives it."""
        found = torch.zeros_like(self.labels)
        for number, probe in enumerate(self.probes):
            own = self.folds == number
            found[own] = probe.classes(features[own])
        return found

    def multiply_adds(self, tokens: Mapping[int, int]) -> int:
        """Of one image, of the blocks, when they read so many tokens: all maps once for each token, and products of attention
        once for each pair. What the reducer takes is told by its milliseconds."""
        total = 0
        for place in blocks_of(self.model):
            if place.stack == self.stack and place.block in tokens:
                n = tokens[place.block]
                maps = [p for p in place.module.parameters() if p.dim() == 2]
                width = next((p.shape[-1] for p in place.module.parameters() if p.dim() == 1), 0)
                total += n * sum(p.numel() for p in maps) + 2 * n * n * width
        return total

    @torch.inference_mode()
    def speed(self, cut: Callable[[], Shorten]) -> tuple[float, float]:
        """Images per second on one thread, with fewer tokens and with all: run in turn, each at its quickest."""
        images = self.images[: min(TIMED, len(self.images))]
        best = [float("inf"), float("inf")]
        with one_thread():
            for _ in range(TRIES):
                for way in (0, 1):
                    inside = edited(self.model, cut()) if not way else nullcontext()
                    with inside:
                        start = time.perf_counter()
                        self._run(images)
                        best[way] = min(best[way], time.perf_counter() - start)
        return len(images) / best[0], len(images) / best[1]

    def fingerprint(self) -> str:
        """That changes with anything that is measured."""
        if "fingerprint" not in self._known:
            digest = hashlib.sha256(weights_sha256(self.model).encode())
            for value in (self.images, self.labels):
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            digest.update(repr((self.read, self.prefix, self.state, self.stack)).encode())
            self._known["fingerprint"] = digest.hexdigest()
        found: str = self._known["fingerprint"]
        return found


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear classifier of standardised features: least squares on the classes, with weight decay.

    Attributes:
        mean, deviation: of the training features.
        weight, bias: of the classes.
    """

    mean: Float[Tensor, "dim"]
    deviation: Float[Tensor, "dim"]
    weight: Float[Tensor, "dim classes"]
    bias: Float[Tensor, "classes"]
    known: Int[Tensor, "classes"]

    @classmethod
    def fitted(cls, x: Float[Tensor, "images dim"], labels: Int[Tensor, "images"]) -> Probe:
        """With the weight decay of the smallest error where each image is left out in turn, which has a closed form."""
        known, numbers = labels.unique(return_inverse=True)
        wide = x.double()
        mean, deviation = wide.mean(0), wide.std(0, correction=0)
        deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        a = (wide - mean) / deviation
        y = nn.functional.one_hot(numbers, len(known)).double()
        bias = y.mean(0)
        u, s, v = torch.linalg.svd(a, full_matrices=False)
        best: tuple[float, Tensor] | None = None
        for decay in DECAYS:
            shrunk = s.square() / (s.square() + decay * len(x))
            guess = u @ (shrunk[:, None] * (u.T @ (y - bias)))
            leverage = (u.square() @ shrunk + 1 / len(x)).clamp(max=1 - 1e-6)
            error = float((((y - bias) - guess) / (1 - leverage)[:, None]).square().mean())
            if best is None or error < best[0]:
                weight = v.T @ ((s / (s.square() + decay * len(x)))[:, None] * (u.T @ (y - bias)))
                best = (error, weight)
        assert best is not None
        return cls(mean, deviation, best[1], bias, known)

    def classes(self, x: Float[Tensor, "images dim"]) -> Int[Tensor, "images"]:
        """The class of largest score."""
        scores = ((x.double() - self.mean) / self.deviation) @ self.weight + self.bias
        return self.known[scores.argmax(1)]

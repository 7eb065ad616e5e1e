"""Ablations of single heads, orders of pruning, and pruning step by step.

Source: Michel, Levy and Neubig (2019), arXiv 1905.10650.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.mix.sixteen_heads.gated import Granularity
from cenote.mix.sixteen_heads.live import Head, HeadMap, Importance, Loss, importance_of_heads, masked_heads
from cenote.mix.sixteen_heads.statistics import Change, paired_bootstrap
from cenote.models.live.without_heads import WithoutHeads, without_heads

Evaluate = Callable[[nn.Module], Float[ndarray, "items"]]
"""From a model to what each item adds to its metric, larger is better: of accuracy 1 where it is right."""
Order = Literal["importance", "reverse", "random"]


class Ablated(NamedTuple):
    """What heads do to a metric.

    Attributes:
        full: of each item with all heads.
        without: of a head, the same without it; or of a place, with the named head alone.
    """

    full: Float[ndarray, "items"]
    without: dict[Head, Float[ndarray, "items"]]

    def changes(self, random_state: int = 0) -> dict[Head, Change]:
        """Differences with a paired bootstrap."""
        return {h: paired_bootstrap(self.full, one, random_state=random_state) for h, one in self.without.items()}

    def table(self, known: HeadMap) -> Float[ndarray, "places heads"]:
        """Differences of the metric; NaN where a place has fewer heads."""
        found = np.full((len(known.places), max(known.heads)), np.nan)
        rows = {place.path: i for i, place in enumerate(known.places)}
        for head, own in self.without.items():
            found[rows[head.path], head.number] = own.mean() - self.full.mean()
        return found


@torch.no_grad()
def ablate_each(model: nn.Module, evaluate: Evaluate, known: HeadMap, kind: str | None = None) -> Ablated:
    """The metric without each head, all others kept: one evaluation for each.

    Args:
        model: in eval mode.
        evaluate: see `Evaluate`.
        known: its heads.
        kind: of attention alone, see `HeadMap.types`.
    """
    chosen = known if kind is None else known.of_type(kind)
    found = {}
    for head in chosen.all:
        with masked_heads(model, known, [head]):
            found[head] = evaluate(model)
    return Ablated(evaluate(model), found)


@torch.no_grad()
def ablate_all_but_one(
    model: nn.Module, choose: Evaluate, evaluate: Evaluate, known: HeadMap, kind: str | None = None
) -> Ablated:
    """The metric where a place has one head alone, that which is best on validation items.

    Args:
        model: in eval mode.
        choose: metric of validation items.
        evaluate: metric of the items that are told of.
        known: its heads.
        kind: of attention alone, see `HeadMap.types`.
    """
    chosen = known if kind is None else known.of_type(kind)
    found = {}
    for place, count in zip(chosen.places, chosen.heads, strict=True):
        own = [Head(place.path, n) for n in range(count)]
        values = []
        for head in own:
            with masked_heads(model, known, [h for h in own if h != head]):
                values.append(float(choose(model).mean()))
        best = own[int(np.argmax(values))]
        with masked_heads(model, known, [h for h in own if h != best]):
            found[best] = evaluate(model)
    return Ablated(evaluate(model), found)


def pruning_order(
    importance: Importance,
    order: Order = "importance",
    *,
    by_place: bool = True,
    keep: int = 0,
    random_state: int = 0,
) -> tuple[Head, ...]:
    """Heads in the order in which they go, of all layers together.

    Args:
        importance: what they are worth.
        order: the least important first, the most important first, or any.
        by_place: divide by the length of each place's first, `sqrt(sum I^2) + 1e-20`.
        keep: so many of each place, the most important, never go.
        random_state: of a random order.
    """
    require_one_of(get_args(Order), order=order)
    require_at_least(0, keep=keep)
    of = importance.normalised() if by_place else importance
    kept = set()
    for place, scores in zip(of.known.places, of.scores, strict=True):
        best = scores.argsort(descending=True, stable=True)[:keep]
        kept |= {Head(place.path, n) for n in best.tolist()}
    worth = {
        Head(place.path, n): value
        for place, scores in zip(of.known.places, of.scores, strict=True)
        for n, value in enumerate(scores.tolist())
    }
    heads = [head for head in of.known.all if head not in kept]
    if order == "random":
        return tuple(heads[i] for i in np.random.default_rng(random_state).permutation(len(heads)))
    return tuple(sorted(heads, key=worth.__getitem__, reverse=order == "reverse"))


def by_drop(ablated: Ablated, known: HeadMap) -> Importance:
    """What heads are worth by how much the metric drops without each: the order by what was measured."""
    table = -ablated.table(known)
    return Importance(known, tuple(torch.from_numpy(table[i, :count]).float() for i, count in enumerate(known.heads)))


class PruningStep(NamedTuple):
    """`share` of all heads that are gone, which, and the metric of each item."""

    share: float
    gone: tuple[Head, ...]
    items: Float[ndarray, "items"]


class GreedyPruning:
    """Heads of all layers taken out in steps, the least important first.

    Args:
        step: share of all heads that goes in each step; the paper's 0.1, or 0.05.
        keep: so many heads of each place never go.
        granularity: of the importance.
        order: see `pruning_order`.
        by_place: see `pruning_order`.
        reestimate: estimate importance anew before each step, without those that are gone already.
        kind: of attention alone, see `HeadMap.types`.
        rescale: times all over those that are left.
        random_state: of a random order.

    Example:
        >>> from cenote.mix import heads_of
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 8}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=20, **sizes)).eval()
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 5]]), "labels": torch.tensor([0, 1])}
        >>> def loss(model, batch):
        ...     return 2 * model(**batch).loss
        >>> def right(model):
        ...     return (model(**batch).logits.argmax(1) == batch["labels"]).double().numpy()
        >>> steps = GreedyPruning(0.25, keep=1).run(model, right, loss=loss, batches=[batch], until=0.5)
        >>> [(step.share, len(step.gone)) for step in steps]
        [(0.0, 0), (0.25, 2), (0.5, 4)]
        >>> known = heads_of(model, lambda: model(batch["input_ids"]))
        >>> smaller = prune_heads(model, known, steps[-1].gone, {"input_ids": batch["input_ids"]})
        >>> len(heads_of(smaller.model, lambda: smaller.model(batch["input_ids"])).all)
        4

    Source: Michel, Levy and Neubig (2019), arXiv 1905.10650.
    """

    def __init__(
        self,
        step: float = 0.1,
        *,
        keep: int = 0,
        granularity: Granularity = "token",
        order: Order = "importance",
        by_place: bool = True,
        reestimate: bool = False,
        kind: str | None = None,
        rescale: bool = False,
        random_state: int = 0,
    ) -> None:
        if not 0 < step <= 1:
            raise InputError(f"step: expected a share above 0, up to 1, got {step}")
        require_one_of(get_args(Granularity), granularity=granularity)
        require_one_of(get_args(Order), order=order)
        require_at_least(0, keep=keep)
        self.step, self.keep, self.granularity, self.order = step, keep, granularity, order
        self.by_place, self.reestimate, self.kind, self.rescale = by_place, reestimate, kind, rescale
        self.random_state = random_state

    def run(
        self,
        model: nn.Module,
        evaluate: Evaluate,
        importance: Importance | None = None,
        *,
        loss: Loss | None = None,
        batches: Sequence[Any] = (),
        until: float = 1.0,
    ) -> list[PruningStep]:
        """The metric with fewer and fewer heads, from all to none (of those that may go).

        Args:
            model: in eval mode; it is what it was behind this.
            evaluate: see `Evaluate`.
            importance: of its heads; or `loss` and `batches`, as for `importance_of_heads`, of which it is estimated.
            loss, batches: needed to estimate it anew.
            until: share of the heads at which to end.
        """
        if importance is None:
            importance = self._estimated(model, loss, batches)
        known = importance.known
        chosen = known if self.kind is None else known.of_type(self.kind)
        total = len(chosen.all)
        gone: tuple[Head, ...] = ()
        with torch.no_grad():
            found = [PruningStep(0.0, (), evaluate(model))]
        steps = 1
        while found[-1].share < until:
            if self.reestimate and gone:
                importance = self._estimated(model, loss, batches, known, gone)
            left = [h for h in self._order(importance, chosen) if h not in set(gone)]
            count = round(min(steps * self.step, until) * total)
            new = left[: max(count - len(gone), 0)]
            last = steps * self.step >= until
            steps += 1
            if not new and (last or not left):
                # rounded down, no step is nearer to that share
                break
            if not new:
                continue
            gone = (*gone, *new)
            with torch.no_grad(), masked_heads(model, known, gone, self.rescale):
                found.append(PruningStep(len(gone) / total, gone, evaluate(model)))
        return found

    def _order(self, importance: Importance, chosen: HeadMap) -> tuple[Head, ...]:
        order = pruning_order(
            importance, self.order, by_place=self.by_place, keep=self.keep, random_state=self.random_state
        )
        paths = {place.path for place in chosen.places}
        return tuple(head for head in order if head.path in paths)

    def _estimated(
        self,
        model: nn.Module,
        loss: Loss | None,
        batches: Sequence[Any],
        known: HeadMap | None = None,
        without: Sequence[Head] = (),
    ) -> Importance:
        if loss is None or not batches:
            raise InputError(
                "loss: give it, with batches, to estimate importance; or an importance that is there already"
            )
        return importance_of_heads(model, loss, batches, self.granularity, known=known, without=without)


def prune_heads(model: nn.Module, known: HeadMap, heads: Iterable[Head], inputs: Mapping[str, Any]) -> WithoutHeads:
    """A copy of a model from which these heads are really gone, see `cenote.models.live.without_heads.without_heads`.

    Args:
        model: in eval mode; it stays as it is.
        known: its heads.
        heads: those that go; key heads go with the last query head that reads them, and groups must stay even.
        inputs: of its forward, to find the maps with and to compare outputs on.
    """
    return without_heads(model, known.by_place(heads), inputs)


@torch.no_grad()
def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """What one run takes, the median of several behind one to warm up: of a model with and without heads, at the batch sizes
    that matter."""
    require_at_least(1, repeats=repeats)
    run()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))

"""Train all seeds and learning rates of one probe together over one read of the data."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cenote.compare.metrics import Metric
from cenote.core.binding import bind
from cenote.core.graphs import Graphs
from cenote.core.seeded import seeded
from cenote.core.sets import Tokens
from cenote.core.tokenwise import ROWS_AT_ONCE
from cenote.features.dataset import Task, TokenDataset
from cenote.jobs.probe.module import Probe
from cenote.jobs.probe.optimiser import CosineAdamW, CosineLARS
from cenote.jobs.probe.recipe import Recipe
from cenote.jobs.probe.together import joined_products
from cenote.pool.base import similar_lengths
from cenote.pool.graph.base import GraphPool

Progress = Callable[[float], None]

NUMBERS_WORTH_SHARING = 2**21
"""Features in one step, above which several threads are faster than one."""

WHOLE_BATCH = 16
"""How many times the usual bound a batch may take when its pool must see it whole."""


@dataclass(frozen=True)
class Trained:
    """What training one method gave.

    Attributes:
        probes: one probe per seed, at the chosen learning rate and its best epoch, in eval mode.
        learning_rate: chosen by the mean over the seeds of the best validation metric.
        validation: best validation metric per seed.
        by_rate: best validation metric at each learning rate, mean over the seeds.
        epochs: epoch of the kept state per seed, from 1.
        train_loss, validation_curve: per seed, one number per epoch.
        seconds: wall time.
    """

    probes: tuple[Probe, ...]
    learning_rate: float
    validation: tuple[float, ...]
    by_rate: tuple[float, ...]
    epochs: tuple[int, ...]
    train_loss: tuple[tuple[float, ...], ...]
    validation_curve: tuple[tuple[float, ...], ...]
    seconds: float


def train(
    build: Callable[[], Probe],
    data: TokenDataset,
    metric: Metric,
    seeds: tuple[int, ...],
    recipe: Recipe,
    progress: Progress = lambda _: None,
) -> Trained:
    """Train `len(seeds) * len(recipe.learning_rates)` probes side by side.

    The probes of one seed start from the same weights; all see the same batches in the same order, drawn from the first
    seed. So seeds differ in initialisation (and dropout), not in the order of the data.

    Args:
        build: a fresh probe; called once per seed, after seeding.
        data: with items in train and val.
        metric: higher is better.
        seeds: of the initialisations.
        recipe: see `Recipe`.
        progress: called with the share of the work that is done.

    Small steps run on one thread. Of several threads that train, one does at a time: they share a generator.
    """
    # dropout must not depend on what was trained before
    with seeded(seeds[0]):
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if steps_are_small(data, recipe) else threads)
        try:
            return _train(build, data, metric, seeds, recipe, progress)
        finally:
            torch.set_num_threads(threads)


def steps_are_small(data: TokenDataset, recipe: Recipe) -> bool:
    """Whether one thread trains as fast as several, which would wait for each other."""
    # items of many lengths go through in pieces of like length: the mean tells, not the longest
    step = recipe.items_per_step(len(data.indices("train"))) * float(data.lengths().float().mean()) * data.dim
    return step < NUMBERS_WORTH_SHARING


def _train(
    build: Callable[[], Probe],
    data: TokenDataset,
    metric: Metric,
    seeds: tuple[int, ...],
    recipe: Recipe,
    progress: Progress = lambda _: None,
) -> Trained:
    ensemble = _Ensemble([_seeded(build, s) for s in seeds], recipe.learning_rates)
    start = time.perf_counter()
    train_items, val_items = data.indices("train"), data.indices("val")
    size = recipe.items_per_step(len(train_items))
    batches = max(1, math.ceil(len(train_items) / size))
    passes = math.ceil(recipe.least_steps / batches)
    per_epoch = passes * batches
    optimiser = (CosineLARS if recipe.optimiser == "lars" else CosineAdamW)(
        ensemble.leaves(),
        recipe.learning_rates,
        recipe.weight_decay,
        recipe.epochs * per_epoch,
        recipe.warmup_epochs * per_epoch,
    )
    ensemble.pool_once(data, torch.cat([train_items, val_items]), recipe.tokens_at_once)
    order = torch.Generator().manual_seed(seeds[0])
    scale = TargetScale.of(data, train_items)
    y = scale.standardised(data.y)
    y_val = y[val_items].numpy()
    ones = torch.ones(1, len(val_items), dtype=torch.float64).numpy()

    losses: list[list[float]] = []
    curves: list[list[float]] = []
    best = [-math.inf] * ensemble.members
    best_loss = [math.inf] * ensemble.members
    best_epoch = [0] * ensemble.members
    best_leading, leading_epoch = -math.inf, 0
    kept = ensemble.state()
    for epoch in range(1, recipe.epochs + 1):
        ensemble.train()
        total = torch.zeros(ensemble.members)
        for items in _passes(train_items, size, passes, order):
            logits = ensemble.logits(data, items, recipe.tokens_at_once)
            loss = _losses(logits, y[items], data.task)
            loss.sum().backward()
            optimiser.step()
            total += loss.detach() * len(items)
        losses.append((total / (passes * len(train_items))).tolist())
        logits = ensemble.predict(data, val_items, recipe)
        # of logits that are no numbers a metric may be anything
        now = [float(metric(s, y_val, ones)[0]) if np.isfinite(s).all() else -math.inf for s in logits.numpy()]
        curves.append(now)
        # of epochs that are equally good, the one whose scores can be believed most: a ranking may be right long before
        now_loss = _losses(logits, y[val_items], data.task).tolist()
        better = [
            n > b or b == -math.inf or (n == b and loss < least)
            for n, b, loss, least in zip(now, best, now_loss, best_loss, strict=True)
        ]
        if any(better):
            ensemble.keep(kept, better)
        for m in range(ensemble.members):
            if better[m]:
                best[m], best_loss[m], best_epoch[m] = now[m], now_loss[m], epoch
        leading = float(_mean_by_rate(best, len(seeds)).max())
        if leading > best_leading:
            best_leading, leading_epoch = leading, epoch
        progress(epoch / recipe.epochs)
        if epoch - leading_epoch >= recipe.patience:
            break

    by_rate = _mean_by_rate(best, len(seeds))
    chosen = int(by_rate.argmax())
    members = range(chosen * len(seeds), (chosen + 1) * len(seeds))
    return Trained(
        probes=tuple(scale.restored(ensemble.probe(kept, m)) for m in members),
        learning_rate=recipe.learning_rates[chosen],
        validation=tuple(best[m] for m in members),
        by_rate=tuple(by_rate.tolist()),
        epochs=tuple(best_epoch[m] for m in members),
        train_loss=tuple(tuple(row[m] for row in losses) for m in members),
        validation_curve=tuple(tuple(row[m] for row in curves) for m in members),
        seconds=time.perf_counter() - start,
    )


@torch.no_grad()
def predict(probe: Probe, data: TokenDataset, items: Int[Tensor, "chosen"], tokens_at_once: int) -> Tensor:
    """Logits `[chosen, outputs]` of one probe, in pieces of bounded size."""
    probe.eval()
    out = torch.empty(len(items), probe.classifier.out_features)
    for where, part in pieces(data, items, tokens_at_once):
        x, mask = data.batch(part)
        out[where] = probe(_float(x), mask)
    return out


@torch.no_grad()
def vectors(
    probe: Probe, data: TokenDataset, items: Int[Tensor, "chosen"], tokens_at_once: int
) -> Float[Tensor, "items width"]:
    """What the probe's pool makes of some items, in the rows of their numbers; other rows hold anything."""
    out: Tensor | None = None
    for _, part in pieces(data, items, tokens_at_once):
        x, mask = data.batch(part)
        pooled = probe.pooled(_float(x), mask)
        out = pooled.new_empty(len(data), pooled.shape[1]) if out is None else out
        out[part] = pooled
    assert out is not None
    return out


def logical_batches(
    items: Int[Tensor, "train"], size: int, generator: torch.Generator
) -> Iterator[Int[Tensor, "batch"]]:
    """Shuffled batches; a last batch of one item joins the one before it, because it has no variance."""
    shuffled = items[torch.randperm(len(items), generator=generator)]
    chunks = list(shuffled.split(size))
    if len(chunks) > 1 and len(chunks[-1]) == 1:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    yield from chunks


def _passes(items: Tensor, size: int, passes: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(passes):
        yield from logical_batches(items, size, generator)


def pieces(
    data: TokenDataset, items: Int[Tensor, "chosen"], tokens_at_once: int, keep_together: bool = False
) -> Iterator[tuple[Int[Tensor, "part"], Int[Tensor, "part"]]]:
    """Cut a batch into `(positions, items)` of similar length, so that padding and size stay bounded.

    With `keep_together` a batch that fits the bound is not cut, whatever its padding: a pool that normalises over the
    batch must see it whole.
    """
    if keep_together and len(items) * int(data.lengths()[items].max()) <= tokens_at_once:
        groups = [list(range(len(items)))]
    elif data.tokens is not None or not data.pads:
        # what is not padded need not be sorted by length
        longest = data.tokens or int(data.lengths()[items].max())
        step = max(1, tokens_at_once // max(longest, 1))
        groups = [list(range(i, min(i + step, len(items)))) for i in range(0, len(items), step)]
    else:
        lengths = data.lengths()[items].tolist()
        groups = []
        for group in similar_lengths(lengths):
            step = max(1, tokens_at_once // max(lengths[group[-1]], 1))
            groups += [group[i : i + step] for i in range(0, len(group), step)]
    for group in groups:
        where = torch.tensor(group)
        yield where, items[where]


@dataclass(frozen=True)
class TargetScale:
    """Of regression targets: probes are trained to standardised ones, so that one recipe fits all units of measurement.

    Attributes:
        mean, deviation: of the training items' targets; a target that does not vary keeps its unit. `None`: no regression.
    """

    mean: Float[Tensor, "targets"] | None
    deviation: Float[Tensor, "targets"] | None

    @classmethod
    def of(cls, data: TokenDataset, items: Int[Tensor, "train"]) -> TargetScale:
        """That of these items."""
        if data.task != "regression":
            return cls(None, None)
        targets = data.y[items].double()
        mean, deviation = targets.mean(0), targets.std(0, correction=0)
        varies = deviation > 1e-12 * targets.abs().amax(0).clamp(min=1e-300)
        return cls(mean, torch.where(varies, deviation, 1.0))

    def standardised(self, y: Tensor) -> Tensor:
        """Targets as probes are trained to them; labels as they are."""
        if self.mean is None or self.deviation is None:
            return y
        return ((y.double() - self.mean) / self.deviation).to(y.dtype)

    @torch.no_grad()
    def restored(self, probe: Probe) -> Probe:
        """The same probe, whose classifier gives targets in their own unit."""
        if self.mean is not None and self.deviation is not None:
            weight, bias = probe.classifier.weight, probe.classifier.bias
            weight.copy_(weight.double() * self.deviation.unsqueeze(1))
            bias.copy_(bias.double() * self.deviation + self.mean)
        return probe


class _Ensemble:
    """Copies of one probe, stacked: `rates` major, `seeds` minor. Their pools run together where vmap can do it."""

    def __init__(self, seeded: list[Probe], rates: tuple[float, ...]) -> None:
        self.base = copy.deepcopy(seeded[0])
        self.pool = self.base.pool
        self.rates = len(rates)
        self.members = self.rates * len(seeded)
        self.stacked = _stack([dict(p.named_parameters()) for p in seeded])
        self.frozen = {n for n, p in self.base.named_parameters() if not p.requires_grad}
        self.parameters = [
            {k: v.clone().requires_grad_(k not in self.frozen) for k, v in self.stacked.items()} for _ in rates
        ]
        buffers = _stack([dict(p.named_buffers()) for p in seeded])
        self.buffers = {k: v.repeat(self.rates, *[1] * (v.dim() - 1)) for k, v in buffers.items()}
        self.normalises_batches = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.pool.modules())
        self.vectors: Tensor | None = None
        # what a graph pool does follows from the data, which vmap cannot batch
        self.copies: list[nn.Module] = []
        self.together = not isinstance(self.pool, GraphPool)
        self.training = True

    def leaves(self) -> list[list[Tensor]]:
        return [[v for v in of_rate.values() if v.requires_grad] for of_rate in self.parameters]

    @torch.no_grad()
    def pool_once(self, data: TokenDataset, items: Tensor, tokens_at_once: int) -> None:
        """Keep what a pool without parameters makes of these items: of frozen tokens it never changes."""
        if self.normalises_batches or [*self.pool.parameters(), *self.pool.buffers()]:
            return
        self.vectors = vectors(self.base, data, items, tokens_at_once)

    def train(self) -> None:
        self.training = True
        self.pool.train()

    def logits(self, data: TokenDataset, items: Tensor, tokens_at_once: int) -> Float[Tensor, "members batch outputs"]:
        """Of one batch, with gradients when training; the normalisation sees the whole batch, whatever its pieces."""
        p = {k: torch.cat([of_rate[k] for of_rate in self.parameters]) for k in self.parameters[0]}
        if self.vectors is not None:
            pooled = self.vectors[items].expand(self.members, -1, -1)
        else:
            pooled = self._pooled_in_pieces(p, data, items, tokens_at_once)
        z = self._normalised(pooled)
        return torch.baddbmm(p["classifier.bias"].unsqueeze(1), z, p["classifier.weight"].transpose(1, 2))

    def _pooled_in_pieces(
        self, p: dict[str, Tensor], data: TokenDataset, items: Tensor, tokens_at_once: int
    ) -> Float[Tensor, "members batch width"]:
        at_once = max(1, tokens_at_once // (self.members if data.pads else 1))
        if self.training and self.normalises_batches:
            at_once *= WHOLE_BATCH
        parts = list(pieces(data, items, at_once, keep_together=self.training and self.normalises_batches))
        pooled = torch.cat([self._pooled(p, *data.batch(part)) for _, part in parts], 1)
        back = torch.cat([where for where, _ in parts]).argsort()
        return pooled[:, back]

    @torch.no_grad()
    def predict(self, data: TokenDataset, items: Tensor, recipe: Recipe) -> Float[Tensor, "members items outputs"]:
        self.training = False
        self.pool.eval()
        return torch.cat([self.logits(data, part, recipe.tokens_at_once) for part in items.split(recipe.batch_size)], 1)

    def state(self) -> dict[str, Tensor]:
        state = {k: torch.cat([of_rate[k].detach() for of_rate in self.parameters]) for k in self.parameters[0]}
        return state | {k: v.clone() for k, v in self.buffers.items()}

    def keep(self, kept: dict[str, Tensor], which: list[bool]) -> None:
        chosen = torch.tensor(which)
        for k, v in self.state().items():
            kept[k][chosen] = v[chosen]

    def probe(self, state: dict[str, Tensor], member: int) -> Probe:
        probe = copy.deepcopy(self.base)
        probe.load_state_dict({k: v[member] for k, v in state.items()})
        return probe.eval()

    def _pooled(
        self, p: dict[str, Tensor], x: Tensor | Tokens | Graphs, mask: Tensor | None
    ) -> Float[Tensor, "members batch width"]:
        tokens = self.base.seen(_float(x), mask)
        values, mask = tokens.values, getattr(tokens, "mask", None)
        parameters = {k.removeprefix("pool."): v for k, v in p.items() if k.startswith("pool.")}
        buffers = {k.removeprefix("pool."): v for k, v in self.buffers.items() if k.startswith("pool.")}
        if not parameters and not buffers:
            return self.pool(values, mask).flatten(1).expand(self.members, -1, -1)

        def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.pool, (parameters, buffers), (values, mask)).flatten(1)

        # a huge set goes through alone, so that one member's hidden layers are in memory at a time
        if self.together and values.shape[:2].numel() <= ROWS_AT_ONCE:
            try:
                # the fused attention kernels have no batching rule: vmap would run them one by one
                with sdpa_kernel(SDPBackend.MATH), joined_products():
                    return torch.func.vmap(run, randomness="different")(parameters, buffers)
            except RuntimeError:
                # a pool that vmap cannot batch is trained member by member
                self.together = False
        self.copies = self.copies or [copy.deepcopy(self.pool) for _ in range(self.members)]
        outputs = []
        for m, pool in enumerate(self.copies):
            bind(pool.train(self.training), {k: v[m] for k, v in (parameters | buffers).items()})
            outputs.append(pool(values, mask).flatten(1))
        return torch.stack(outputs)

    def _normalised(self, z: Float[Tensor, "members batch width"]) -> Float[Tensor, "members batch width"]:
        norm: nn.BatchNorm1d = self.base.norm
        running_mean, running_var = self.buffers["norm.running_mean"], self.buffers["norm.running_var"]
        if self.training:
            # var_mean is many times slower along a middle dimension
            mean = z.mean(1)
            variance = (z - mean.unsqueeze(1)).square().mean(1)
            momentum = norm.momentum or 0.0
            with torch.no_grad():
                unbiased = variance * (z.shape[1] / max(z.shape[1] - 1, 1))
                running_mean.lerp_(mean.detach(), momentum)
                running_var.lerp_(unbiased.detach(), momentum)
                self.buffers["norm.num_batches_tracked"] += 1
        else:
            mean, variance = running_mean, running_var
        return (z - mean.unsqueeze(1)) * (variance.unsqueeze(1) + norm.eps).rsqrt()


def _mean_by_rate(best: list[float], seeds: int) -> Float[Tensor, "rates"]:
    by_rate = torch.tensor(best, dtype=torch.float64).view(-1, seeds)
    # nan_to_num would make the infinities finite as well
    return by_rate.where(~by_rate.isnan(), -math.inf).mean(1)


def _seeded(build: Callable[[], Probe], seed: int) -> Probe:
    with seeded(seed):
        return build()


def _stack(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {k: torch.stack([s[k].detach() for s in states]) for k in states[0]}


def _float(x: Any) -> Any:
    return x.to(torch.get_default_dtype())


def _losses(logits: Float[Tensor, "members batch outputs"], y: Tensor, task: Task) -> Float[Tensor, "members"]:
    members = logits.shape[0]
    if task == "multiclass":
        flat = F.cross_entropy(logits.flatten(0, 1), y.repeat(members), reduction="none")
        return flat.view(members, -1).mean(1)
    if task == "regression":
        return (logits - y).square().flatten(1).mean(1)
    target = y.float().unsqueeze(-1) if task == "binary" else y
    return F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none").flatten(1).mean(1)

"""Reaching into a running denoising loop: latents before they are used, steps, attention maps with a graph.

`denoising(pipeline, *edits, on_step=f)` calls f before each step with a `DenoisingStep`: its latents may be set, and what is
set is used by the denoiser and by `scheduler.step` of this very step; `step.look()` runs the denoiser once more beside the
loop, with a graph, so that losses on attention maps have gradients at the latents. Of diffusers it knows only names of
arguments, and of the states in which schedulers are inside of a step: any denoiser and any object with `step(..., sample)` will
do.

What it does not know: latents that a pipeline changes between the denoiser and `scheduler.step`; what beside the latents
depends on them (a ControlNet's residuals are taken as they are, without a gradient); where latents end, if other channels or
tokens stand behind them and `scheduler.scale_model_input` did not see the latents alone; which rows are conditional, where
guidance calls the denoiser several times per step and not with the prompt first.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cenote.core import InputError
from cenote.core.interrupts import uninterrupted
from cenote.core.requirements import require_several
from cenote.models.live.calls import AttentionCall, Kind, Place
from cenote.models.live.edited import Placed, Run, entered, placed, require_module
from cenote.models.live.edits import Edit, RowRecorder, Trace, Where

PROMPT: tuple[Kind, ...] = ("cross",)
CROSS = Where(kinds=PROMPT)
DENOISERS = ("unet", "transformer")


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Attention weights of several places, and means of them.

    Args:
        weights: at each place, `[items, heads, queries, keys]`.

    Example:
        >>> place = Place(0, "cross", "blocks", "blocks.0.attn2", torch.nn.Identity())
        >>> maps = AttentionMaps({place: torch.full((1, 2, 16, 5), 0.2)})
        >>> maps.mean(4, 4).shape
        torch.Size([1, 5, 4, 4])
        >>> maps.of(torch.tensor([[False, True, True, False, False]]), 4, 4).sum()
        tensor(3.2000)
    """

    weights: Mapping[Place, Float[Tensor, "_items _heads _queries _keys"]]

    def mean(
        self,
        rows: int,
        columns: int,
        kinds: Collection[Kind] = PROMPT,
        image: Bool[Tensor, "_items tokens"] | None = None,
    ) -> Float[Tensor, "items keys rows columns"]:
        """What the pixels of one resolution take from each key: mean over the heads of all places of that resolution.

        Args:
            rows, columns: the resolution; places that have another number of queries are left out.
            kinds: of places; "cross" (keys are the prompt's tokens), "self" (pixels), "joint" (both).
            image: which of the queries are pixels, where they stand among others (joint attention); one row for all items, or
                a row each.

        Raises:
            InputError: where no place has this resolution, or their keys differ in number.
        """
        require_several(kinds=kinds)
        chosen: list[Tensor] = []
        sizes: set[int] = set()
        for place, weights in self.weights.items():
            if place.kind in kinds:
                pixels = weights if image is None else _of_image(weights, image, place)
                sizes.add(pixels.shape[2])
                if pixels.shape[2] == rows * columns:
                    chosen.append(pixels)
        if not chosen:
            raise InputError(
                f"rows, columns: no place of kind {', '.join(kinds)} has {rows} x {columns} queries; there are places of "
                f"{', '.join(map(str, sorted(sizes))) or 'no'} queries"
            )
        if len({weights.shape[3] for weights in chosen}) > 1:
            raise InputError(f"kinds: places of kind {', '.join(kinds)} read different numbers of keys; take one kind")
        return torch.cat(chosen, 1).mean(1).mT.unflatten(2, (rows, columns))

    def of(
        self,
        span: Bool[Tensor, "_items keys"],
        rows: int,
        columns: int,
        kinds: Collection[Kind] = PROMPT,
        image: Bool[Tensor, "_items tokens"] | None = None,
    ) -> Float[Tensor, "items rows columns"]:
        """The mean over a span's tokens of their maps; other arguments as in `mean`.

        Raises:
            InputError: as `mean`; for a span of other tokens, or one that has none in an item.
        """
        maps = self.mean(rows, columns, kinds, image)
        if span.shape[1] != maps.shape[1] or len(maps) % len(span):
            raise InputError(
                f"span: {tuple(span.shape)}, and the maps are of {len(maps)} items and {maps.shape[1]} keys"
            )
        if not span.any(1).all():
            raise InputError("span: has no token in one of its items")
        taken = span.to(maps).repeat_interleave(len(maps) // len(span), 0)[..., None, None]
        return (maps * taken).sum(1) / taken.sum(1)


def _of_image(weights: Tensor, image: Tensor, place: Place) -> Float[Tensor, "items heads pixels keys"]:
    """The queries that are pixels."""
    items, heads, queries, keys = weights.shape
    counts = set(image.sum(1).tolist())
    if image.shape[1] != queries or items % len(image) or len(counts) > 1:
        raise InputError(
            f"image: {tuple(image.shape)} with {', '.join(map(str, sorted(counts)))} pixels, and {place.path} has {items} "
            f"items of {queries} queries; expected as many pixels in each item"
        )
    where = image.to(weights.device).repeat_interleave(items // len(image), 0)
    return weights.transpose(1, 2)[where].view(items, -1, heads, keys).transpose(1, 2)


class MapRecorder(RowRecorder):
    """Attention maps of the loop itself, without a graph: of conditional rows, means over heads; the loop runs as it would.

    Args:
        at: the places; cross-attention by default.
        queries: only places with that many.
    """

    def __init__(self, at: Where = CROSS, queries: int | None = None) -> None:
        super().__init__(lambda call: _all_queries(call, queries), at)
        self.steps = Trace()

    def begins(self) -> None:
        super().begins()
        self.steps.clear()

    def rows(self, call: AttentionCall, weights: Tensor) -> Tensor:
        kept = weights if call.conditional is None else weights[call.conditional]
        self.found.keep(call.place, kept.mean(1, keepdim=True), True)
        self.steps.setdefault(call.place, []).append(call.step)
        return weights

    def maps(self, steps: Collection[int] | None = None) -> AttentionMaps:
        """Means over these steps, all by default, `[items, 1, queries, keys]` at each place.

        Raises:
            InputError: where nothing was recorded in these steps.
        """
        found: dict[Place, Tensor] = {}
        for place, maps in self.found.items():
            kept = [m for m, step in zip(maps, self.steps[place], strict=True) if steps is None or step in steps]
            if kept:
                found[place] = torch.stack(kept).mean(0)
        if not found:
            raise InputError(f"steps: nothing was recorded in {'any step' if steps is None else sorted(steps)}")
        return AttentionMaps(found)


def _all_queries(call: AttentionCall, number: int | None) -> Bool[Tensor, "batch queries"]:
    """All of the conditional items, in a call of that many queries; else none."""
    chosen = torch.zeros(call.batch, call.queries, dtype=torch.bool, device=call.q.device)
    if number is None or number == call.queries:
        chosen |= True if call.conditional is None else call.conditional[:, None]
    return chosen


@dataclass(frozen=True, eq=False)
class Look:
    """The denoiser run once more, with a graph. It holds the graph; drop it, and memory is free.

    Attributes:
        latents: what was looked at, `[items, ...]`.
        prediction: of the denoiser, `[items, ...]`, conditional.
        maps: weights at the places that were asked for.
    """

    latents: Tensor
    prediction: Tensor
    maps: AttentionMaps

    def gradient(self, loss: Float[Tensor, "*losses"], retain: bool = False) -> Float[Tensor, "items ..."]:
        """d loss / d latents; several losses are summed. No parameter gathers a gradient.

        Args:
            loss: of `maps` or `prediction`.
            retain: keep the graph for another gradient.

        Raises:
            InputError: for a loss that does not depend on the latents; for a second gradient of a graph that was not retained.
        """
        if not loss.requires_grad:
            raise InputError("loss: has no graph; was it computed under torch.no_grad(), or of detached maps?")
        try:
            (found,) = torch.autograd.grad(loss.sum(), self.latents, retain_graph=retain, allow_unused=True)
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise InputError("loss: its graph went with an earlier gradient; take that with retain=True") from error
        if found is None:
            raise InputError("loss: does not depend on the latents of this look")
        return found


class DenoisingStep:
    """One step of a denoising loop, before it.

    Attributes:
        index: from 0; a step goes from latents to latents, however often the denoiser runs in it.
        timestep: as the denoiser is given it.
        conditional: which rows of the denoiser's batch read the prompt, `[rows]`; the others are guidance.
        latents: before `scheduler.scale_model_input`, once for each picture, `[items, ...]`. May be set, or changed in place.
    """

    def __init__(self, run: Denoising, index: int, forward: _Forward, seen: _Seen) -> None:
        self.index, self.timestep, self.conditional = index, forward.timestep, seen.conditional
        self._run, self._forward, self._seen = run, forward, seen
        self._latents = seen.latents.detach().clone()
        self._before = self._latents, None if self._latents.is_inference() else self._latents._version

    @property
    def latents(self) -> Float[Tensor, "items ..."]:
        return self._latents

    @latents.setter
    def latents(self, latents: Float[Tensor, "items ..."]) -> None:
        self._require_now()
        before = self._seen.latents
        if not isinstance(latents, Tensor) or latents.shape != before.shape:
            got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise InputError(f"latents: expected a tensor {tuple(before.shape)} as they were, got {got}")
        latents = latents.detach().to(before)
        self.check(latents)
        self._latents = latents

    @property
    def changed(self) -> bool:
        """Whether the latents were set, or changed in place."""
        tensor, version = self._before
        if self._latents is not tensor:
            return True
        return not torch.equal(tensor, self._seen.latents) if version is None else tensor._version != version

    def check(self, latents: Float[Tensor, "items ..."]) -> None:
        """Raise where other latents would be no good here, or be lost."""
        if not latents.isfinite().all():
            raise InputError(f"latents: not finite at step {self.index}; was the update too large?")
        if (why := _corrects(self._run.scheduler)) is not None:
            raise InputError(why)

    def look(self, latents: Float[Tensor, "items ..."] | None = None, queries: int | None = None) -> Look:
        """Run the conditional rows through the denoiser once more, beside the loop, with a graph from the latents.

        Edits act as in the loop, and are not counted; what recorders find is left out. To contexts of `edited` and `recorded`
        around the loop a look is a call of the denoiser. Parameters stay as they are; where they require gradients,
        `denoiser.requires_grad_(False)` before the loop saves memory.

        Args:
            latents: `[items, ...]`, those of the step by default; a graph that they have is kept.
            queries: record maps only at places with that many.

        Raises:
            InputError: under `torch.inference_mode`; with gradient checkpointing, where maps are asked for; after the step.

        Example:
            >>> class Denoiser(torch.nn.Module):
            ...     def forward(self, sample, timestep):
            ...         return sample**2
            >>> class Scheduler:
            ...     def step(self, model_output, timestep, sample):
            ...         return sample - 0.1 * model_output
            >>> def descend(step):
            ...     look = step.look()
            ...     step.latents = step.latents - look.gradient(look.prediction)
            >>> denoiser, scheduler, x = Denoiser(), Scheduler(), torch.ones(1, 1, 2)
            >>> with torch.no_grad(), denoising(denoiser, scheduler=scheduler, on_step=descend):
            ...     scheduler.step(denoiser(x, 0), 0, x)
            tensor([[[-1.1000, -1.1000]]])
        """
        self._require_now()
        if torch.is_inference_mode_enabled():
            raise InputError(
                "look: there are no gradients under torch.inference_mode(); run the loop under torch.no_grad()"
            )
        z = self._latents if latents is None else latents
        if z.shape != self._seen.latents.shape:
            raise InputError(f"latents: expected {tuple(self._seen.latents.shape)}, got {tuple(z.shape)}")
        with torch.enable_grad():
            if not z.requires_grad:
                z = z.detach().clone().requires_grad_()
            args, kwargs = self._forward.rows(self._seen, z)
            return self._run.look(z, args, kwargs, queries)

    def _require_now(self) -> None:
        if self._run.now is not self:
            raise InputError(f"step: {self.index} is over; look and set latents while on_step runs")


class _Seen(NamedTuple):
    """How latents lie in a denoiser's batch: `copies` times, one after the other; scaled; with other channels behind."""

    latents: Tensor
    scaled: Tensor
    scale: Callable[[Tensor], Tensor]
    copies: int
    rows: slice
    conditional: Tensor

    def tiled(self, latents: Tensor, beside: Tensor) -> Tensor:
        """What the denoiser is given for these latents, with what stood beside the first ones."""
        scaled = self.scale(latents).to(beside)
        full = torch.cat([scaled] * (len(beside) // len(scaled))) if len(beside) > len(scaled) else scaled
        return torch.cat([full, beside[:, full.shape[1] :]], 1) if beside.shape[1] > full.shape[1] else full

    def stand_in(self, x: Tensor) -> bool:
        """Whether x is of these latents alone."""
        scaled, rows = self.scaled, len(self.scaled)
        if len(x) % rows or x.dim() != scaled.dim() or x.shape[1] < scaled.shape[1] or x.shape[2:] != scaled.shape[2:]:
            return False
        return all(torch.equal(part, scaled) for part in x[:, : scaled.shape[1]].split(rows))


class _Forward:
    """A call of the denoiser: which argument is the latents, which the timestep."""

    def __init__(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(denoiser.forward).parameters)
        self.args, self.kwargs = args, kwargs
        self.name = names[0] if names else ""
        latents = args[0] if args else kwargs.get(self.name)
        if not isinstance(latents, Tensor) or latents.dim() < 2:
            raise InputError(
                f"model: {type(denoiser).__name__} is called with {type(latents).__name__} first; expected latents "
                f"[batch, channels or tokens, ...]"
            )
        self.latents = latents
        at = names.index("timestep") if "timestep" in names else 1
        self.timestep = args[at] if at < len(args) else kwargs.get(names[at]) if at < len(names) else None

    def replaced(self, latents: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.args:
            return (latents, *self.args[1:]), self.kwargs
        return (), {**self.kwargs, self.name: latents}

    def rows(self, seen: _Seen, latents: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call for the conditional rows alone, of these latents."""
        batch = len(self.latents)
        args, kwargs = self.replaced(seen.tiled(latents, self.latents[seen.rows]))
        first = 1 if args else 0
        cut = functools.partial(_cut, rows=seen.rows, batch=batch)
        kept = {name: value if name == self.name and not args else cut(value) for name, value in kwargs.items()}
        return (*args[:first], *map(cut, args[first:])), kept


def _cut(value: Any, rows: slice, batch: int) -> Any:
    """Tensors that have a row for each of the batch, these rows of them."""
    if isinstance(value, Tensor):
        value = value[rows] if value.dim() and len(value) == batch else value
        # one made under inference_mode cannot be in a graph
        return value.clone() if value.is_inference() else value
    if isinstance(value, Mapping):
        return {key: _cut(part, rows, batch) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_cut(part, rows, batch) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value


class Denoising(Run):
    """A denoising loop that is entered.

    Attributes:
        effect: as of `Run`, by steps of denoising; looks are not counted.
        step: of denoising.
        now: the step that runs; None between steps, and in what a scheduler of second order evaluates inside of one.
    """

    def __init__(
        self,
        model: nn.Module,
        edits: Sequence[Edit],
        spans: Mapping[str, Tensor],
        scheduler: Any,
        pipeline: Any = None,
        on_step: Callable[[DenoisingStep], None] | None = None,
        maps: Where | None = None,
        copies: int | None = None,
        conditional: int = -1,
    ) -> None:
        super().__init__(model, edits, spans)
        self.scheduler, self.pipeline, self.on_step = scheduler, pipeline, on_step
        self.copies, self.conditional = copies, conditional
        self.now: DenoisingStep | None = None
        self._recorder: RowRecorder | None = None
        self._where: Placed | None = None
        if maps is not None:
            self._recorder = RowRecorder("all", maps, detach=False)
            self._where = placed(model, [self._recorder], {})
        self._index = -1
        self._timesteps: object = None
        self._scaled: tuple[Tensor, Tensor, Callable[[Tensor], Tensor]] | None = None
        self._seen: _Seen | None = None
        self._looking = False
        self._steps = 0
        self._spans: Mapping[str, Tensor] = {}
        self._conditional = torch.ones(1, dtype=torch.bool)

    @property
    def step(self) -> int:
        return max(0, self._index)

    def arrives(self, place: Place, call: AttentionCall) -> Mapping[str, object]:  # noqa: ARG002
        conditional = None
        if call.batch % len(self._conditional) == 0:
            each = call.batch // len(self._conditional)
            conditional = self._conditional.to(call.q.device).repeat_interleave(each)
        return {
            "spans": self._spans,
            "step": self.step,
            "query_start": 0,
            "key_start": 0,
            "prompt": call.queries,
            "conditional": conditional,
        }

    def counts(self, edit: Edit, place: Place, number: int) -> None:
        if not self._looking:
            super().counts(edit, place, number)

    def enters(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before each call of the denoiser."""
        if threading.get_ident() != self.thread or self._looking:
            return None
        forward = _Forward(denoiser, args, kwargs)
        timesteps = getattr(self.scheduler, "timesteps", None)
        if timesteps is not self._timesteps:
            # a loop begins; the one before may have been broken off
            self._timesteps, self._index, self._seen, self.now = timesteps, -1, None, None
        if self._seen is None:
            self._begins(forward)
        else:
            same = self._seen.stand_in(forward.latents)
            if not same and self.now is not None and self.now.changed:
                raise InputError(
                    f"model: step {self.now.index} calls the denoiser again with other latents, and its latents were set; "
                    f"set latents in a loop that calls it once per step, or again with the same"
                )
            seen = self._seen if same else self._looked_at(forward.latents)
            rows = len(forward.latents)
            if same and (seen.copies == 1 or rows != len(seen.conditional)):
                # one call after the other is guidance, the prompt first
                self._lay(torch.zeros(rows, dtype=torch.bool), rows)
            else:
                self._lay(seen.conditional, len(seen.latents))
        assert self._seen is not None
        if self.now is None or not self.now.changed:
            return None
        return forward.replaced(self._seen.tiled(self.now.latents, forward.latents))

    def scales(self, method: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """In the place of `scheduler.scale_model_input`."""
        scaled = method(*args, **kwargs)
        sample = args[0] if args else kwargs.get("sample")
        if threading.get_ident() == self.thread and isinstance(sample, Tensor):
            rest = {name: value for name, value in kwargs.items() if name != "sample"}
            self._scaled = sample, scaled, lambda latents: method(latents, *args[1:], **rest)
        return scaled

    def steps(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In the place of `scheduler.step`."""
        if threading.get_ident() != self.thread:
            return method(*args, **kwargs)
        seen, step = self._seen, self.now
        if seen is None:
            raise InputError(
                f"model: scheduler.step was called, and {type(self.model).__name__} did not run before it; where a pipeline "
                f"has several denoisers, enter each: denoising(pipeline.transformer_2, scheduler=pipeline.scheduler)"
            )
        self._seen = self.now = None
        self._steps += 1
        if step is None:
            return method(*args, **kwargs)
        bound = inspect.signature(method).bind(*args, **kwargs)
        sample = bound.arguments.get("sample")
        if isinstance(sample, Tensor):
            self._check_rows(seen, len(sample))
        if not step.changed:
            return method(*args, **kwargs)
        old = seen.latents
        if not isinstance(sample, Tensor) or sample.shape[1:] != old.shape[1:]:
            got = tuple(sample.shape) if isinstance(sample, Tensor) else "no sample"
            raise InputError(
                f"latents: set as {tuple(old.shape)}, and scheduler.step is given {got}; set latents where the denoiser takes "
                f"them as the scheduler does"
            )
        if not all(torch.equal(part.to(old), old) for part in sample.split(len(old))):
            raise InputError(
                f"latents: were set at step {step.index}, and the loop changed its own between the denoiser and scheduler.step"
            )
        bound.arguments["sample"] = torch.cat([step.latents.to(sample)] * (len(sample) // len(old)))
        return method(*bound.args, **bound.kwargs)

    def look(self, latents: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], queries: int | None) -> Look:
        """The denoiser beside the loop; see `DenoisingStep.look`."""
        recorder, where = self._recorder, self._where
        before = self._spans, self._conditional
        lengths = [(trace, {place: len(kept) for place, kept in trace.items()}) for trace in self._traces()]
        read = self._conditional
        try:
            self._spans = {name: span[read.to(span.device)] for name, span in self._spans.items()}
            self._conditional = read[read]
            self._looking = True
            beside: AbstractContextManager[object] = nullcontext()
            if recorder is not None and where is not None:
                if getattr(self.model, "is_gradient_checkpointing", False):
                    raise InputError(
                        "model: with gradient checkpointing maps have no gradient; call disable_gradient_checkpointing()"
                    )
                recorder.wanted = lambda call: _all_queries(call, queries)
                beside = entered(_Beside(self, recorder), where)
            with beside:
                output = self.model(*args, **kwargs)
            found = {place: kept[-1] for place, kept in recorder.found.items()} if recorder is not None else {}
        finally:
            self._looking = False
            self._spans, self._conditional = before
            if recorder is not None:
                recorder.begins()
            for trace, counts in lengths:
                for place, kept in trace.items():
                    del kept[counts.get(place, 0) :]
        return Look(latents, output if isinstance(output, Tensor) else output[0], AttentionMaps(found))

    def require_effect(self) -> None:
        super().require_effect()
        if self._index < 0:
            raise InputError("on_step: was never called: the denoiser did not run in this thread")
        if not self._steps:
            raise InputError(
                f"scheduler: step was never called, and {type(self.model).__name__} ran; is this the loop's own scheduler?"
            )

    def forgets(self) -> None:
        """Let go of tensors: the loop is left."""
        self.now = self._seen = self._scaled = self._timesteps = None

    def _begins(self, forward: _Forward) -> None:
        """An evaluation begins, and where the scheduler is not inside of a step, a step."""
        self._seen = seen = self._looked_at(forward.latents)
        self._lay(seen.conditional, len(seen.latents))
        if _inside(self.scheduler):
            return
        self._index += 1
        self.now = DenoisingStep(self, self._index, forward, seen)
        if self.on_step is not None:
            with torch.enable_grad():
                self.on_step(self.now)
        if self.now.changed:
            self.now.check(self.now.latents)

    def _looked_at(self, x: Tensor) -> _Seen:
        full, scaled = x, x
        scale: Callable[[Tensor], Tensor] = _as_it_is
        if self._scaled is not None:
            sample, out, again = self._scaled
            rows, width = len(out), out.shape[1]
            if len(x) % rows == 0 and x.dim() == out.dim() and x.shape[2:] == out.shape[2:] and width <= x.shape[1]:
                many = len(x) // rows
                if torch.equal(x[:, :width], torch.cat([out] * many).to(x)):
                    full, scaled, scale = torch.cat([sample] * many), x[:, :width], again
        copies = self._count(full)
        items = len(full) // copies
        at = range(copies)[self.conditional] * items
        conditional = torch.zeros(len(full), dtype=torch.bool, device=full.device)
        conditional[at : at + items] = True
        return _Seen(full[:items], scaled[:items], scale, copies, slice(at, at + items), conditional)

    def _count(self, latents: Tensor) -> int:
        """How many copies of the latents there are."""
        said = self.copies
        if said is None and getattr(self.pipeline, "do_classifier_free_guidance", None) is False:
            return 1
        many = said if said is not None else 2
        alike = len(latents) % many == 0 and all(
            torch.equal(part, latents[: len(latents) // many]) for part in latents.split(len(latents) // many)
        )
        if said is not None and not alike:
            raise InputError(
                f"copies: {said}, and the denoiser's batch of {len(latents)} rows is not the same latents {said} times"
            )
        return many if alike else 1

    def _check_rows(self, seen: _Seen, rows: int) -> None:
        items, copies = len(seen.latents), seen.copies
        if rows == items or (rows == items * copies and self.copies is not None):
            return
        raise InputError(
            f"copies: the denoiser's {items * copies} rows were taken as {copies} times {items} latents, and scheduler.step is "
            f"given {rows}; say how often latents stand in the denoiser's batch: copies=2 for guidance, copies=1 without"
        )

    def _lay(self, conditional: Tensor, items: int) -> None:
        """Spans, and which rows are conditional, as this call of the denoiser has its rows."""
        rows = len(conditional)
        laid: dict[str, Tensor] = {}
        for name, span in self.spans.items():
            if len(span) == rows > items:
                laid[name] = span
                continue
            if items % len(span):
                raise InputError(
                    f"spans: {name!r} is of {len(span)} items, and the denoiser has {items} in {rows} rows"
                )
            each = span.repeat_interleave(items // len(span), 0)
            if not conditional.all():
                read = conditional.to(span.device)
                each = torch.zeros(rows, span.shape[1], dtype=torch.bool, device=span.device).masked_scatter(
                    read[:, None], each
                )
            laid[name] = each
        self._spans, self._conditional = laid, conditional

    def _traces(self) -> Iterator[Trace]:
        for edit in self.edits:
            yield from (value for value in vars(edit).values() if isinstance(value, Trace))


class _Beside(Run):
    """The recorder of a look: its calls are those of the loop that it looks into."""

    def __init__(self, loop: Denoising, recorder: RowRecorder) -> None:
        super().__init__(loop.model, [recorder], {})
        self.loop = loop

    def arrives(self, place: Place, call: AttentionCall) -> Mapping[str, object]:
        return self.loop.arrives(place, call)


class _Replaced:
    """A method of a scheduler, while a loop is entered. A copy of the scheduler has its own method back."""

    def __init__(self, scheduler: Any, name: str, act: Callable[..., Any]) -> None:
        self.scheduler, self.name, self.act = scheduler, name, act
        # an attribute of the scheduler itself, where its class was overridden before
        self.before = vars(scheduler).get(name)
        self.method = getattr(scheduler, name)
        functools.update_wrapper(self, self.method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.act(self.method, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy = memo.get(id(self.scheduler))
        return self.method if copy is None else getattr(type(copy), self.name).__get__(copy)


@contextmanager
def denoising(
    model: Any,
    *edits: Edit,
    scheduler: Any = None,
    on_step: Callable[[DenoisingStep], None] | None = None,
    maps: Where | None = None,
    spans: Mapping[str, Bool[Tensor, "items tokens"]] | None = None,
    copies: int | None = None,
    conditional: int = -1,
) -> Iterator[Denoising]:
    """Run a denoising loop with changes in it, for a while; on leaving all is as it was, also after an exception.

    `on_step` is called before each step, with gradients enabled, also where the loop runs without. A step goes from latents to
    latents: what schedulers of second order (Heun, PNDM at first) evaluate inside of a step runs with the edits, and is no step
    of its own. Where guidance puts the latents into one batch several times, spans lie in the conditional rows alone, and
    `call.conditional` says which these are; where it calls the denoiser one time after the other, the first call of a step is
    taken to be the conditional one. Hears only the thread that entered.

    Args:
        model: a pipeline with a `scheduler`, and a denoiser called `unet` or `transformer`; or a denoiser, with `scheduler`.
            The denoiser's first argument is the latents, `[rows, channels or tokens, ...]`.
        edits: as in `edited`, of the denoiser; they hold in looks too.
        scheduler: of the loop, beside a bare denoiser; anything with `step(..., sample)`.
        on_step: may look, and set latents.
        maps: the places whose attention weights a look records.
        spans: which of the prompt's tokens are the cat, the hat, `[items, tokens]`; `[prompts, tokens]` where several pictures
            are made of a prompt; `[rows, tokens]` of the denoiser's whole batch.
        copies: how often the latents stand in the denoiser's batch; found out where it's 1 or 2.
        conditional: which of the copies reads the prompt; diffusers puts it last, its pipeline for DiT first.

    Returns:
        The step that runs, and what was edited where.

    Raises:
        InputError: at entry, where a place is out of reach, or the loop is entered already; in the first step, where the batch
            is not as said; on leaving, where an edit did nothing or no step was taken.

    Example:
        >>> class Denoiser(torch.nn.Module):
        ...     def forward(self, sample, timestep):
        ...         return sample.mean((1, 2, 3), keepdim=True).expand_as(sample)
        >>> class Scheduler:
        ...     def step(self, model_output, timestep, sample):
        ...         return sample - model_output
        >>> def to_one(step):
        ...     step.latents = torch.ones_like(step.latents)
        >>> denoiser, scheduler, x = Denoiser(), Scheduler(), torch.zeros(1, 4, 8, 8)
        >>> with denoising(denoiser, scheduler=scheduler, on_step=to_one):
        ...     print(scheduler.step(denoiser(torch.cat([x, x]), 3)[:1], 3, x + 0).abs().max())
        tensor(0.)
    """
    denoiser, scheduler, pipeline = _parts(model, scheduler)
    if on_step is not None and not callable(on_step):
        raise InputError(f"on_step: expected a function of a DenoisingStep, got {type(on_step).__name__}")
    if not edits and on_step is None:
        raise InputError("edits: give at least one, or on_step")
    if copies is not None and copies < 1:
        raise InputError(f"copies: expected at least 1, got {copies}")
    if not -(copies or 2) <= conditional < (copies or 2):
        raise InputError(f"conditional: {conditional} is none of {copies or 2} copies")
    if any(_is_entered(hook) for hook in denoiser._forward_pre_hooks.values()) or isinstance(
        vars(scheduler).get("step"), _Replaced
    ):
        raise InputError("model: its loop is entered already; give all edits and one on_step to one denoising(...)")
    spans = dict(spans or {})
    where = placed(denoiser, edits, spans) if edits else None
    acting = () if where is None else where.parts
    run = Denoising(denoiser, acting, spans, scheduler, pipeline, on_step, maps, copies, conditional)
    with nullcontext() if where is None else entered(run, where):
        handles: list[RemovableHandle] = []
        try:
            with uninterrupted():
                _enter(run, handles)
            yield run
            run.require_effect()
        finally:
            try:
                _leave(run, handles)
            except BaseException:
                # interrupted: what was left already is left once more
                _leave(run, handles)
                raise


def _enter(run: Denoising, handles: list[RemovableHandle]) -> None:
    for name, act in {"step": run.steps, "scale_model_input": run.scales}.items():
        if hasattr(run.scheduler, name):
            vars(run.scheduler)[name] = _Replaced(run.scheduler, name, act)
    handles.append(run.model.register_forward_pre_hook(run.enters, with_kwargs=True))


def _leave(run: Denoising, handles: Sequence[RemovableHandle]) -> None:
    own = vars(run.scheduler)
    for name in ("step", "scale_model_input"):
        replaced = own.get(name)
        if isinstance(replaced, _Replaced) and replaced.before is None:
            del own[name]
        elif isinstance(replaced, _Replaced):
            own[name] = replaced.before
    for handle in handles:
        handle.remove()
    # whoever keeps the run keeps no step, and with it no latents
    run.forgets()


def _is_entered(hook: object) -> bool:
    run = getattr(hook, "__self__", None)
    return isinstance(run, Denoising) and run.thread == threading.get_ident()


def _parts(model: Any, scheduler: Any) -> tuple[nn.Module, Any, Any]:
    """Denoiser, scheduler, and the pipeline where there is one."""
    pipeline = None
    if not isinstance(model, nn.Module):
        pipeline = model
        denoiser = next((part for name in DENOISERS if (part := getattr(model, name, None)) is not None), None)
        if denoiser is None:
            raise InputError(
                f"model: {type(model).__name__} has none of {', '.join(DENOISERS)}; give the denoiser and scheduler=..."
            )
        model, scheduler = denoiser, scheduler if scheduler is not None else getattr(model, "scheduler", None)
    require_module(model)
    if not callable(getattr(scheduler, "step", None)) or not hasattr(scheduler, "__dict__"):
        raise InputError(
            f"scheduler: expected the loop's own, with step(model_output, timestep, sample), got {type(scheduler).__name__}"
        )
    return model, scheduler, pipeline


def _as_it_is(latents: Tensor) -> Tensor:
    return latents


def _inside(scheduler: Any) -> bool:
    """Whether a scheduler of diffusers is inside of a step: the next evaluation goes on from a sample that it kept."""
    if getattr(scheduler, "state_in_first_order", True) is False:
        return True
    # of PNDM; kept too long where a loop was broken off
    if getattr(scheduler, "cur_sample", None) is not None and getattr(scheduler, "counter", 0) > 0:
        return True
    # of single-step DPM-Solver
    orders, at = getattr(scheduler, "order_list", None), getattr(scheduler, "step_index", None)
    if orders is None or at is None or at >= len(orders):
        return False
    return orders[at] > 1 and scheduler.model_outputs[-1] is not None


def _corrects(scheduler: Any) -> str | None:
    """Why latents that are set would be lost: the next step goes on from the last step's, and corrects it."""
    if getattr(scheduler, "last_sample", None) is None:
        return None
    at, off = getattr(scheduler, "step_index", None), getattr(scheduler, "disable_corrector", None)
    if not at or (off is not None and at - 1 in off):
        return None
    name = type(scheduler).__name__
    advice = f"{name}.from_config(..., disable_corrector=list(range(steps)))" if off is not None else "DDIM or Euler"
    return (
        f"latents: set at a step where {name} goes on from those of the step before, corrected, so that they would be lost; "
        f"use {advice}"
    )

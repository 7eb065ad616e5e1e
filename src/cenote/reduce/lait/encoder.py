"""An encoder whose first P blocks see one segment at a time.

Source: Milbauer, Louis, Hosseini, Fabrikant, Metzler and Schuster (2023), arXiv 2305.19585.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.language import accepted
from cenote.core.requirements import require_one_of
from cenote.models.live import AttentionCall, AttentionEdit, Where, edited, from_states, stack_blocks, states_before
from cenote.reduce.lait.cache import Key, SegmentCache

Positions = Literal["per_segment", "global"]
Form = Literal["folded", "masked"]


class Joint(NamedTuple):
    """What the last block wrote, the segments one behind the other, and which tokens are real; zeros for the others."""

    states: Float[Tensor, "batch tokens dim"]
    mask: Bool[Tensor, "batch tokens"]


class Together(NamedTuple):
    """The same with each item's real tokens in front, as the model ran, and its own `output`."""

    states: Float[Tensor, "batch tokens dim"]
    mask: Bool[Tensor, "batch tokens"]
    output: Any


class LAITEncoder(nn.Module):
    """The blocks of an encoder, the first `split` of which attend inside of each segment, the others over all of them.

        X_s = Block_P(... Block_1(emb(segment s)));  Z = Block_L(... Block_P+1([X_1; ...; X_S]))

    With `split=0` it is the encoder on the segments one behind the other; with all blocks split it encodes segments alone. It
    has no parameters of its own. What the first part gives of a segment depends on that segment only, so it can be kept.

    Args:
        model: an encoder with `input_ids` and `attention_mask` and one list of blocks, as of BERT or T5; of an encoder-decoder,
            its encoder.
        split: P, how many blocks.
        positions: of models that know absolute ones: `"per_segment"`: each segment starts at the first; `"global"`: each goes
            on behind the one before, as in the encoder itself; then what is kept of a segment is kept with its place. In the
            joint blocks distances are those of real tokens, whatever padding is between them.
        stack: path of the list of blocks, where the model has several.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
        >>> lait = LAITEncoder(BertModel(BertConfig(vocab_size=20, **sizes)).eval(), split=2)
        >>> ids = torch.tensor([[[5, 6, 7], [8, 9, 0]]])
        >>> first = lait.encode_segments(ids, ids > 0)
        >>> first.shape, lait.encode_joint(first, ids > 0).states.shape
        (torch.Size([1, 2, 3, 8]), torch.Size([1, 6, 8]))

    Source: Milbauer et al. (2023), arXiv 2305.19585; how positions are counted is inferred.
    """

    def __init__(
        self, model: nn.Module, split: int, positions: Positions = "per_segment", stack: str | None = None
    ) -> None:
        super().__init__()
        require_one_of(get_args(Positions), positions=positions)
        places = stack_blocks(model, stack)
        if not 0 <= split <= len(places):
            raise InputError(f"split: expected from 0 to the {len(places)} blocks of the model, got {split}")
        self.model, self.split, self.positions = model, split, positions
        self.layers, self.stack = len(places), places[0].stack
        # of a model with such a table, and of no other, positions have to be said
        self.table = next((m for name, m in model.named_modules() if _is_table(name, m)), None)
        if self.table is not None and positions == "global" and not accepted(model, position_ids=None):
            raise InputError(
                f"positions: {type(model).__name__} counts its own and takes no position_ids; expected 'per_segment'"
            )
        self._digest: tuple[Any, str] | None = None

    def forward(
        self,
        input_ids: Int[Tensor, "batch segments length"],
        mask: Bool[Tensor, "batch segments length"],
        also: Mapping[str, Shaped[Tensor, "batch segments length"]] | None = None,
        form: Form = "folded",
        cache: SegmentCache | None = None,
    ) -> Joint:
        """All blocks.

        Args:
            input_ids: tokens of each segment.
            mask: True = a real token; a segment may be empty, an item may not.
            also: other inputs of the model for each token, such as `token_type_ids`.
            form: `"folded"`: in the first part segments are items of a batch; `"masked"`: one sequence with a mask of blocks.
                They give the same.
            cache: of the first part; `"folded"` only.
        """
        require_one_of(get_args(Form), form=form)
        if form == "folded":
            return self.encode_joint(self.encode_segments(input_ids, mask, also, cache), mask)
        if cache is not None:
            raise InputError("cache: keeps segments that were encoded alone; expected form='folded'")
        segments = input_ids.shape[1]
        apart, together = torch.eye(segments, dtype=torch.bool), torch.ones(segments, segments, dtype=torch.bool)
        return self.scheduled(input_ids, mask, [apart] * self.split + [together] * (self.layers - self.split), also)

    def encode_segments(
        self,
        input_ids: Int[Tensor, "batch segments length"],
        mask: Bool[Tensor, "batch segments length"],
        also: Mapping[str, Shaped[Tensor, "batch segments length"]] | None = None,
        cache: SegmentCache | None = None,
    ) -> Float[Tensor, "batch segments length dim"]:
        """The first part: `H_P` of each segment; zeros for padding.

        Args:
            input_ids, mask, also: see `forward`.
            cache: what is known is not computed again; each segment once. In eval mode only.
        """
        also = _checked(input_ids, mask, also)
        rows = mask.flatten(0, 1)
        there = rows.any(1)
        tokens = {name: t.flatten(0, 1)[there] for name, t in {"input_ids": input_ids, **also}.items()}
        order, real = front(rows[there])
        packed = {name: t.gather(1, order) for name, t in tokens.items()}
        offsets = None
        if self.positions == "global" and self.table is not None:
            counts = mask.sum(2)
            offsets = (counts.cumsum(1) - counts).flatten()[there]
        found = self._first(packed, real, offsets) if cache is None else self._cached(packed, real, offsets, cache)
        back = torch.where(real[..., None], found, torch.zeros_like(found))
        width = input_ids.shape[2]
        states = back.new_zeros(len(order), width, back.shape[-1])
        states = states.scatter(1, order[..., None].expand_as(back), back)
        every = states.new_zeros(len(rows), width, back.shape[-1])
        return every.index_put((there.nonzero()[:, 0],), states).unflatten(0, mask.shape[:2])

    def encode_joint(
        self, states: Float[Tensor, "batch segments length dim"], mask: Bool[Tensor, "batch segments length"]
    ) -> Joint:
        """The second part.

        Args:
            states: of the first.
            mask: as for the first.
        """
        found = self.joined(states, mask)
        flat = mask.flatten(1)
        order, _ = front(flat)
        kept = torch.where(found.mask[..., None], found.states, torch.zeros_like(found.states))
        back = kept.new_zeros(*flat.shape, kept.shape[-1])
        return Joint(back.scatter(1, order[..., None].expand_as(kept), kept), flat)

    def joined(
        self, states: Float[Tensor, "batch segments length dim"], mask: Bool[Tensor, "batch segments length"]
    ) -> Together:
        """The second part, each item's real tokens in front; for decoders, which read the model's own output."""
        if states.shape[:3] != mask.shape:
            raise InputError(f"mask: expected {list(states.shape[:3])} as the states, got {list(mask.shape)}")
        _require_items(mask)
        order, real = front(mask.flatten(1))
        packed = states.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, states.shape[-1]))
        given: dict[str, Any] = {"input_ids": torch.zeros_like(order), "attention_mask": real.long()}
        if self.table is not None:
            # positions are in the states already; a table may be shorter than all segments together
            given |= accepted(self.model, position_ids=torch.zeros_like(order))
        output = from_states(self.model, packed, given, self.split, self.stack)
        return Together(_states(output), real, output)

    def scheduled(
        self,
        input_ids: Int[Tensor, "batch segments length"],
        mask: Bool[Tensor, "batch segments length"],
        schedule: Sequence[Bool[Tensor, "segments segments"]],
        also: Mapping[str, Shaped[Tensor, "batch segments length"]] | None = None,
    ) -> Joint:
        """One sequence, in each block a mask of which segments read which: more than P can say.

        Args:
            input_ids, mask, also: see `forward`.
            schedule: for each block `M[s, t]`, True = tokens of segment s read those of t.
        """
        also = _checked(input_ids, mask, also)
        if len(schedule) != self.layers:
            raise InputError(f"schedule: expected a mask for each of {self.layers} blocks, got {len(schedule)}")
        _require_items(mask)
        flat = mask.flatten(1)
        order, real = front(flat)
        segment = torch.arange(mask.shape[1], device=mask.device)[None, :, None].expand_as(mask).flatten(1)
        segment = segment.gather(1, order)
        given: dict[str, Any] = {n: t.flatten(1).gather(1, order) for n, t in {"input_ids": input_ids, **also}.items()}
        given["attention_mask"] = real.long()
        if self.table is not None:
            if not accepted(self.model, position_ids=None):
                raise InputError(
                    f"form: {type(self.model).__name__} counts positions by itself, through all segments; expected 'folded'"
                )
            counted = (
                mask.long().cumsum(2) - 1 if self.positions == "per_segment" else flat.long().cumsum(1) - 1
            ).view(len(flat), -1)
            given |= self._positions(counted.gather(1, order).masked_fill(~real, 0))
        edits = [
            _Between(segment, may.to(segment.device), Where(blocks=[number], kinds=["self"], stack=self.stack))
            for number, may in enumerate(schedule)
            if not bool(may.all())
        ]
        if edits:
            with edited(self.model, *edits):
                found = _states(self.model(**given))
        else:
            found = _states(self.model(**given))
        kept = torch.where(real[..., None], found, torch.zeros_like(found))
        back = kept.new_zeros(*flat.shape, kept.shape[-1])
        return Joint(back.scatter(1, order[..., None].expand_as(kept), kept), flat)

    @property
    def digest(self) -> str:
        """Of the parameters, so that what was kept of other ones is not taken; computed again where one has changed."""
        seen = tuple((p.data_ptr(), p._version) for p in self.model.parameters())
        if self._digest is None or self._digest[0] != seen:
            sha = hashlib.sha256(type(self.model).__name__.encode())
            for name, p in self.model.named_parameters():
                sha.update(name.encode())
                sha.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            self._digest = seen, sha.hexdigest()[:32]
        return self._digest[1]

    def _first(
        self, packed: Mapping[str, Tensor], real: Bool[Tensor, "rows width"], offsets: Int[Tensor, "rows"] | None
    ) -> Float[Tensor, "rows width dim"]:
        given: dict[str, Any] = {**packed, "attention_mask": real.long()}
        if offsets is not None:
            given |= self._positions(offsets[:, None] + torch.arange(real.shape[1], device=real.device) * real)
        return states_before(self.model, given, self.split, self.stack)

    def _cached(
        self, packed: Mapping[str, Tensor], real: Tensor, offsets: Tensor | None, cache: SegmentCache
    ) -> Float[Tensor, "rows width dim"]:
        if self.training or self.model.training:
            raise InputError("cache: keeps what is the same each time; expected eval mode, got training")
        counts = real.sum(1).tolist()
        keys: list[Key] = []
        for row, count in enumerate(counts):
            ids = tuple((name, *t[row, :count].tolist()) for name, t in sorted(packed.items()))
            keys.append((ids, self.split, self.digest, -1 if offsets is None else int(offsets[row])))
        kept = cache.take(keys)
        new = list({key: row for row, key in reversed(list(enumerate(keys))) if key not in kept}.values())
        if new:
            rows = torch.tensor(sorted(new), device=real.device)
            width = int(real[rows].sum(1).max())
            with torch.no_grad():
                some = {name: t[rows, :width] for name, t in packed.items()}
                found = self._first(some, real[rows, :width], None if offsets is None else offsets[rows])
            for row, states in zip(rows.tolist(), found, strict=True):
                kept[keys[row]] = states[: counts[row]]
                cache.keep(keys[row], states[: counts[row]])
        like = self.model_parameter
        out = torch.zeros(*real.shape, next(iter(kept.values())).shape[-1], dtype=like.dtype, device=like.device)
        for row, key in enumerate(keys):
            out[row, : counts[row]] = kept[key].to(out)
        return out

    @property
    def model_parameter(self) -> Tensor:
        """One of the model's, for dtype and device."""
        return next(p for p in self.model.parameters() if p.is_floating_point())

    def _positions(self, counted: Int[Tensor, "rows width"]) -> dict[str, Any]:
        """As the model's table begins: behind its row of padding, where it has one."""
        padding = getattr(self.table, "padding_idx", None)
        return accepted(self.model, position_ids=counted + (0 if padding is None else padding + 1))


class _Between(AttentionEdit):
    """Which segments read which; what is padding reads as before."""

    def __init__(self, segment: Int[Tensor, "batch tokens"], may: Bool[Tensor, "segments segments"], at: Where) -> None:
        self.at, self.readable = at, may[segment[:, :, None], segment[:, None]]

    def inputs(self, call: AttentionCall) -> AttentionCall:
        before, readable = call.allowed, self.readable

        def allowed(rows: Tensor) -> Tensor:
            item = torch.arange(len(rows), device=rows.device)[:, None]
            may = readable[item, rows][:, None]
            return may if before is None else may & before(rows)

        return call.replace(allowed=allowed)


def front(mask: Bool[Tensor, "rows tokens"]) -> tuple[Int[Tensor, "rows width"], Bool[Tensor, "rows width"]]:
    """Numbers of each row's real tokens, in their order, in front of others; as many as the longest row has.

    >>> front(torch.tensor([[False, True, True], [True, False, False]]))[0].tolist()
    [[1, 2], [0, 1]]
    """
    counts = mask.sum(1)
    width = int(counts.max()) if len(mask) else 0
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    return order, torch.arange(width, device=mask.device) < counts[:, None]


def _checked(
    input_ids: Tensor, mask: Tensor, also: Mapping[str, Tensor] | None
) -> Mapping[str, Shaped[Tensor, "batch segments length"]]:
    also = {} if also is None else also
    if input_ids.dim() != 3:
        raise InputError(f"input_ids: expected [batch, segments, length], got {list(input_ids.shape)}")
    for name, t in {"mask": mask, **also}.items():
        if t.shape != input_ids.shape:
            raise InputError(f"{name}: expected {list(input_ids.shape)} as input_ids, got {list(t.shape)}")
    _require_items(mask)
    return also


def _require_items(mask: Tensor) -> None:
    empty = (~mask.flatten(1).any(1)).nonzero()[:, 0].tolist()
    if empty or not len(mask):
        which = f"items {empty} have none" if empty else "there are no items"
        raise InputError(f"mask: expected a real token in each item; {which}")


def _is_table(name: str, module: nn.Module) -> bool:
    last = name.rpartition(".")[2].lower()
    return isinstance(module, nn.Embedding) and "position" in last and "relative" not in last


def _states(output: Any) -> Float[Tensor, "batch tokens dim"]:
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "last_hidden_state", None)
    return output[0] if found is None else found

"""Attention of a running model as a mixture of experts: its own weights under gates that start even.

Source: Peng et al. (2020), arXiv 2005.06537.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_one_of
from cenote.mix.mixture_of_attentive_experts.attention import Mixture, drawn
from cenote.mix.mixture_of_attentive_experts.experts import ExpertGate, head_factors
from cenote.models.live import AttentionCall, AttentionEdit, BlockEdit, Place, Where, attentions, edited


class LiveMixture(nn.Module):
    """A gate for each place of a running model, which scales its heads; the model's attention function stays and runs.

    The gate reads the states that the block reads, over real tokens; where attention is causal, as in decoders, over those up
    to each token. Even gates
    leave the model as it is, to rounding. Parameters of the model are the experts (`theta`), those of this module the gates.

    Args:
        model: whose attention can be reached.
        run: calls it on two tokens or more, to find how many heads each place has and where attention is causal, as
            `lambda: model(**inputs)`.
        at: the places; all by default.
        drop, hidden: see `ExpertGate`.

    Attributes:
        gates: of each place.
        mixture: `"soft"`, `"hard"`, `"sampled"` (an expert for each item) or `"even"`.
        last: of each place's path the gates of its last run, `[batch, experts]`, of each token where they are causal.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = BertModel(BertConfig(vocab_size=20, **sizes)).eval()
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> mixture = LiveMixture(model, lambda: model(ids))
        >>> with mixture.on(model):
        ...     states = model(ids).last_hidden_state
        >>> torch.allclose(states, model(ids).last_hidden_state, atol=1e-5)
        True

    Source: Peng et al. (2020), arXiv 2005.06537.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Any,
        at: Where | None = None,
        *,
        drop: int = 1,
        hidden: int = 256,
    ) -> None:
        super().__init__()
        seen = _Seen(at or Where())
        with torch.no_grad(), edited(model, seen, _Entering(seen)):
            run()
        self.places = [place for place in attentions(model) if place in seen.heads and place in seen.at]
        missing = [place.path for place in self.places if (place.stack, place.block) not in seen.widths]
        if missing:
            raise InputError(f"model: attention at {missing[0]} stands in no block, whose states its gate would read")
        self.gates = nn.ModuleList(
            ExpertGate(
                seen.widths[place.stack, place.block],
                seen.heads[place],
                drop=drop,
                hidden=hidden,
                causal=(place.stack, place.block) in seen.causal,
            )
            for place in self.places
        )
        self.at, self.mixture = seen.at, "soft"
        self.last: dict[str, Tensor] = {}
        like = next((p for p in model.parameters() if p.is_floating_point()), None)
        if like is not None:
            self.to(like.device, like.dtype if like.dtype == torch.float64 else torch.float32)

    def use(self, mixture: Mixture) -> LiveMixture:
        """Mix experts this way from now on."""
        require_one_of(("soft", "hard", "even", "sampled"), mixture=mixture)
        self.mixture = mixture
        return self

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[LiveMixture]:
        """Within the block the model's heads are mixed by the gates; behind it, it is what it was."""
        told = _Told(self)
        with edited(model, _Entering(told), told):
            yield self

    def factors(
        self,
        number: int,
        sums: Float[Tensor, "batch tokens dim"],
        counts: Float[Tensor, "batch tokens 1"],
        real: Tensor,
    ) -> Float[Tensor, "batch heads tokens"]:
        """Of a place the factors of its heads, from running sums of states and of real tokens."""
        gate = self.gates[number]
        assert isinstance(gate, ExpertGate)
        mean = sums / counts.clamp(min=1)
        # of an encoder the mean of all is that of the last
        gates = gate.chosen(mean if gate.causal else mean[:, -1])
        self.last[self.places[number].path] = gates.detach()
        if self.mixture == "even":
            gates = torch.full_like(gates, 1 / gates.shape[-1])
        if self.mixture == "hard":
            gates = _one(gates.argmax(-1), gates)
        if self.mixture == "sampled":
            expert = _one(drawn(gates, real), gates)
            gates = expert[:, None].expand_as(gates) if gates.dim() == 3 else expert
        found = head_factors(gates, gate.members)
        return found.transpose(1, 2) if found.dim() == 3 else found[..., None].expand(-1, -1, sums.shape[1])


def _one(expert: Int[Tensor, "*batch"], gates: Tensor) -> Float[Tensor, "*batch experts"]:
    return F.one_hot(expert, gates.shape[-1]).to(gates)


class _Seen(AttentionEdit):
    """How many heads places have, how wide the states are that their blocks read, and which blocks read no later token."""

    def __init__(self, at: Where) -> None:
        self.at = at
        self.heads: dict[Place, int] = {}
        self.widths: dict[tuple[str, int], int] = {}
        self.causal: set[tuple[str, int]] = set()

    def inputs(self, call: AttentionCall) -> AttentionCall:
        self.heads[call.place] = call.heads
        seen = call.readable()
        if call.place.kind == "self" and seen is not None and call.queries == call.keys > 1:
            later = torch.ones(call.queries, call.keys, dtype=torch.bool, device=call.q.device).triu(1)
            if not bool((seen & later).any()):
                self.causal.add((call.place.stack, call.place.block))
        return call

    def reads(self, place: Place, h: Tensor) -> None:
        self.widths[place.stack, place.block] = h.shape[-1]


class _Entering(BlockEdit):
    """Tells another edit what each block reads."""

    def __init__(self, told: _Seen | _Told) -> None:
        self.told = told

    def enters(self, place: Place, h: Tensor) -> Tensor:
        self.told.reads(place, h)
        return h


class _Told(AttentionEdit):
    """Heads times their factors; keeps sums over the tokens so far, for decoding with a cache."""

    def __init__(self, mixture: LiveMixture) -> None:
        self.mixture, self.at = mixture, mixture.at
        self.numbers = {(p.stack, p.block, p.path): i for i, p in enumerate(mixture.places)}
        self.states: dict[tuple[str, int], Tensor] = {}
        self.real: dict[tuple[str, int], Tensor] = {}
        self.so_far: dict[Place, tuple[Tensor, Tensor]] = {}

    def begins(self) -> None:
        self.states.clear()
        self.real.clear()
        self.so_far.clear()

    def reads(self, place: Place, h: Tensor) -> None:
        self.states[place.stack, place.block] = h

    def context(self, call: AttentionCall, y: Tensor) -> Tensor:
        place = call.place
        number = self.numbers[place.stack, place.block, place.path]
        h = self.states[place.stack, place.block]
        gate = self.mixture.gates[number]
        h = h.to(next(gate.parameters()).dtype)
        if h.dim() != 3 or h.shape[:2] != (call.batch, call.queries):
            raise InputError(
                f"model: {place.path} computes {call.batch} items of {call.queries} queries, and its block reads "
                f"{list(h.shape)}; a gate can be put there only where both are the same tokens"
            )
        real = self._real(call)
        kept = h.masked_fill(~real.unsqueeze(-1), 0.0)
        sums, counts = kept.cumsum(1), real.unsqueeze(-1).cumsum(1).to(kept)
        before = self.so_far.get(place)
        if before is not None and call.query_start and before[0].shape[0] == len(sums):
            sums, counts = sums + before[0], counts + before[1]
        self.so_far[place] = (sums[:, -1:].detach(), counts[:, -1:])
        return y * self.mixture.factors(number, sums, counts, real).unsqueeze(-1).to(y)

    def _real(self, call: AttentionCall) -> Tensor:
        """Which queries are no padding: those that may read themselves; of cross-attention those of the block's own."""
        key = (call.place.stack, call.place.block)
        if call.place.kind == "self" and call.queries == call.keys and (seen := call.readable()) is not None:
            self.real[key] = seen.expand(call.batch, -1, call.queries, -1).diagonal(dim1=2, dim2=3).any(1)
            return self.real[key]
        whole = torch.ones(call.batch, call.queries, dtype=torch.bool, device=call.q.device)
        known = self.real.get(key)
        return known if call.place.kind == "cross" and known is not None and known.shape == whole.shape else whole

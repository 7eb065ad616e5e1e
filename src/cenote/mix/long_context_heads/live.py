"""QAdA in a running decoder: of each query and head, far keys are read only where near ones are not expected to do.

Source: Donhauser, Arnal, Pezeshki, Cabannes, Lopez-Paz, Ahuja, "Unveiling Simplicities of Attention: Adaptive Long-Context Head
Identification" (2025), arXiv 2502.09647.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from cenote.core.answers import UNASKED, answer_loss, answered
from cenote.core.errors import InputError
from cenote.core.language import accepted
from cenote.core.requirements import require_at_least, require_one_of
from cenote.mix.blocks import Leftward, leftward
from cenote.mix.layer_gates import real_keys, require_plain, told
from cenote.mix.long_context_heads.criterion import Form, Masses, Moments, expected, masses, static_labels
from cenote.mix.long_context_heads.prompts import look
from cenote.models.live import AttentionCall, AttentionEdit, Place, Where, edited, one_stack
from cenote.models.live.edits import require_where

Rule = Literal["qada", "oracle", "static", "random", "near"]


@dataclass(frozen=True)
class HeadCalibration:
    """What a run over a text told of a decoder's heads.

    Attributes:
        moments: of each block, of the far keys of each head of keys.
        shares: of each block and head of queries, how many of the queries with far keys were local.
        expected: of each block and head, the mean of the expected log mass per far key: a criterion that does not look at
            queries; a control.
    """

    moments: Mapping[int, Moments]
    shares: Mapping[int, Float[Tensor, "heads"]]
    expected: Mapping[int, Float[Tensor, "heads"]]

    def labels(self, local: float) -> dict[int, Bool[Tensor, "heads"]]:
        """Of each block the heads that are always local, so that this share of all is, see `static_labels`."""
        labels = static_labels(torch.stack(list(self.shares.values())), local)
        return dict(zip(self.shares, labels, strict=True))


class Read(NamedTuple):
    """What one attention computation read.

    Attributes:
        local: queries and heads that read near keys alone, `[batch, heads, queries]`.
        counted: queries that are no padding, and have far keys, `[batch, queries]`.
        keys: keys that each head of keys read for its last query, `[batch, kv_heads]`.
        of: keys that there were, `[batch]`.
    """

    local: Bool[Tensor, "batch heads queries"]
    counted: Bool[Tensor, "batch queries"]
    keys: Int[Tensor, "batch kv_heads"]
    of: Int[Tensor, "batch"]


class QAdA(AttentionEdit):
    """Each query of each head reads near keys alone, sinks and a window, where these are expected to have most of its weight.

    What far keys would have is expected from their mean and covariance, `log n + q.mu s + q'Sigma q s^2 / 2`, without a look at
    them; a query is local where near keys then have a share of `tau` or more. Where all heads of a group are local, a decoded
    token reads no far key of that group. Prompts are computed whole, and then what is local is put in its place: they save
    nothing. For `cenote.models.live.edited`.

    Args:
        tau: the share; 0 makes every query local, 1 none that has far keys.
        sinks: first tokens that are always near.
        window: last tokens that are near.
        rule: `"qada"` as above; `"oracle"`: by the exact mass of all keys; `"static"`: `labels` of heads; `"random"`: a coin
            with `share` heads; `"near"`: always local.
        calibration: moments of a calibration in place of running ones of this text, and labels for `"static"`.
        share: of `"static"`, how many heads are local; of `"random"`, how many queries.
        form: of the covariance, see `Moments.as_`.
        clip: never expect more than the longest far key could have; of decoding alone (inferred).
        prompts: also in prompts, and wherever several queries are computed at once; else in decoding alone.
        seed: of `"random"`.
        at: the places.

    Attributes:
        read: of each place what each computation read.

    Raises:
        InputError: for a rule that lacks what it needs; in use, for caches that were not seen growing, beams among them.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from cenote.models.live import edited
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
        >>> heads = QAdA(tau=0.6, sinks=1, window=4)
        >>> with edited(model, heads):
        ...     made = model.generate(torch.arange(1, 13)[None], max_new_tokens=3, do_sample=False, eos_token_id=None)
        >>> 0.0 <= heads.share_local() <= 1.0
        True

    Source: Donhauser et al. (2025), arXiv 2502.09647.
    """

    def __init__(
        self,
        tau: float = 0.9,
        sinks: int = 16,
        window: int = 1024,
        rule: Rule = "qada",
        *,
        calibration: HeadCalibration | None = None,
        share: float | None = None,
        form: Form = "full",
        clip: bool = False,
        prompts: bool = True,
        seed: int = 0,
        at: Where | None = None,
    ) -> None:
        require_one_of(get_args(Rule), rule=rule)
        require_at_least(0, sinks=sinks)
        require_at_least(1, window=window)
        if not 0 <= tau <= 1:
            raise InputError(f"tau: expected a share from 0 to 1, got {tau}")
        if rule == "static" and calibration is None:
            raise InputError("calibration: 'static' needs one; see calibrate_heads")
        if rule in ("static", "random") and share is None:
            raise InputError(f"share: {rule!r} needs how much is local")
        self.at = require_where(at) if at is not None else Where(kinds=["self"])
        self.tau, self.sinks, self.window, self.rule, self.form = tau, sinks, window, rule, form
        self.clip, self.prompts, self.share, self.seed = clip, prompts, share, seed
        self.calibration = calibration if rule in ("qada", "static") else None
        self.labels = calibration.labels(share) if rule == "static" and calibration and share is not None else {}
        self.read: dict[Place, list[Read]] = {}
        self._states: dict[Place, _State] = {}
        self._drawn = torch.Generator().manual_seed(seed)

    def begins(self) -> None:
        self.read.clear()
        self._states.clear()
        self._drawn.manual_seed(self.seed)

    def share_local(self) -> float:
        """Of all (query, head) pairs that had far keys, those that were local; NaN where none had."""
        pairs = [(found.local & found.counted[:, None], found.counted) for all_ in self.read.values() for found in all_]
        heads = [local.shape[1] * int(counted.sum()) for local, counted in pairs]
        return sum(int(local.sum()) for local, _ in pairs) / sum(heads) if sum(heads) else float("nan")

    def keys_read(self) -> float:
        """Of the keys that there were, those that decoding read, per head of keys; NaN where nothing was decoded."""
        steps = [found for all_ in self.read.values() for found in all_ if found.local.shape[2] == 1]
        there = sum(int(found.of.sum()) * found.keys.shape[1] for found in steps)
        return sum(int(found.keys.sum()) for found in steps) / there if there else float("nan")

    def attends(
        self, call: AttentionCall, fused: Callable[[AttentionCall], Tensor]
    ) -> Float[Tensor, "batch heads queries width"]:
        real = real_keys(call)
        if call.queries == call.keys:
            self._states[call.place] = _State(Moments.none(call.k), call.k.new_zeros(call.k.shape[:2]))
        state = self._states.get(call.place)
        if state is None or state.tokens != call.keys - call.queries:
            raise InputError(
                f"model: {call.place.path} reads {call.keys - call.queries} keys of a cache that was not seen growing; begin "
                f"with the prompt inside of the context, without drafts"
            )
        if state.last is not None and not torch.equal(state.last, call.k[:, :, state.tokens - 1]):
            raise InputError("model: the items of the cache changed places; decode without beams (num_beams=1)")
        state.tokens, state.last = call.keys, call.k[:, :, -1]
        if call.queries == call.keys > 1:
            return self._whole(call, fused, real, state)
        self._leaves(call, real, state)
        if call.queries > 1:
            return fused(call)
        return self._step(call, fused, real, state)

    def _whole(
        self, call: AttentionCall, fused: Callable[[AttentionCall], Tensor], real: Tensor, state: _State
    ) -> Tensor:
        require_plain(call)
        laid = leftward(real)
        q, k, v = (laid.laid(x) for x in (call.q, call.k, call.v))
        found = look(
            q,
            k,
            v,
            laid.real,
            sinks=self.sinks,
            window=self.window,
            scale=call.scale,
            exact=self.rule == "oracle",
            known=self._known(call),
        )
        state.moments = found.moments
        far = (found.away > 0) & laid.real
        y = fused(call)
        if not self.prompts:
            return y
        local = self._local(call, found.exact if self.rule == "oracle" else found.estimated) | ~far[:, None]
        local, far = laid.back(local), laid.back(far[:, None])[:, 0]
        self._keep(call, local, far, real)
        replaced = (local & far[:, None])[..., None]
        return torch.where(replaced, laid.back(found.local).to(y.dtype), y) if bool(replaced.any()) else y

    def _step(
        self, call: AttentionCall, fused: Callable[[AttentionCall], Tensor], real: Tensor, state: _State
    ) -> Tensor:
        tokens = real.sum(1)
        far = tokens > self.sinks + self.window
        if not bool(far.any()):
            return fused(call)
        require_plain(call)
        near_k, near_v, near = self._near(call, real)
        scores = call.q.unflatten(1, (call.k.shape[1], -1)).flatten(2, 3) @ near_k.mT
        scores = scores.to(state.moments.mean.dtype) * call.scale
        mass = masses(scores, near[:, None, None])
        if self.rule == "oracle":
            every = call.scores().flatten(2).unflatten(1, (call.k.shape[1], -1))
            number = real.long().cumsum(1) - 1
            away = (number >= self.sinks) & (number < (tokens - self.window)[:, None])
            guessed = masses(every, away[:, None, None]).near
        else:
            guessed = self._guessed(call, state)
        flat = Masses(mass.near.flatten(1)[..., None], guessed.flatten(1)[..., None])
        local = self._local(call, flat) | ~far[:, None, None]
        weights = scores.masked_fill(~near[:, None, None], float("-inf")).softmax(-1).to(call.v.dtype)
        y = (weights @ near_v).flatten(1, 2)[:, :, None]
        whole = ~local[..., 0].unflatten(1, (call.k.shape[1], -1)).all(2)
        self._keep(call, local, far[:, None], real, whole)
        group = call.heads // call.k.shape[1]
        y = y.clone()
        for item, head in whole.nonzero().tolist():
            heads = slice(head * group, (head + 1) * group)
            seen = real[item]
            full = F.scaled_dot_product_attention(
                call.q[item, heads, 0], call.k[item, head], call.v[item, head], attn_mask=seen[None], scale=call.scale
            )
            needs = ~local[item, heads]
            y[item, heads, 0] = torch.where(needs, full, y[item, heads, 0])
        return y

    def _near(self, call: AttentionCall, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of sinks and window, and which of them are there; padding stands on the left."""
        tokens = call.keys
        first = real.to(torch.uint8).argmax(1)
        sinks = (first[:, None] + torch.arange(self.sinks, device=real.device)).clamp(max=tokens - 1)
        start = max(0, tokens - self.window)
        inside = torch.arange(start, tokens, device=real.device)
        there = torch.cat([sinks < start, real[:, inside]], 1)
        at = sinks[:, None, :, None]

        def of(x: Tensor) -> Tensor:
            chosen = x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3]))
            return torch.cat([chosen, x[:, :, start:]], 2)

        return of(call.k), of(call.v), there

    def _leaves(self, call: AttentionCall, real: Tensor, state: _State) -> None:
        """The window has left some keys behind, which are far from now on."""
        number = real.long().cumsum(1) - 1
        ends = call.keys - self.window
        starts = max(0, ends - call.queries)
        if ends <= 0:
            return
        span = slice(starts, ends)
        among = real[:, span] & (number[:, span] >= self.sinks)
        state.moments = state.moments.with_(call.k[:, :, span], among[:, None])
        if self.clip:
            lengths = call.k[:, :, span].norm(dim=-1).masked_fill(~among[:, None], 0.0).amax(-1)
            state.longest = torch.maximum(state.longest, lengths)

    def _guessed(self, call: AttentionCall, state: _State) -> Float[Tensor, "batch kv_heads group"]:
        grouped = call.q.unflatten(1, (call.k.shape[1], -1)).flatten(2, 3)
        known = self._known(call)
        moments = state.moments
        if known is not None:
            mean = known.mean.expand(call.batch, -1, -1)
            moments = Moments(moments.keys, mean, known.covariance.expand(call.batch, -1, -1, -1))
        longest = state.longest if self.clip else None
        return expected(grouped, moments.as_(self.form), call.scale, longest)

    def _known(self, call: AttentionCall) -> Moments | None:
        if self.calibration is None or self.rule != "qada":
            return None
        if call.place.block not in self.calibration.moments:
            raise InputError(f"calibration: has no block {call.place.block}; calibrate this model")
        return self.calibration.moments[call.place.block].as_(self.form)

    def _local(self, call: AttentionCall, mass: Masses) -> Bool[Tensor, "batch heads queries"]:
        shape = mass.near.shape
        if self.rule == "near":
            return torch.ones(shape, dtype=torch.bool, device=call.q.device)
        if self.rule == "random":
            assert self.share is not None
            return (torch.rand(shape, generator=self._drawn) < self.share).to(call.q.device)
        if self.rule == "static":
            return self.labels[call.place.block].to(call.q.device)[None, :, None].expand(shape)
        return mass.local(self.tau)

    def _keep(self, call: AttentionCall, local: Tensor, far: Tensor, real: Tensor, whole: Tensor | None = None) -> None:
        tokens = real.sum(1)
        if whole is None:
            whole = ~local[:, :, -1].unflatten(1, (call.k.shape[1], -1)).all(2)
        near = tokens.clamp(max=self.sinks + self.window)
        keys = torch.where(whole, tokens[:, None], near[:, None])
        self.read.setdefault(call.place, []).append(Read(local, far, keys, tokens))


@dataclass
class _State:
    """Of one place: moments of the far keys so far, the length of the longest, how many tokens were seen."""

    moments: Moments
    longest: Tensor
    tokens: int = 0
    last: Tensor | None = None


class _Calibrating(AttentionEdit):
    """Moments and shares of local queries of each block."""

    def __init__(self, tau: float, sinks: int, window: int, at: Where) -> None:
        self.at, self.tau, self.sinks, self.window = at, tau, sinks, window
        self.moments: dict[int, Moments] = {}
        self.shares: dict[int, Tensor] = {}
        self.expected: dict[int, Tensor] = {}

    def inputs(self, call: AttentionCall) -> AttentionCall:
        require_plain(call)
        laid: Leftward = leftward(real_keys(call))
        q, k, v = (laid.laid(x.detach()) for x in (call.q, call.k, call.v))
        options = {"sinks": self.sinks, "window": self.window, "scale": call.scale}
        found = look(q, k, v, laid.real, exact=True, **options)  # type: ignore[arg-type]
        counted = found.away > 0
        if not bool(counted.any()):
            raise InputError(
                f"input_ids: no text is longer than {self.sinks} sinks and a window of {self.window}; give a longer one"
            )
        number = torch.arange(call.keys, device=q.device)
        far = laid.real & (number >= self.sinks) & (number < laid.real.sum(1, keepdim=True) - self.window)
        block = call.place.block
        self.moments[block] = Moments.of(k.transpose(0, 1).flatten(1, 2), far.flatten()[None])
        total = counted.sum()
        local = found.exact.local(self.tau) & counted[:, None]
        self.shares[block] = local.sum((0, 2)) / total
        per_key = (found.guessed - found.away.clamp(min=1).log()[:, None]).masked_fill(~counted[:, None], 0.0)
        self.expected[block] = per_key.sum((0, 2)) / total
        return call


@torch.no_grad()
def calibrate_heads(
    model: nn.Module,
    ids: Int[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    *,
    tau: float = 0.9,
    sinks: int = 16,
    window: int = 1024,
) -> HeadCalibration:
    """Run a decoder over texts, random words in the paper, and keep what its heads' far keys are like.

    Args:
        model: a causal decoder.
        ids, mask: the texts; longer than sinks and window.
        tau: share from which a query counts as local.
        sinks, window: near keys.

    Raises:
        InputError: where no text has far keys.
    """
    found = _Calibrating(tau, sinks, window, one_stack(model))
    with edited(model, found):
        model(input_ids=ids, **told(mask), **accepted(model, use_cache=False, logits_to_keep=1))
    return HeadCalibration(found.moments, found.shares, found.expected)


def random_words(words: Sequence[str], count: int, seed: int = 0) -> str:
    """A text to calibrate on: words drawn one by one, so that nothing in it refers to anything.

    >>> len(random_words(["sky", "sea", "sun"], 5).split())
    5
    """
    require_at_least(1, count=count)
    if not words:
        raise InputError("words: give at least one")
    return " ".join(np.random.default_rng(seed).choice(list(words), count).tolist())


class Swept(NamedTuple):
    """What a decoder does at one threshold.

    Attributes:
        tau: the threshold.
        share: of the (query, head) pairs that have far keys, those that were local.
        loss: mean `-log p` of all tokens but the first.
        recall: share of the asked answers that are told right; NaN without.
    """

    tau: float
    share: float
    loss: float
    recall: float


@torch.no_grad()
def sweep_heads(
    model: nn.Module,
    ids: Int[Tensor, "batch tokens"],
    taus: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    mask: Bool[Tensor, "batch tokens"] | None = None,
    answers: Int[Tensor, "batch tokens"] | None = None,
    **options: Any,
) -> list[Swept]:
    """Loss and recall of a decoder by how much of it is local.

    Args:
        model: a causal decoder.
        ids, mask: texts.
        taus: thresholds; of rules that have none, shares.
        answers: of each token that is asked for its number, else `cenote.core.answers.UNASKED`.
        options: of `QAdA`.
    """
    found = []
    by_share = options.get("rule") in ("static", "random")
    for tau in taus:
        heads = QAdA(**{**options, "share" if by_share else "tau": tau})
        with edited(model, heads):
            logits = model(input_ids=ids, **told(mask), **accepted(model, use_cache=False)).logits
        labels = ids if mask is None else ids.masked_fill(~mask, UNASKED)
        right = float("nan") if answers is None else float(answered(logits, answers).right.float().mean())
        found.append(Swept(tau, heads.share_local(), float(answer_loss(logits, labels)), right))
    return found

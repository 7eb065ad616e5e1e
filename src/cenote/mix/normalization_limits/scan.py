"""The measures of all heads of a running model, at several lengths, and what they say.

Source: Mudarisov, Burtsev, Petrova and State (2025), arXiv 2508.17821.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.masks import padding_of
from cenote.core.requirements import require_at_least, require_one_of, require_positive
from cenote.mix.base import Normaliser
from cenote.mix.normalisers import Softmax
from cenote.mix.normalisers import normaliser as normaliser_named
from cenote.mix.normalization_limits.measures import (
    critical_n,
    distance,
    distance_bound,
    entropy,
    expected_distance_bound,
    jacobian_norms,
    separable,
    spectral_norms,
)
from cenote.models.live import AttentionCall, few_logits, recorded

Vectors = Literal["values", "embeddings"]


class HeadLimits(NamedTuple):
    """Of one head at one length: means over the rows that were looked at.

    Attributes:
        block, head, length: which; causal rows near the end read about `length` tokens.
        distance, bound: of the top tokens, and what it cannot exceed.
        of_random: what cannot be exceeded by the distance that is expected of a random set.
        separable: share of the top tokens that can be told from the others.
        critical: smallest share N / L at which distances cannot be told from those of random sets; NaN where all can, or where
            rows are of different length.
        jacobian: spectral norm of the normaliser's Jacobian.
        entropy: in nats, as a share of that of uniform weights; of weights made to sum to 1.
    """

    block: int
    head: int
    length: int
    distance: float
    bound: float
    of_random: float
    separable: float
    critical: float
    jacobian: float
    entropy: float

    @property
    def flat(self) -> bool:
        """Whether its weights say hardly more than uniform ones: nine tenths of their entropy, or more."""
        return self.entropy >= 0.9


class Limits(NamedTuple):
    """Of all heads, at all lengths."""

    heads: tuple[HeadLimits, ...]
    n: int

    def sentence(self) -> str:
        """Which heads have gone flat, in words."""
        longest = max(h.length for h in self.heads)
        last = [h for h in self.heads if h.length == longest]
        flat = [f"{h.block}.{h.head}" for h in last if h.flat]
        mean = sum(h.separable for h in last) / len(last)
        said = f"{len(flat)} of {len(last)} heads are flat at {longest} tokens"
        named = f" ({', '.join(flat[:8])}{', ...' if len(flat) > 8 else ''})" if flat else ""
        return f"{said}{named}; of the {self.n} top tokens {mean:.0%} can be told from the others in the mean."

    def table(self) -> str:
        """All of it, tabs between columns."""
        lines = ["\t".join(HeadLimits._fields)]
        lines += ["\t".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in h) for h in self.heads]
        return "\n".join(lines)

    def figure(self, measure: str = "entropy", length: int | None = None) -> str:
        """All heads as an SVG picture: a row for each block, a cell for each head, darker where the measure is larger.

        Args:
            measure: a number of `HeadLimits`.
            length: of the inputs; the longest by default.

        Raises:
            InputError: for a measure or a length that there is not.
        """
        require_one_of(HeadLimits._fields[3:], measure=measure)
        require_one_of(sorted({h.length for h in self.heads}), length=length or self.heads[-1].length)
        longest = max(h.length for h in self.heads) if length is None else length
        shown = {(h.block, h.head): float(getattr(h, measure)) for h in self.heads if h.length == longest}
        known = [v for v in shown.values() if math.isfinite(v)]
        low, high = min(known, default=0.0), max(known, default=1.0)
        cells = []
        for (block, head), value in shown.items():
            depth = (value - low) / ((high - low) or 1.0) if math.isfinite(value) else 0.0
            where = f'x="{40 + 18 * head}" y="{24 + 18 * block}" width="17" height="17"'
            told = f"<title>block {block}, head {head}: {value:.3g}</title>"
            cells.append(f'<rect {where} fill="#1f4e79" fill-opacity="{0.05 + 0.95 * depth:.3f}">{told}</rect>')
        blocks, heads = (1 + max(key[i] for key in shown) for i in (0, 1))
        labels = [f'<text x="4" y="{37 + 18 * b}" font-size="11">{b}</text>' for b in sorted({k[0] for k in shown})]
        said = f"{measure} of each head at {longest} tokens, {low:.3g} to {high:.3g}"
        size = f'width="{max(48 + 18 * heads, 320)}" height="{32 + 18 * blocks}"'
        title = f'<text x="4" y="14" font-size="12">{said}</text>'
        return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', title, *labels, *cells, "</svg>"])

    def growth(self) -> tuple[float, float]:
        """Slope per token and R^2 of the mean distance as a line over the length.

        Raises:
            InputError: for fewer than three lengths.
        """
        lengths = sorted({h.length for h in self.heads})
        if len(lengths) < 3:
            raise InputError(f"lengths: a line needs three, got {lengths}")
        x = torch.tensor(lengths, dtype=torch.float64)
        y = torch.stack(
            [
                torch.tensor([h.distance for h in self.heads if h.length == n], dtype=torch.float64).mean()
                for n in lengths
            ]
        )
        x0, y0 = x - x.mean(), y - y.mean()
        slope = (x0 @ y0) / (x0 @ x0)
        left = (y0 - slope * x0).square().sum()
        return float(slope), float(1 - left / y0.square().sum().clamp(min=1e-300))


class HeadScan:
    """Measures every head of a model that `cenote.models.live` reaches, from its queries, keys and values; nothing is changed.

    Args:
        n: top tokens.
        vectors: what weights are laid on: each head's `"values"`, or the `"embeddings"`, brought to unit length.
        normaliser: what makes weights of the model's scores; softmax, as the model has it, by default. See
            `cenote.mix.normalisers`.
        temperature: scores are divided by it.
        rows: so many rows of each head are looked at, from the last one back; causal rows read what stands before them, so that
            row i has i + 1 tokens.
        without_first: so many tokens at the start are left out of every row: sinks.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = BertModel(BertConfig(vocab_size=20, **sizes)).eval()
        >>> found = HeadScan(n=2).scan(model, {"input_ids": torch.arange(12)[None]}, lengths=(6, 12))
        >>> len(found.heads), found.sentence()[:30]
        (4, '2 of 2 heads are flat at 12 to')
    """

    def __init__(
        self,
        n: int = 5,
        vectors: Vectors = "values",
        normaliser: str | Normaliser = "softmax",
        temperature: float = 1.0,
        rows: int = 32,
        without_first: int = 0,
    ) -> None:
        require_at_least(1, n=n, rows=rows)
        require_at_least(0, without_first=without_first)
        require_positive(temperature=temperature)
        require_one_of(get_args(Vectors), vectors=vectors)
        self.n, self.vectors, self.temperature = n, vectors, temperature
        self.normaliser = normaliser_named(normaliser)
        self.rows, self.without_first = rows, without_first

    @torch.no_grad()
    def scan(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        lengths: Sequence[int] = (),
        random_state: int = 0,
    ) -> Limits:
        """Of all heads.

        Args:
            model: in eval mode.
            inputs: as the model takes them, without padding: one item, or several of one length.
            lengths: inputs are cut to these; as they are by default.

        Raises:
            InputError: for inputs with padding, a length beyond them, or rows with hardly more tokens than n.
        """
        sizes = [v.shape[1] for v in inputs.values() if isinstance(v, Tensor) and v.dim() > 1]
        if not sizes:
            raise InputError("inputs: expected a tensor [batch, tokens, ...] among them, got none")
        if padding_of(inputs) is not None:
            raise InputError("inputs: attention_mask tells of padding; scan items of one length, or one at a time")
        whole = sizes[0]
        for length in lengths:
            require_at_least(1, lengths=length)
        found: list[HeadLimits] = []
        for length in lengths or (whole,):
            if length > whole:
                raise InputError(f"lengths: {length} tokens of inputs that have {whole}")
            cut = {k: v[:, :length] if isinstance(v, Tensor) and v.dim() > 1 else v for k, v in inputs.items()}
            found += self._at(model, cut, length, random_state)
        return Limits(tuple(found), self.n)

    def _at(self, model: nn.Module, inputs: Mapping[str, Any], length: int, random_state: int) -> Iterator[HeadLimits]:
        with recorded(model, "inputs", "states") as seen:
            model(**few_logits(model, inputs))
        start = next(iter(seen["state 0"].values()))[0]
        embeddings = nn.functional.normalize(start.double(), dim=-1)
        for place, calls in seen["inputs"].items():
            if place.kind != "self":
                continue
            call = calls[0]
            chosen = torch.zeros(call.batch, call.queries, dtype=torch.bool, device=call.q.device)
            chosen[:, -self.rows :] = True
            scores, weights, readable = self._weights(call.only(chosen))
            for head in range(call.heads):
                values = call.v[:, head // (call.heads // call.v.shape[1])].double()
                x = (values if self.vectors == "values" else embeddings).unsqueeze(1)
                own = (scores[:, head], weights[:, head], x, readable[:, head])
                yield self._measured(place.block, head, length, *own, random_state)

    def _weights(self, call: AttentionCall) -> tuple[Tensor, Tensor, Bool[Tensor, "batch heads rows keys"]]:
        scores = call.scores() / self.temperature
        readable = scores > -math.inf
        readable[..., : self.without_first] = False
        counts = readable.sum(-1)
        if int(counts.min()) <= self.n:
            raise InputError(
                f"n: {self.n} top tokens, and a row reads {int(counts.min())}; take longer inputs, fewer rows or a smaller n"
            )
        return scores, self.normaliser(scores, readable).double(), readable

    def _jacobian(self, scores: Tensor, weights: Tensor, readable: Tensor) -> Float[Tensor, "batch rows"]:
        if type(self.normaliser) is Softmax:
            return jacobian_norms(weights, self.temperature * self.normaliser.temperature).spectral
        return spectral_norms(self.normaliser, scores, readable) / self.temperature

    def _measured(
        self,
        block: int,
        head: int,
        length: int,
        scores: Float[Tensor, "batch rows keys"],
        weights: Float[Tensor, "batch rows keys"],
        x: Float[Tensor, "batch 1 keys dim"],
        readable: Bool[Tensor, "batch rows keys"],
        random_state: int,
    ) -> HeadLimits:
        critical = math.nan
        counts = readable.sum(-1)
        if bool((counts == counts[0, 0]).all()) and counts.numel() >= 20:
            generator = torch.Generator().manual_seed(random_state)
            tokens = int(counts[0, 0])
            alone = weights[readable].view(-1, tokens)
            vectors = x.expand(*weights.shape, -1)[readable].view(len(alone), tokens, -1)
            tried = sorted({1, *(round(tokens * s) for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4))} - {0, tokens})
            found = critical_n(alone, vectors, tried, generator=generator)
            critical = math.nan if found is None else found / tokens
        total = weights.sum(-1, keepdim=True)
        share = entropy(weights / total.masked_fill(total == 0, 1.0)) / counts.log().clamp(min=1e-9)
        return HeadLimits(
            block,
            head,
            length,
            float(distance(weights, x, self.n, readable).mean()),
            float(distance_bound(weights, x, self.n, readable).mean()),
            float(expected_distance_bound(weights, x, self.n, readable).mean()),
            float(separable(weights, x, self.n, readable).share.mean()),
            critical,
            float(self._jacobian(scores, weights, readable).mean()),
            float(share.mean()),
        )

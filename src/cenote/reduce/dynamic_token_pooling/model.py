"""The whole model: characters, segments, characters again.

Source: Nawrot, Chorowski, Lancucki and Ponti (2023), arXiv 2211.09761.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_positive
from cenote.reduce.dynamic_token_pooling.boundaries import (
    BoundaryPredictor,
    binomial_loss,
    boundary_cross_entropy,
    entropy_spikes,
    fixed_boundaries,
    space_boundaries,
)
from cenote.reduce.dynamic_token_pooling.relative_attention import RelativeLayer, Shared, sinusoids
from cenote.reduce.dynamic_token_pooling.shortening import cleaned, downsample, segment_counts, upsample

Boundaries = Literal["none", "fixed", "whitespace", "unigram", "entropy", "gumbel"]


class Read(NamedTuple):
    """What an `HourglassLM` makes of a text.

    Attributes:
        logits: of the token behind each of the last `targets` tokens.
        losses: cross-entropy of each target, in nats, 0 for padding; `None` without targets.
        boundary_loss: of the predictor; 0 where there is none, or nothing to compare it with.
        boundaries: the cuts that were used, 0 or 1; none at all with `"none"`.
        probabilities: what the predictor said; `None` without one.
        segments: how many each item has that are over.
    """

    logits: Float[Tensor, "batch targets vocabulary"]
    losses: Float[Tensor, "batch targets"] | None
    boundary_loss: Float[Tensor, ""]
    boundaries: Float[Tensor, "batch tokens"]
    probabilities: Float[Tensor, "batch tokens"] | None
    segments: Int[Tensor, "batch"]


class HourglassLM(nn.Module):
    """A causal language model in which most layers run on means of segments.

        h = pre(emb(x));  short = middle(LN(down(b, h)));  logits = W post(up(b, short) + h)

    Args:
        vocabulary: number of tokens.
        layers: before shortening, on segments, behind; with `boundaries="none"` all of them run on tokens, in a row.
        dim: of the tokens.
        heads, head_dim: of the attention.
        inner: hidden width of layers and predictor.
        dropout, attention_dropout: in training.
        boundaries: `"none"`: vanilla; `"fixed"`: every `every` tokens; `"whitespace"`: at `space`; `"unigram"`: predicted,
            trained on given pieces; `"entropy"`: predicted, trained on spikes of the model's own entropy; `"gumbel"`:
            predicted, trained by what it does to the loss, and held near `prior`.
        every: tokens per segment of `"fixed"`.
        space: the token of `"whitespace"`.
        prior: share of cuts that `"gumbel"` is drawn to.
        temperature, threshold: of the predictor.
        spikes_left: how many tokens before a spike must be below it.
        pre_norm, activation: see `RelativeLayer`.
        null_std: deviation of the null group at the start.
        bidirectional: every token reads all of them, and is given its own segment's mean; then it is no language model, and
            `logits` speak of the token itself.
        deterministic_eval: see `BoundaryPredictor`.
        code_parity: see `boundary_cross_entropy`.

    Example:
        >>> model = HourglassLM(27, (1, 1, 1), dim=16, heads=2, inner=32, boundaries="whitespace").eval()
        >>> model(torch.tensor([[3, 4, 0, 5]])).logits.shape
        torch.Size([1, 4, 27])

    Source: Nawrot et al. (2023), arXiv 2211.09761.
    """

    def __init__(
        self,
        vocabulary: int,
        layers: tuple[int, int, int] = (2, 8, 2),
        dim: int = 512,
        heads: int = 8,
        head_dim: int | None = None,
        inner: int = 2048,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        boundaries: Boundaries = "gumbel",
        every: int = 2,
        space: int = 0,
        prior: float = 0.2,
        temperature: float = 0.5,
        threshold: float = 0.5,
        spikes_left: int = 2,
        pre_norm: bool = False,
        activation: Literal["gelu", "relu"] = "gelu",
        null_std: float = 1.0,
        bidirectional: bool = False,
        deterministic_eval: bool = True,
        code_parity: bool = False,
    ) -> None:
        super().__init__()
        require_at_least(1, vocabulary=vocabulary, dim=dim, heads=heads, every=every)
        require_at_least(0, spikes_left=spikes_left, null_std=null_std)
        require_positive(temperature=temperature)
        require_one_of(get_args(Boundaries), boundaries=boundaries)
        if len(layers) != 3 or min(layers) < 0 or not sum(layers):
            raise InputError(f"layers: expected three numbers of layers, before, on segments and behind, got {layers}")
        if dim % 2:
            raise InputError(f"dim: expected an even width, for sines and cosines, got {dim}")
        if head_dim is None and dim % heads:
            raise InputError(f"heads: {heads} does not divide dim={dim}; give head_dim")
        if bidirectional and boundaries == "entropy":
            raise InputError("bidirectional: knows no next token, of which boundaries='entropy' could be unsure")
        width = dim // heads if head_dim is None else head_dim
        self.mode, self.every, self.space, self.prior, self.spikes_left = boundaries, every, space, prior, spikes_left
        self.bidirectional, self.code_parity = bidirectional, code_parity
        self.embedding = nn.Embedding(vocabulary, dim)
        self.content_bias = nn.Parameter(torch.zeros(heads, width))
        self.distance_bias = nn.Parameter(torch.zeros(heads, width))
        self.stacks = nn.ModuleList(
            nn.ModuleList(
                RelativeLayer(dim, heads, width, inner, dropout, attention_dropout, pre_norm, activation)
                for _ in range(count)
            )
            for count in layers
        )
        self.null_group, self.short_norm, self.predictor = None, None, None
        if boundaries != "none":
            self.null_group = nn.Parameter(null_std * torch.randn(1, 1, dim))
            self.short_norm = nn.LayerNorm(dim)
        if boundaries in ("unigram", "entropy", "gumbel"):
            kind: Literal["gumbel", "supervised"] = "gumbel" if boundaries == "gumbel" else "supervised"
            self.predictor = BoundaryPredictor(
                dim, inner, kind, temperature, threshold, activation, deterministic_eval=deterministic_eval
            )
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(dim, vocabulary)
        self.apply(_initialised)

    def forward(
        self,
        data: Int[Tensor, "batch tokens"],
        target: Int[Tensor, "batch targets"] | None = None,
        boundaries: Shaped[Tensor, "batch tokens"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        noise: Float[Tensor, "batch tokens"] | None = None,
    ) -> Read:
        """Read a text.

        Args:
            data: tokens.
            target: what comes behind each of the last ones; as many as are asked for, all or fewer than `data` has.
            boundaries: of `"fixed"` and `"whitespace"`: cuts instead of their own; of `"unigram"`: what the predictor is
                compared with.
            mask: True = a real token; padding stands at either end, belongs to no segment and changes nothing.
            noise: `u` of `"gumbel"`.
        """
        self._require(data, target, boundaries, mask)
        h = self.dropout(self.embedding(data))
        asked = data.shape[1] if target is None else target.shape[1]
        cuts, soft = torch.zeros_like(h[..., 0]), None
        h = self._run(0, h, mask)
        if self.mode == "none":
            h = self._run(2, self._run(1, h, mask), mask)
        else:
            assert self.null_group is not None
            assert self.short_norm is not None
            cuts, soft = self._cut(data, h, boundaries, mask, noise)
            short = self.short_norm(downsample(cuts, h, self.null_group, mask, self.bidirectional))
            short = self._run(1, short, self._short_mask(cuts, mask))
            h = self._run(2, upsample(cuts, short, mask, self.bidirectional) + h, mask)
        logits = self.output(h[:, -asked:] if asked else h[:, :0])
        real = None if mask is None else mask[:, mask.shape[1] - asked :]
        losses = None
        if target is not None:
            losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
            losses = losses if real is None else torch.where(real, losses, torch.zeros_like(losses))
        counts = segment_counts(cuts, mask)
        return Read(
            logits, losses, self._boundary_loss(cuts, soft, logits, losses, boundaries, mask), cuts, soft, counts
        )

    def boundaries_of(
        self,
        data: Int[Tensor, "batch tokens"],
        boundaries: Shaped[Tensor, "batch tokens"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Bool[Tensor, "batch tokens"]:
        """Where a text is cut, without reading it to its end."""
        self._require(data, None, boundaries, mask)
        h = self._run(0, self.dropout(self.embedding(data)), mask)
        return cleaned(self._cut(data, h, boundaries, mask, None)[0], mask) > 0.5

    def layers_of(self, stack: int) -> list[RelativeLayer]:
        """Those before shortening (0), on segments (1), behind (2)."""
        return list(self.stacks[stack].children())  # type: ignore[arg-type]

    def ends(self, tokens: Int[Tensor, "batch"], h: Float[Tensor, "batch dim"], number: int) -> Bool[Tensor, "batch"]:
        """Whether a segment ends with a token, as the model itself cuts.

        Args:
            tokens: one of each item.
            h: what the first layers made of them.
            number: how many tokens stand before them.
        """
        if self.predictor is not None:
            return self.predictor(h[:, None]).hard[:, 0] > 0.5
        if self.mode == "whitespace":
            return space_boundaries(tokens, self.space)
        return torch.full_like(tokens, self.mode == "fixed" and number % self.every == 0, dtype=torch.bool)

    def _cut(
        self,
        data: Tensor,
        h: Float[Tensor, "batch tokens dim"],
        boundaries: Tensor | None,
        mask: Tensor | None,
        noise: Tensor | None,
    ) -> tuple[Float[Tensor, "batch tokens"], Float[Tensor, "batch tokens"] | None]:
        if self.predictor is not None:
            soft, hard = self.predictor(h, noise)
            return cleaned(hard, mask).to(h), soft
        if self.mode == "none":
            return torch.zeros_like(h[..., 0]), None
        if boundaries is None:
            fixed = self.mode == "fixed"
            boundaries = self._counted(data, mask) if fixed else space_boundaries(data, self.space)
        return cleaned(boundaries, mask).to(h), None

    def _counted(self, data: Tensor, mask: Tensor | None) -> Bool[Tensor, "batch tokens"]:
        if mask is None:
            return fixed_boundaries(data.shape[0], data.shape[1], self.every).to(data.device)
        return (mask.long().cumsum(1) - 1) % self.every == 0

    def _run(self, stack: int, x: Float[Tensor, "batch tokens dim"], mask: Tensor | None) -> Tensor:
        layers = self.layers_of(stack)
        if not layers:
            return x
        shared = self._shared(x.shape[1], mask, x.device)
        for layer in layers:
            x = layer(x, shared)
        return x

    def _shared(self, tokens: int, mask: Bool[Tensor, "batch tokens"] | None, device: torch.device) -> Shared:
        last = 1 - tokens if self.bidirectional else 0
        distances = torch.arange(tokens - 1, last - 1, -1, device=device).to(self.output.weight.dtype)
        table = self.dropout(sinusoids(distances, self.embedding.embedding_dim))
        hidden = torch.zeros(tokens, tokens, dtype=torch.bool, device=device)
        if not self.bidirectional:
            hidden = torch.ones_like(hidden).triu(1)
        if mask is not None:
            # a token of padding reads itself, so that no row is without a key
            own = torch.eye(tokens, dtype=torch.bool, device=device)
            hidden = (hidden | ~mask[:, None]) & ~own
        return Shared(self.content_bias, self.distance_bias, table, hidden)

    def _short_mask(self, cuts: Tensor, mask: Tensor | None) -> Bool[Tensor, "batch short"] | None:
        """Of rows that an item has too many, which in a causal model nothing reads."""
        if not self.bidirectional:
            return None
        counts = segment_counts(cuts, mask, unfinished=True)
        return torch.arange(int(counts.max()) + 1, device=cuts.device) <= counts[:, None]

    def _boundary_loss(
        self,
        cuts: Tensor,
        soft: Tensor | None,
        logits: Tensor,
        losses: Tensor | None,
        boundaries: Tensor | None,
        mask: Tensor | None,
    ) -> Float[Tensor, ""]:
        if soft is None or losses is None:
            return logits.new_zeros(())
        if self.mode == "gumbel":
            return binomial_loss(cuts, self.prior, mask)
        if self.mode == "unigram":
            if boundaries is None:
                return logits.new_zeros(())
            return boundary_cross_entropy(soft, boundaries.bool(), mask, self.code_parity)
        real = None if mask is None else mask[:, -logits.shape[1] :]
        log = logits.detach().log_softmax(-1)
        spikes = entropy_spikes(-(log.exp() * log).sum(-1), self.spikes_left, real)
        return boundary_cross_entropy(soft[:, -logits.shape[1] :], spikes, real, self.code_parity)

    def _require(self, data: Tensor, target: Tensor | None, boundaries: Tensor | None, mask: Tensor | None) -> None:
        if data.dim() != 2 or not data.shape[1]:
            raise InputError(f"data: expected [batch, tokens] with at least one token, got {list(data.shape)}")
        if target is not None and (len(target) != len(data) or not 0 < target.shape[1] <= data.shape[1]):
            raise InputError(
                f"target: expected {len(data)} rows of 1 to {data.shape[1]} tokens, got {list(target.shape)}"
            )
        for name, given in (("boundaries", boundaries), ("mask", mask)):
            if given is not None and given.shape != data.shape:
                raise InputError(f"{name}: expected {list(data.shape)} as data, got {list(given.shape)}")
        if boundaries is not None and self.mode not in ("fixed", "whitespace", "unigram"):
            raise InputError(f"boundaries: with boundaries={self.mode!r} the model makes its own; give none")
        if self.mode == "unigram" and self.training and target is not None and boundaries is None:
            raise InputError("boundaries: expected those of the pieces, on which 'unigram' is trained, got none")
        if mask is not None and bool(((mask[:, 1:] != mask[:, :-1]).sum(1) > 1 + (~mask[:, 0]).long()).any()):
            raise InputError("mask: expected padding at the ends of an item, got some between its tokens")


def objective(read: Read, mask: Bool[Tensor, "batch targets"] | None = None) -> Float[Tensor, ""]:
    """What is trained: the mean loss of the targets, and the loss of the boundaries.

    Args:
        read: with targets.
        mask: True = a real target.
    """
    if read.losses is None:
        raise InputError("read: has no losses; give the model targets")
    count = read.losses.numel() if mask is None else int(mask.sum())
    return read.losses.sum() / max(count, 1) + read.boundary_loss


def _initialised(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    if isinstance(module, nn.LayerNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if isinstance(module, (nn.Linear, nn.LayerNorm)):
        nn.init.zeros_(module.bias)

"""Attentive Mimicking: the vector of a rare word from its letters and from the contexts that agree with each other.

Source: Schick, Schütze, "Attentive Mimicking: Better Word Embeddings by Attending to Informative Contexts", NAACL 2019.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.masks import real_tokens
from cenote.core.requirements import require_at_least, require_one_of
from cenote.core.segments import accumulation_dtype
from cenote.core.sets import PaddedTokens, Tokens
from cenote.core.tokenwise import tokenwise
from cenote.pool.base import Pool, Pooled

TINY = 1e-9
LEAST_AGREEMENT = 0.01
REACH = 10

Combinator = Literal["gated", "single", "form", "context"]


class AgreementPool(Pool):
    """Weighted sum in which a token that agrees with the other tokens weighs more.

    `p_n = M x_n`, `s_n = sum_m p_n . p_m / sqrt(dim)` (with `m = n`), `a_n = s_n / sum_m s_m`, `y = sum_n a_n x_n`

    There is no softmax: the weights sum to 1, but a token against the majority gets a negative one. The sums over pairs are
    `s_n = p_n . P / sqrt(dim)` with `P = sum_m p_m`, linear in the number of tokens.

    Args:
        dim: width of a token.
        safe: where the tokens all but cancel, `|P|^2 < 0.01 sum_n |p_n|^2`, the authors' weights grow without bound. With
            `safe` the divisor stops there, and what the weights then lack to 1 is spread evenly; above that nothing changes.

    Example:
        >>> pool = AgreementPool(2)
        >>> _ = torch.nn.init.eye_(pool.map.weight)
        >>> pool.attend(torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])).weights.tolist()
        [[[0.4000000059604645, 0.4000000059604645, 0.20000000298023224]]]

    Source: Schick, Schütze, "Attentive Mimicking: Better Word Embeddings by Attending to Informative Contexts", NAACL 2019.
    """

    def __init__(self, dim: int, safe: bool = True) -> None:
        super().__init__(dim)
        self.safe = safe
        self.map = nn.Linear(dim, dim, bias=False)
        nn.init.xavier_uniform_(self.map.weight)

    def pool(self, tokens: Tokens) -> Pooled:
        weights = self.agreement(tokens)
        return Pooled(tokens.weighted_sum(weights).squeeze(1), weights)

    def agreement(self, tokens: Tokens) -> Float[Tensor, "*rows 1"]:
        """`a`, which sums to 1 over the tokens of each set."""
        p = tokenwise(self.map, tokens.values)
        p = p.to(accumulation_dtype(p.dtype))
        together = tokens.sum(p)
        scores = (p * tokens.spread(together)).sum(-1, keepdim=True) / math.sqrt(self.dim)
        total = together.square().sum(-1, keepdim=True) / math.sqrt(self.dim)
        if not self.safe:
            return (scores / tokens.spread(total + TINY)).to(tokens.values.dtype)
        floor = LEAST_AGREEMENT * tokens.sum(p.square().sum(-1, keepdim=True)) / math.sqrt(self.dim)
        divisor = torch.maximum(total, floor).clamp(min=torch.finfo(total.dtype).tiny)
        lacking = tokens.spread(1 - total / divisor) * tokens.uniform()
        return tokens.replace(scores / tokens.spread(divisor) + lacking).values.to(tokens.values.dtype)


class Mimicked(NamedTuple):
    """A word's vector and what it was made of.

    Attributes:
        embedding: `[batch, dim]`.
        form: from the letters, `[batch, dim]`.
        context: `v`, from the contexts, before the map `A`, `[batch, dim]`.
        weights: of the contexts, `[batch, contexts]`; `None` where all words of all contexts weigh the same.
        gate: share of the form in the embedding, `[batch, 1]`.
    """

    embedding: Float[Tensor, "batch dim"]
    form: Float[Tensor, "batch dim"]
    context: Float[Tensor, "batch dim"]
    weights: Float[Tensor, "batch contexts"] | None
    gate: Float[Tensor, "batch 1"]


class AttentiveMimicking(nn.Module):
    """The form-context model: a gate between the mean of a word's n-gram vectors and the pool of its contexts.

    `f = mean_g e_g` over its n-grams; `c_i` the mean of the known words of context `i`; `v = sum_i a_i c_i` with the weights of
    `AgreementPool`, `u = A v`; `alpha = sigmoid(w . [f; v] + b)`; `y = alpha f + (1 - alpha) u`.
    It is trained to give frequent words the vectors that they have, by the mean squared error.

    Args:
        dim: width of the word vectors.
        ngrams: number of n-grams, the unknown one included.
        combinator: `"gated"`; `"single"`: one learned number instead of the gate; `"form"` or `"context"` alone.
        attentive: False: `v` is the mean over all words of all contexts, so that a long context weighs more (the earlier
            form-context model).
        distances: whether a word of a context is multiplied by a learned vector for how far from the target it stands.
        safe: as in `AgreementPool`.

    Example:
        >>> model = AttentiveMimicking(8, ngrams=50)
        >>> words, mask = torch.randn(2, 3, 5, 8), torch.ones(2, 3, 5, dtype=torch.bool)
        >>> model(torch.randint(50, (2, 6)), words, word_mask=mask).shape
        torch.Size([2, 8])

    Source: Schick, Schütze, "Attentive Mimicking: Better Word Embeddings by Attending to Informative Contexts", NAACL 2019;
    without attention: Schick, Schütze, "Learning Semantic Representations for Novel Words: Leveraging Both Form and Context",
    AAAI 2019.

    Note:
        A word without contexts gets its form alone, a word without n-grams its contexts alone (the authors take a share of a
        zero vector). The authors look distances up by the negative number itself; here -10 to 10 are rows 0 to 20, which start
        at 1, so that untrained distances change nothing.
    """

    def __init__(
        self,
        dim: int,
        ngrams: int,
        combinator: Combinator = "gated",
        attentive: bool = True,
        distances: bool = False,
        safe: bool = True,
    ) -> None:
        super().__init__()
        require_one_of(("gated", "single", "form", "context"), combinator=combinator)
        require_at_least(1, dim=dim, ngrams=ngrams)
        self.dim = dim
        self.combinator = combinator
        reads_contexts = combinator != "form"
        self.ngrams = nn.Embedding(ngrams, dim) if combinator != "context" else None
        self.agreement = AgreementPool(dim, safe) if attentive and reads_contexts else None
        self.to_out = nn.Linear(dim, dim, bias=False) if reads_contexts else None
        self.distances = nn.Embedding(2 * REACH + 1, dim) if distances and reads_contexts else None
        self.gate = nn.Linear(2 * dim, 1) if combinator == "gated" else None
        self.share = nn.Parameter(torch.zeros(1)) if combinator == "single" else None
        for module in (self.ngrams, self.to_out, self.gate):
            if module is not None:
                nn.init.xavier_uniform_(module.weight)
        if self.gate is not None:
            nn.init.zeros_(self.gate.bias)
        if self.distances is not None:
            nn.init.ones_(self.distances.weight)

    def forward(
        self,
        ngrams: Int[Tensor, "batch ngrams"],
        words: Float[Tensor, "batch contexts words dim"],
        ngram_mask: Bool[Tensor, "batch ngrams"] | None = None,
        word_mask: Bool[Tensor, "batch contexts words"] | None = None,
        distances: Int[Tensor, "batch contexts words"] | None = None,
    ) -> Float[Tensor, "batch dim"]:
        """Vectors of words from the numbers of their n-grams and the vectors of the words around them; masks True = real."""
        return self.attend(ngrams, words, ngram_mask, word_mask, distances).embedding

    def attend(
        self,
        ngrams: Int[Tensor, "batch ngrams"],
        words: Float[Tensor, "batch contexts words dim"],
        ngram_mask: Bool[Tensor, "batch ngrams"] | None = None,
        word_mask: Bool[Tensor, "batch contexts words"] | None = None,
        distances: Int[Tensor, "batch contexts words"] | None = None,
    ) -> Mimicked:
        """As calling the model, and also what the vectors were made of.

        Args:
            ngrams: numbers of n-grams.
            words: vectors of the known words of each context, without the target itself.
            ngram_mask, word_mask: True on what is real; a context without a real word does not count.
            distances: how many words before (negative) or behind the target each word stands.

        Raises:
            InputError: naming the argument and what was expected.
        """
        self._check(ngrams, words, ngram_mask, word_mask, distances)
        has_form, form = self._form(ngrams, ngram_mask)
        has_context, context, weights = self._context(words, word_mask, distances)
        zero = form if self.to_out is None else context.new_zeros(context.shape)
        mapped = zero if self.to_out is None else self.to_out(context)
        gate = self._gate(form, context, has_form, has_context)
        return Mimicked(gate * form + (1 - gate) * mapped, form, context, weights, gate)

    def context_weights(
        self, words: Float[Tensor, "batch contexts words dim"], word_mask: Bool[Tensor, "batch contexts words"]
    ) -> Float[Tensor, "batch contexts"]:
        """`a`, from words that are zero where the mask is False."""
        assert self.agreement is not None
        means = PaddedTokens(context_means(words, word_mask), word_mask.any(2))
        return self.agreement.agreement(means).squeeze(-1)

    def _form(self, ngrams: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        real = real_tokens(ngrams, mask)
        if self.ngrams is None:
            return torch.zeros_like(real.any(1, keepdim=True)), self._weight().new_zeros(ngrams.shape[0], self.dim)
        embedded = self.ngrams(ngrams.masked_fill(~real, 0))
        return real.any(1, keepdim=True), PaddedTokens(embedded, real).mean()

    def _context(
        self, words: Tensor, mask: Tensor | None, distances: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        mask = torch.ones(words.shape[:3], dtype=torch.bool, device=words.device) if mask is None else mask
        real = mask.any(2)
        if self.to_out is None:
            return torch.zeros_like(real.any(1, keepdim=True)), words.new_zeros(words.shape[0], self.dim), None
        if self.distances is not None and distances is not None:
            words = words * self.distances(distances.clamp(-REACH, REACH) + REACH)
        words = words.masked_fill(~mask.unsqueeze(-1), 0)
        if self.agreement is None:
            return real.any(1, keepdim=True), PaddedTokens(words.flatten(1, 2), mask.flatten(1)).mean(), None
        weights = self.context_weights(words, mask)
        means = context_means(words, mask)
        return real.any(1, keepdim=True), (weights.unsqueeze(-1) * means).sum(1), weights

    def _gate(self, form: Tensor, context: Tensor, has_form: Tensor, has_context: Tensor) -> Tensor:
        ones = form.new_ones(form.shape[0], 1)
        if self.combinator in ("form", "context"):
            return ones if self.combinator == "form" else 0 * ones
        logit = self.share if self.share is not None else None
        if self.gate is not None:
            logit = self.gate(torch.cat([form, context], -1))
        assert logit is not None
        gate = torch.sigmoid(logit).expand(form.shape[0], 1)
        gate = torch.where(has_context, gate, ones)
        return torch.where(has_form, gate, 0 * ones)

    def _weight(self) -> Tensor:
        return next(self.parameters())

    def _check(
        self,
        ngrams: Tensor,
        words: Tensor,
        ngram_mask: Tensor | None,
        word_mask: Tensor | None,
        distances: Tensor | None,
    ) -> None:
        if ngrams.dim() != 2 or ngrams.is_floating_point():
            raise InputError(
                f"ngrams: expected whole numbers [batch, ngrams], got {ngrams.dtype} {tuple(ngrams.shape)}"
            )
        if words.dim() != 4 or words.shape[0] != ngrams.shape[0] or words.shape[-1] != self.dim:
            raise InputError(
                f"words: expected [{ngrams.shape[0]}, contexts, words, {self.dim}] to match ngrams and dim, "
                f"got {tuple(words.shape)}"
            )
        for name, mask, shape in (("ngram_mask", ngram_mask, ngrams.shape), ("word_mask", word_mask, words.shape[:3])):
            if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
                raise InputError(
                    f"{name}: expected bool {tuple(shape)} with True on what is real, got {mask.dtype} {tuple(mask.shape)}"
                )
        if distances is not None and distances.shape != words.shape[:3]:
            raise InputError(f"distances: expected shape {tuple(words.shape[:3])}, got {tuple(distances.shape)}")


def context_means(
    words: Float[Tensor, "batch contexts words dim"], mask: Bool[Tensor, "batch contexts words"]
) -> Float[Tensor, "batch contexts dim"]:
    """`c`: the mean of the known words of each context; zeros for a context without any."""
    return words.sum(2) / mask.sum(2, keepdim=True).clamp(min=1)

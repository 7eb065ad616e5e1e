"""Where a text is cut: by rule, by spaces, by the pieces of a tokenizer, by surprise, or as a network learns it.

A boundary stands at the last token of its segment.

Source: Nawrot, Chorowski, Lancucki and Ponti (2023), arXiv 2211.09761.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_positive

Learned = Literal["gumbel", "supervised"]


class Predicted(NamedTuple):
    """Probabilities (of `"gumbel"`, what was drawn of them) and cuts: `soft` and `hard`, both `[batch, tokens]`."""

    soft: Float[Tensor, "batch tokens"]
    hard: Float[Tensor, "batch tokens"]


class BoundaryPredictor(nn.Module):
    """A small network that says of each token whether its segment ends with it: `p = sigmoid(W2 gelu(W1 h))`.

    It reads the state of that token alone, so that its cuts are as causal as the states are.

    Args:
        dim: of the states.
        inner: hidden width.
        mode: `"gumbel"`: learned with the model, `soft = sigmoid((logit p + logit u) / temperature)` with uniform `u`, and the
            gradient of `hard = 1[soft > threshold]` is that of `soft`. `"supervised"`: `soft = p`, and `hard` has no gradient.
        temperature: of the relaxation.
        threshold: above which there is a cut.
        activation: `"gelu"` or `"relu"`.
        deterministic_eval: in eval mode `"gumbel"` draws nothing: `soft = p`.

    Example:
        >>> predictor = BoundaryPredictor(8, 16, "supervised")
        >>> predictor(torch.zeros(2, 5, 8)).hard.shape
        torch.Size([2, 5])

    Source: Nawrot et al. (2023), arXiv 2211.09761.

    Note: the released code draws in eval mode, too, as `deterministic_eval=False` does; then no two evaluations agree.
    """

    def __init__(
        self,
        dim: int,
        inner: int,
        mode: Learned = "gumbel",
        temperature: float = 0.5,
        threshold: float = 0.5,
        activation: Literal["gelu", "relu"] = "gelu",
        deterministic_eval: bool = True,
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, inner=inner)
        require_one_of(get_args(Learned), mode=mode)
        require_positive(temperature=temperature)
        self.mode, self.temperature, self.threshold = mode, temperature, threshold
        self.deterministic_eval = deterministic_eval
        self.layers = nn.Sequential(nn.Linear(dim, inner), activated(activation), nn.Linear(inner, 1))

    def logits(self, hidden: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows"]:
        """`logit p`."""
        return self.layers(hidden).squeeze(-1)

    def forward(
        self, hidden: Float[Tensor, "batch tokens dim"], noise: Float[Tensor, "batch tokens"] | None = None
    ) -> Predicted:
        """Cut.

        Args:
            hidden: states.
            noise: `u` from 0 to 1, of `"gumbel"`; drawn by default.
        """
        logits = self.logits(hidden)
        if self.mode == "supervised":
            soft = logits.sigmoid()
            return Predicted(soft, (soft > self.threshold).to(soft))
        if noise is None and not self.training and self.deterministic_eval:
            soft = logits.sigmoid()
        else:
            drawn = torch.rand_like(logits) if noise is None else noise
            soft = relaxed_bernoulli(logits, drawn, self.temperature)
        # in this order the sum is exactly 0 or 1
        return Predicted(soft, ((soft > self.threshold).to(soft) - soft.detach()) + soft)


def activated(name: Literal["gelu", "relu"]) -> nn.Module:
    """The activation of that name."""
    require_one_of(("gelu", "relu"), activation=name)
    return nn.GELU() if name == "gelu" else nn.ReLU()


def relaxed_bernoulli(
    logits: Float[Tensor, "*any"], noise: Float[Tensor, "*any"], temperature: float
) -> Float[Tensor, "*any"]:
    """`sigmoid((logit p + logit u) / temperature)`.

    >>> float(relaxed_bernoulli(torch.tensor(1.0), torch.tensor(0.5), 0.5)) == float(torch.tensor(2.0).sigmoid())
    True
    """
    tiny = torch.finfo(noise.dtype).eps
    u = noise.clamp(tiny, 1 - tiny)
    return ((logits + u.log() - (-u).log1p()) / temperature).sigmoid()


def fixed_boundaries(batch: int, tokens: int, every: int) -> Bool[Tensor, "batch tokens"]:
    """At tokens 0, `every`, `2 every`, whatever stands there.

    >>> fixed_boundaries(1, 5, 2).int().tolist()
    [[1, 0, 1, 0, 1]]
    """
    require_at_least(1, every=every)
    return (torch.arange(tokens) % every == 0).expand(batch, -1)


def space_boundaries(ids: Int[Tensor, "*batch tokens"], space: int) -> Bool[Tensor, "*batch tokens"]:
    """At each space.

    >>> space_boundaries(torch.tensor([5, 0, 7, 0]), space=0).int().tolist()
    [0, 1, 0, 1]
    """
    return ids == space


def piece_boundaries(text: str, pieces: Callable[[str], Sequence[str]]) -> Bool[Tensor, "characters"]:
    """At the last character of each piece; a space belongs to the piece that it ends.

    Args:
        text: words with single spaces between them.
        pieces: of a word, which together are the word: a tokenizer's, such as `unigram_pieces` makes.

    Raises:
        InputError: where the pieces of a word are not the word.

    >>> piece_boundaries("undo it", lambda word: ["un", "do"] if word == "undo" else [word]).int().tolist()
    [0, 1, 0, 0, 1, 0, 1]
    """
    cuts: list[bool] = []
    words = text.split(" ")
    known: dict[str, list[bool]] = {}
    for n, word in enumerate(words):
        if word not in known:
            parts = [p for p in pieces(word) if p] if word else []
            if "".join(parts) != word:
                raise InputError(f"pieces: expected parts of the word {word!r}, got {parts}")
            known[word] = [i == len(p) - 1 for p in parts for i in range(len(p))]
        own = known[word]
        if n < len(words) - 1:
            own = [*own[:-1], False, True] if own else [True]
        cuts += own
    return torch.tensor(cuts, dtype=torch.bool)


def unigram_pieces(text: str, vocabulary: int = 200) -> Callable[[str], list[str]]:
    """The pieces of a word, as a Unigram tokenizer that was trained on a text cuts it.

    Args:
        text: words with spaces between them.
        vocabulary: how many pieces are kept.

    Raises:
        InputError: where `tokenizers` is not installed.
    """
    require_at_least(1, vocabulary=vocabulary)
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise InputError('unigram_pieces: needs tokenizers; run: pip install "cenote[models]"') from None
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = sorted(set(text) - {" "})
    # what it has never seen is a piece of its own
    unknown = "<unknown>"
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary,
        initial_alphabet=letters,
        show_progress=False,
        special_tokens=[unknown],
        unk_token=unknown,
    )
    tokenizer.train_from_iterator(text.split(" "), trainer)
    return lambda word: [word[a:b] for a, b in tokenizer.encode(word).offsets]


def entropy_spikes(
    entropy: Float[Tensor, "batch tokens"], left: int = 2, mask: Bool[Tensor, "batch tokens"] | None = None
) -> Bool[Tensor, "batch tokens"]:
    """Where the model is less sure of what comes next than at each of the `left` tokens before; what is not there is no rival.

    >>> entropy_spikes(torch.tensor([[1.0, 2.0, 1.5, 2.5, 2.5]])).int().tolist()
    [[1, 1, 0, 1, 0]]
    """
    require_at_least(0, left=left)
    h = entropy if mask is None else entropy.masked_fill(~mask, -torch.inf)
    spike = torch.ones_like(h, dtype=torch.bool)
    for i in range(1, left + 1):
        before = F.pad(h[:, : max(h.shape[1] - i, 0)], (min(i, h.shape[1]), 0), value=-torch.inf)
        spike = spike & (h > before)
    return spike if mask is None else spike & mask


def binomial_loss(
    hard: Float[Tensor, "batch tokens"], prior: float, mask: Bool[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, ""]:
    """`-log Binomial(sum_t hard; T, prior) / T`, mean over the items: least near `prior T` cuts.

    >>> round(float(binomial_loss(torch.tensor([[1.0, 0.0]]), prior=0.5)), 4)
    0.3466
    """
    if not 0 < prior < 1:
        raise InputError(f"prior: expected a share between 0 and 1, got {prior}")
    if mask is None:
        total, k = torch.full_like(hard[:, 0], hard.shape[1]), hard.sum(1)
    else:
        total, k = mask.sum(1).to(hard), torch.where(mask, hard, torch.zeros_like(hard)).sum(1)
    p = torch.as_tensor(prior, dtype=hard.dtype)
    ways = (total + 1).lgamma() - (k + 1).lgamma() - (total - k + 1).lgamma()
    log = ways + k * p.log() + (total - k) * (-p).log1p()
    return (-log / total.clamp(min=1)).mean()


def boundary_cross_entropy(
    soft: Float[Tensor, "batch tokens"],
    target: Bool[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    code_parity: bool = False,
) -> Float[Tensor, ""]:
    """Mean binary cross-entropy of the cuts.

    Args:
        soft: probabilities.
        target: where the cuts should be.
        mask: True = a real token.
        code_parity: as in the released code, which takes the probabilities for logits: its least loss is not where they are
            the targets.
    """
    wanted = target.to(soft)
    if code_parity:
        each = F.binary_cross_entropy_with_logits(soft, wanted, reduction="none")
    else:
        each = F.binary_cross_entropy(soft, wanted, reduction="none")
    return (
        each.mean() if mask is None else torch.where(mask, each, torch.zeros_like(each)).sum() / mask.sum().clamp(min=1)
    )

"""Which words of a text should matter: from what a scorer says when words are left out.

Source: Zhang et al., "Hybrid Attribution Priors for Explainable and Robust Model Training" (2025), arXiv 2512.14719. The
paper's
equations could not be read: that the scores solve a positive definite system by Cholesky, that the scorer is told all class
names, and that priors are blended, is known; the rest is reconstruction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core import InputError, files
from cenote.core.requirements import require_at_least, require_one_of, require_positive

Scorer = Callable[[Sequence[str]], Float[Tensor, "texts classes"]]
"""From texts to `log p(class | text)` for all listed classes: a language model that is told their names, or any classifier."""
Against = Literal["all", "nearest", "none", "probability"]
Blend = Literal["mean", "max", "weighted", "product"]
MOST_WORDS = 64
KEPT = (0.5, 0.9)


def keep_masks(words: int, count: int, generator: torch.Generator) -> Bool[Tensor, "count words"]:
    """Which words are kept: all of them, all but each one, and others at random, each with a share from 0.5 to 0.9.

    Args:
        words: how many.
        count: of masks; at least as many as are needed for the first two kinds.
        generator: of the others.

    >>> keep_masks(2, 3, torch.Generator()).tolist()
    [[True, True], [False, True], [True, False]]
    """
    require_at_least(1, words=words)
    require_at_least(words + 1, count=count)
    fixed = torch.cat([torch.ones(1, words, dtype=torch.bool), ~torch.eye(words, dtype=torch.bool)])
    others = count - len(fixed)
    share = KEPT[0] + (KEPT[1] - KEPT[0]) * torch.rand(others, 1, generator=generator)
    return torch.cat([fixed, torch.rand(others, words, generator=generator) < share])


def mask_weights(masks: Bool[Tensor, "masks words"], width: float | None = 0.25) -> Float[Tensor, "masks"]:
    """`exp(-(1 - cos(z, 1))^2 / width^2)`: masks that keep much count more; all alike with `width=None`."""
    if width is None:
        return torch.ones(len(masks), dtype=torch.float64)
    require_positive(width=width)
    cosine = masks.double().mean(1).sqrt()
    return torch.exp(-((1 - cosine) ** 2) / width**2)


def ridge(
    masks: Bool[Tensor, "*batch masks words"],
    targets: Float[Tensor, "*batch masks"],
    weights: Float[Tensor, "*batch masks"] | None = None,
    mu: float = 1.0,
) -> Float[Tensor, "*batch words"]:
    """`argmin_s sum_m w_m (y_m - z_m . s - b)^2 + mu ||s||^2`, by `A s = c` with `A = Z' W Z + mu I` and Cholesky.

    `Z` and `y` have their weighted means taken off, which solves for b. Computed in float64.

    Args:
        masks: z, one row each.
        targets: y.
        weights: w; all alike by default.
        mu: above 0.

    >>> masks = torch.tensor([[True, True], [False, True], [True, False]])
    >>> [round(s, 3) for s in ridge(masks, torch.tensor([3.0, 1.0, 2.0]), mu=1e-9).tolist()]
    [2.0, 1.0]
    """
    require_positive(mu=mu)
    if masks.shape[:-1] != targets.shape or (weights is not None and weights.shape != targets.shape):
        raise InputError(
            f"targets, weights: expected one for each of the masks {list(masks.shape)}, got {list(targets.shape)} and "
            f"{None if weights is None else list(weights.shape)}"
        )
    z, y = masks.double(), targets.double()
    w = torch.ones_like(y) if weights is None else weights.double()
    share = (w / w.sum(-1, keepdim=True))[..., None]
    z = z - (share * z).sum(-2, keepdim=True)
    y = y - (share[..., 0] * y).sum(-1, keepdim=True)
    weighed = (z * w[..., None]).mT
    a = weighed @ z + mu * torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    return torch.cholesky_solve(weighed @ y[..., None], torch.linalg.cholesky(a))[..., 0]


def as_prior(scores: Float[Tensor, "words"], content: Bool[Tensor, "words"] | None = None) -> Float[Tensor, "words"]:
    """The positive part, made to sum to 1; where nothing is positive, the same for all words of content."""
    positive = scores.clamp(min=0.0)
    if bool(positive.any()):
        return positive / positive.sum()
    alike = torch.ones_like(scores) if content is None or not bool(content.any()) else content.to(scores)
    return alike / alike.sum()


def contrast(log_p: Float[Tensor, "texts classes"], label: int, against: Against = "all") -> Float[Tensor, "texts"]:
    """`log p(c) - max log p` of the other listed classes; a constant on all of them changes nothing.

    Args:
        log_p: of the whole text first.
        label: c.
        against: `"all"` others; the `"nearest"`, the one likeliest on the whole text; `"none"`: `log p(c)` alone,
            `"probability"`: `p(c)` alone; both are blind to the other classes.

    >>> contrast(torch.tensor([[0.0, -1.0, -3.0], [-2.0, -2.5, 0.0]]), 0, "nearest").tolist()
    [1.0, 0.5]
    """
    require_one_of(get_args(Against), against=against)
    classes = log_p.shape[1]
    if not 0 <= label < classes or classes < 2:
        raise InputError(f"label: expected one of at least two listed classes, got {label} of {classes}")
    if against == "none":
        return log_p[:, label]
    if against == "probability":
        return log_p[:, label].exp()
    others = log_p.clone()
    others[:, label] = -torch.inf
    if against == "nearest":
        return log_p[:, label] - log_p[:, int(others[0].argmax())]
    return log_p[:, label] - others.amax(1)


def class_aware_prior(
    scorer: Scorer,
    words: Sequence[str],
    label: int,
    *,
    against: Against = "all",
    masks: int | None = None,
    width: float | None = 0.25,
    mu: float = 1e-2,
    content: Sequence[bool] | None = None,
    random_state: int = 0,
) -> Float[Tensor, "words"]:
    """How much each word speaks for a class **against the other listed classes**: a ridge surrogate of what leaving words
    out does.

    Args:
        scorer: from texts to `log p` of all listed classes.
        words: of the text, joined by spaces for the scorer.
        label: the text's class.
        against: see `contrast`; `"probability"` makes LIME's prior.
        masks: how many texts with words left out are scored; four times the words, and at least 32, by default.
        width, mu: of the surrogate, see `mask_weights` and `ridge`.
        content: which words share the prior where none speaks for the class; all by default.
        random_state: of the masks.

    Returns:
        Not below 0, sum 1. Texts of more than 64 words are looked at in pieces, the rest of the text kept.
    """
    if not words:
        raise InputError("words: expected at least one")
    generator = torch.Generator().manual_seed(random_state)
    scores = torch.zeros(len(words), dtype=torch.float64)
    for start in range(0, len(words), MOST_WORDS):
        part = slice(start, min(start + MOST_WORDS, len(words)))
        n = part.stop - start
        z = keep_masks(n, max(n + 1, max(32, 4 * n) if masks is None else masks), generator)
        texts = [_kept(words, part, row) for row in z.tolist()]
        log_p = scorer(texts)
        if log_p.dim() != 2 or len(log_p) != len(texts):
            raise InputError(f"scorer: expected log p [{len(texts)}, classes], got {list(log_p.shape)}")
        y = contrast(log_p.double().cpu(), label, against)
        scores[part] = ridge(z, y, mask_weights(z, width), mu)
    of = None if content is None else torch.tensor(list(content), dtype=torch.bool)
    return as_prior(scores, of).float()


def priors_of_scores(
    scores: Float[Tensor, "texts tokens"], word: Int[Tensor, "texts tokens"], absolute: bool = False
) -> list[Float[Tensor, "_words"]]:
    """Priors of words from scores of tokens, such as integrated gradients of a teacher: a word has the sum of its tokens.

    Args:
        scores: of the true class, such as `InputGradients("integrated")` gives.
        word: the number of each token's word, -1 of other tokens; see `encode_words`.
        absolute: whether what speaks against the class counts as well; else the positive part is taken.

    >>> scores, word = torch.tensor([[9.0, 1.0, 2.0, 1.0]]), torch.tensor([[-1, 0, 1, 1]])
    >>> priors_of_scores(scores, word)[0].tolist()
    [0.25, 0.75]
    """
    if scores.shape != word.shape:
        raise InputError(f"word: expected {list(scores.shape)} as the scores, got {list(word.shape)}")
    found = []
    for row, of in zip(scores, word, strict=True):
        at = of >= 0
        sums = row.new_zeros(int(of.max()) + 1).index_add(0, of[at], row[at])
        found.append(as_prior(sums.abs() if absolute else sums))
    return found


def random_prior(words: int, random_state: int) -> Float[Tensor, "words"]:
    """Numbers drawn at random, sum 1: what knows nothing."""
    drawn = torch.rand(words, generator=torch.Generator().manual_seed(random_state))
    return drawn / drawn.sum()


def hybrid_prior(
    priors: Sequence[Float[Tensor, "words"]], by: Blend = "mean", weights: Sequence[float] | None = None
) -> Float[Tensor, "words"]:
    """Several priors of one text as one: each made to sum to 1, blended, made to sum to 1; of one it is itself.

    Args:
        priors: not below 0.
        by: `"mean"`, `"max"`, `"weighted"` or `"product"`; where a product is zero everywhere, their mean.
        weights: of `"weighted"`.
    """
    require_one_of(get_args(Blend), by=by)
    if (
        not priors
        or (by == "weighted") != (weights is not None)
        or (weights is not None and len(weights) != len(priors))
    ):
        raise InputError("priors, weights: expected at least one prior, and as many weights with by='weighted' alone")
    stack = torch.stack([p / p.sum() for p in priors])
    if by == "max":
        found = stack.amax(0)
    elif by == "product":
        found = stack.prod(0)
        found = found if bool(found.any()) else stack.mean(0)
    elif weights is not None:
        found = (stack * torch.tensor(weights).to(stack)[:, None]).sum(0)
    else:
        found = stack.mean(0)
    return found / found.sum()


class CachedScorer:
    """A scorer of texts given an instruction and the names of all classes, which remembers what it was asked, in memory or
    on disk.

    Args:
        score: `(texts, instruction, labels) -> log p [texts, classes]`: a language model's, or a stated substitute such as the
            similarity of sentence embeddings to descriptions of the classes.
        labels: names of the classes.
        instruction: of the task.
        folder: where answers are kept, one small file per text; `None`: in memory.

    Example:
        >>> def score(texts, instruction, labels):
        ...     return torch.tensor([[float(label in text) for label in labels] for text in texts]).log_softmax(1)
        >>> scorer = CachedScorer(score, ["pay", "cancel"])
        >>> class_aware_prior(scorer, ["please", "pay", "now"], 0).round(decimals=2).tolist()
        [0.0, 1.0, 0.0]
    """

    def __init__(
        self,
        score: Callable[[Sequence[str], str, Sequence[str]], Tensor],
        labels: Sequence[str],
        instruction: str = "",
        folder: str | Path | None = None,
    ) -> None:
        if len(labels) < 2 or len(set(labels)) < len(labels) or not all(labels):
            raise InputError(f"labels: expected the names of at least two classes, all different, got {list(labels)}")
        self.score, self.labels, self.instruction = score, tuple(labels), instruction
        self.folder = None if folder is None else Path(folder)
        self.known: dict[str, list[float]] = {}
        self.calls = 0

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "texts classes"]:
        """`log p` of all classes; each different text is scored once."""
        keys = [self._key(t) for t in texts]
        new = {k: t for k, t in zip(keys, texts, strict=True) if not self._recalled(k)}
        if new:
            found = self.score(list(new.values()), self.instruction, self.labels)
            if found.shape != (len(new), len(self.labels)):
                raise InputError(f"score: expected [{len(new)}, {len(self.labels)}], got {list(found.shape)}")
            self.calls += len(new)
            for key, row in zip(new, found.double().tolist(), strict=True):
                self.known[key] = row
                if self.folder is not None:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    files.write_whole(self.folder / f"{key}.json", json.dumps(row).encode())
        return torch.tensor([self.known[k] for k in keys], dtype=torch.float64)

    def _key(self, text: str) -> str:
        asked = json.dumps([self.instruction, self.labels, text])
        return hashlib.sha256(asked.encode()).hexdigest()[:32]

    def _recalled(self, key: str) -> bool:
        if key not in self.known and self.folder is not None and (path := self.folder / f"{key}.json").is_file():
            self.known[key] = json.loads(path.read_text("utf-8"))
        return key in self.known


def _kept(words: Sequence[str], part: slice, row: Sequence[bool]) -> str:
    inside = [w for w, keep in zip(words[part], row, strict=True) if keep]
    return " ".join([*words[: part.start], *inside, *words[part.stop :]])

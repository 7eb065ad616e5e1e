"""Translating with a beam: the most likely sentences, word by word, with what each layer needs kept from word to word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.pool.sequence.cuni_multimodal.translator import Translator
from cenote.pool.sequence.subwords import END, PAD, START, Subwords, padded


class Translation(NamedTuple):
    """What was found for one text.

    Attributes:
        words: subwords, the end included where it was reached.
        score: log-likelihood over the length penalty.
        image_weights: `[layers, heads, words, patches]`, where each word looked in the picture; `None` without one.
    """

    words: tuple[int, ...]
    score: float
    image_weights: Float[Tensor, "layers heads words patches"] | None


class Finished(NamedTuple):
    """A sentence that has ended."""

    score: float
    words: tuple[int, ...]


def length_penalty(length: int, alpha: float) -> float:
    """`((5 + length) / 6)^alpha`, which a log-likelihood is divided by.

    >>> length_penalty(1, 0.6), length_penalty(7, 0.0)
    (1.0, 1.0)

    Source: Wu et al., "Google's Neural Machine Translation System", 2016.
    """
    return float(((5 + length) / 6) ** alpha)


def translate(
    model: Translator,
    source: Int[Tensor, "batch tokens"],
    image: Tensor | None = None,
    *,
    beam: int = 12,
    alpha: float = 1.0,
    longest: int | None = None,
) -> list[Translation]:
    """The best translation of each text that a beam search finds.

    Of each text the `beam` likeliest beginnings are kept. A sentence ends with the subword END where that is among the `beam`
    likeliest continuations; the search ends with the `beam`-th ended sentence, or at `longest`. With a beam of 1 it is the
    greedy one. Texts of a batch do not see each other, whatever their lengths.

    Args:
        model: in eval mode while it runs, and left as it was.
        source: subwords, 0 behind the end of a text.
        image: maps or patches, one of each text; `None` where the model takes none, as with imagination.
        beam: beginnings that are kept.
        alpha: of the length penalty; 0 ranks by likelihood alone.
        longest: most subwords of a translation; default twice those of the longest source and 10.

    Returns:
        One translation per text.

    Raises:
        InputError: where the picture is missing, or not wanted.

    Example:
        >>> from cenote.pool import MultimodalTransformer, TranslatorConfig
        >>> model = MultimodalTransformer(TranslatorConfig(vocabulary=9, rule="text only", dim=8, layers=1, hidden=8, heads=2))
        >>> found = translate(model, torch.tensor([[4, 5, 2], [6, 2, 0]]), beam=3, longest=5)
        >>> len(found), found[0].image_weights
        (2, None)

    Source: Helcl, Libovicky, Varis, "CUNI System for the WMT18 Multimodal Translation Task", WMT 2018; width and penalty of the
    beam are not published.
    """
    require_at_least(1, beam=beam)
    require_at_least(0, alpha=alpha)
    longest = 2 * source.shape[1] + 10 if longest is None else longest
    require_at_least(1, longest=longest)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            encoded = model.encode(source, image)
            best = _search(model, model.start(encoded, beam), len(source), beam, alpha, longest)
            target = padded([[START, *sentence.words[:-1]] for sentence in best]).to(source.device)
            weights = model.decode(target, encoded).image_weights if len(source) else None
    finally:
        model.train(training)
    return [
        Translation(s.words, s.score, None if weights is None else weights[i, :, :, : len(s.words)])
        for i, s in enumerate(best)
    ]


def translate_lines(
    model: Translator, subwords: Subwords, lines: Sequence[str], image: Tensor | None = None, **how: int | float
) -> list[str]:
    """The translations of texts, as texts; `how` as of `translate`.

    Raises:
        InputError: where a text has no word.
    """
    if not all(line.split() for line in lines):
        raise InputError("lines: expected at least one word in each text")
    device = next(model.parameters()).device
    found = translate(model, subwords.batch(lines).to(device), image, **how)  # type: ignore[arg-type]
    return [subwords.text(t.words) for t in found]


def _search(model: Translator, kept: object, items: int, beam: int, alpha: float, longest: int) -> list[Finished]:
    device = next(model.parameters()).device
    scores = torch.full((items, beam), -torch.inf, device=device)
    # the hypotheses of a beam begin alike, so that one of them is enough
    scores[:, 0] = 0
    words = torch.full((items * beam,), START, device=device)
    so_far = torch.empty((items, beam, 0), dtype=torch.long, device=device)
    ended: list[list[Finished]] = [[] for _ in range(items)]
    first_rows = (torch.arange(items, device=device) * beam).unsqueeze(1)
    for length in range(1, longest + 1):
        logits, kept = model.step(words, kept)
        logits[:, [PAD, START]] = -torch.inf
        following = logits.log_softmax(-1).unflatten(0, (items, beam)) + scores.unsqueeze(-1)
        vocabulary = following.shape[-1]
        # of each hypothesis one word ends it, so that twice as many are enough to go on with
        top, at = following.flatten(1).topk(min(2 * beam, beam * vocabulary), dim=1)
        origin, word = at.div(vocabulary, rounding_mode="floor"), at % vocabulary
        ends = (word == END) & top.isfinite()
        penalty = length_penalty(length, alpha)
        for i, rank in ends[:, :beam].nonzero().tolist():
            if len(ended[i]) < beam:
                sentence = (*so_far[i, origin[i, rank]].tolist(), END)
                ended[i].append(Finished(float(top[i, rank]) / penalty, sentence))
        going = top.masked_fill(word == END, -torch.inf)
        scores, order = going.topk(beam, dim=1)
        origin, word = origin.gather(1, order), word.gather(1, order)
        so_far = torch.cat([so_far.gather(1, origin.unsqueeze(-1).expand(-1, -1, length - 1)), word.unsqueeze(-1)], 2)
        if all(len(e) == beam for e in ended):
            break
        kept = model.chosen(kept, (first_rows + origin).flatten())
        words = word.flatten()
    for i, sentences in enumerate(ended):
        # what has not ended when the length is spent counts as it is
        if len(sentences) < beam:
            penalty = length_penalty(longest, alpha)
            open_ = zip(scores[i].tolist(), so_far[i].tolist(), strict=True)
            sentences += [Finished(s / penalty, tuple(w)) for s, w in open_ if s > -torch.inf]
    return [max(sentences, key=lambda sentence: sentence.score) for sentences in ended]

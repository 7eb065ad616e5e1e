"""Vectors for rare words from a text file: train Attentive Mimicking on frequent words, infer rare ones, keep the model.

Source: Schick, Schütze, "Attentive Mimicking: Better Word Embeddings by Attending to Informative Contexts", NAACL 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from safetensors import SafetensorError
from torch import Tensor

from cenote.core import files
from cenote.core.errors import InputError
from cenote.core.requirements import require_rate, require_several
from cenote.core.seeded import seeded
from cenote.pool.sequence.attentive_mimicking.letter_ngrams import LetterNgrams
from cenote.pool.sequence.attentive_mimicking.model import AttentiveMimicking, Combinator, Mimicked
from cenote.pool.sequence.attentive_mimicking.word_contexts import AROUND, Context, contexts_of, count_words
from cenote.pool.sequence.attentive_mimicking.word_vectors import WordVectors

FORMAT = 1
FIELDS: dict[str, Any] = {
    "format": int,
    "combinator": str,
    "attentive": bool,
    "distances": bool,
    "safe": bool,
    "ngrams": list,
    "shortest": int,
    "longest": int,
    "words": list,
}
"""What `mimic.json` must say to build the model again."""
MOST_VISITS = 5


class Batch(NamedTuple):
    """Words as numbers, padded: n-grams `[batch, ngrams]`, words of contexts `[batch, contexts, words]`."""

    ngrams: Int[Tensor, "batch ngrams"]
    ngram_mask: Bool[Tensor, "batch ngrams"]
    words: Int[Tensor, "batch contexts words"]
    word_mask: Bool[Tensor, "batch contexts words"]
    distances: Int[Tensor, "batch contexts words"]


class Shown(NamedTuple):
    """What the vector of a word was made of.

    Attributes:
        gate: share of the letters; the rest is that of the contexts.
        weights: of the contexts, in their order; `None` where the model weighs all of their words alike, or reads none.
    """

    gate: float
    weights: tuple[float, ...] | None


class Mimic:
    """A trained model with what it needs to give vectors to new words.

    Args:
        model: takes n-grams and contexts.
        ngrams: numbers of n-grams.
        known: the vectors that contexts are made of.

    Attributes:
        losses: mean loss of each epoch of training.
    """

    def __init__(self, model: AttentiveMimicking, ngrams: LetterNgrams, known: WordVectors) -> None:
        self.model = model
        self.ngrams = ngrams
        self.known = known
        self.losses: tuple[float, ...] = ()

    @torch.no_grad()
    def infer(self, contexts: Mapping[str, Sequence[Context]], batch_size: int = 64) -> WordVectors:
        """Vectors of words from their letters and the contexts that `contexts_of` found, which may be none."""
        self.model.eval()
        words = list(contexts)
        parts = [
            self._run(self.batch([(w, contexts[w]) for w in words[i : i + batch_size]]))
            for i in range(0, len(words), batch_size)
        ]
        return WordVectors(words, torch.cat(parts) if parts else torch.zeros(0, self.model.dim))

    @torch.no_grad()
    def show(self, contexts: Mapping[str, Sequence[Context]], batch_size: int = 64) -> dict[str, Shown]:
        """Of words and their contexts, as `infer` takes them, how much the letters and each context count."""
        self.model.eval()
        words, shown = list(contexts), {}
        for start in range(0, len(words), batch_size):
            part = words[start : start + batch_size]
            found = self._attend(self.batch([(w, contexts[w]) for w in part]))
            for i, word in enumerate(part):
                weights = None if found.weights is None else tuple(found.weights[i, : len(contexts[word])].tolist())
                shown[word] = Shown(float(found.gate[i]), weights)
        return shown

    def infer_from_text(
        self, words: Sequence[str], text: str | Path | Iterable[str], contexts: int = 100, seed: int = 0
    ) -> WordVectors:
        """Vectors of words from their letters and their contexts in a text.

        Args:
            words: a word that the text does not hold is made of its letters alone.
            text: a file, or sentences; one sentence per line.
            contexts: read at most so many of each word.
            seed: of the sample where a word has more.
        """
        require_several(words=words)
        wanted = list(dict.fromkeys(w.lower() for w in words))
        return self.infer(contexts_of(wanted, text, self.known.number, contexts, seed=seed))

    def batch(
        self,
        items: Sequence[tuple[str, Sequence[Context]]],
        ngram_dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Batch:
        """Words with their contexts as padded numbers; each n-gram is left out with the probability `ngram_dropout`."""
        numbers = [self.ngrams.numbers(word) for word, _ in items]
        if ngram_dropout > 0:
            drawn = [torch.rand(len(n), generator=generator).tolist() for n in numbers]
            left = [
                [i for i, p in zip(n, d, strict=True) if p >= ngram_dropout]
                for n, d in zip(numbers, drawn, strict=True)
            ]
            numbers = [n or [0] for n in left]
        width = max(len(n) for n in numbers)
        ngrams = torch.tensor([n + [0] * (width - len(n)) for n in numbers])
        ngram_mask = torch.arange(width) < torch.tensor([len(n) for n in numbers]).unsqueeze(1)
        most = max(1, *(len(found) for _, found in items))
        longest = max([1, *(len(c.words) for _, found in items for c in found)])
        words = torch.zeros(len(items), most, longest, dtype=torch.int64)
        distances, word_mask = torch.zeros_like(words), torch.zeros_like(words, dtype=torch.bool)
        for i, (_, found) in enumerate(items):
            for j, context in enumerate(found):
                length = len(context.words)
                words[i, j, :length] = torch.tensor(context.words)
                distances[i, j, :length] = torch.tensor(context.distances)
                word_mask[i, j, :length] = True
        return Batch(ngrams, ngram_mask, words, word_mask, distances)

    def save(self, folder: str | Path) -> None:
        """Write the model, its n-grams and its words into a folder; no pickle."""
        folder = Path(folder)
        card = {
            "format": FORMAT,
            "combinator": self.model.combinator,
            "attentive": self.model.agreement is not None,
            "distances": self.model.distances is not None,
            "safe": self.model.agreement is None or self.model.agreement.safe,
            "ngrams": self.ngrams.ngrams,
            "shortest": self.ngrams.shortest,
            "longest": self.ngrams.longest,
            "words": self.known.words,
            "losses": list(self.losses),
        }
        state = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors = {**state, "vectors": self.known.vectors}
        files.write_saved(folder / "mimic.json", folder / "mimic.safetensors", card, tensors)

    @classmethod
    def load(cls, folder: str | Path) -> Mimic:
        """Read what `save` wrote.

        Raises:
            InputError: naming the folder and what is wrong with it.
        """
        folder = Path(folder)
        try:
            card, state = files.read_saved(
                folder / "mimic.json", folder / "mimic.safetensors", "train it again", **FIELDS
            )
            files.require_format(folder, card, FORMAT)
            known = WordVectors(card["words"], state.pop("vectors"))
            ngrams = LetterNgrams(card["ngrams"], card["shortest"], card["longest"])
            model = AttentiveMimicking(
                known.dim, len(ngrams), card["combinator"], card["attentive"], card["distances"], card["safe"]
            )
            model.load_state_dict({k.removeprefix("model."): v for k, v in state.items()})
        except InputError:
            raise
        except (OSError, SafetensorError, TypeError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(
                f"{folder}: holds no whole model of train_mimic ({error}); name the folder of save"
            ) from error
        mimic = cls(model.eval(), ngrams, known)
        mimic.losses = tuple(card.get("losses", ()))
        return mimic

    def _run(self, batch: Batch) -> Tensor:
        return self._attend(batch).embedding

    def _attend(self, batch: Batch) -> Mimicked:
        around = self.known.vectors[batch.words]
        return self.model.attend(batch.ngrams, around, batch.ngram_mask, batch.word_mask, batch.distances)


def train_mimic(
    known: WordVectors,
    text: str | Path | Sequence[str],
    *,
    combinator: Combinator = "gated",
    attentive: bool = True,
    distances: bool = False,
    leave_out: Iterable[str] = (),
    least_count: int = 100,
    contexts: int = 20,
    kept_contexts: int = 100,
    around: int = AROUND,
    least_ngram: int = 4,
    ngram_dropout: float = 0.0,
    epochs: int = 10,
    batch_size: int = 64,
    learning_rate: float = 0.01,
    seed: int = 0,
    on_progress: Callable[[float], None] = lambda _share: None,
) -> Mimic:
    """Train Attentive Mimicking: from letters and contexts, give frequent words the vectors that they have.

    A word that stands `c` times in the text is seen `min(c / least_count, 5)` times per epoch, each time with other contexts.

    Args:
        known: word vectors, `WordVectors.read` of a word2vec text file for example; words are lower-case.
        text: a file, or sentences; one sentence per line.
        combinator, attentive, distances: as in `AttentiveMimicking`.
        leave_out: words that are not trained on, those to test with for example; they stay in other words' contexts.
        least_count: how often a word must stand in the text to be trained on.
        contexts: read per word and step.
        kept_contexts: kept per word, from which those are drawn.
        around: words on each side that make a context.
        least_ngram: how often an n-gram must stand in the words of `known` to get a vector of its own.
        ngram_dropout: probability with which an n-gram of a word is left out of a step; a word without any left is unknown.
        epochs, batch_size, learning_rate: of Adam.
        seed: of initialisation and order.
        on_progress: called with the share of the training that is done.

    Raises:
        InputError: where no word with a vector is frequent enough, or `ngram_dropout` is no share below 1.

    Example:
        >>> text = ["red apple pie", "sweet apple pie", "red berry pie", "sweet berry pie"] * 5
        >>> known = WordVectors(["red", "sweet", "apple", "berry", "pie"], torch.eye(5))
        >>> mimic = train_mimic(known, text, least_count=10, epochs=2)
        >>> mimic.infer_from_text(["cherry"], ["sweet cherry pie"]).vectors.shape
        torch.Size([1, 5])
    """
    require_rate(ngram_dropout=ngram_dropout)
    counts = count_words(text)
    left_out = leave_out if isinstance(leave_out, str) else set(leave_out)
    require_several(leave_out=left_out)
    targets = [w for w in known.words if counts[w] >= least_count and w not in left_out]
    if not targets:
        raise InputError(
            f"text: none of the {len(known)} words with a vector stands {least_count} times in it; "
            f"give more text or a smaller least_count"
        )
    found = contexts_of(targets, text, known.number, kept_contexts, around, seed)
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        ngrams = LetterNgrams.count((w for w in known.words if w not in left_out), least_ngram)
        mimic = Mimic(AttentiveMimicking(known.dim, len(ngrams), combinator, attentive, distances), ngrams, known)
    optimiser = torch.optim.Adam(mimic.model.parameters(), lr=learning_rate)
    visits = [w for w in targets for _ in range(int(min(counts[w] / least_count, MOST_VISITS)))]
    mimic.model.train()
    losses = []
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(visits), generator=generator).tolist()
        for start in range(0, len(order), batch_size):
            words = [visits[i] for i in order[start : start + batch_size]]
            items = [(w, _drawn(found[w], contexts, generator)) for w in words]
            batch = mimic.batch(items, ngram_dropout, generator)
            target = known.vectors[[known.number[w] for w in words]]
            loss = torch.nn.functional.mse_loss(mimic._run(batch), target)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            total += float(loss.detach()) * len(words)
            on_progress((epoch + (start + len(words)) / len(order)) / epochs)
        losses.append(total / len(order))
    mimic.losses = tuple(losses)
    mimic.model.eval()
    return mimic


def words_without_vector(text: str | Path | Iterable[str], known: WordVectors, at_least: int = 1) -> list[str]:
    """The words of a text that have no vector yet, the most frequent first; punctuation and bare numbers are no words.

    Args:
        text: a file, or sentences.
        known: words with a vector.
        at_least: how often a word must stand in the text.

    Raises:
        InputError: where there is none.

    Example:
        >>> words_without_vector(["a cenote, a sinkhole of 1999"], WordVectors(["a", "of"], torch.eye(2)))
        ['cenote', 'sinkhole']
    """
    counts = count_words(text)
    new = [w for w, n in counts.most_common() if n >= at_least and w not in known.number and any(map(str.isalpha, w))]
    if not new:
        raise InputError(
            f"text: no word that stands {at_least} times in it lacks a vector; name the words, or give another text"
        )
    return new


def read_words(path: str | Path) -> list[str]:
    """The words of a text file, one a line, in lower case and each once.

    Raises:
        InputError: naming the line that is no word.
    """
    words: dict[str, None] = {}
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"words: {path} cannot be read as text ({error}); name a file with a word a line") from error
    for number, line in enumerate(lines, 1):
        word = line.strip().lower()
        if any(c.isspace() for c in word):
            raise InputError(f"words: line {number} of {path} holds several words, {line.strip()!r}; give one a line")
        if word:
            words[word] = None
    if not words:
        raise InputError(f"words: {path} holds no word; write one a line")
    return list(words)


def _drawn(found: Sequence[Context], count: int, generator: torch.Generator) -> list[Context]:
    if len(found) <= count:
        return list(found)
    return [found[i] for i in torch.randperm(len(found), generator=generator)[:count].tolist()]

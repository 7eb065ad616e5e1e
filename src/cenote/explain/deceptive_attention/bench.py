"""What a classifier really reads, beside what its attention shows; and a bench of models of which that is known.

Source: Pruthi et al. (2020), arXiv 1909.07913.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_one_of
from cenote.explain.attention_classifiers import AttentionClassifier, attention_classifier
from cenote.explain.base import Attribution, Explainer
from cenote.explain.deceptive_attention.penalty import attention_mass_penalty
from cenote.explain.deceptive_attention.training import accuracy, train_deceptive
from cenote.explain.fitting import Texts
from cenote.explain.input_gradients import chosen_targets, logits_of, real_of, target_logits, token_embeddings
from cenote.explain.shown_attention import shown

Kind = Literal["embedding", "bilstm"]
WORDS = 200
KEYS = 6
LENGTH = 12
DIM = 64
FIRST_SIZE = 0.1
STEPS: dict[str, tuple[int, float]] = {"embedding": (50, 1e-2), "bilstm": (15, 5e-3)}


class Occlusion(Explainer):
    """How far the target's logit falls when a token is left out, one forward pass per token.

    The token is hidden by the attention mask; the model must heed it.

    Example:
        >>> model = attention_classifier(vocabulary=20, classes=2, dim=8, random_state=0).eval()
        >>> Occlusion().explain(model, {"input_ids": torch.tensor([[5, 6, 7]])}).scores.shape
        torch.Size([1, 3])

    Source: Zeiler and Fergus (2014), arXiv 1311.2901; of words: Li et al. (2016), arXiv 1612.08220.
    """

    family = "perturbation"

    @torch.no_grad()
    def explain(
        self, model: nn.Module, inputs: Mapping[str, Any], target: Int[Tensor, "batch"] | None = None
    ) -> Attribution:
        """Explain, see `Explainer.explain`; the only token of a text is not left out, and scores 0."""
        real = real_of(inputs)
        logits = logits_of(model(**inputs))
        target = chosen_targets(logits, target)
        whole = target_logits(logits, target)
        scores = torch.zeros(real.shape, dtype=whole.dtype, device=whole.device)
        for at in range(real.shape[1]):
            without = real.clone()
            without[:, at] = False
            kept = without.any(1)
            hidden = torch.where(kept[:, None], without, real)
            less = target_logits(logits_of(model(**{**inputs, "attention_mask": hidden.long()})), target)
            scores[:, at] = torch.where(real[:, at] & kept, whole - less, 0.0)
        return Attribution(scores, real, target=target, signed=True)


@dataclass(frozen=True)
class AttentionAudit:
    """What a classifier's attention shows of marked tokens, and what the classifier does with them.

    Attributes:
        accuracy: as it is.
        mass: of the attention on marked tokens, mean over texts and heads, from 0 to 1.
        share: of the tokens that are marked, mean over texts: what even attention would put there.
        embedding_share: of the norms of all embeddings, what marked tokens have; above `share` their vectors are larger.
        state_share: likewise of the states that are pooled; `None` of a transformer.
        norm_mass: of `||a_t h_t||`, what marked tokens have; `None` of a transformer.
        blocked: accuracy with the attention on marked tokens set to 0.
        removed: accuracy with marked tokens taken out of the text.
        occlusion: by how much the logit of the class falls where a marked token is left out, mean over marked tokens.
        occlusion_others: likewise of the other tokens.
    """

    accuracy: float
    mass: float
    share: float
    embedding_share: float
    state_share: float | None
    norm_mass: float | None
    blocked: float
    removed: float
    occlusion: float
    occlusion_others: float

    def sentence(self) -> str:
        """In words.

        >>> AttentionAudit(0.99, 0.01, 0.08, 0.4, 0.4, 0.2, 0.52, 0.5, 4.0, 0.1).sentence()
        'attention puts 1 % on the marked tokens (8 % of the text); without them accuracy falls from 99 % to 50 %: it deceives'
        """
        lost, hidden = self.accuracy - self.removed > 0.1, self.mass < self.share
        end = "it deceives" if lost and hidden else "it shows that" if lost else "they are not needed"
        return (
            f"attention puts {self.mass:.0%} on the marked tokens ({self.share:.0%} of the text); without them accuracy falls "
            f"from {self.accuracy:.0%} to {self.removed:.0%}: {end}"
        ).replace("%", " %")


@torch.no_grad()
def audit_attention(model: nn.Module, texts: Texts) -> AttentionAudit:
    """Compare what attention shows of the marked tokens with what the classifier does with them.

    Args:
        model: in eval mode, see `shown`.
        texts: with marked tokens in each.

    Raises:
        InputError: where no token is marked.
    """
    marked = texts.marked & texts.mask
    if not bool(marked.any()):
        raise InputError("texts: no token is marked, so nothing can be hidden")
    found = shown(model, texts.inputs)
    embeddings = token_embeddings(model, texts.inputs).norm(dim=-1)
    state_share = norm_mass = None
    if isinstance(model, AttentionClassifier):
        h = model.states(texts.input_ids, texts.mask)[0].norm(dim=-1)
        state_share, norm_mass = _share(h, texts), _share(h * found.weights[:, 0], texts)
    blocked = shown(model, texts.inputs, blocked=marked).logits
    falls = Occlusion().explain(model, texts.inputs, texts.labels).scores
    return AttentionAudit(
        accuracy=_right(found.logits, texts.labels),
        mass=float(attention_mass_penalty(found.weights, texts.marked, mask=texts.mask).mass),
        share=_share(torch.ones_like(embeddings), texts),
        embedding_share=_share(embeddings, texts),
        state_share=state_share,
        norm_mass=norm_mass,
        blocked=_right(blocked, texts.labels),
        removed=accuracy(model, texts.without_marked()),
        occlusion=float(falls[marked].mean()),
        occlusion_others=float(falls[texts.mask & ~marked].mean()) if bool((texts.mask & ~marked).any()) else 0.0,
    )


@dataclass(frozen=True)
class Bench:
    """A classifier of which it is known what it reads; `model, inputs, truth = bench` unpacks what an audit takes.

    Attributes:
        model: in eval mode.
        inputs: of its forward, a batch.
        truth: the tokens that decide the class, `[batch, tokens]`.
        labels: the classes.
        honest: the same model trained without the penalty.
        audit, honest_audit: what their attention shows, and what they do.
        vocabulary: a word for each token, for pictures.
    """

    model: AttentionClassifier
    inputs: dict[str, Tensor]
    truth: Bool[Tensor, "items tokens"]
    labels: Int[Tensor, "items"]
    honest: AttentionClassifier
    audit: AttentionAudit
    honest_audit: AttentionAudit
    vocabulary: tuple[str, ...]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.inputs, self.truth))


def pronoun_task(
    items: int,
    generator: torch.Generator,
    length: int = LENGTH,
    words: int = WORDS,
    shortest: int | None = None,
    neutral: float = 0.0,
) -> Texts:
    """Random words, one place of which holds one of 6 key words that decides between two classes; the key is marked.

    Token 0 is padding, then come the words, then the keys: the first three mean class 0.

    Args:
        items: how many.
        generator: of everything.
        length: of a text; where `shortest` is given, of the longest.
        words: how many different ones.
        shortest: text.
        neutral: share of the texts that have no key and are of a third class.

    >>> texts = pronoun_task(4, torch.Generator().manual_seed(0))
    >>> texts.marked.sum(1).tolist(), bool(((texts.input_ids[texts.marked] > 203) == texts.labels).all())
    ([1, 1, 1, 1], True)
    """
    ids = torch.randint(1, words + 1, (items, length), generator=generator)
    lengths = torch.randint(length if shortest is None else shortest, length + 1, (items,), generator=generator)
    mask = torch.arange(length) < lengths[:, None]
    place = (torch.rand(items, generator=generator) * lengths).long()
    key = torch.randint(KEYS, (items,), generator=generator)
    without = torch.rand(items, generator=generator) < neutral
    marked = nn.functional.one_hot(place, length).bool() & ~without[:, None]
    ids = torch.where(marked, words + 1 + key[:, None], ids).masked_fill(~mask, 0)
    return Texts(ids, mask, (key >= KEYS // 2).long().masked_fill(without, 2), marked)


def vocabulary_of_task(words: int = WORDS) -> tuple[str, ...]:
    """A word for each token of `pronoun_task`."""
    return ("[PAD]", *(f"word{n}" for n in range(words)), "he", "him", "his", "she", "her", "hers")


def deceptive_bench(
    kind: Kind = "embedding",
    lam: float = 1.0,
    items: int = 200,
    random_state: int = 0,
    train_items: int = 1000,
    epochs: int | None = None,
    batch: int = 50,
    lr: float | None = None,
) -> Bench:
    """Train, in seconds, a classifier that decides by one key word and hides it from its attention, and an honest one.

    Explanations that find the key in the honest model alone believe what attention shows. See `finds`. A third of the training
    texts has no key and is of a class of its own: of two classes one could be told by what is not there, and its keys would be
    no true answer. All texts that are given out have a key.

    Args:
        kind: `"embedding"`: the key's vector is large, so that a small weight is enough; `"bilstm"`: the key leaks into the
            states of its neighbours before attention.
        lam: strength of the penalty.
        items: texts that are given out.
        random_state: of data, parameters and training.
        train_items, epochs, batch, lr: of the training; by default as many epochs as the penalty needs.

    Example:
        >>> model, inputs, truth = deceptive_bench(items=10, train_items=100, epochs=1)
        >>> inputs["input_ids"].shape, truth.sum(1).tolist() == [1] * 10
        (torch.Size([10, 12]), True)
    """
    require_one_of(get_args(Kind), kind=kind)
    generator = torch.Generator().manual_seed(random_state)
    train = pronoun_task(train_items, generator, neutral=1 / 3)
    test = pronoun_task(items, generator)
    passes, rate = STEPS[kind]
    passes, rate = passes if epochs is None else epochs, rate if lr is None else lr
    models = []
    for strength in (0.0, lam):
        model = small_classifier(kind, random_state, classes=3)
        train_deceptive(model, train, lam=strength, epochs=passes, batch=batch, lr=rate, random_state=random_state)
        models.append(model)
    honest, model = models
    return Bench(
        model,
        test.inputs,
        test.marked,
        test.labels,
        honest,
        audit_attention(model, test),
        audit_attention(honest, test),
        vocabulary_of_task(),
    )


def frontier(
    build: Callable[[], nn.Module], train: Texts, test: Texts, lams: Sequence[float] = (0.0, 0.1, 1.0), **settings: Any
) -> list[tuple[float, float, float]]:
    """What hiding costs: of each strength of the penalty, the strength, the accuracy, and the mass on marked tokens.

    Args:
        build: a fresh model.
        train, test: texts.
        lams: strengths.
        settings: of `train_deceptive`.
    """
    found = []
    for lam in lams:
        model = build()
        train_deceptive(model, train, lam=lam, **settings)
        audit = audit_attention(model, test)
        found.append((lam, audit.accuracy, audit.mass))
    return found


def small_classifier(kind: Kind, random_state: int, **settings: Any) -> AttentionClassifier:
    """The paper's two models for `pronoun_task`, with fewer numbers."""
    sizes: dict[str, Any] = {"vocabulary": 1 + WORDS + KEYS, "classes": 2, "dim": DIM}
    if kind == "bilstm":
        sizes["hidden"] = DIM // 2
    model = attention_classifier(**{**sizes, **settings}, random_state=random_state)
    with torch.no_grad():
        # words that say nothing should say little from the start: training is too short to make them so
        model.embedding.weight.mul_(FIRST_SIZE)
    return model


def finds(attribution: Attribution, truth: Bool[Tensor, "batch tokens"]) -> Float[Tensor, "batch"]:
    """How well scores find the true tokens of each text: the share of pairs of a true token and another that they order
    rightly.

    It is the area under the ROC curve; equal scores count half, and a text without both kinds gives a half.

    >>> a = Attribution(torch.tensor([[0.2, 0.9, 0.2]]), torch.ones(1, 3, dtype=torch.bool))
    >>> finds(a, torch.tensor([[False, True, False]])).tolist()
    [1.0]
    """
    if truth.shape != attribution.mask.shape:
        raise InputError(f"truth: expected {list(attribution.mask.shape)} as the scores, got {list(truth.shape)}")
    true, other = truth & attribution.mask, attribution.mask & ~truth
    s = attribution.scores.double()
    pairs = (true[:, :, None] & other[:, None]).double()
    right = (s[:, :, None] > s[:, None]).double() + 0.5 * (s[:, :, None] == s[:, None]).double()
    count = pairs.sum((1, 2))
    return torch.where(count > 0, (right * pairs).sum((1, 2)) / count.clamp(min=1), 0.5)


def _share(of: Float[Tensor, "items tokens"], texts: Texts) -> float:
    of = of * texts.mask
    return float(((of * texts.marked).sum(1) / of.sum(1).clamp(min=torch.finfo(of.dtype).tiny)).mean())


def _right(logits: Float[Tensor, "items classes"], labels: Int[Tensor, "items"]) -> float:
    return float((chosen_targets(logits, None) == labels).double().mean())

"""What is measured of a decoder that reads or keeps fewer keys: facts told, log-loss, keys read, bytes, time."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.digests import weights_sha256
from cenote.core.language import accepted, encoded, longest
from cenote.core.planted import CITIES, QUESTION, SENTENCE, FactPrompts, planted, prompts, recalled
from cenote.core.requirements import require_at_least
from cenote.core.threads import one_thread
from cenote.mix.policies import Dense, KVPolicy
from cenote.models.caches import ARGUMENTS
from cenote.models.live.store import cache_argument, exact_decoding, nbytes

METRIC = "facts told"
FACTS, TOGETHER = 24, 8
"""Facts in all, and at most in one context."""
PASSAGES = 2
"""Texts whose last half is read token by token, where there are so many."""
STRETCH = 32
"""Tokens in a row that belong together where log-losses are compared."""
DEPTHS = 4
"""Parts of a context, by each of which facts are counted."""
ROOM = 2**30
"""Bytes that the caches of questions asked at once may take."""
BURST, TRIES = 8, 5
"""Tokens that are timed in a row, and how often each way is tried, in turn."""
WORDS = 60
"""More of them than a sentence has."""
LEAST = 16
"""Tokens, fewer than which are no context."""


class Facts(NamedTuple):
    """A context with facts in it.

    Attributes:
        asked: it and its questions as tokens.
        names: of the facts.
        depths: where each stands in the context, from 0 to 1.
    """

    asked: FactPrompts
    names: tuple[str, ...]
    depths: tuple[float, ...]


class Seen(NamedTuple):
    """What a decoder said.

    Attributes:
        told: whether each fact was told.
        fact_loss: `-log p` of each fact's number.
        loss: `-log p` of each token that was decoded.
        said: the likeliest token in its place.
        share: of the keys that reading all would have read, those that were; counted in the store.
        keys: that one key head read for one token, on average.
        most: at most.
        bytes: of a text's keys and values at its end, room for more among them.
    """

    told: Bool[Tensor, "facts"]
    fact_loss: Float[Tensor, "facts"]
    loss: Float[Tensor, "tokens"]
    said: Int[Tensor, "tokens"]
    share: float
    keys: float
    most: int
    bytes: int


class Times(NamedTuple):
    """Of one generation, measured in turn on the same tokens: by a policy, as loaded, by the exact path.

    Attributes:
        prefill, prefill_loaded: seconds that the prompt took.
        own, loaded, exact: of each try, seconds of one token.
    """

    prefill: float
    prefill_loaded: float
    own: tuple[float, ...]
    loaded: tuple[float, ...]
    exact: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Bench:
    """A decoder, facts that it is asked for, and texts that it reads.

    Attributes:
        model: in eval mode.
        contexts: with facts.
        passages: tokens of texts without any, `[1, length]`.
        length: of contexts and passages.
    """

    model: nn.Module
    contexts: tuple[Facts, ...]
    passages: tuple[Int[Tensor, "1 tokens"], ...]
    length: int
    _known: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: Any,
        texts: Sequence[str],
        facts: int = FACTS,
        length: int = 1000,
        seed: int = 0,
    ) -> Bench:
        """Contexts and passages out of somebody's texts.

        Raises:
            InputError: where the texts are too short, the length is too small or too large, or the model cannot be measured.
        """
        require_at_least(1, facts=facts)
        require_at_least(LEAST, length=length)
        require_decoder(model)
        _require_positions(model, length)
        sentences = [s for text in texts for s in _sentences(text)]
        if not sentences:
            raise InputError("texts: hold no sentence; give prose of the kind that the model reads")
        contexts = tuple(_contexts(tokenizer, sentences, facts, length, seed))
        for made in contexts:
            _require_positions(model, made.asked.context.shape[1] + made.asked.prompt.shape[1])
        return cls(model, contexts, tuple(_passages(tokenizer, sentences, length)), length)

    @property
    def facts(self) -> tuple[str, ...]:
        """Names of all."""
        return tuple(name for made in self.contexts for name in made.names)

    @property
    def depths(self) -> tuple[float, ...]:
        """Of all."""
        return tuple(depth for made in self.contexts for depth in made.depths)

    @property
    def per_depth(self) -> list[int]:
        """How many facts stand in each part of a context."""
        parts = [min(int(depth * DEPTHS), DEPTHS - 1) for depth in self.depths]
        return [parts.count(part) for part in range(DEPTHS)]

    @property
    def stretches(self) -> list[str]:
        """Of each token whose loss is counted, what it belongs to."""
        return [
            f"{number}: {at // STRETCH}"
            for number, passage in enumerate(self.passages)
            for at in range(passage.shape[1] - 1 - passage.shape[1] // 2)
        ]

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def read(self, policy: KVPolicy, on_share: Callable[[float], None] = lambda _: None) -> Seen:
        """Facts and texts, as a policy lets the model read them.

        Args:
            policy: what acts behind the prompt, or on it too.
            on_share: progress.
        """
        told, fact_losses, losses, said = [], [], [], []
        work, done, largest = len(self.contexts) + len(self.passages), 0, 0
        tally = _Tally()
        with policy.on(self.model) as run:
            for made in self.contexts:
                found = recalled(lambda *given: self._tell(tally, *given), made.asked)
                told.append(found.right)
                fact_losses.append(found.nll.double())
                done += 1
                on_share(done / work)
            for passage in self.passages:
                loss, likeliest, held = self._passage(tally, passage)
                losses.append(loss)
                said.append(likeliest)
                largest = max(largest, held)
                done += 1
                on_share(done / work)
        share = run.share
        return Seen(
            torch.cat(told), torch.cat(fact_losses), torch.cat(losses), torch.cat(said),
            share, share * tally.keys / max(tally.tokens, 1), max(run.most.values(), default=0), largest,
        )  # fmt: skip

    @torch.inference_mode()
    def speed(self, policy: KVPolicy | None) -> Times:
        """Seconds of a prompt, and of a token behind it: by a policy, as loaded, by the exact path; in turn.

        Where the policy is `None`, the model is as loaded. On the CPU they are CPU time of one thread. The prompt
        is as long as all the tokens that are timed behind it allow.
        """
        ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
            "loaded": nullcontext,
            "exact": lambda: exact_decoding(self.model),
        }
        if policy is not None:
            ways["own"] = lambda: policy.on(self.model)
        passage = self.passages[0]
        burst = max(1, min(BURST, self.length // (4 * TRIES)))
        start = passage.shape[1] - TRIES * (burst + 1)
        caches, prefill = {}, {}
        times: dict[str, list[float]] = {name: [] for name in ways}
        with one_thread() if self.device.type == "cpu" else nullcontext():
            for name, way in ways.items():
                with way():
                    began = self._clock()
                    caches[name] = self.prefilled(passage[:, :start])
                    prefill[name] = self._clock() - began
            # the first token of each try brings a policy up to date
            for tokens in passage[:, start:].to(self.device).split(burst + 1, 1):
                for name, way in ways.items():
                    with way():
                        self.step(caches[name], tokens[:, 0])
                        began = self._clock()
                        for at in range(1, burst + 1):
                            self.step(caches[name], tokens[:, at])
                        times[name].append((self._clock() - began) / burst)
        own = "own" if policy is not None else "loaded"
        return Times(prefill[own], prefill["loaded"], tuple(times[own]), tuple(times["loaded"]), tuple(times["exact"]))

    def fingerprint(self) -> str:
        """That changes with anything that is measured."""
        if "fingerprint" not in self._known:
            digest = hashlib.sha256(weights_sha256(self.model).encode())
            digest.update(str(getattr(getattr(self.model, "config", None), "_attn_implementation", "")).encode())
            for made in self.contexts:
                digest.update(repr((made.asked.context.tolist(), made.asked.prompt.tolist(), made.depths)).encode())
            digest.update(repr([passage.tolist() for passage in self.passages]).encode())
            self._known["fingerprint"] = digest.hexdigest()
        found: str = self._known["fingerprint"]
        return found

    def _tell(
        self,
        tally: _Tally,
        context: Int[Tensor, "1 tokens"],
        prompt: Int[Tensor, "facts words"],
        mask: Bool[Tensor, "facts words"],
    ) -> Float[Tensor, "facts words vocab"]:
        """A context, and each question behind it by itself, token by token: so many at once as there is room for."""
        lengths, words = mask.sum(1).tolist(), prompt.shape[1]
        left = sorted(range(len(prompt)), key=lambda row: -lengths[row])
        found: Tensor | None = None
        while left:
            cache = self.prefilled(context)
            count = max(1, min(len(left), ROOM // max(nbytes(cache), 1)))
            some, left = left[:count], left[count:]
            cache.batch_repeat_interleave(count)
            # what the last word is followed by is not asked
            for at in range(lengths[some[0]] - 1):
                going = [row for row in some if lengths[row] > at + 1]
                if len(going) < count:
                    cache.batch_select_indices(torch.arange(len(going), device=self.device))
                    count = len(going)
                places = torch.tensor([words - lengths[row] + at for row in going])
                logits = self.step(cache, prompt[going, places].to(self.device)).cpu()
                tally.counts(len(going), context.shape[1] + at + 1)
                if found is None:
                    found = logits.new_zeros(len(prompt), words, logits.shape[1])
                found[going, places] = logits
        assert found is not None
        return found

    def _passage(
        self, tally: _Tally, passage: Int[Tensor, "1 tokens"]
    ) -> tuple[Float[Tensor, "decoded"], Int[Tensor, "decoded"], int]:
        half = passage.shape[1] // 2
        cache = self.prefilled(passage[:, :half])
        losses, said = [], []
        for at in range(half, passage.shape[1] - 1):
            logits = self.step(cache, passage[:, at].to(self.device)).double().cpu()
            tally.counts(1, at + 1)
            losses.append(-logits.log_softmax(-1)[0, passage[0, at + 1]])
            said.append(logits.argmax(-1)[0])
        return torch.stack(losses), torch.stack(said), nbytes(cache)

    def prefilled(self, tokens: Int[Tensor, "1 tokens"]) -> Any:
        """A cache that holds these."""
        given = accepted(self.model, logits_to_keep=1, use_cache=True)
        return cache_of(self.model(tokens.to(self.device), **given))

    def step(self, cache: Any, token: Int[Tensor, "batch"]) -> Float[Tensor, "batch vocab"]:
        """A token more of each item, and what is told behind it."""
        logits: Tensor = self.model(token[:, None], **{cache_argument(self.model): cache}, use_cache=True).logits[:, -1]
        return logits

    def _clock(self) -> float:
        """Of this process alone on the CPU, where others may run beside it; on another device what the wall says."""
        if self.device.type == "cpu":
            return time.process_time()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Tally:
    """How many tokens were decoded, and how many keys each had before and with it."""

    def __init__(self) -> None:
        self.tokens, self.keys = 0, 0

    def counts(self, tokens: int, keys: int) -> None:
        self.tokens += tokens
        self.keys += tokens * keys


def cache_of(output: Any) -> Any:
    """What a model keeps for the next token."""
    return next(cache for name in ARGUMENTS if (cache := getattr(output, name, None)) is not None)


def require_decoder(model: nn.Module) -> None:
    """Raise `InputError` unless policies can act in a model, that tells the next token: tried on three tokens."""
    if model.training:
        raise InputError("model: is in training mode, where answers are drawn; call model.eval()")
    name = type(model).__name__
    try:
        with torch.inference_mode(), Dense().on(model):
            embedded = model.get_input_embeddings().weight  # type: ignore[operator]
            ids = torch.zeros(1, 2, dtype=torch.long, device=embedded.device)
            cache = {cache_argument(model): cache_of(model(ids, use_cache=True))}
            logits = model(ids[:, :1], **cache, use_cache=True).logits
    except InputError:
        raise
    except (
        AttributeError,
        RuntimeError,
        TypeError,
        ValueError,
        NotImplementedError,
        LookupError,
        StopIteration,
    ) as error:
        first = str(error).strip().partition("\n")[0]
        raise InputError(
            f"model: {name} cannot decode token by token from a cache ({type(error).__name__}: {first}); give a causal decoder "
            f"of transformers with its head (AutoModelForCausalLM)"
        ) from error
    if not bool(logits.isfinite().all()):
        raise InputError(f"model: {name} tells NaN or infinity behind three tokens; are its weights whole?")


def why_unfit(model: nn.Module, policy: KVPolicy) -> str | None:
    """Why a policy cannot act in a model, tried on some tokens; `None` where it can."""
    try:
        with torch.inference_mode(), policy.on(model):
            ids = torch.zeros(1, LEAST, dtype=torch.long, device=next(model.parameters()).device)
            cache = {cache_argument(model): cache_of(model(ids, use_cache=True))}
            for _ in range(2):
                model(ids[:, :1], **cache, use_cache=True)
    except InputError as error:
        return str(error)
    return None


def paired(own: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """How many times quicker one way is than the other that was run in turn with it: the median of the tries, and the least.

    >>> paired([1.0, 1.0, 1.0], [2.0, 1.5, 3.0])
    (2.0, 1.5)
    """
    times = [b / a for a, b in zip(own, other, strict=True)]
    return statistics.median(times), min(times)


def by_depth(told: Sequence[float], depths: Sequence[float]) -> tuple[float, ...]:
    """The share of facts that are told, of each part of the context; NaN of one where none stands.

    >>> by_depth([1, 0, 1], [0.1, 0.2, 0.9])
    (0.5, nan, nan, 1.0)
    """
    parts: list[list[float]] = [[] for _ in range(DEPTHS)]
    for right, depth in zip(told, depths, strict=True):
        parts[min(int(depth * DEPTHS), DEPTHS - 1)].append(float(right))
    return tuple(sum(part) / len(part) if part else math.nan for part in parts)


def _contexts(tokenizer: Any, sentences: Sequence[str], facts: int, length: int, seed: int) -> Iterator[Facts]:
    """So many facts in contexts of about this length, one after the other through the sentences."""
    fact = max(_counts(tokenizer, [f"{QUESTION.format(city=city)} 88888." for city in CITIES]))
    together = min(TOGETHER, length // (2 * fact))
    if not together:
        raise InputError(
            f"length: {length} tokens do not hold a fact and as much text besides; give {2 * fact} or more, such as 1000"
        )
    contexts = math.ceil(facts / together)
    needed = contexts * (length - min(facts, together) * fact)
    counts = _counts(tokenizer, sentences)
    at = 0
    for number in range(contexts):
        size = facts // contexts + (number < facts % contexts)
        room, first = length - size * fact, at
        while at < len(counts) and counts[at] <= room:
            room -= counts[at]
            at += 1
        if at == len(counts) and room > max(counts):
            most = number * together
            raise InputError(
                f"texts: {facts} facts in contexts of {length} tokens take about {needed:,} tokens of text, and these have "
                f"{sum(counts):,}; give more text, a smaller length{f', or at most {most} facts' if most else ''}"
            )
        if at == first:
            raise InputError(
                f"texts: sentence {first + 1} alone has {counts[first]:,} tokens, and a context of {length} has room for "
                f"{room}; give texts with sentences that end in a full stop, or a larger length"
            )
        made = planted(sentences[first:at], size, seed=seed + number)
        names = tuple(f"context {number + 1}, {question.split()[-2]}" for question in made.questions)
        depths = tuple(place / made.sentences for place in made.places)
        yield Facts(prompts(tokenizer, made), names, depths)


def _passages(tokenizer: Any, sentences: Sequence[str], length: int) -> Iterator[Int[Tensor, "1 tokens"]]:
    """Texts of so many tokens, one after the other."""
    counts, at = _counts(tokenizer, sentences), 0
    for number in range(PASSAGES):
        held, first = 0, at
        # tokens at seams may merge
        while at < len(counts) and held < length + LEAST:
            held += counts[at]
            at += 1
        ids = encoded(tokenizer, " ".join(sentences[first:at]), [" ."]).prompt if first < at else []
        if len(ids) >= length:
            yield torch.tensor([ids[:length]])
        elif not number:
            raise InputError(
                f"texts: have {len(ids):,} tokens, and a text of {length} is read; give more, or a smaller length"
            )


def _sentences(text: str) -> Iterator[str]:
    """Of a text; a very long one in pieces, where lists and tables have no full stop.

    >>> list(_sentences("It joins. It separates again."))
    ['It joins.', 'It separates again.']
    """
    for sentence in SENTENCE.split(text.strip()):
        words = sentence.split()
        for start in range(0, len(words), WORDS):
            yield " ".join(words[start : start + WORDS])


def _counts(tokenizer: Any, sentences: Sequence[str]) -> list[int]:
    """Tokens of each, with the space before it."""
    found = tokenizer([f" {sentence}" for sentence in sentences], add_special_tokens=False, verbose=False)
    return [len(ids) for ids in found["input_ids"]]


def _require_positions(model: nn.Module, tokens: int) -> None:
    limit = longest(model)
    if limit is not None and tokens > limit:
        raise InputError(
            f"length: a context and a question are {tokens:,} tokens, and the model has {limit:,} positions; give a smaller one"
        )

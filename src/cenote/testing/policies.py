"""The contract of KV policies, as a check that anybody can run on their own, with their own model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cenote.core import routing
from cenote.core.errors import InputError
from cenote.models.live.reading import Held, Layout, Phase, Policy, Reading, Reads, reading
from cenote.testing.as_found import AsFound
from cenote.testing.contract import difference, run_rules

CLOSE = 1e-4
BUDGET = 12
PROMPT = 21
NEW = 6
LENGTHS = (21, 14, 9, 17)
GROUPS = (3, 1, 4, 8)
LAYERS = 2
LONG = 10**6


def check_kv_policy(
    make: Callable[[int], Any],
    model: Callable[[int], nn.Module] | None = None,
    *,
    budget: int = BUDGET,
    whole_layers: Collection[int] = (),
    leave_out: Collection[str] = (),
) -> None:
    """Check that a KV policy keeps what is promised of every one.

    With a budget of the length or more, outputs are those of the model to the bit. Fewer keys are read than there are, never
    more than the budget, by each head and counted where they are gathered, and the same for any number of query heads per key
    head. Nothing that comes later changes what was said before, by change and by gradient. What is decoded with a cache is what
    one forward says. What is chosen is chosen by this token's query, and its own key is never forgotten before it reads. A
    batch padded on the left is its items, and padding is never chosen.
    Beams are scored as their tokens are one by one. A prompt in pieces is the whole one. Tokens that are taken back leave
    nothing. A second generation is the first, and so are two at a time. What was forgotten is as if it was masked; bytes are
    those declared. Half precision works. Afterwards, also after an exception, the model is what it was.

    Args:
        make: from a budget to the policy; a class whose other arguments have defaults.
        model: from a number of query heads per key head to a decoder in eval mode, with at least 40 positions and
            40 tokens; tiny ones with random weights by default.
        budget: that is tried, above 4 and below 20.
        whole_layers: that may read everything, as the policy's `reads_all` says; any other keeps to the budget.
        leave_out: names of rules that are not checked.

    Raises:
        ContractError: with one line per broken rule.
        InputError: where `leave_out` names a rule that there is not.
    """
    trial = _Trial(make, model or _tiny, budget, whole_layers)
    run_rules(make(budget), _RULES, trial, leave_out=leave_out, first=(_rule_dense,))


def _tiny(group: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=16 * group, intermediate_size=24, num_hidden_layers=LAYERS,
        num_attention_heads=2 * group, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(group)
        model = LlamaForCausalLM(config)
        # of untrained weights no key takes more than another
        for name, p in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.data.mul_(12.0)
    return model.train(False)


class _Watched:
    """A policy, and what it says in its own words."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.padding: list[str] = []
        self.kept: list[tuple[int, int]] = []
        self.most: Counter[int] = Counter()
        self.without_own: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    acts = property(lambda self: self.policy.acts)
    forgets = property(lambda self: self.policy.forgets)
    watches = property(lambda self: self.policy.watches)

    def begin(self, layout: Layout) -> Any:
        return self.policy.begin(layout)

    def read(self, layer: int, q: Tensor, held: Held, state: Any) -> Reads | None:
        reads = self.policy.read(layer, q, held, state)
        if reads is None:
            each = held.real.sum(2)
        else:
            group = reads.numbers.shape[1] // held.keys.shape[1]
            real = held.real.repeat_interleave(group, 1).gather(2, reads.numbers)
            if bool((reads.valid & ~real).any()):
                self.padding.append("read")
            each = routing.counted(reads.numbers, reads.valid & real, reads.numbers.shape[1], held.count)
        self.most[layer] = max(self.most[layer], int(each.max()))
        return reads

    def choose(self, layer: int, q: Tensor, held: Held, state: Any) -> Tensor | None:
        found = self.policy.choose(layer, q, held, state)
        return None if found is None else torch.as_tensor(found)

    def seen(self, layer: int, weights: Tensor, held: Held, state: Any) -> None:
        self.policy.seen(layer, weights, held, state)

    def forget(self, layer: int, held: Held, state: Any) -> Tensor | None:
        kept = self.policy.forget(layer, held, state)
        if kept is not None:
            if bool((kept & ~held.real).any()):
                self.padding.append("kept")
            self.kept.append((layer, int(kept.sum(2).max())))
            # behind a whole prompt its last query has read already
            if held.seen > PROMPT and not bool((kept & (held.positions == held.last)).any(2).all()):
                self.without_own.append(layer)
        return None if kept is None else torch.as_tensor(kept)


class _Trial:
    def __init__(
        self, make: Callable[[int], Any], model: Callable[[int], nn.Module], budget: int, whole_layers: Collection[int]
    ) -> None:
        self.make, self.budget, self.whole_layers = make, budget, frozenset(whole_layers)
        self.models = {group: model(group) for group in GROUPS}
        self.model = self.models[GROUPS[0]]
        generator = torch.Generator().manual_seed(0)
        self.words = torch.randint(5, 38, (len(LENGTHS), PROMPT), generator=generator)
        self.mask = torch.arange(PROMPT) >= PROMPT - torch.tensor(LENGTHS)[:, None]
        self.words = self.words.masked_fill(~self.mask, 0)
        self.behind = torch.randint(5, 38, (1, NEW), generator=generator)

    def policy(self, budget: int | None = None) -> _Watched:
        return _Watched(self.make(self.budget if budget is None else budget))

    def generated(self, model: nn.Module, item: int | None = 0, **options: Any) -> Any:
        """Of one item without its padding, or of the batch."""
        words, mask = self.words, self.mask
        if item is not None:
            words, mask = words[item : item + 1, -LENGTHS[item] :], mask[item : item + 1, -LENGTHS[item] :]
        settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        with torch.no_grad():
            return model.generate(  # type: ignore[operator]
                input_ids=words, attention_mask=mask.long(), output_logits=True, return_dict_in_generate=True,
                **{**settings, **options},
            )  # fmt: skip

    def logits(self, *args: Any, **options: Any) -> Tensor:
        return torch.stack(self.generated(*args, **options).logits)

    def cache(self) -> Any:
        from cenote.models.live.store import KeyValueStore

        return KeyValueStore(self.model.config)

    def behind_of(self, cache: Any, words: Tensor) -> Any:
        """The model's output for tokens behind those of a cache."""
        from cenote.models.live.store import cache_argument

        return self.model(words, **{cache_argument(self.model): cache})

    def decoded(self, behind: Tensor, words: Tensor | None = None, cache: Any = None) -> Tensor:
        """Given tokens one by one behind the first item's prompt, or behind what a cache holds."""
        found = []
        with torch.no_grad():
            if cache is None:
                cache = self.cache()
                self.behind_of(cache, self.words[:1] if words is None else words)
            for i in range(behind.shape[1]):
                found.append(self.behind_of(cache, behind[:, i : i + 1]).logits[:, -1])
        return torch.stack(found, 1)

    @contextmanager
    def on(
        self, policy: Policy | None = None, model: nn.Module | None = None, prompt: int | None = None
    ) -> Iterator[Reading]:
        with reading(self.model if model is None else model, policy or self.policy(), prompt) as run:
            yield run


def _rule_dense(t: _Trial) -> str | None:
    """With a budget of the length or more."""
    for group, model in t.models.items():
        plain = t.logits(model, None)
        for budget in (PROMPT + NEW, LONG) if model is t.model else (PROMPT + NEW,):
            with t.on(t.policy(_at_least(t, budget)), model):
                found = t.logits(model, None)
            if not torch.equal(found, plain):
                return (
                    f"dense: with a budget of {budget} for {PROMPT + NEW} tokens logits are off by "
                    f"{difference(plain, found):.3g}, expected the model's to the bit ({group} query heads per key head)"
                )
    return None


def _at_least(t: _Trial, length: int) -> int:
    """The first budget that a policy takes, from a length on: it may take multiples alone."""
    for budget in range(length, length + 64):
        try:
            t.make(budget)
        except InputError:
            continue
        return budget
    return length


def _rule_budget(t: _Trial) -> str | None:
    for group, model in t.models.items():
        policy = t.policy()
        share = group if getattr(policy, "share", "kv_head") == "query_head" else 1
        with t.on(policy, model) as run:
            t.generated(model)
        excused = [layer for layer in run.most if getattr(policy, "reads_all", lambda _: False)(layer)]
        if alone := [layer for layer in excused if layer not in t.whole_layers]:
            return (
                f"budget: reads_all says that layer {alone[0]} reads everything, and whole_layers does not name it; name the "
                f"layers that may"
            )
        if len(excused) == len(run.most):
            return "budget: every layer reads everything, as reads_all says; at least one must keep to the budget"
        for layer in run.most:
            if layer in excused:
                continue
            said = f"of layer {layer} read {{}} keys for one token, with a budget of {t.budget}"
            if policy.most[layer] > t.budget:
                return f"budget: a head {said.format(policy.most[layer])}"
            if run.most[layer] > t.budget * share:
                several = f" for each of {group} query heads" if share > 1 else ""
                return f"budget: a key head {said.format(run.most[layer])}{several}"
        kept = [(layer, most) for layer, most in policy.kept if most > t.budget]
        if kept:
            return f"budget: layer {kept[0][0]} kept {kept[0][1]} keys, with a budget of {t.budget}"
        if policy.forgets and not policy.kept:
            return "budget: it says that it forgets, and forgot nothing"
        if share == 1 and run.share >= 1.0:
            return f"budget: all keys were read, with a budget of {t.budget} of {PROMPT + NEW}"
    return None


def _rule_causality(t: _Trial) -> str | None:
    # one that forgets reads one token after the other behind the prompt, and no later one is there
    forgets = t.policy().forgets
    words = torch.cat([t.words[:1], t.behind], 1)
    for given, last in ((words[:, :PROMPT], PROMPT // 2), *(() if forgets else ((words, PROMPT + NEW // 2),))):
        if message := _reached(t, given, last, use_cache=forgets):
            return f"causality: {message}"
    return None


def _reached(t: _Trial, words: Tensor, last: int, use_cache: bool) -> str | None:
    """Whether what is said of the tokens before one depends on it, or on those behind it."""
    other = words.clone()
    other[:, last:] = (other[:, last:] - 4) % 33 + 5
    found = []
    with torch.no_grad():
        for given in (words, other):
            with t.on(t.policy(), prompt=PROMPT):
                found.append(t.model(given, use_cache=use_cache).logits[:, :last])
    if not torch.equal(*found):
        return f"tokens from {last} on change logits before them, by {difference(*found):.3g}"
    embedded = t.model.get_input_embeddings()(words).detach().requires_grad_()  # type: ignore[operator]
    with t.on(t.policy(), prompt=PROMPT):
        out = t.model(inputs_embeds=embedded, use_cache=use_cache).logits[:, last - 1].sum()
    (gradient,) = torch.autograd.grad(out, embedded)
    if bool(gradient[:, last:].any()):
        return "gradients of a token's logits reach later tokens"
    return None


def _rule_cached(t: _Trial) -> str | None:
    if t.policy().forgets:
        return None
    with t.on():
        cached = t.decoded(t.behind)
    with torch.no_grad(), t.on(prompt=PROMPT):
        once = t.model(torch.cat([t.words[:1], t.behind], 1), use_cache=False).logits[:, PROMPT:]
    if (apart := difference(once, cached)) > CLOSE:
        return f"cached: decoding with a cache and one forward of all tokens differ by {apart:.3g}"
    return None


def _rule_own_query(t: _Trial) -> str | None:
    """What is read for a token is the same whatever was asked before it."""
    policy = t.policy()
    if policy.forgets:
        return None
    generator = torch.Generator().manual_seed(3)
    heads, kv_heads, width, tokens = 6, 2, 8, 24
    keys = 2 * torch.randn(LAYERS, 2, 1, kv_heads, tokens, width, generator=generator)
    queries = 2 * torch.randn(3, LAYERS, 1, heads, 1, width, generator=generator)
    found = []
    for before in (None, queries[1], queries[2]):
        state = policy.begin(Layout(LAYERS, heads, kv_heads, width))
        notes: list[dict[str, Any]] = [{} for _ in range(LAYERS)]
        for back, asked in ((1, before), (0, queries[0])):
            if asked is None:
                continue
            reads = []
            for layer in range(LAYERS):
                k, v = keys[layer]
                held = Held(
                    k[:, :, : tokens - back],
                    v[:, :, : tokens - back],
                    width**-0.5,
                    seen=tokens - back,
                    notes=notes[layer],
                )
                reads.append(policy.read(layer, asked[layer], held, state))
        found.append(reads)
    for layer, first in enumerate(found[0]):
        for others in found[1:]:
            if _chosen(first, tokens) != _chosen(others[layer], tokens):
                return (
                    f"own query: layer {layer} reads other keys for the same query and keys where another token was asked for "
                    f"before it"
                )
    return None


def _rule_own_key(t: _Trial) -> str | None:
    """What a token stored is there when it reads."""
    policy = t.policy()
    with t.on(policy):
        t.generated(t.model, None)
    if policy.without_own:
        return f"own key: layer {policy.without_own[0]} forgets a token's key before that token has read it"
    return None


def _chosen(reads: Reads | None, tokens: int) -> list[list[int]]:
    if reads is None:
        return [list(range(tokens))]
    return [sorted(n[v].tolist()) for n, v in zip(reads.numbers[0], reads.valid[0], strict=True)]


def _rule_batch(t: _Trial) -> str | None:
    policy = t.policy()
    with t.on(policy) as together:
        batch = t.logits(t.model, None)
    if policy.padding:
        return f"batch: padding was {policy.padding[0]}"
    read = 0
    for item, length in enumerate(LENGTHS):
        with t.on() as run:
            alone = t.logits(t.model, item)
        read += sum(run.read.values())
        if (apart := difference(alone[:, 0], batch[:, item])) > CLOSE:
            return f"batch: an item of {length} tokens is off by {apart:.3g} in a batch padded on the left"
    if read != sum(together.read.values()):
        return f"batch: {sum(together.read.values())} keys were read for a batch, {read} for its items"
    return None


def _rule_beams(t: _Trial) -> str | None:
    with t.on():
        found = t.generated(t.model, num_beams=3, num_return_sequences=3, output_scores=True, length_penalty=0.0)
    for sequence, score in zip(found.sequences, found.sequences_scores, strict=True):
        tokens = sequence[None, PROMPT:]
        with t.on(), torch.no_grad():
            cache = t.cache()
            first = t.behind_of(cache, t.words[:1]).logits[:, -1:]
            rest = t.decoded(tokens[:, :-1], cache=cache)
        logs = torch.cat([first, rest], 1).log_softmax(-1).gather(2, tokens[:, :, None]).sum()
        if (apart := difference(score, logs)) > CLOSE:
            return f"beams: a beam's score is off by {apart:.3g} of that of its tokens, decoded one by one"
    return None


def _rule_pieces(t: _Trial) -> str | None:
    with t.on():
        whole = t.logits(t.model)
    with t.on(prompt=PROMPT):
        pieces = t.logits(t.model, prefill_chunk_size=8)
    if (apart := difference(whole, pieces)) > CLOSE:
        return f"pieces: a prompt in pieces of 8 tokens is off by {apart:.3g}"
    return None


def _rule_taken_back(t: _Trial) -> str | None:
    if t.policy().forgets:
        return None
    # long enough that what was cropped would be chosen later
    tail = t.words[3:4, -14:]
    with t.on():
        expected = t.decoded(tail)
    with t.on(), torch.no_grad():
        cache = t.cache()
        t.behind_of(cache, t.words[:1])
        t.decoded(tail[:, :2], cache=cache)
        t.decoded(tail[:, 2:10].flip(1), cache=cache)
        cache.crop(-8)
        found = t.decoded(tail[:, 2:], cache=cache)
    if (apart := difference(expected[:, 2:], found)) > CLOSE:
        return f"taken back: eight tokens that were cropped leave something, logits are off by {apart:.3g}"
    return None


def _rule_again(t: _Trial) -> str | None:
    policy = t.policy()
    with t.on(policy):
        first, second = t.logits(t.model), t.logits(t.model)
    if not torch.equal(first, second):
        return f"again: a second generation differs from the first, by {difference(first, second):.3g}"
    with t.on(policy):
        third = t.logits(t.model)
    if not torch.equal(first, third):
        return f"again: entered a second time it differs, by {difference(first, third):.3g}"
    return None


def _rule_two_at_a_time(t: _Trial) -> str | None:
    tails = (t.behind, (t.behind + 3) % 33 + 5)
    prompts = (t.words[:1], t.words[3:4, -LENGTHS[3] :])
    expected = []
    for tail, prompt in zip(tails, prompts, strict=True):
        with t.on():
            expected.append(t.decoded(tail, prompt))
    with t.on(), torch.no_grad():
        caches = [t.cache() for _ in prompts]
        for prompt, cache in zip(prompts, caches, strict=True):
            t.behind_of(cache, prompt)
        for i in range(NEW):
            for tail, cache, alone in zip(tails, caches, expected, strict=True):
                found = t.decoded(tail[:, i : i + 1], cache=cache)
                if (apart := difference(alone[:, i : i + 1], found)) > CLOSE:
                    return f"two at a time: a token is off by {apart:.3g} where another generation goes on beside it"
    return None


class _Replayed:
    """Reads what another policy had kept, from a cache that keeps all."""

    acts: frozenset[Phase] = frozenset({"decode"})
    forgets = watches = False

    def __init__(self, kept: Sequence[dict[int, Tensor]]) -> None:
        self.kept = kept

    def begin(self, layout: Layout) -> Any:  # noqa: ARG002
        return None

    def read(self, layer: int, q: Tensor, held: Held, state: Any) -> Reads | None:  # noqa: ARG002
        numbers = self.kept[held.seen - PROMPT - 1].get(layer)
        return None if numbers is None else Reads(numbers.clamp(min=0), numbers >= 0)

    def choose(self, layer: int, q: Tensor, held: Held, state: Any) -> Tensor | None:  # noqa: ARG002
        return None

    def seen(self, layer: int, weights: Tensor, held: Held, state: Any) -> None: ...

    def forget(self, layer: int, held: Held, state: Any) -> Tensor | None:  # noqa: ARG002
        return None


def _rule_forgetting(t: _Trial) -> str | None:
    """Keys that are gone are as if they were there and could not be read; their bytes are given back."""
    if not t.policy().forgets:
        return None
    with t.on() as run, torch.no_grad():
        cache = t.cache()
        t.behind_of(cache, t.words[:1])
        forgot, kept, sizes = [], [], []
        for i in range(NEW):
            forgot.append(t.decoded(t.behind[:, i : i + 1], cache=cache))
            layers = enumerate(cache.layers)
            kept.append({n: layer.numbers.clone() for n, layer in layers if layer.numbers is not None})
            sizes.append(run.nbytes)
        if cache.get_seq_length() != PROMPT + NEW:
            return f"forgetting: {PROMPT + NEW} tokens were seen, and the cache says {cache.get_seq_length()}"
        longest = max(layer.keys.shape[2] for layer in cache.layers)
    if longest > t.budget:
        return f"forgetting: {longest} keys are kept, with a budget of {t.budget}"
    if len(set(sizes)) > 1:
        return f"forgetting: bytes go from {sizes[0]} to {sizes[-1]} while tokens are decoded"
    with t.on(_Replayed(kept)):
        masked = t.decoded(t.behind)
    if (apart := difference(masked, torch.cat(forgot, 1))) > CLOSE:
        return f"forgetting: logits are off by {apart:.3g} of those where the same keys are masked"
    return None


def _rule_bytes(t: _Trial) -> str | None:
    cache = t.cache()
    with t.on() as run, torch.no_grad():
        t.behind_of(cache, t.words[:1])
        t.decoded(t.behind, cache=cache)
        declared = run.nbytes
    held = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
    if declared != held or declared != cache.nbytes:
        return f"bytes: {declared} are declared, and {held} are there"
    return None


def _rule_half_precision(t: _Trial) -> str | None:
    model = t.models[4]
    half = type(model)(model.config).eval()
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    plain = t.logits(half, None)
    with t.on(t.policy(_at_least(t, PROMPT + NEW)), half):
        if not torch.equal(t.logits(half, None), plain):
            return "half precision: with a budget of the length bfloat16 logits are not the model's to the bit"
    with t.on(model=half):
        if not bool(t.logits(half, None).isfinite().all()):
            return "half precision: bfloat16 gives NaN or infinity"
    return None


def _rule_random_generators(t: _Trial) -> str | None:
    before = torch.get_rng_state()
    with t.on():
        t.logits(t.model)
    if not torch.equal(before, torch.get_rng_state()):
        return "random generators: the global one was used; take a seed"
    return None


def _rule_restored(t: _Trial) -> str | None:
    with torch.no_grad():
        found = AsFound(t.model, lambda: t.generated(t.model))
    plain = t.logits(t.model)
    with t.on():
        t.generated(t.model)
    if changed := found.changed():
        return f"restored: after leaving, {changed}"
    try:
        with t.on():
            t.generated(t.model)
            raise _OwnError
    except _OwnError:
        pass
    if changed := found.changed():
        return f"restored: after an exception, {changed}"
    if not torch.equal(t.logits(t.model), plain):
        return "restored: after leaving, the model's logits are others"
    return None


class _OwnError(Exception):
    """Raised inside, and by nothing else."""


_RULES = (
    _rule_budget,
    _rule_causality,
    _rule_cached,
    _rule_own_query,
    _rule_own_key,
    _rule_batch,
    _rule_beams,
    _rule_pieces,
    _rule_taken_back,
    _rule_again,
    _rule_two_at_a_time,
    _rule_forgetting,
    _rule_bytes,
    _rule_half_precision,
    _rule_random_generators,
    _rule_restored,
)

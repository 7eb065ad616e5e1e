"""The contract of KV policies, of those that there are, and of wrong ones that it must catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.models.live import zoo
from torch import Tensor

from cenote.core import InputError, routing
from cenote.mix import H2O, KVPolicy, OracleTopK, Quest, RandomKeys, SinkWindow
from cenote.mix.policies import Reads, key_scores
from cenote.models.live.reading import Held, Layout
from cenote.testing import ContractError, check_kv_policy
from cenote.testing.contract import title
from cenote.testing.policies import _RULES, _rule_dense

POLICIES: dict[str, Callable[[int], KVPolicy]] = {
    "quest": lambda budget: Quest(budget, page=4),
    "h2o": H2O,
    "oracle of query heads": lambda budget: OracleTopK(budget, "query_head"),
    "window": SinkWindow,
    "window that forgets": lambda budget: SinkWindow(budget, 2, forgets=True),
    "random": RandomKeys,
    "oracle": OracleTopK,
    "quest without a sink": lambda budget: Quest(budget, page=2, sink=False),
    "h2o with sinks": lambda budget: H2O(budget, recent=2, sinks=3),
}


def few(cases: list[Any], first: int) -> list[Any]:
    """The others of the same kind are thorough."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=[pytest.mark.thorough] if i >= first else []
        )
        for i, case in enumerate(cases)
    ]


def all_but(*rules: str) -> list[str]:
    return [name for name in map(title, (_rule_dense, *_RULES)) if name not in rules]


@pytest.mark.parametrize(
    ("name", "rules"), [("quest", ["budget", "cached", "batch"]), ("h2o", ["budget", "forgetting"])]
)
def test_some_rules_of_some_policies(name: str, rules: list[str]) -> None:
    check_kv_policy(POLICIES[name], leave_out=all_but(*rules))


@pytest.mark.thorough
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_its_contract(name: str) -> None:
    check_kv_policy(POLICIES[name])


@pytest.mark.thorough
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "phi", "mixtral"])
def test_models_of_other_kinds(name: str, attention: str) -> None:
    settings = {"max_position_embeddings": 64, "num_hidden_layers": 2}
    kind, small, own = {
        "llama": ("LlamaForCausalLM", zoo.GROUPED, {}),
        "qwen2": ("Qwen2ForCausalLM", zoo.GROUPED, {}),
        "qwen3": ("Qwen3ForCausalLM", zoo.GROUPED, {"head_dim": 8}),
        "gpt2": ("GPT2LMHeadModel", zoo.TEXT, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
        "gpt_neox": ("GPTNeoXForCausalLM", zoo.TEXT, {}),
        "phi": ("PhiForCausalLM", zoo.TEXT, {}),
        "mixtral": ("MixtralForCausalLM", zoo.GROUPED, {"num_local_experts": 2}),
    }[name]
    settings = {**small, **settings, "bos_token_id": 1, "eos_token_id": 2, **own}
    model = zoo.built(kind, settings, attention)
    # the model has the heads that it has
    for policy in ("quest", "h2o"):
        check_kv_policy(POLICIES[policy], lambda _: model)


class _Early(SinkWindow):
    """Gathers all keys where all are read."""

    def read(self, layer: int, q: Tensor, held: Held, state: Any) -> Reads | None:
        return super().read(layer, q, held, state) or Reads.of(held.real)


class _OneMore(OracleTopK):
    def read(self, layer: int, q: Tensor, held: Held, state: Any) -> Reads | None:
        self.budget += 1
        try:
            return super().read(layer, q, held, state)
        finally:
            self.budget -= 1


class _KeepsOneMore(H2O):
    def forget(self, layer: int, held: Held, state: Any) -> Tensor | None:
        self.budget += 1
        try:
            return super().forget(layer, held, state)
        finally:
            self.budget -= 1


class _Padding(OracleTopK):
    """The best of all keys, whatever the mask says."""

    def read(self, layer: int, q: Tensor, held: Held, state: Any) -> Reads | None:
        return super().read(layer, q, Held(held.keys, held.values, held.scale, seen=held.seen), state)


class _AnotherToken(OracleTopK):
    """What the token before asked for."""

    def begin(self, layout: Layout) -> Any:
        return {}

    def read(self, layer: int, q: Tensor, held: Held, state: Any) -> Reads | None:
        before, state[layer] = state.get(layer, q), q
        return super().read(layer, before if before.shape == q.shape else q, held, state)


class _AnotherItem(OracleTopK):
    """What the first item asks for."""

    def read(self, layer: int, q: Tensor, held: Held, state: Any) -> Reads | None:
        return super().read(layer, q[:1].expand_as(q), held, state)


class _LeftOver(RandomKeys):
    """What was counted in one generation counts in the next."""

    def read(self, layer: int, q: Tensor, held: Held, state: Any) -> Reads | None:
        self.seed += held.count > self.budget and layer == 0
        return super().read(layer, q, held, state)


class _OfTheLast(SinkWindow):
    """Several queries read what the last of them reads."""

    def choose(self, layer: int, q: Tensor, held: Held, state: Any) -> Tensor | None:
        reads = super().read(layer, q[:, :, -1:], held, state)
        if reads is None:
            return None
        chosen = torch.zeros(*held.keys.shape[:3], dtype=torch.bool).scatter(2, reads.numbers, reads.valid)
        return chosen.unsqueeze(2).expand(-1, -1, q.shape[2], -1)


class _Future(OracleTopK):
    """The best of keys that later tokens have changed."""

    def choose(self, layer: int, q: Tensor, held: Held, state: Any) -> Tensor | None:
        changed = held.keys * held.keys.mean(2, keepdim=True)
        return super().choose(layer, q, Held(changed, held.values, held.scale, seen=held.seen, start=held.start), state)


class _Unsorted(SinkWindow):
    """State of items that beams do not move."""

    def begin(self, layout: Layout) -> Any:
        return {}

    def read(self, layer: int, q: Tensor, held: Held, state: Any) -> Reads | None:
        if held.count <= self.budget:
            return None
        sums = state.setdefault(layer, {})
        key = held.keys[:, :, -1].sum(-1)
        before = sums.get(held.count - 1)
        sums[held.count] = key if before is None or before.shape != key.shape else before + key
        scores = torch.sin(sums[held.count].unsqueeze(-1) * (1.0 + held.positions))
        own = held.positions == held.last
        return Reads.of(routing.best(scores.masked_fill(own, torch.inf), self.budget, held.real))


class _NotTakenBack(Quest):
    """Bounds of pages that a crop does not reach."""

    def begin(self, layout: Layout) -> Any:
        return {}

    def read(self, layer: int, q: Tensor, held: Held, state: Any) -> Reads | None:
        held.notes = state.setdefault(layer, {})
        return super().read(layer, q, held, state)


class _Shared(_NotTakenBack):
    """One memory for all generations."""

    def __init__(self, budget: int) -> None:
        super().__init__(budget, page=4)
        self.memory: dict[int, Any] = {}

    def begin(self, layout: Layout) -> Any:
        return self.memory


class _GlobalGenerator(RandomKeys):
    def scores(self, layer: int, q: Tensor, held: Held, state: Any) -> Tensor:
        torch.rand(1)
        return super().scores(layer, q, held, state)


class _Slow(SinkWindow):
    """Says that it forgets, and does not."""

    def __init__(self, budget: int) -> None:
        super().__init__(budget, forgets=True)

    def forget(self, layer: int, held: Held, state: Any) -> Tensor | None:
        return None


class _ByBatch(OracleTopK):
    """Fewer for each item where there are several."""

    def read(self, layer: int, q: Tensor, held: Held, state: Any) -> Reads | None:
        if len(q) > 1 and held.count > self.budget:
            return Reads.of(routing.best(held.positions.float(), self.budget, held.real))
        return super().read(layer, q, held, state)


class _BudgetTimesGroup(OracleTopK):
    """The whole group's budget for each query head."""

    def __init__(self, budget: int) -> None:
        super().__init__(budget, "query_head")

    def read(self, layer: int, q: Tensor, held: Held, state: Any) -> Reads | None:
        if held.count <= self.budget:
            return None
        scores = self.scores(layer, q, held, state)
        group = scores.shape[1] // held.keys.shape[1]
        return Reads(*routing.best_numbers(scores, self.budget * group, held.real.repeat_interleave(group, 1)))


class _AllAtTimes(OracleTopK):
    """Reads everything of longer contexts, which is less than a group of query heads may read."""

    share = "query_head"

    def read(self, layer: int, q: Tensor, held: Held, state: Any) -> Reads | None:
        return None if held.count > 20 else super().read(layer, q, held, state)


class _ExcusesItself(OracleTopK):
    """Reads everything in its first layer, and says that it may."""

    def reads_all(self, layer: int) -> bool:
        return True

    def read(self, layer: int, q: Tensor, held: Held, state: Any) -> Reads | None:
        return None if layer == 0 else super().read(layer, q, held, state)


class _ForgetsTheNewest(SinkWindow):
    """Keeps the first tokens, and not the one that is just decoded."""

    def __init__(self, budget: int) -> None:
        super().__init__(budget, forgets=True)

    def forget(self, layer: int, held: Held, state: Any) -> Tensor | None:
        return held.real & (held.positions < self.budget) if held.count > self.budget else None


class _PromptOfTheLast(SinkWindow):
    """Every query of the prompt reads what its last one asks for."""

    acts = frozenset({"prefill", "decode"})

    def choose(self, layer: int, q: Tensor, held: Held, state: Any) -> Tensor | None:
        chosen = routing.best(key_scores(q[:, :, -1:], held, "kv_head"), self.budget, held.real)
        own = held.last + torch.arange(1 - q.shape[2], 1)
        return chosen.unsqueeze(2) | (held.positions.unsqueeze(2) == own.unsqueeze(-1))


def _forgetting(policy: SinkWindow) -> SinkWindow:
    policy.forgets = True
    return policy


WRONG: list[tuple[Any, str]] = [
    (_Early, "dense"),
    (_OneMore, "budget"),
    (_BudgetTimesGroup, "budget"),
    (_ExcusesItself, "budget"),
    (_ForgetsTheNewest, "own key"),
    (_Padding, "batch"),
    (_AnotherToken, "own query"),
    (_LeftOver, "again"),
    (_Future, "causality"),
    (_KeepsOneMore, "budget"),
    (_AnotherItem, "batch"),
    (_OfTheLast, "cached"),
    (_Unsorted, "beams"),
    (lambda budget: _NotTakenBack(budget, page=4), "taken back"),
    (_Shared, "two at a time"),
    (_GlobalGenerator, "random generators"),
    (_Slow, "budget"),
    (_ByBatch, "batch"),
    (_AllAtTimes, "budget"),
    (_PromptOfTheLast, "causality"),
    (lambda budget: _forgetting(_PromptOfTheLast(budget)), "causality"),
]


@pytest.mark.parametrize(("make", "rule"), few(WRONG, 9))
def test_wrong_policies_are_caught(make: Any, rule: str) -> None:
    with pytest.raises(ContractError) as caught:
        check_kv_policy(make, leave_out=all_but(rule))
    assert caught.value.broken == (rule,)


def test_layers_that_read_everything_are_named_and_are_not_all() -> None:
    for layers, told in (
        ([], r"reads_all says that layer 0 reads everything, and whole_layers does not name it"),
        ([0], r"reads_all says that layer 1 reads everything"),
        ([0, 1], r"every layer reads everything"),
    ):
        with pytest.raises(ContractError, match=told):
            check_kv_policy(_ExcusesItself, whole_layers=layers, leave_out=all_but("budget"))


def test_a_dense_policy_must_be_dense() -> None:
    def make(budget: int) -> KVPolicy:
        return SinkWindow(min(budget, 20))

    with pytest.raises(ContractError, match=r"dense: with a budget of 27 for 27 tokens logits are off"):
        check_kv_policy(make)


@pytest.mark.thorough
def test_rules_can_be_left_out() -> None:
    check_kv_policy(_GlobalGenerator, leave_out=["random generators"])
    with pytest.raises(InputError, match="leave_out: there is no rule 'beam'"):
        check_kv_policy(SinkWindow, leave_out=["beam"])

from __future__ import annotations

import networkx
import pytest
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.explain import (
    AttentionFlow,
    AttentionRollout,
    LastLayerAttention,
    MeanAttention,
    augmented,
    max_flow,
    over_heads,
    rollout,
)
from cenote.models.live import one_stack, recorded
from cenote.testing import check_explainer
from tests.models.live import zoo


def stack(layers: int, tokens: int, seed: int = 0, causal: bool = False) -> Tensor:
    scores = torch.randn(layers, tokens, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if causal:
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    return (2 * scores).softmax(-1)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("layers", [3, 4, 5])
def test_flow_is_that_of_networkx(layers: int, seed: int) -> None:
    a = augmented(stack(layers, 4, seed))
    graph = networkx.DiGraph()
    for layer in range(layers):
        for i in range(4):
            for j in range(4):
                graph.add_edge((layer + 1, i), (layer, j), capacity=float(a[layer, i, j]))
    expected = torch.tensor(
        [networkx.maximum_flow_value(graph, (layers, 1), (0, j)) for j in range(4)], dtype=torch.float64
    )
    (found,) = max_flow(a, 0.0, queries=[1], layers=[layers - 1])
    assert torch.allclose(found[0], expected / expected.sum(), atol=1e-9, rtol=0)


def test_closed_forms() -> None:
    w = stack(2, 6)
    a = augmented(w)
    assert torch.allclose(max_flow(w[:1])[0], a[0])
    two = torch.minimum(a[1][:, :, None], a[0]).sum(1)
    assert torch.allclose(max_flow(w, layers=[1])[0], two / two.sum(-1, keepdim=True))
    assert torch.allclose(rollout(w[:1])[0], a[0])


@pytest.mark.parametrize("residual", [0.5, 1.0])
def test_attention_to_oneself_is_the_identity(residual: float) -> None:
    w = torch.eye(5).expand(3, 5, 5) if residual < 1 else stack(3, 5).float()
    assert torch.equal(rollout(w, residual)[-1], torch.eye(5))
    assert torch.equal(max_flow(w, residual, layers=[2])[0], torch.eye(5))


def test_uniform_attention_without_a_residual_stays_uniform() -> None:
    w = torch.full((3, 4, 4), 0.25)
    assert torch.allclose(rollout(w, 0.0), torch.full((3, 4, 4), 0.25))
    assert torch.allclose(max_flow(w, 0.0, layers=[2]), torch.full((1, 4, 4), 0.25))


def test_one_token_holds_all() -> None:
    assert rollout(torch.ones(3, 1, 1)).tolist() == [[[1.0]]] * 3
    assert max_flow(torch.ones(3, 1, 1)).tolist() == [[[1.0]]] * 3


def test_rows_sum_to_one_and_causal_stacks_stay_so() -> None:
    w = stack(4, 6, causal=True)
    assert torch.allclose(rollout(w).sum(-1), torch.ones(4, 6, dtype=torch.float64))
    assert not rollout(w).triu(1).any()
    assert not max_flow(w, queries=[2], layers=[3])[0, 0, 3:].any()


def test_permuting_tokens_permutes_both_axes() -> None:
    w, order = stack(3, 5), torch.tensor([3, 0, 4, 1, 2])
    moved = w[:, order][:, :, order]
    assert torch.allclose(rollout(moved), rollout(w)[:, order][:, :, order])
    assert torch.allclose(max_flow(moved, layers=[2]), max_flow(w, layers=[2])[:, order][:, :, order])


def test_flow_is_at_most_what_leaves_and_what_arrives() -> None:
    a = augmented(stack(3, 5))
    raw = max_flow(a, 0.0, layers=[2])[0]
    assert bool((raw <= 1 + 1e-12).all())
    assert torch.allclose(raw.sum(-1), torch.ones(5, dtype=torch.float64))


def test_a_row_without_attention_is_the_residuals() -> None:
    w = stack(2, 4)
    w[:, 2] = 0
    assert torch.equal(rollout(w)[-1, 2], torch.eye(4, dtype=torch.float64)[2])


def test_layers_below_the_start_do_not_count() -> None:
    w = stack(3, 4)
    assert torch.equal(rollout(w, start_layer=1)[0], torch.eye(4, dtype=torch.float64))
    assert torch.allclose(rollout(w, start_layer=1)[-1], rollout(w[1:])[-1])


def test_heads_become_one() -> None:
    layers = [torch.rand(2, 3, 4, 4) for _ in range(2)]
    assert over_heads(layers).shape == (2, 2, 4, 4)
    assert torch.equal(over_heads(layers, "max")[:, 1], layers[1].amax(1))
    assert torch.equal(over_heads(layers, "min")[:, 0], layers[0].amin(1))
    assert torch.allclose(over_heads(layers, "sum"), 3 * over_heads(layers))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rollout(torch.rand(3, 4)), r"attention: expected \[\.\.\., layers, tokens, tokens\]"),
        (lambda: rollout(stack(2, 3), start_layer=2), "start_layer: expected 0 to 1, got 2"),
        (lambda: augmented(stack(1, 3), 1.5), "residual: expected a share"),
        (lambda: max_flow(stack(2, 3), queries=[3]), "queries, layers: expected below 3 and 2"),
        (lambda: max_flow(stack(2, 3)[None]), "of one input"),
        (lambda: AttentionRollout(query="middle"), "query: expected 'first' or 'last'"),
        (lambda: AttentionRollout(block=0), "block: expected at least 1"),
        (lambda: AttentionRollout(residual=1.0), "residual: expected a share from 0, below 1"),
    ],
)
def test_what_cannot_be_used_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call()


PADDED = {
    "input_ids": zoo.ids(3, 7),
    "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]]),
}
UNEVEN = {"initializer_range": 0.5}
"""Small weights attend almost evenly, and what is rolled out then follows from places alone."""
KINDS = {
    "bert": (lambda: zoo.text("BertModel")("sdpa").model, "first"),
    "llama": (lambda: zoo.text("LlamaForCausalLM", num_key_value_heads=2, **UNEVEN)("sdpa").model, "last"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("explainer", [AttentionRollout, AttentionFlow])
def test_explainers_keep_the_contract(kind: str, explainer: type[AttentionRollout]) -> None:
    build, query = KINDS[kind]
    check_explainer(explainer(query=query), build(), PADDED)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [2, 256])
def test_a_chained_row_is_a_row_of_the_whole_product(kind: str, block: int) -> None:
    build, query = KINDS[kind]
    model = build()
    with torch.no_grad(), recorded(model, "rows", rows="all") as found:
        model(**PADDED)
    whole = rollout(over_heads([steps[0] for steps in found["rows"].values()]))[:, -1]
    scores = AttentionRollout(query, block=block).explain(model, PADDED).scores
    at = torch.zeros(3, dtype=torch.long) if query == "first" else PADDED["attention_mask"].sum(1) - 1
    assert torch.allclose(scores, whole[torch.arange(3), at], atol=1e-6)


def test_flow_of_a_model_is_that_of_its_maps() -> None:
    model = KINDS["bert"][0]()
    with torch.no_grad(), recorded(model, "rows", rows="all") as found:
        model(**PADDED)
    maps = over_heads([steps[0] for steps in found["rows"].values()])[1, :, :4, :4]
    (expected,) = max_flow(maps, queries=[0], layers=[len(maps) - 1])
    scores = AttentionFlow().explain(model, PADDED).scores[1]
    assert torch.allclose(scores[:4], expected[0], atol=1e-6)
    assert not scores[4:].any()


def test_models_with_several_stacks_need_a_name() -> None:
    case = zoo.seq2seq("BartModel", **zoo.BART)("sdpa")
    with pytest.raises(InputError, match="stack: the model has 2 lists of blocks with self-attention; name one of"):
        AttentionRollout().explain(case.model, case.inputs)
    with pytest.raises(InputError, match="stack: 0 lists of blocks with self-attention are called 'tower'"):
        AttentionRollout(stack="tower").explain(case.model, case.inputs)
    found = AttentionRollout(stack="encoder.layers").explain(case.model, case.inputs)
    assert torch.allclose(found.scores.sum(1), torch.ones(2))


@pytest.mark.parametrize("explainer", [AttentionRollout(), AttentionFlow(), LastLayerAttention(), MeanAttention()])
def test_each_pass_of_shared_blocks_is_a_layer(explainer: AttentionRollout) -> None:
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "embedding_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    config = AlbertConfig(vocab_size=40, num_hidden_layers=3, initializer_range=0.5, **sizes)
    model = AlbertModel(config).eval()
    model.set_attn_implementation("eager")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        given = over_heads(model(input_ids=ids, output_attentions=True).attentions)[0]
    expected = {
        AttentionRollout: rollout(given)[-1, 0],
        AttentionFlow: max_flow(given, queries=[0], layers=[2])[0, 0],
        LastLayerAttention: given[-1, 0],
        MeanAttention: given[:, 0].mean(0),
    }[type(explainer)]
    torch.testing.assert_close(explainer.explain(model, {"input_ids": ids}).scores[0], expected, atol=1e-5, rtol=0)


def test_blocks_that_run_in_turns_are_refused() -> None:
    from transformers import AlbertConfig, AlbertModel

    sizes = {"hidden_size": 16, "embedding_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    model = AlbertModel(AlbertConfig(vocab_size=40, num_hidden_layers=2, inner_group_num=2, **sizes)).eval()
    with pytest.raises(InputError, match="runs more than once in one forward"):
        AttentionRollout(stack=one_stack(model).stack).explain(model, {"input_ids": torch.tensor([[5, 6, 7]])})

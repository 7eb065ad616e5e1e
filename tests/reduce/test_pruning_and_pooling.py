"""Pruning or pooling: scores, policy and both reductions by hand; what holds in every branch."""

import math

import pytest
import torch

import cenote
from cenote.reduce import (
    BipartiteMerging,
    PruneOrPool,
    ReducibleViT,
    TopAttentionTokens,
    importance,
    pooled_tokens,
    ppt,
    pruned_tokens,
    reductions,
    score_variance,
    set_thresholds,
    watched,
)

GENERATOR = torch.Generator().manual_seed(0)
X, KEYS, VALUES = (torch.randn(*shape, generator=GENERATOR) for shape in ((4, 9, 6), (4, 2, 9, 3), (4, 2, 9, 3)))
ATTENTION = torch.rand(4, 2, 9, generator=GENERATOR)
SIGNALS = {"attention": ATTENTION, "keys": KEYS, "values": VALUES}
POOL, PRUNE = math.inf, -math.inf


def vit() -> ReducibleViT:
    torch.manual_seed(0)
    return ReducibleViT(8, 2, 16, depth=4, heads=2, classes=5, channels=1).eval()


IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_scores_by_hand() -> None:
    attention = torch.tensor([[[0.1, 0.3], [0.2, 0.1]]])
    values = torch.tensor([[[[3.0], [0.0]], [[4.0], [2.0]]]])
    assert importance(attention, values)[0].tolist() == pytest.approx([1.5 / 2.3, 0.8 / 2.3])
    assert importance(attention)[0].tolist() == pytest.approx([3 / 7, 4 / 7])
    masked = importance(attention, values, torch.tensor([[True, False]]))
    assert masked.tolist() == [[1.0, 0.0]]


def test_the_variance_is_unbiased_and_can_be_freed_of_the_number_of_tokens() -> None:
    scores = torch.softmax(torch.randn(3, 7, generator=torch.Generator().manual_seed(0)), 1)
    torch.testing.assert_close(score_variance(scores), scores.var(1))
    twice = torch.cat([scores, scores], 1) / 2
    apart = score_variance(scores, normalised=True) * 6 / 7
    torch.testing.assert_close(score_variance(twice, normalised=True) * 13 / 14, apart)
    assert score_variance(torch.ones(1, 1)).tolist() == [0.0]


def test_pooling_keeps_sizes_and_the_weighted_sum() -> None:
    sizes = torch.arange(1.0, 10).expand(4, -1)
    found = pooled_tokens(X, KEYS.mean(1), 3, sizes)
    assert found.tokens.shape == (4, 6, 6)
    torch.testing.assert_close(found.sizes.sum(1), sizes.sum(1))
    torch.testing.assert_close((found.sizes.unsqueeze(-1) * found.tokens).sum(1), (sizes.unsqueeze(-1) * X).sum(1))
    # first what stands at even places and was not merged, [CLS] ahead; then all odd places
    for item in range(4):
        assert int(found.assignment[item, 0]) == 0
        assert found.assignment[item, 1::2].tolist() == [2, 3, 4, 5]
        assert torch.equal(found.tokens[item, 0], X[item, 0])


def test_nothing_is_merged_into_the_token_of_distillation() -> None:
    keys = KEYS.mean(1).clone()
    keys[:, 2:] = keys[:, 1:2] + 0.01 * keys[:, 2:]
    plain = pooled_tokens(X, keys, 3)
    found = pooled_tokens(X, keys, 3, distilled=True)
    assert bool((plain.sizes[:, 2] > 1).any())
    assert found.sizes[:, 2].tolist() == [1.0] * 4


def test_pruning_keeps_the_order_of_scores() -> None:
    scores = torch.tensor([[2.0, 0.1, 0.5, 0.4]])
    x = torch.arange(4.0).view(1, 4, 1)
    found = pruned_tokens(x, scores, 1, torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert found.tokens.flatten().tolist() == [0, 2, 3]
    assert found.sizes.tolist() == [[1.0, 3.0, 4.0]]
    assert found.assignment.tolist() == [[0, -1, 1, 2]]


def test_the_threshold_decides_for_each_image() -> None:
    variance = PruneOrPool(factor=2).decide(ATTENTION, VALUES, torch.ones(4, 9, dtype=torch.bool)).variance
    limit = float(variance.sort().values[1:3].mean())
    mixed = PruneOrPool(factor=2, threshold=limit)(X, **SIGNALS)
    pooled = PruneOrPool(factor=2, threshold=POOL)(X, **SIGNALS)
    pruned = PruneOrPool(factor=2, threshold=PRUNE)(X, **SIGNALS)
    assert mixed.counts.tolist() == [4] * 4
    for item in range(4):
        like = pooled if float(variance[item]) < limit else pruned
        assert torch.equal(mixed.assignment[item], like.assignment[item])
        assert torch.equal(mixed.tokens[item], like.tokens[item])
    assert not torch.equal(pooled.assignment, pruned.assignment)


def test_always_pooling_is_tome_on_keys_over_the_whole_network() -> None:
    at = ppt(16, blocks=(1, 2), r=4, threshold=POOL)
    tome = {block: BipartiteMerging(tokens=reducer.budget.tokens) for block, reducer in at.items()}
    assert torch.equal(vit()(IMAGES, at), vit()(IMAGES, tome))


def test_always_pruning_by_attention_alone_is_the_choice_of_the_largest() -> None:
    reducer = PruneOrPool(tokens=4, threshold=PRUNE, by_values=False)
    found = reducer(X, **SIGNALS)
    assert torch.equal(found.tokens, TopAttentionTokens(tokens=4)(X, attention=ATTENTION).tokens)


def test_taking_nothing_is_the_plain_network_in_its_order() -> None:
    at = ppt(16, blocks=(1, 2), r=0)
    run = vit().run(IMAGES, at, proportional=False)
    assert torch.equal(run.logits, vit()(IMAGES))
    assert run.reduced.assignment.tolist() == [list(range(17))] * 4


def test_tokens_per_block_and_the_way_back_to_the_patches() -> None:
    at = ppt(16, blocks=(0, 2), r=4)
    run = vit().run(IMAGES, at)
    assert run.counts == (13, 13, 9, 9)
    for item in range(4):
        members = torch.bincount(run.reduced.assignment[item].clamp(min=-1) + 1, minlength=10)[1:]
        assert torch.equal(members.float(), run.reduced.sizes[item])


@pytest.mark.parametrize("threshold", [POOL, PRUNE])
def test_cls_stays_in_row_0_in_every_branch(threshold: float) -> None:
    found = PruneOrPool(factor=2, threshold=threshold)(X, protect=1, **SIGNALS)
    assert torch.equal(found.tokens[:, 0], X[:, 0])
    assert found.assignment[:, 0].tolist() == [0] * 4
    assert not bool((found.assignment[:, 1:] == 0).any())


def test_equal_scores_have_no_variance_so_that_images_are_pooled() -> None:
    even = {**SIGNALS, "attention": torch.ones(4, 2, 9), "values": torch.ones(4, 2, 9, 3)}
    mask = torch.ones(4, 9, dtype=torch.bool)
    decision = PruneOrPool(factor=2).decide(even["attention"], even["values"], mask)
    assert float(decision.variance.max()) < 1e-15
    assert bool(decision.pool.all())
    assert PruneOrPool(factor=2)(X, **even).sizes.sum(1).tolist() == [9.0] * 4


@pytest.mark.parametrize("threshold", [POOL, PRUNE])
def test_keys_of_length_zero_give_numbers(threshold: float) -> None:
    reducer = PruneOrPool(factor=2, threshold=threshold)
    found = reducer(X, **{**SIGNALS, "keys": torch.zeros_like(KEYS), "values": torch.zeros_like(VALUES)})
    assert bool(found.tokens.isfinite().all())
    assert found.counts.tolist() == [4] * 4


@pytest.mark.parametrize("threshold", [POOL, PRUNE, 7e-5])
def test_a_batch_of_one_works(threshold: float) -> None:
    reducer = PruneOrPool(factor=2, threshold=threshold)
    alone = reducer(X[2:3], **{name: s[2:3] for name, s in SIGNALS.items()})
    assert torch.equal(alone.assignment[0], reducer(X, **SIGNALS).assignment[2])


def test_schedules_and_their_limits() -> None:
    assert reductions(5, 3) == [5, 5, 5]
    assert reductions([1, 2], 3) == [1, 2, 0]
    assert sum(reductions((10, 0.8), 5)) == 50
    assert reductions((10, 0.8), 5) == [2, 6, 10, 14, 18]
    assert reductions((10, -1.0), 3) == [20, 10, 0]
    assert reductions(50, 2, 17) == [8, 4]
    assert pooled_tokens(X, KEYS.mean(1), 50).tokens.shape[1] == 5
    for wrong, message in (((3, 2.0), "inflection"), ([1, 2, 3, 4], "r: 4 numbers for 3 blocks"), (-1, "r: expected")):
        with pytest.raises(cenote.InputError, match=message):
            reductions(wrong, 3)  # type: ignore[arg-type]
    with pytest.raises(cenote.InputError, match="threshold: 2 numbers for 3 blocks"):
        ppt(16, r=2, threshold=[1.0, 2.0])
    with pytest.raises(cenote.InputError, match="threshold: expected a number"):
        PruneOrPool(factor=2, threshold=math.nan)


def test_thresholds_are_the_median_of_given_data() -> None:
    model, at = vit(), ppt(16, blocks=(1, 2), r=4)
    thresholds = set_thresholds(at, lambda: [model(part, at) for part in IMAGES.split(2)])
    with watched(at) as seen:
        model(IMAGES, at)
    for block in (1, 2):
        assert thresholds[block] == at[block].threshold == float(seen[block].variance.double().quantile(0.5))
        assert float(seen[block].pool.float().mean()) == 0.5
        assert seen[block].scores.shape[0] == 4
    with pytest.raises(cenote.InputError, match="run: nothing came to the reducer of block 1"):
        set_thresholds(at, lambda: None)


def test_it_acts_in_a_running_vit_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from cenote.models.live import Shorten, edited

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3}
    config = transformers.ViTConfig(**shape, image_size=8, patch_size=2, num_channels=1)
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    for reducer, rows in (
        (PruneOrPool(factor=2, threshold=POOL), "first"),
        (PruneOrPool(factor=2, threshold=PRUNE), "first"),
        (cenote.create("token-pooling", factor=2), "all"),
        (cenote.create("bat", factor=2), "first"),
    ):
        shorten = Shorten(reducer, 1, protect=1, rows=rows, proportional=True)
        with torch.no_grad(), edited(model, shorten):
            assert model(pixel_values=IMAGES).last_hidden_state.shape == (4, 9, 16)

"""Token pooling: least squared error against other implementations, and every edge."""

import pytest
import torch
from sklearn.cluster import KMeans

import cenote
from cenote.core.reduced import Reduced
from cenote.reduce import (
    KMeansTokens,
    KMedoidsTokens,
    ReducibleViT,
    constant_share,
    on_grid,
    pooling_at,
    reconstruction_loss,
    searched_schedule,
    significance,
)

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 14, 5, generator=GENERATOR)
ATTENTION = torch.rand(2, 3, 14, generator=GENERATOR) + 0.1
EVERY = [
    (kind, {"weighted": weighted, "init": init})
    for kind in (KMedoidsTokens, KMeansTokens)
    for weighted in (True, False)
    for init in ("heaviest", "farthest", "random")
]


def reduced(kind: type, settings: dict[str, object], x: torch.Tensor = X, tokens: int = 4, **more: object) -> Reduced:
    reducer = kind(tokens=tokens, **settings)
    signals = {"attention": ATTENTION[:, :, : x.shape[1]]} if "attention" in reducer.needs else {}
    return reducer(x, **{**signals, **more})


def test_significance_sums_over_heads_and_queries() -> None:
    attention = torch.tensor([[[[0.5, 0.5], [0.2, 0.8]], [[1.0, 0.0], [0.3, 0.7]]]])
    assert significance(attention)[0].tolist() == pytest.approx([2.0, 2.0])
    assert significance(attention, torch.tensor([[True, False]]))[0].tolist() == pytest.approx([1.5, 0.5])


def test_means_are_those_of_scikit_learn() -> None:
    w = ATTENTION.sum(1)
    found = reduced(KMeansTokens, {"iterations": 50})
    for item in range(2):
        first = X[item, w[item].topk(4).indices.sort().values].numpy()
        peer = KMeans(4, init=first, n_init=1, max_iter=300, tol=0, algorithm="lloyd")
        peer.fit(X[item].numpy(), sample_weight=w[item].numpy())
        labels = torch.from_numpy(peer.labels_)
        assert torch.equal(labels[:, None] == labels, found.assignment[item][:, None] == found.assignment[item])
        theirs = torch.from_numpy(peer.cluster_centers_)[labels]
        torch.testing.assert_close(found.expand(found.tokens)[item], theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings"), [(k, given) for k, given in EVERY if given["weighted"] or given["init"] == "heaviest"]
)
def test_a_constant_factor_on_weights_changes_nothing(kind: type, settings: dict[str, object]) -> None:
    again = kind(tokens=4, **settings)(X, attention=4 * ATTENTION)
    assert torch.equal(again.assignment, reduced(kind, settings).assignment)


@pytest.mark.parametrize(("kind", "settings"), EVERY)
def test_rotation_and_translation_change_no_assignment(kind: type, settings: dict[str, object]) -> None:
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(3)))[0]
    moved = X @ turn + torch.tensor([30.0, -20.0, 0.0, 5.0, 50.0])
    assert torch.equal(reduced(kind, settings).assignment, reduced(kind, settings, moved).assignment)


def test_medoids_are_rows_and_their_means_are_not() -> None:
    found = reduced(KMedoidsTokens, {})
    assert bool((found.tokens[:, :, None] == X[:, None]).all(-1).any(-1).all())
    means = reduced(KMedoidsTokens, {"output": "mean"})
    assert torch.equal(means.assignment, found.assignment)
    w = ATTENTION.sum(1)[0]
    own = found.assignment[0] == 1
    torch.testing.assert_close(means.tokens[0, 1], (w[own, None] * X[0, own]).sum(0) / w[own].sum())


def test_clusters_rebuild_better_than_what_is_important_or_drawn() -> None:
    w = ATTENTION.sum(1)
    rivals = [
        cenote.create("top-attention", tokens=4)(X, attention=ATTENTION),
        cenote.create("random-drop", tokens=4)(X),
    ]
    found = reconstruction_loss(X, reduced(KMedoidsTokens, {"iterations": 10}), w)
    assert all(bool((found < reconstruction_loss(X, rival, w)).all()) for rival in rivals)


@pytest.mark.parametrize(("kind", "settings"), EVERY)
def test_all_tokens_are_left_in_their_order_where_so_many_may_be(kind: type, settings: dict[str, object]) -> None:
    for tokens in (14, 20):
        found = reduced(kind, settings, tokens=tokens)
        assert torch.equal(found.tokens, X)
        assert reconstruction_loss(X, found).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", [KMedoidsTokens, KMeansTokens])
def test_distinct_points_are_all_found(kind: type) -> None:
    x = X[:, :4].repeat(1, 3, 1)
    found = reduced(kind, {"weighted": False}, x)
    assert reconstruction_loss(x, found).tolist() == pytest.approx([0.0, 0.0], abs=1e-9)


def test_one_mean_has_the_variance_as_its_loss() -> None:
    w = ATTENTION.sum(1)
    even = reduced(KMeansTokens, {"weighted": False}, tokens=1)
    torch.testing.assert_close(even.tokens, X.mean(1, keepdim=True))
    torch.testing.assert_close(reconstruction_loss(X, even), X.var(1, correction=0).sum(1) * 14)
    found = reduced(KMeansTokens, {}, tokens=1)
    mean = (w.unsqueeze(-1) * X).sum(1, keepdim=True) / w.sum(1)[:, None, None]
    torch.testing.assert_close(found.tokens, mean)
    torch.testing.assert_close(reconstruction_loss(X, found, w), (w * (X - mean).square().sum(-1)).sum(1))


def test_weights_of_zero_count_alike() -> None:
    x, none = torch.tensor([[[0.0], [1.0], [2.0], [5.0]]]), torch.zeros(1, 1, 4)
    assert KMeansTokens(tokens=1)(x, attention=none).tokens.flatten().tolist() == [2.0]
    assert KMedoidsTokens(tokens=1)(x, attention=none).tokens.flatten().tolist() == [2.0]


def test_among_equals_the_first_is_kept() -> None:
    found = KMedoidsTokens(tokens=2)(torch.zeros(1, 5, 3), attention=torch.ones(1, 1, 5))
    assert found.assignment.tolist() == [[0, 1, 0, 0, 0]]


def test_a_mean_that_nobody_is_nearest_to_is_not_left_empty() -> None:
    x = torch.tensor([[[0.0], [0.0], [0.0], [5.0], [5.0]]])
    weights = torch.tensor([[[3.0, 2.0, 1.5, 1.0, 0.5]]])
    found = KMeansTokens(tokens=3)(x, attention=weights)
    assert found.counts.tolist() == [3]
    assert bool(found.tokens.isfinite().all())


@pytest.mark.parametrize(("kind", "settings"), EVERY)
def test_padding_is_nobodys(kind: type, settings: dict[str, object]) -> None:
    mask = torch.arange(14) < torch.tensor([14, 9])[:, None]
    filled = X.masked_fill(~mask.unsqueeze(-1), float("nan"))
    found = reduced(kind, settings, filled, mask=mask)
    short = kind(tokens=4, **settings)
    signals = {"attention": ATTENTION[1:, :, :9]} if "attention" in short.needs else {}
    alone = short(X[1:, :9], **signals)
    assert torch.equal(found.assignment[1, :9], alone.assignment[0])
    assert found.assignment[1, 9:].tolist() == [-1] * 5
    assert bool(found.tokens.isfinite().all())


def test_half_precision_computes_distances_in_float32() -> None:
    x = X.half() * 300
    for kind in (KMedoidsTokens, KMeansTokens):
        found = reduced(kind, {}, x)
        assert found.tokens.dtype == torch.float16
        assert torch.equal(found.assignment, reduced(kind, {}, x.float()).assignment)
        assert bool(found.tokens.isfinite().all())


def test_schedules() -> None:
    assert constant_share(64, 4, 0.5) == [32, 16, 8, 4]
    assert constant_share(5, 3, 0.2) == [1, 1, 1]
    at = pooling_at([12, 6], first=1, weighted=False)
    assert {block: reducer.budget.tokens for block, reducer in at.items()} == {1: 12, 2: 6}
    with pytest.raises(cenote.InputError, match="tokens: do not become more"):
        pooling_at([6, 12])


def test_a_stronger_norm_leaves_fewer_tokens() -> None:
    torch.manual_seed(0)
    vit = ReducibleViT(8, 2, 8, depth=2, heads=2, classes=3, channels=1).eval()
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    images, labels = torch.rand(24, 1, 8, 8), torch.arange(24) % 3
    weak, strong = (
        searched_schedule(vit, images, labels, strength=s, epochs=2, retention_rate=0.1, batch=8) for s in (0.0, 5.0)
    )
    assert len(weak) == len(strong) == 2
    assert all(a < b for a, b in zip(strong, weak, strict=True))
    assert strong[0] >= strong[1] >= 1
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    run = vit.run(images, pooling_at(strong))
    assert run.counts == tuple(k + 1 for k in strong)


def test_groups_on_the_grid() -> None:
    found = KMedoidsTokens(tokens=2)(X[:1, :5], attention=ATTENTION[:1, :, :5], protect=1)
    assert on_grid(found, 2)[0].flatten().tolist() == found.assignment[0, 1:].tolist()
    with pytest.raises(cenote.InputError, match="width: 3 does not divide 4 patches"):
        on_grid(found, 3)


def test_impossible_settings_are_told() -> None:
    with pytest.raises(cenote.InputError, match="init: expected 'heaviest', 'farthest' or 'random'"):
        KMedoidsTokens(factor=2, init="first")  # type: ignore[arg-type]
    with pytest.raises(cenote.InputError, match="output: expected 'medoid' or 'mean'"):
        KMedoidsTokens(factor=2, output="row")  # type: ignore[arg-type]
    with pytest.raises(cenote.InputError, match="attention: KMeansTokens needs it"):
        KMeansTokens(factor=2)(X)

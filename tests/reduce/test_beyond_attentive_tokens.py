"""Attentive tokens matched, inattentive ones clustered: by hand, against the rivals it contains, and every edge."""

import pytest
import torch

import cenote
from cenote.reduce import AttentiveAndDiverse, FusedTopTokens, ReducibleViT, bat, budget_split, mean_cosine, vit_cost

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(3, 16, 5, generator=GENERATOR)
ATTENTION = torch.rand(3, 2, 16, generator=GENERATOR) + 0.05


def test_the_most_attended_are_attentive_and_cls_is_touched_by_nobody() -> None:
    x, attention = X[:1, :6], torch.zeros(1, 2, 6)
    attention[0, :, 1:] = torch.tensor([[0.1, 0.5, 0.1, 0.1, 0.4], [0.1, 0.3, 0.1, 0.1, 0.6]])
    found = AttentiveAndDiverse(split=(2, 0, 1))(x, attention=attention, protect=1)
    assert found.assignment.tolist() == [[0, 1, 2, 1, 1, 3]]
    assert torch.equal(found.tokens[0, [0, 2, 3]], x[0, [0, 2, 5]])
    torch.testing.assert_close(found.tokens[0, 1], x[0, [1, 3, 4]].mean(0))


def test_means_weigh_by_attention() -> None:
    found = AttentiveAndDiverse(split=(0, 0, 1))(X, attention=ATTENTION)
    weights = ATTENTION.mean(1).unsqueeze(-1)
    torch.testing.assert_close(found.tokens[:, 0], (weights * X).sum(1) / weights.sum(1))


def test_separated_groups_of_inattentive_tokens_are_recovered() -> None:
    groups = torch.arange(3).repeat_interleave(4)
    x = 10 * torch.eye(5)[groups] + 0.1 * torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    found = AttentiveAndDiverse(split=(0, 0, 3))(x[None], attention=torch.ones(1, 1, 12))
    assert found.assignment[0].tolist() == groups.tolist()


def test_identical_inattentive_tokens_are_merged_to_themselves() -> None:
    x = X[:1, :1].expand(-1, 8, -1)
    found = AttentiveAndDiverse(split=(3, 0, 2))(x, attention=ATTENTION[:1, :, :8])
    torch.testing.assert_close(found.tokens, x[:, :5])


def test_the_most_similar_attentive_tokens_are_one() -> None:
    x = X[:1, :6].clone()
    x[0, 4] = 2 * x[0, 1] + 0.01
    found = AttentiveAndDiverse(split=(6, 1, 0))(x, attention=ATTENTION[:1, :, :6])
    assert found.assignment.tolist() == [[0, 1, 2, 3, 1, 4]]
    w = ATTENTION[0, :, [1, 4]].mean(0).unsqueeze(-1)
    torch.testing.assert_close(found.tokens[0, 1], (w * x[0, [1, 4]]).sum(0) / w.sum())
    several = AttentiveAndDiverse(split=(6, 3, 0), matching="bipartite")(x, attention=ATTENTION[:1, :, :6])
    assert several.counts.tolist() == [3]


def test_the_total_is_exact_whatever_the_set() -> None:
    for fraction in (0.7, 0.5, 0.3, 0.2, 0.05):
        for n in range(17):
            mask = torch.arange(16) < torch.tensor([n, 16, 5])[:, None]
            reducer = AttentiveAndDiverse(fraction=fraction, rounding="ceil")
            found = reducer(X, mask=mask, attention=ATTENTION)
            assert torch.equal(found.counts, reducer.budget.of(mask.sum(1)))


def test_all_parts_of_a_budget_can_be_given() -> None:
    left, pairs, groups = budget_split(torch.tensor([50]), torch.tensor([196]))
    assert (int(left), int(pairs), int(groups)) == (42, 4, 12)
    assert [int(n) for n in budget_split(torch.tensor([1]), torch.tensor([9]))] == [0, 0, 1]
    assert [int(n) for n in budget_split(torch.tensor([6]), torch.tensor([9]), clusters=1, pairs=0)] == [0, 0, 6]
    for wrong, message in (
        ({"clusters": 1.5}, "clusters: expected a share from 0 to 1"),
        ({"pairs": 0.7}, "pairs: expected a share from 0 to 0.5"),
        ({"split": (3, 2, 1)}, "split: expected"),
        ({"split": (3, 1, 1), "tokens": 3}, "split: says how many are left"),
    ):
        with pytest.raises(cenote.InputError, match=message):
            AttentiveAndDiverse(**({"factor": 2} if "split" not in wrong else {}) | wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keep", "ours", "theirs"),
    [
        (0.7, 2.997, 3.005),
        (0.6, 2.608, 2.583),
        (0.5, 2.282, 2.344),
        (0.4, 2.023, 2.083),
        (0.3, 1.801, 1.823),
        (0.2, 1.623, 1.645),
    ],
)
def test_the_cost_of_a_deit_s(keep: float, ours: float, theirs: float) -> None:
    counts, left = [], 197
    at = bat(196, keep)
    for block in range(12):
        left = (at[block].budget.tokens or 0) + 1 if block in at else left
        counts.append(left)
    reducing = {b: at[b].multiply_adds(counts[b - 1] - 1, counts[b] - 1, 384) for b in at}
    found = vit_cost(counts, 384, tokens=197, patch_numbers=768, classes=1000, reducing=reducing)
    assert (found.total - found.reducing) / 1e9 == pytest.approx(ours, abs=1e-3)
    assert found.total / 1e9 == pytest.approx(theirs, rel=0.03)
    assert found.reducing < 0.01 * found.total


def test_a_whole_network_keeps_count_and_changes_its_rate_between_calls() -> None:
    torch.manual_seed(0)
    vit = ReducibleViT(8, 1, 16, depth=4, heads=2, classes=5, channels=1).eval()
    images = torch.rand(2, 1, 8, 8)
    plain = vit(images)
    assert torch.equal(vit(images, bat(64, 1.0, blocks=(1, 2)), proportional=False), plain)
    for keep, counts in ((0.5, (65, 33, 17, 17)), (0.2, (65, 14, 4, 4))):
        run = vit.run(images, bat(64, keep, blocks=(1, 2)))
        assert run.counts == counts
        assert run.reduced.sizes.sum(1).tolist() == [65.0, 65.0]
        assert torch.equal(run.logits, vit(images, bat(64, keep, blocks=(1, 2))))
        for item in range(2):
            alone = vit.run(images[item : item + 1], bat(64, keep, blocks=(1, 2)))
            assert torch.equal(alone.reduced.assignment[0], run.reduced.assignment[item])


def test_without_pairs_and_with_one_cluster_it_is_evit() -> None:
    ours = AttentiveAndDiverse(split=(5, 0, 1))(X, attention=ATTENTION)
    theirs = FusedTopTokens(tokens=6)(X, attention=ATTENTION)
    assert torch.equal(ours.assignment, theirs.assignment)
    torch.testing.assert_close(ours.tokens, theirs.tokens)


def test_inattentive_tokens_that_are_no_more_than_their_clusters_are_kept() -> None:
    found = AttentiveAndDiverse(split=(10, 1, 6))(X, attention=ATTENTION)
    assert found.counts.tolist() == [15] * 3
    for item in range(3):
        for token in ATTENTION[item].mean(0).topk(6, largest=False).indices.tolist():
            at = int(found.assignment[item, token])
            assert torch.equal(found.tokens[item, at], X[item, token])


def test_a_cluster_without_attention_is_a_plain_mean() -> None:
    attention = torch.zeros(1, 2, 6)
    attention[..., 0] = 1.0
    found = AttentiveAndDiverse(split=(1, 0, 1))(X[:1, :6], attention=attention)
    torch.testing.assert_close(found.tokens[0, 1], X[0, 1:6].mean(0))


def test_padding_is_in_neither_group_and_nobodys_neighbour() -> None:
    mask = torch.arange(16) < torch.tensor([16, 11, 7])[:, None]
    filled, signal = X.masked_fill(~mask.unsqueeze(-1), 1e4), ATTENTION.masked_fill(~mask[:, None], 9.0)
    found = AttentiveAndDiverse(factor=2)(filled, mask=mask, attention=signal)
    for item, n in enumerate((16, 11, 7)):
        alone = AttentiveAndDiverse(factor=2)(X[item : item + 1, :n], attention=ATTENTION[item : item + 1, :, :n])
        assert torch.equal(found.assignment[item, :n], alone.assignment[0])
        assert bool((found.assignment[item, n:] == -1).all())


def test_the_order_of_tokens_permutes_groups() -> None:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    before = AttentiveAndDiverse(factor=3)(X, attention=ATTENTION).assignment[:, order]
    after = AttentiveAndDiverse(factor=3)(X[:, order], attention=ATTENTION[..., order]).assignment
    assert torch.equal(before[:, :, None] == before[:, None], after[:, :, None] == after[:, None])


def test_diversity_leaves_the_class_token_out() -> None:
    found = AttentiveAndDiverse(factor=2)(X, attention=ATTENTION, protect=1)
    unit = torch.nn.functional.normalize(found.tokens[0, 1:], dim=-1)
    pairs = (unit @ unit.T)[torch.ones(len(unit), len(unit)).triu(1).bool()]
    assert float(mean_cosine(found, 1)[0]) == pytest.approx(float(pairs.mean()), abs=1e-6)

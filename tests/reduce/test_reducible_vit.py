"""A vision transformer that reduces between attention and MLP: without a reducer the plain network, timm's parameters."""

import pytest
import torch
from torch import Tensor

import cenote
from cenote.core.reduced import Reduced, merged
from cenote.reduce import (
    BipartiteMerging,
    EvenlySpacedTokens,
    KMedoidsTokens,
    PruneOrPool,
    ReducibleViT,
    ReducingBlock,
    cost_of,
    ppt,
    train_reduced,
    vit_cost,
)
from cenote.reduce.reducible_vit.cost import Cost
from tests.tiny import timm_models


def tiny(**more: object) -> ReducibleViT:
    torch.manual_seed(0)
    given = {"image": 8, "patch": 2, "dim": 16, "depth": 4, "heads": 2, "classes": 5, "channels": 1, **more}
    return ReducibleViT(**given).eval()  # type: ignore[arg-type]


IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("distilled", [False, True])
def test_timms_parameters_give_timms_logits(distilled: bool) -> None:
    timm = timm_models()
    name = "deit_tiny_distilled_patch16_224" if distilled else "deit_tiny_patch16_224"
    theirs = timm.create_model(name, img_size=48, depth=2, num_classes=7).eval()
    ours = ReducibleViT.of_timm(theirs.state_dict(), heads=3).eval()
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)


def test_a_checkpoint_of_something_else_is_refused() -> None:
    with pytest.raises(cenote.InputError, match="state: expected that of a ViT or DeiT of timm"):
        ReducibleViT.of_timm(torch.nn.Linear(2, 2).state_dict(), heads=1)


def test_a_factor_of_one_gives_the_logits_of_the_plain_network_to_the_bit() -> None:
    vit = tiny()
    plain = vit(IMAGES)
    for name in ("token-pooling", "token-pooling-means", "bat", "ppt", "tome", "dpc-knn", "evit"):
        at = dict.fromkeys(range(4), cenote.create(name, factor=1))
        torch.testing.assert_close(vit(IMAGES, at, proportional=False), plain, rtol=0, atol=0, msg=name)
        # a bias of zeros takes another kernel
        torch.testing.assert_close(vit(IMAGES, at), plain, rtol=0, atol=1e-6)
    assert torch.equal(vit(IMAGES), plain)


def test_later_blocks_run_on_what_is_left() -> None:
    vit, seen = tiny(), []
    for block in vit.blocks:
        block.mlp.register_forward_hook(lambda _module, given, _out: seen.append(given[0].shape[1]))
    run = vit.run(IMAGES, {1: KMedoidsTokens(tokens=8), 2: BipartiteMerging(tokens=5)})
    assert run.counts == (17, 9, 6, 6) == tuple(seen)
    assert run.reduced.assignment.shape == (3, 17)
    assert bool((run.reduced.assignment[:, 0] == 0).all())
    assert run.reduced.sizes.sum(1).tolist() == [17.0] * 3


def test_an_image_alone_is_as_in_a_batch() -> None:
    vit = tiny()
    for name in ("token-pooling", "token-pooling-means", "bat", "ppt", "tome", "dpc-knn", "evit"):
        at = dict.fromkeys((1, 2), cenote.create(name, factor=2))
        whole = vit.run(IMAGES, at)
        for item in range(3):
            alone = vit.run(IMAGES[item : item + 1], at)
            assert torch.equal(alone.reduced.assignment[0], whole.reduced.assignment[item]), name
            torch.testing.assert_close(alone.logits[0], whole.logits[item], rtol=0, atol=1e-5)
        assert torch.equal(vit(IMAGES, at), whole.logits)


class _Doubles(BipartiteMerging):
    """Tokens `2 n` and `2 n + 1` to their mean."""

    needs = frozenset()

    def reduce(self, x: Tensor, sizes: Tensor, mask: Tensor) -> Reduced:  # type: ignore[override]
        return merged(x, (mask.cumsum(1) - 1) // 2, mask.shape[1] // 2, sizes)


def test_merging_identical_tokens_leaves_the_next_attention_unchanged() -> None:
    torch.manual_seed(0)
    first, second = (ReducingBlock(16, 2, 32).eval() for _ in range(2))
    x = torch.cat([torch.randn(2, 1, 16), torch.randn(2, 5, 16).repeat_interleave(2, 1)], 1)
    whole = second(first(x).tokens).tokens
    fewer = first(x, _Doubles(factor=2), protect=1)
    found = second(fewer.tokens, sizes=fewer.sizes)
    torch.testing.assert_close(found.tokens, whole[:, [0, 1, 3, 5, 7, 9]], rtol=0, atol=1e-5)
    without = second(fewer.tokens, sizes=fewer.sizes, proportional=False)
    assert float((without.tokens - found.tokens).abs().max()) > 1e-3


def test_tokens_that_are_padding_are_read_by_nobody() -> None:
    torch.manual_seed(0)
    block = ReducingBlock(16, 2, 32).eval()
    x, mask = torch.randn(1, 6, 16), torch.tensor([[True] * 4 + [False] * 2])
    short = block(x[:, :4])
    padded = block(x, mask=mask)
    torch.testing.assert_close(padded.tokens[:, :4], short.tokens, rtol=0, atol=1e-6)
    assert padded.assignment.tolist() == [[0, 1, 2, 3, -1, -1]]


@pytest.mark.parametrize("name", ["token-pooling", "token-pooling-means", "bat", "ppt"])
def test_gradients_reach_every_parameter_through_what_is_left(name: str) -> None:
    vit = tiny()
    at = dict.fromkeys((1, 2), cenote.create(name, factor=2))
    torch.nn.functional.cross_entropy(vit(IMAGES, at), torch.tensor([0, 1, 2])).backward()
    for path, parameter in vit.named_parameters():
        assert parameter.grad is not None, path
        assert bool(parameter.grad.isfinite().all())
        assert float(parameter.grad.abs().sum()) > 0, path


def test_training_with_reduction_on_lowers_the_loss() -> None:
    vit = tiny()
    labels = torch.arange(30) % 3
    images = torch.zeros(30, 1, 8, 8)
    images[torch.arange(30), 0, labels * 2] = 1.0
    at = dict.fromkeys((1,), PruneOrPool(factor=2))
    losses = train_reduced(vit, images, labels, at, epochs=6, learning_rate=1e-2, warm_up=1, batch=15)
    assert losses[-1] < 0.7 * losses[0]
    assert not vit.training


def test_multiply_adds_of_one_block_by_hand() -> None:
    d, h, t, left = 16, 64, 17, 9
    reducer = KMedoidsTokens(tokens=8)
    found = cost_of(tiny(depth=1), (left,), {0: reducer})
    assert found == Cost(
        patches=16 * 4 * d,
        projections=4 * t * d * d,
        products=2 * t * t * d,
        mlps=2 * left * d * h,
        head=d * 5,
        reducing=16 * 16 * (d + 5),
    )
    assert found.attention == found.projections + found.products
    assert found.total == sum(found)


def test_the_published_cost_of_ppt() -> None:
    counts, left = [], 197
    at = ppt(196)
    for block in range(12):
        left = (at[block].budget.tokens or 0) + 1 if block in at else left
        counts.append(left)
    found = vit_cost(counts, 384, tokens=197, patch_numbers=768, classes=1000)
    assert found.total / 1e9 == pytest.approx(2.94, abs=0.02)


def test_impossible_settings_are_told() -> None:
    vit = tiny()
    with pytest.raises(cenote.InputError, match="at: there is no block 4; blocks are 0 to 3"):
        vit(IMAGES, {4: EvenlySpacedTokens(factor=2)})
    with pytest.raises(cenote.InputError, match="images: expected 16 patches of 2 pixels, got 25"):
        vit(torch.rand(1, 1, 10, 10))
    with pytest.raises(cenote.InputError, match="patch: 3 pixels do not divide an image of 8"):
        tiny(patch=3)
    with pytest.raises(cenote.InputError, match="heads: 3 do not divide a width of 16"):
        tiny(heads=3)
    with pytest.raises(cenote.InputError, match="counts: tokens do not become more"):
        vit_cost([17, 18], 16, tokens=17)

"""The skeleton, the pooling in it, and whole networks with other mixers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.core import InputError
from cenote.mix.augment import CHANGES, erased, mixed_pairs, rand_augment, smoothed, warped
from cenote.mix.basic.attention import AttentionMixer, WindowAttention
from cenote.mix.basic.grids import DepthwiseConv, FrozenRandomMixer, IdentityMixer, SpatialLinear
from cenote.mix.image_training import Recipe, accuracy, train_images
from cenote.mix.maps import DropPath, on_map
from cenote.mix.metaformer.block import MetaFormerBlock
from cenote.mix.metaformer.model import (
    METAFORMER_RECIPE,
    SIZES,
    FeatureMaps,
    MetaFormer,
    PoolFormer,
    PositionMap,
    load_transformers,
)
from cenote.mix.metaformer.pooling import PoolMixer


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_pooling_is_average_pooling_less_the_token() -> None:
    x = randn(2, 3, 5, 7)
    for size in (3, 5, 7, 9):
        expected = F.avg_pool2d(x, size, 1, size // 2, count_include_pad=False) - x
        torch.testing.assert_close(on_map(PoolMixer(size), x), expected)


def test_a_constant_map_gives_0_one_cell_exactly_and_a_wide_window_the_mean() -> None:
    constant = torch.full((1, 2, 4, 6), 0.7, dtype=torch.float64)
    assert float(on_map(PoolMixer(), constant).abs().max()) < 1e-15
    assert not on_map(PoolMixer(5), randn(2, 3, 1, 1)).any()
    x = randn(2, 3, 4, 5)
    torch.testing.assert_close(on_map(PoolMixer(9), x), x.mean((2, 3), keepdim=True) - x)
    with pytest.raises(InputError, match="size: expected an odd"):
        PoolMixer(4)


def test_only_real_neighbours_are_averaged() -> None:
    x, real = randn(1, 2, 3, 4), torch.ones(1, 3, 4, dtype=torch.bool)
    real[0, :, 2:] = False
    found = on_map(PoolMixer(), x, real)
    torch.testing.assert_close(found[..., :2], on_map(PoolMixer(), x[..., :2]))
    assert not found[..., 2:].any()


def test_a_block_without_scale_is_the_identity() -> None:
    x = randn(2, 4, 3, 5)
    block = MetaFormerBlock(4, PoolMixer(), layer_scale=0.0).double()
    assert torch.equal(block(x), x)


def test_the_norm_over_channels_and_cells_forgets_scale_and_shift() -> None:
    x, block = randn(2, 4, 3, 5), MetaFormerBlock(4, PoolMixer()).double()
    torch.testing.assert_close(block.norm1(3 * x + 2), block.norm1(x), atol=1e-4, rtol=1e-4)


def test_attention_with_equal_logits_is_the_mean_of_the_map() -> None:
    mixer, x = AttentionMixer(4, 2).double(), randn(2, 4, 3, 5)
    with torch.no_grad():
        mixer.qkv.weight[:8].zero_()
    values = F.linear(x.flatten(2).mT, mixer.qkv.weight[8:]).mean(1)
    torch.testing.assert_close(on_map(mixer, x), mixer.proj(values).view(2, 4, 1, 1).expand(-1, -1, 3, 5))


def test_windows_do_not_see_each_other() -> None:
    mixer, x = WindowAttention(4, 2, 2).double(), randn(1, 4, 3, 4)
    found = on_map(mixer, x)
    torch.testing.assert_close(found[..., :2, 2:], on_map(mixer.attention, x[..., :2, 2:]))
    torch.testing.assert_close(found[..., 2:, :2], on_map(mixer.attention, x[..., 2:, :2]))


def test_ablations_and_norms_by_a_word() -> None:
    x = randn(2, 4, 3, 5)
    for norm, kind in (
        ("batch", nn.BatchNorm2d),
        ("none", nn.Identity),
        ("group", nn.GroupNorm),
        ("layer", nn.LayerNorm),
    ):
        block = MetaFormerBlock(4, PoolMixer(), norm=norm).double()
        assert isinstance(block.norm1, kind)
        assert block(x).shape == x.shape
    plain = MetaFormerBlock(4, PoolMixer(), norm="none", mlp=False, layer_scale=None).double()
    torch.testing.assert_close(plain(x), x + on_map(PoolMixer(), x))
    bare = MetaFormerBlock(4, PoolMixer(), norm="none", mlp=False, skip=False, layer_scale=None).double()
    torch.testing.assert_close(bare(x), on_map(PoolMixer(), x))
    with pytest.raises(InputError, match="norm"):
        MetaFormerBlock(4, PoolMixer(), norm="instance")


def test_branches_are_left_out_by_item_in_training() -> None:
    drop, x = DropPath(0.5), torch.ones(400, 2, 1, 1)
    assert torch.equal(drop.eval()(x), x)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = drop.train()(x)
    assert set(found[:, 0].flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(found[:, 0], found[:, 1])
    assert float(found.mean()) == pytest.approx(1, abs=0.15)


def test_published_sizes() -> None:
    published = {"S12": 12, "S24": 21, "S36": 31, "M36": 56, "M48": 73}
    assert published.keys() == SIZES.keys()
    for name, millions in published.items():
        layers, dims, scale = SIZES[name]
        blocks = sum(depth * (8 * c * c + 5 * c + 4 * c + 2 * c) for depth, c in zip(layers, dims, strict=True))
        convs = 3 * 49 * dims[0] + dims[0] + sum(9 * a * b + b for a, b in itertools.pairwise(dims))
        assert round((blocks + convs + 2 * dims[-1] + 1000 * dims[-1] + 1000) / 1e6) == millions
        assert scale == (1e-5 if name in ("S12", "S24") else 1e-6)
    with torch.device("meta"):
        count = sum(p.numel() for p in PoolFormer("S12").parameters())
    assert round(count / 1e6, 2) == 11.92


def test_the_weights_of_transformers_give_its_logits() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.PoolFormerConfig(depths=[1, 2, 1, 1], hidden_sizes=[4, 6, 8, 8], mlp_ratio=2.0, num_labels=3)
    theirs = transformers.PoolFormerForImageClassification(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn_like(p))
    ours = MetaFormer((1, 2, 1, 1), (4, 6, 8, 8), classes=3, ratio=2.0).eval()
    load_transformers(ours, theirs.state_dict())
    x = torch.rand(2, 3, 64, 48)
    torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="weights"):
        load_transformers(MetaFormer((1, 1, 1, 1), (4, 6, 8, 9), classes=3), theirs.state_dict())


def test_stages_of_different_mixers_by_letters() -> None:
    net = MetaFormer((1, 1), (8, 8), "PA", image=(16, 16), classes=2, patch=(2, 2, 0))
    kinds = [type(net.network[i][-1].token_mixer) for i in net.stages]  # type: ignore[index, union-attr]
    assert kinds == [PoolMixer, AttentionMixer]
    assert isinstance(net.network[net.stages[1]][0], PositionMap)  # type: ignore[index]
    assert isinstance(MetaFormer((1,), (8,), ["depthwise"]).network[0][0].token_mixer, DepthwiseConv)  # type: ignore[index]
    for letters in ("PPPA", "PPAA", "PPPF", "PPFF"):
        hybrid = MetaFormer((1, 1, 1, 1), (4, 4, 8, 8), letters, image=(32, 64), classes=2)
        assert hybrid(torch.zeros(1, 3, 32, 64)).shape == (1, 2)
    mixed = MetaFormer((1, 1), (4, 4), ["P", "identity"], classes=2)
    kinds = [type(mixed.network[i][-1].token_mixer) for i in mixed.stages]  # type: ignore[index, union-attr]
    assert kinds == [PoolMixer, IdentityMixer]
    for letters, wrong in (("PPX", "mixers"), ("PP", "mixers: expected one for each of 3")):
        with pytest.raises(InputError, match=wrong):
            MetaFormer((1, 1, 1), (4, 4, 4), letters)


def test_feature_maps_of_any_size_and_refusal_by_name_where_a_mixer_has_one() -> None:
    net = FeatureMaps(MetaFormer((1, 1, 1, 1), (4, 6, 8, 8), classes=0))
    for size in ((32, 32), (64, 96), (37, 51)):
        maps = net(torch.zeros(1, 3, *size))
        assert [m.shape[1] for m in maps] == [4, 6, 8, 8]
        assert maps[0].shape[2:] == torch.Size([(n - 3) // 4 + 1 for n in size])
    fixed = MetaFormer((1,), (4,), "fc", image=(16, 16), classes=2)
    with pytest.raises(InputError, match="map of positions is made for a grid of 4 x 4"):
        fixed(torch.zeros(1, 3, 32, 32))
    bare = MetaFormer((1,), (4,), "fc", image=(16, 16), classes=2, positions=False)
    with pytest.raises(InputError, match="SpatialLinear is made for a grid of 4 x 4"):
        bare(torch.zeros(1, 3, 32, 32))
    with pytest.raises(InputError, match="image"):
        MetaFormer((1,), (4,), "random")


def test_mixers_over_all_cells_by_hand() -> None:
    x = randn(2, 3, 2, 4)
    linear = SpatialLinear((2, 4)).double()
    torch.testing.assert_close(on_map(linear, x).flatten(2), x.flatten(2) @ linear.fc.weight.mT)
    frozen = FrozenRandomMixer((2, 4)).double()
    assert not list(frozen.parameters())
    torch.testing.assert_close(on_map(frozen, x).flatten(2), x.flatten(2) @ frozen.weights.mT)
    torch.testing.assert_close(frozen.weights.sum(-1), torch.ones(8, dtype=torch.float64))
    assert torch.equal(on_map(IdentityMixer(), x), x)
    with pytest.raises(InputError, match="grid"):
        SpatialLinear(None)  # type: ignore[arg-type]


def checks(items: int) -> tuple[Tensor, Tensor]:
    """Fine and coarse checks."""
    labels = torch.arange(items) % 2
    fine, coarse = (torch.zeros(8, 8), torch.zeros(8, 8))
    fine[::2, 1::2] = fine[1::2, ::2] = 1
    coarse[:4, 4:] = coarse[4:, :4] = 1
    noise = 0.3 * torch.rand(items, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return noise + 0.6 * torch.where(labels.bool().view(-1, 1, 1, 1), fine, coarse), labels


def test_training_with_all_that_the_recipe_does() -> None:
    images, labels = checks(32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = MetaFormer((1,), (8,), classes=2, channels=1, patch=(2, 2, 0), layer_scale=0.1, drop_path=0.1)
    recipe = Recipe(6, 3e-2, 16, warm_up=1, magnitude=1, mixup=0.1, cutmix=0.1, erasing=0.1)
    trained = train_images(net, images, labels, recipe, batch=16)
    assert len(trained.losses) == 12
    assert trained.averaged is None
    assert accuracy(net, images, labels) > 0.8
    assert (METAFORMER_RECIPE.learning_rate, METAFORMER_RECIPE.per, METAFORMER_RECIPE.smoothing) == (1e-3, 1024, 0.1)
    with pytest.raises(InputError, match="labels"):
        train_images(net, images, labels[:3])


def test_pairs_are_mixed_in_the_shares_of_their_targets() -> None:
    images, targets = torch.zeros(2, 1, 6, 6), torch.eye(2)
    images[1] = 1
    for mixup, cutmix in ((1.0, 0.0), (0.0, 1.0)):
        for seed in range(5):
            x, y = mixed_pairs(images, targets, mixup, cutmix, torch.Generator().manual_seed(seed))
            torch.testing.assert_close(x.mean((1, 2, 3)), y[:, 1])
            torch.testing.assert_close(y.sum(1), torch.ones(2))
    same = mixed_pairs(images, targets, 0, 0, torch.Generator())
    assert same[0] is images
    torch.testing.assert_close(smoothed(torch.tensor([0]), 4, 0.2), torch.tensor([[0.85, 0.05, 0.05, 0.05]]))


def test_changes_of_images_do_nothing_at_strength_0_and_something_above() -> None:
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    changed = 0
    for change in CHANGES:
        assert change(x, 0.9).shape == x.shape
        changed += not torch.allclose(change(x, 0.9), x, atol=1e-3)
    assert changed == len(CHANGES) - 1
    for still in CHANGES[:11]:
        torch.testing.assert_close(still(x, 0.0), x, atol=1e-5, rtol=1e-5)
    assert torch.equal(
        rand_augment(x, 5, torch.Generator().manual_seed(1)), rand_augment(x, 5, torch.Generator().manual_seed(1))
    )
    shifted = warped(x, shift=(0.5, 0.0))
    torch.testing.assert_close(shifted[..., :6], x[..., 2:], atol=1e-5, rtol=1e-5)
    turned = warped(x, turn=torch.pi / 2)
    torch.testing.assert_close(turned, x.rot90(1, (2, 3)), atol=1e-5, rtol=1e-5)
    gone = erased(torch.zeros(4, 1, 8, 8), 1.0, torch.Generator().manual_seed(0)) != 0
    shares = gone.float().mean((1, 2, 3))
    assert bool(((shares > 0) & (shares <= 0.45)).all())
    assert torch.equal(erased(x, 0.0, torch.Generator()), x)


def test_what_does_not_fit_is_named() -> None:
    calls: list[tuple[Any, str]] = [
        (lambda: MetaFormer((1, 1), (4,)), "dims"),
        (lambda: MetaFormer((1, 1), (4, 4), ratio=(2, 2, 2)), "ratio"),
        (lambda: MetaFormer((1,), (4,), positions=True), "positions"),
        (lambda: PoolFormer("XL"), "size"),
        (lambda: AttentionMixer(6, 4), "heads"),
        (lambda: DropPath(1.0), "rate"),
    ]
    for call, said in calls:
        with pytest.raises(InputError, match=said):
            call()

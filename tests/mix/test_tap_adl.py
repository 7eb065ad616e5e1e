"""Token-aware pooling, the diversification loss, and both on networks of one's own and of others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.core import InputError
from cenote.mix.image_training import Recipe, accuracy, train_images
from cenote.mix.maps import on_map
from cenote.mix.tap_adl.diversification import attention_diversification
from cenote.mix.tap_adl.live import diversified, pooled_before_attention
from cenote.mix.tap_adl.model import FAN_RECIPE, FANBlock, RobustViT, diversified_loss
from cenote.mix.tap_adl.pooling import (
    DilatedMean,
    TokenAwarePooling,
    dilated_mean,
    extra_parameters,
    extra_products,
)
from cenote.mix.tap_adl.robustness import CORRUPTIONS, corrupted, errors_under, flip_rate, mean_corruption_error


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pooling(scales: int = 4) -> TokenAwarePooling:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TokenAwarePooling(6, scales).double().eval()


def test_means_at_a_distance_by_hand() -> None:
    x = randn(2, 3, 5, 7)
    for d in (1, 2, 3):
        wide = F.pad(x, (d,) * 4)
        expected = sum(
            wide[:, :, d + a * d : d + a * d + 5, d + b * d : d + b * d + 7] for a in (-1, 0, 1) for b in (-1, 0, 1)
        )
        torch.testing.assert_close(dilated_mean(x, d), expected / 9)
    torch.testing.assert_close(dilated_mean(x, 1), F.avg_pool2d(x, 3, 1, 1, count_include_pad=True))


def test_one_scale_is_the_identity() -> None:
    x = randn(2, 6, 4, 5)
    assert torch.equal(on_map(pooling(1), x), x)


def test_a_constant_map_is_kept_inside_and_fades_at_the_border() -> None:
    constant = torch.ones(1, 6, 5, 7, dtype=torch.float64)
    module = pooling(2)
    found = module.pooled(constant)
    torch.testing.assert_close(found.output[:, :, 1:-1, 1:-1], constant[:, :, 1:-1, 1:-1])
    taps = dilated_mean(constant, 1)[0, 0] * 9
    assert taps[0].tolist() == pytest.approx([4, 6, 6, 6, 6, 6, 4])
    m = found.weights[0]
    torch.testing.assert_close(found.output[0, 0], m[..., 0] + m[..., 1] * taps / 9)


def test_without_the_second_convolution_all_scales_count_alike() -> None:
    module, x = pooling(4), randn(2, 6, 4, 5)
    with torch.no_grad():
        module.second.weight.zero_()
    found = module.pooled(x)
    torch.testing.assert_close(found.weights, torch.full((2, 4, 5, 4), 0.25, dtype=torch.float64))
    expected = (x + sum(dilated_mean(x, d) for d in (1, 2, 3))) / 4
    torch.testing.assert_close(found.output, expected)


def test_weights_sum_to_one_and_follow_a_strong_choice() -> None:
    module, x = pooling(3), randn(2, 6, 4, 5)
    torch.testing.assert_close(module.pooled(x).weights.sum(-1), torch.ones(2, 4, 5, dtype=torch.float64))

    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([torch.zeros_like(x[:, 0])] * 2 + [torch.full_like(x[:, 0], 1e4)], 1)

    module.second = Chosen()  # type: ignore[assignment]
    torch.testing.assert_close(module.pooled(x).output, dilated_mean(x, 2))


def test_one_token_works_and_the_class_token_stays_out() -> None:
    x = randn(2, 1, 6)
    assert pooling()(x).shape == x.shape
    module = TokenAwarePooling(6, grid=(2, 3), prefix=1).double()
    y = randn(2, 7, 6)
    assert torch.equal(module(y)[:, 0], y[:, 0])


def test_uniform_attention_costs_nothing_and_has_no_gradient() -> None:
    weights = torch.full((2, 3, 5, 5), 0.2, requires_grad=True)
    loss = attention_diversification([weights, weights])
    assert float(loss) == 0
    (gradient,) = torch.autograd.grad(loss, weights)
    assert not gradient.any()


def test_rows_that_look_at_one_token_cost_one() -> None:
    weights = torch.zeros(1, 2, 6, 6, dtype=torch.float64)
    weights[..., 3] = 1
    assert float(attention_diversification([weights] * 3)) == pytest.approx(3 / (3 + 1e-6))


def test_tokens_that_look_at_themselves_cost_nothing() -> None:
    assert float(attention_diversification([torch.eye(3).view(1, 1, 3, 3)])) == 0
    assert float(attention_diversification([torch.ones(2, 2, 1, 1)])) == 0


def test_heads_and_queries_may_come_in_any_order_and_one_item_keeps_its_axis() -> None:
    weights = randn(2, 3, 6, 6).softmax(-1) ** 3
    expected = attention_diversification([weights], 1.0)
    torch.testing.assert_close(attention_diversification([weights[:, [2, 0, 1]]], 1.0), expected)
    torch.testing.assert_close(attention_diversification([weights[:, :, [3, 1, 0, 5, 4, 2]]], 1.0), expected)
    alone = [attention_diversification([weights[i : i + 1]], 1.0) for i in range(2)]
    torch.testing.assert_close((alone[0] + alone[1]) / 2, expected)


def test_padding_is_in_neither_mean_of_the_loss() -> None:
    real = randn(2, 3, 4, 4).softmax(-1)
    padded = F.pad(real, (0, 2, 0, 2), value=0.5)
    mask = torch.tensor([[True] * 4 + [False] * 2] * 2)
    torch.testing.assert_close(attention_diversification([padded], 1.0, mask), attention_diversification([real], 1.0))
    none = attention_diversification([padded], 1.0, torch.zeros_like(mask))
    assert float(none) == 0


def test_what_pooling_costs_is_said() -> None:
    for dim, scales in ((6, 4), (10, 2)):
        module = TokenAwarePooling(dim, scales)
        assert sum(p.numel() for p in module.parameters()) == extra_parameters(dim, scales)
    plain = RobustViT((8, 8), (2, 2), dim=12, depth=2, heads=3, classes=5, scales=1)
    pooled = RobustViT((8, 8), (2, 2), dim=12, depth=2, heads=3, classes=5)
    added = sum(p.numel() for p in pooled.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == 2 * extra_parameters(12)
    assert extra_products(12) == 9 * 12 * 4 + 9 * 16 + 9 * 12 * 3


def test_a_block_pools_for_attention_alone() -> None:
    vit = RobustViT((8, 12), (2, 2), dim=12, depth=1, heads=3, classes=5).double().eval()
    (block,) = vit.blocks
    x = randn(2, 25, 12)
    y, _ = block(x)
    read, _ = block.attn(block.norm1(block.pooling(x)))  # type: ignore[operator]
    h = x + read
    torch.testing.assert_close(y, h + block.mlp(block.norm2(h)))  # type: ignore[operator]
    assert RobustViT((8, 8), (2, 2), dim=12, depth=1, heads=3, classes=5, fixed=2)(torch.zeros(1, 3, 8, 8)).shape == (
        1,
        5,
    )
    assert isinstance(RobustViT((8, 8), (2, 2), dim=12, depth=1, heads=3, fixed="mean").blocks[0].pooling, DilatedMean)


def test_a_fan_block_takes_rectangles() -> None:
    y, weights = FANBlock(8, 2, ratio=2.0, scales=2).eval()(torch.randn(2, 8, 3, 5))
    assert y.shape == (2, 8, 3, 5)
    assert weights.shape == (2, 2, 15, 15)


def striped(items: int) -> tuple[Tensor, Tensor]:
    """Stripes along or across, on noise."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(items) % 2
    x = 0.3 * torch.rand(items, 1, 8, 8, generator=generator)
    x[labels == 0, :, ::2] += 0.6
    x[labels == 1, :, :, ::2] += 0.6
    return x, labels


def test_training_with_both_and_what_it_stands() -> None:
    images, labels = striped(48)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = RobustViT((8, 8), (4, 4), dim=12, depth=1, heads=2, classes=2, scales=2, channels=1)
    recipe = Recipe(
        epochs=6, learning_rate=1e-2, per=16, warm_up=1, mixup=0, cutmix=0, magnitude=1, erasing=0.1, averaged=0.5
    )
    trained = train_images(vit, images, labels, recipe, batch=16, loss=diversified_loss())
    assert len(trained.losses) == 18
    assert accuracy(vit, images, labels) > 0.9
    assert trained.averaged is not None
    assert accuracy(trained.averaged, images, labels) > 0.9
    errors = errors_under(vit, images, labels, ("blur", "noise"), (1, 5))
    assert {kind: len(e) for kind, e in errors.items()} == {"blur": 2, "noise": 2}
    assert 0 <= flip_rate(vit, images, steps=2) <= 1
    assert (FAN_RECIPE.epochs, FAN_RECIPE.learning_rate, FAN_RECIPE.per, FAN_RECIPE.warm_up) == (300, 4e-3, 4096, 10)


def test_corruptions_grow_with_their_strength() -> None:
    images, _ = striped(4)
    for kind in CORRUPTIONS:
        apart = [float((corrupted(images, kind, s) - images).square().mean()) for s in (1, 3, 5)]
        assert 0 < apart[0] < apart[2], kind
        assert torch.equal(corrupted(images, kind, 2), corrupted(images, kind, 2))
    assert mean_corruption_error({"blur": [0.2]}, {"blur": [0.1]}) == 2
    for baseline in ({"blur": [0.0]}, {"noise": [0.1]}):
        with pytest.raises(InputError, match="baseline"):
            mean_corruption_error({"blur": [0.2]}, baseline)


def test_flips_are_counted() -> None:
    class Brightest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0, 0]

    images = torch.eye(4).view(1, 1, 4, 4)
    assert flip_rate(Brightest(), images, steps=3) == 1
    assert flip_rate(Brightest(), torch.ones(1, 1, 4, 4), steps=3) == 0


def test_a_vit_of_transformers_pools_and_is_itself_again() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
    model = transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=2, **sizes)).eval()
    inputs = {"pixel_values": torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        plain = model(**inputs).last_hidden_state
    with pooled_before_attention(model, inputs) as mixers:
        assert list(mixers) == [0, 1]
        found = diversified(model, inputs, 1.0)
        found.loss.backward()
        assert not torch.equal(found.output.last_hidden_state, plain)
        assert all(p.grad is not None for p in mixers[0].parameters())
        assert (mixers[0].prefix, mixers[0].grid_of(17)) == (1, (4, 4))
    with pooled_before_attention(model, inputs, lambda dim: TokenAwarePooling(dim, 1, prefix=1)), torch.no_grad():
        assert torch.equal(model(**inputs).last_hidden_state, plain)
    with torch.no_grad():
        assert torch.equal(model(**inputs).last_hidden_state, plain)


def test_what_does_not_fit_is_named() -> None:
    a = torch.ones(1, 1, 3, 3)
    for call, said in (
        (lambda: attention_diversification([]), "attentions"),
        (lambda: attention_diversification([a[0]]), r"attentions\[0\]"),  # type: ignore[list-item]
        (lambda: attention_diversification([a], mask=torch.ones(1, 2, dtype=torch.bool)), "mask"),
        (lambda: TokenAwarePooling(8, 0), "scales"),
        (lambda: corrupted(torch.zeros(1, 1, 2, 2), "rain"), "kind"),
        (lambda: FANBlock(8, 3), "heads"),
    ):
        with pytest.raises(InputError, match=said):
            call()

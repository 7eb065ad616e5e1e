"""Convolutions whose kernels each image makes, the network of them, and a diffusion transformer."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.core import InputError
from cenote.mix.attentive_convolution.convolution import ATConv, convolved
from cenote.mix.attentive_convolution.diffusion import FlowTransformer, flow_loss, sample_flow, train_flow
from cenote.mix.attentive_convolution.model import (
    ATTNET_RECIPE,
    RATIOS,
    SIZES,
    AttNet,
    AttNetBlock,
    GatedChannelMixer,
)
from cenote.mix.attentive_convolution.rivals import DynamicConv, Involution
from cenote.mix.basic.attention import AttentionMixer, WindowAttention
from cenote.mix.basic.grids import DepthwiseConv
from cenote.mix.image_training import Recipe, accuracy, decayed, train_images
from cenote.mix.maps import on_map
from cenote.testing import check_mixer


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def atconv(dim: int = 6, size: int = 3, **settings: Any) -> ATConv:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = ATConv(dim, size, **settings).double()
        for p in made.parameters():
            p.data.add_(0.3 * torch.randn_like(p))
    return made


def test_the_grouped_convolution_is_the_sum_over_neighbours() -> None:
    x, kernels = randn(2, 3, 5, 7), randn(2, 3, 3, 3, seed=1)
    around = F.unfold(x, 3, padding=1).view(2, 3, 9, 5, 7)
    torch.testing.assert_close(convolved(x, kernels), (around * kernels.view(2, 3, 9, 1, 1)).sum(2))


def test_a_map_with_fewer_cells_than_the_kernel_has_taps() -> None:
    module, x = atconv(size=5), randn(2, 6, 2, 3)
    u = module.kernel_proj(x).flatten(2)  # type: ignore[misc]
    bins = [u[..., b * 6 // 25 : -(-(b + 1) * 6 // 25)].mean(-1) for b in range(25)]
    torch.testing.assert_close(module._means(u.unflatten(-1, (2, 3))), torch.stack(bins, -1))
    assert on_map(module, x).shape == x.shape
    with pytest.raises(InputError, match="size: expected an odd"):
        ATConv(6, 4)


def test_pixels_of_one_strip_may_change_places() -> None:
    module, x = atconv(), randn(1, 6, 6, 6)
    flat = x.flatten(2)
    order = torch.arange(36).view(9, 4).flip(1).flatten()
    other = flat[..., order].view_as(x)
    torch.testing.assert_close(module.kernels(other), module.kernels(x))
    assert not torch.allclose(on_map(module, other), on_map(module, x))
    by_region = atconv(summary="grid")
    regions = x.view(1, 6, 3, 2, 3, 2).flip(3).flip(5).reshape_as(x)
    torch.testing.assert_close(by_region.kernels(regions), by_region.kernels(x))
    assert not torch.allclose(module.kernels(regions), module.kernels(x))


def test_without_a_generator_it_is_a_static_convolution() -> None:
    module, x = atconv(inhibit=False), randn(2, 6, 5, 7)
    assert module.kernel_gen is not None
    with torch.no_grad():
        module.kernel_gen.weight.zero_()
    kernel = module.kernel_gen.bias.view(1, 1, 3, 3).expand(6, 1, 3, 3)
    torch.testing.assert_close(on_map(module, x), module.proj(F.conv2d(module.x_proj(x), kernel, padding=1, groups=6)))


def test_inhibition_from_nothing_to_kernels_that_sum_to_0() -> None:
    module, x = atconv(), randn(2, 6, 5, 7)
    assert module.difference_control is not None
    plain = atconv(inhibit=False)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if k != "difference_control"})
    with torch.no_grad():
        module.difference_control.fill_(-1e4)
    torch.testing.assert_close(module.kernels(x), plain.kernels(x))
    with torch.no_grad():
        module.difference_control.fill_(1e4)
    torch.testing.assert_close(module.kernels(x).sum((2, 3)), torch.zeros(2, 6, dtype=torch.float64))
    constant = on_map(module, x[:, :, :1, :1].expand(-1, -1, 5, 7))[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(constant, module.proj.bias.view(1, -1, 1, 1).expand_as(constant))
    with torch.no_grad():
        module.difference_control.zero_()
    kernels = plain.kernels(x)
    torch.testing.assert_close(module.kernels(x), kernels - kernels.mean((2, 3), keepdim=True) / 2)


def test_other_sizes_and_batch_mates() -> None:
    net = AttNet(None, 3, layers=(1, 1), dims=(8, 12), ratios=(4, 4)).double().eval()
    x = randn(3, 3, 32, 40)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]))
    assert net(randn(1, 3, 21, 64)).shape == (1, 3)
    assert [f.shape[1:] for f in net.features(x)] == [(8, 8, 10), (12, 4, 5)]


def test_published_sizes() -> None:
    published = {"XXS": 2.86, "XS": 5.56, "S": 7.69, "T1": 13.71, "T2": 27.01, "T3": 49.18, "T4": 87.32}
    assert published.keys() == SIZES.keys()
    for size, millions in published.items():
        layers, dims, glu_norm, scale, _ = SIZES[size]
        count = sum(_parameters_of(dims, i, depth, glu_norm, scale) for i, depth in enumerate(layers))
        stem = 3 * 9 * dims[0] // 2 + dims[0] + 9 * dims[0] * dims[0] // 2 + 2 * dims[0]
        down = sum(9 * a * b + 2 * b for a, b in itertools.pairwise(dims))
        count += stem + down + 2 * dims[-1] + 1000 * dims[-1] + 1000
        assert count / 1e6 == pytest.approx(millions, abs=0.0065), size
    with torch.device("meta"):
        net = AttNet("XXS")
    layers, dims, glu_norm, scale, _ = SIZES["XXS"]
    blocks = sum(
        p.numel() for n, p in net.named_parameters() if "token_mixer" in n or "channel_mixer" in n or "norm_" in n
    )
    assert blocks == sum(_parameters_of(dims, i, depth, glu_norm, scale) for i, depth in enumerate(layers))


def _parameters_of(dims: Any, stage: int, depth: int, glu_norm: bool, scale: float | None) -> int:
    c = dims[stage]
    hidden = 2 * int(c * RATIOS[stage]) // 3
    mixer = 3 * c * c + 4 * c + 81 + 9
    gated = c * 2 * hidden + 2 * hidden + 9 * hidden + hidden + hidden * c + c + hidden * glu_norm
    return depth * (mixer + gated + 4 * c + (0 if scale is None else 2 * c))


def test_gated_mixers_without_their_parts() -> None:
    x = randn(1, 6, 4, 4)
    module = GatedChannelMixer(6, 4.0, dconv=False, norm=False).double()
    a, v = module.fc1(x).chunk(2, 1)
    torch.testing.assert_close(module(x), module.fc2(F.gelu(a) * v))
    assert module.fc2.in_channels == 16


def test_the_share_of_inhibition_is_not_shrunk() -> None:
    net = AttNetBlock(6)
    shrunk, kept = decayed(net, 0.05)
    ids = {id(p) for p in kept["params"]}  # type: ignore[attr-defined]
    assert id(net.token_mixer.difference_control) in ids
    assert (shrunk["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)


@pytest.mark.parametrize(
    "build",
    [
        partial(DynamicConv, 8),
        partial(Involution, 8, groups=2),
        partial(ATConv, 8, bottleneck=2),
        partial(ATConv, 8, inhibit=False),
        partial(ATConv, 8, route=False, inhibit=True),
        partial(ATConv, 8, summary="grid", bias=False),
    ],
)
def test_rivals_and_variants_keep_the_contract_of_mixers(build: Any) -> None:
    check_mixer(build(), leave_out=["export"])


@pytest.mark.parametrize("mixer", [DepthwiseConv, DynamicConv, Involution, AttentionMixer, WindowAttention])
def test_the_network_takes_other_mixers(mixer: Any) -> None:
    net = AttNet(None, 3, layers=(1,), dims=(8,), ratios=(2,), mixer=mixer)
    assert net(torch.zeros(2, 3, 8, 12)).shape == (2, 3)


def shapes(items: int) -> tuple[Tensor, Tensor]:
    """Images that are bright at the left or at the right."""
    labels = torch.arange(items) % 2
    x = 0.2 * torch.rand(items, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    x[labels == 0, :, :, :4] += 0.7
    x[labels == 1, :, :, 4:] += 0.7
    return x, labels


def test_training_with_the_published_recipe_at_small_size() -> None:
    images, labels = shapes(32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = AttNet(None, 2, layers=(1,), dims=(8,), ratios=(2,), channels=1)
    train_images(
        net, images, labels, Recipe(5, 3e-2, 16, warm_up=1, mixup=0.2, cutmix=0, magnitude=0, erasing=0), batch=16
    )
    assert accuracy(net, images, labels) > 0.9
    assert (ATTNET_RECIPE.mixup, ATTNET_RECIPE.cutmix, ATTNET_RECIPE.erasing, ATTNET_RECIPE.warm_up) == (
        0.8,
        1.0,
        0.25,
        5,
    )


def flow(mixing: Any = "atconv") -> FlowTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FlowTransformer((1, 8, 8), 2, dim=12, depth=2, heads=2, classes=2, mixing=mixing)


def test_a_flow_transformer_has_positions_only_for_attention() -> None:
    assert flow().places is None
    for mixing, kinds in (("attention", [AttentionMixer] * 2), ("hybrid", [AttentionMixer, ATConv])):
        model = flow(mixing)
        assert model.places is not None
        assert model.places.shape == (1, 16, 12)
        assert [type(block.mixer) for block in model.blocks] == kinds
    assert [type(block.mixer) for block in flow().blocks] == [ATConv] * 2


def test_a_flow_starts_at_zero_and_lays_patches_where_they_were() -> None:
    model, x = flow(), torch.rand(2, 1, 8, 8)
    time, labels = torch.tensor([0.2, 0.7]), torch.tensor([0, 2])
    assert not model.eval()(x, time, labels).any()
    with torch.no_grad():
        model.out.bias.copy_(torch.arange(4.0))
    tile = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    torch.testing.assert_close(model(x, time, labels)[0, 0], tile.repeat(4, 4))


def test_a_flow_learns_and_samples() -> None:
    images, labels = shapes(32)
    model = flow("hybrid")
    losses = train_flow(model, 2 * images - 1, labels, steps=30, batch=16, learning_rate=2e-2)
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])
    drawn = sample_flow(model, torch.tensor([0, 1]), steps=3, guidance=1.5)
    assert drawn.shape == (2, 1, 8, 8)
    assert torch.equal(drawn, sample_flow(model, torch.tensor([0, 1]), steps=3, guidance=1.5))
    with pytest.raises(InputError, match="eval mode"):
        sample_flow(model.train(), torch.tensor([0]))


def test_the_way_from_noise_to_an_image_is_followed() -> None:
    class Straight(FlowTransformer):
        """The true velocity towards one image."""

        def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
            return (1 - x) / (1 - time.clamp(max=0.99)).view(-1, 1, 1, 1)

    model = Straight((1, 4, 4), 2, dim=4, depth=1, heads=1, classes=2).eval()
    assert float((sample_flow(model, torch.tensor([0]), steps=40) - 1).abs().max()) < 0.05


def test_the_loss_of_a_flow_by_hand() -> None:
    class Still(nn.Module):
        def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
            return torch.zeros_like(x)

    images = torch.rand(3, 1, 4, 4)
    found = flow_loss(Still(), images, torch.zeros(3, dtype=torch.long), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    torch.rand(3, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    torch.testing.assert_close(found, (images - noise).square().mean())


def test_what_does_not_fit_is_named() -> None:
    for call, said in (
        (lambda: AttNet("huge"), "size"),
        (lambda: AttNet(None), "layers, dims"),
        (lambda: AttNet(None, layers=(1,), dims=(8, 9)), "dims"),
        (lambda: Involution(8, groups=3), "groups"),
        (lambda: FlowTransformer((1, 8, 6), 2), "image"),
        (lambda: ATConv(6, summary="rows"), "summary"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=said):
            call()

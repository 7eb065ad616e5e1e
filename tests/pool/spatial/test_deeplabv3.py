import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tests.maps import randn
from torch import Tensor, nn

from cenote.core import InputError
from cenote.pool import (
    AtrousCascade,
    DeepLabV3,
    DeepLabV3ASPP,
    DeepLabV3Head,
    multi_grid,
    pixel_loss,
    to_output_stride,
)
from cenote.pool.spatial.deeplabv3 import SCALES, tap_diagnosis


def shaken(module: nn.Module) -> nn.Module:
    """In float64 and eval mode, with statistics that are not 0 and 1."""
    torch.manual_seed(0)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 2)
            nn.init.normal_(m.bias)
    return module.double().eval()


def test_five_branches_are_concatenated_and_projected() -> None:
    aspp, x = shaken(DeepLabV3ASPP(6, 4, (2, 3))), randn(2, 6, 9, 8)
    pointwise, *atrous = aspp.branches
    parts = [pointwise(x)]
    for unit, r in zip(atrous, (2, 3), strict=True):
        conv, norm, _ = unit
        assert conv.bias is None
        parts.append(torch.relu(norm(F.conv2d(x, conv.weight, padding=r, dilation=r))))
    parts.append(aspp.image(x.mean((2, 3), keepdim=True)).expand(-1, -1, 9, 8))
    output, energies = aspp.attend(x)
    torch.testing.assert_close(output, aspp.project(torch.cat(parts, 1)))
    torch.testing.assert_close(aspp(x), output)
    torch.testing.assert_close(energies, torch.stack([p.square().sum(1).sqrt() for p in parts], 1))


def test_rates_beyond_the_map_leave_the_middle_tap() -> None:
    aspp, x = shaken(DeepLabV3ASPP(6, 4, (9, 20), image_pool=False)), randn(2, 6, 9, 8)
    for unit in list(aspp.branches)[1:]:
        middle = unit[0].weight[..., 1:2, 1:2]
        torch.testing.assert_close(unit[0](x), F.conv2d(x, middle))
    # and then no position sees another
    order = torch.randperm(72, generator=torch.Generator().manual_seed(0))
    moved = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(aspp(moved), aspp(x).flatten(2)[..., order].view_as(aspp(x)))


def test_the_image_branch_is_the_same_everywhere_and_knows_no_order() -> None:
    aspp, x = shaken(DeepLabV3ASPP(6, 4, (20,))), randn(2, 6, 9, 8)
    energy = aspp.attend(x).energies[:, -1]
    torch.testing.assert_close(energy, energy[:, :1, :1].expand_as(energy))
    order = torch.randperm(72, generator=torch.Generator().manual_seed(0))
    moved = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(aspp.attend(moved).energies[:, -1], energy)


def test_a_masked_image_is_pooled_over_real_positions() -> None:
    aspp, x = shaken(DeepLabV3ASPP(6, 4, (20,))), randn(1, 6, 9, 8)
    mask = torch.zeros(1, 9, 8, dtype=torch.bool)
    mask[:, :5, :6] = True
    got = aspp.attend(x, mask).energies[:, -1]
    torch.testing.assert_close(got[0, :5, :6], aspp.attend(x[..., :5, :6]).energies[0, -1])
    torch.testing.assert_close(aspp(x, torch.ones_like(mask)), aspp(x))


def test_a_rate_per_axis_and_rates_by_the_rule() -> None:
    assert DeepLabV3ASPP(4, 4, ((1, 3),)).branches[1][0].dilation == (1, 3)
    wide = DeepLabV3ASPP(4, 4, "auto", input_size=(128, 256), output_stride=8)
    assert wide.rates == ((3, 6), (6, 12), (9, 18))
    assert wide(randn(1, 4, 16, 32).float().expand(2, -1, -1, -1)).shape == (2, 4, 16, 32)


def test_one_image_trains_with_another_norm_alone() -> None:
    x = randn(1, 8, 5, 5).float()
    with pytest.raises(InputError, match="GroupNorm"):
        DeepLabV3ASPP(8, 4)(x)
    DeepLabV3ASPP(8, 4, image_pool=False)(x)
    DeepLabV3ASPP(8, 4).eval()(x)
    assert DeepLabV3ASPP(8, 4, norm=partial(nn.GroupNorm, 2))(x).shape == (1, 4, 5, 5)


def test_gradients_are_right_and_reach_every_parameter() -> None:
    head = shaken(DeepLabV3Head(3, 2, channels=3, rates=(1, 2)))
    x = randn(2, 3, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(head, (x,), fast_mode=True)
    head(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())


def test_compiles_exports_and_copies() -> None:
    head, x = shaken(DeepLabV3Head(3, 2, channels=3, rates=(1, 2))), randn(2, 3, 5, 4)
    compiled = torch.compile(copy.deepcopy(head), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), head(x))
    torch.testing.assert_close(torch.export.export(head, (x,)).module()(x), head(x))
    torch.testing.assert_close(torch.cat([head(x[:1]), head(x[1:])]), head(x))


class Unit(nn.Module):
    """A residual unit with a 3 x 3 and two 1 x 1 convolutions."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 1)
        self.middle = nn.Conv2d(channels, channels, 3, stride, 1)
        self.last = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def test_multi_grid_multiplies_the_rate_of_the_block() -> None:
    block = nn.Sequential(Unit(4, 2), Unit(4), Unit(4))
    net = to_output_stride(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), block), 2, torch.zeros(1, 3, 16, 16))
    assert [u.middle.dilation[0] for u in net[1]] == [1, 2, 2]
    multi_grid(net[1], (1, 2, 4))
    assert [u.middle.dilation[0] for u in net[1]] == [1, 4, 8]
    assert [u.middle.padding[0] for u in net[1]] == [1, 4, 8]
    assert all(u.first.padding == (0, 0) and u.last.dilation == (1, 1) for u in net[1])
    with pytest.raises(InputError, match="rates"):
        multi_grid(net[1], (1, 2))


def test_a_cascade_keeps_the_size_and_doubles_the_rates() -> None:
    def unit(rate: int) -> nn.Module:
        return nn.Conv2d(2, 2, 3, padding=rate, dilation=rate)

    cascade = AtrousCascade(unit, blocks=3, base_rate=4, multi_grid=(1, 2, 1))
    assert [[c.dilation[0] for c in block] for block in cascade] == [[4, 8, 4], [8, 16, 8], [16, 32, 16]]
    assert cascade(torch.zeros(1, 2, 9, 7)).shape == (1, 2, 9, 7)


def test_the_system_trains_on_every_label_and_averages_scales_and_mirror_images() -> None:
    torch.manual_seed(0)
    net = DeepLabV3(nn.Conv2d(3, 6, 3, 4, 1), 6, 3, output_stride=4, rates=(1, 2, 3), width=8)
    assert DeepLabV3(nn.Identity(), 3, 2, output_stride=8).head.aspp.rates == ((12, 12), (24, 24), (36, 36))
    x = torch.randn(4, 3, 17, 22)
    labels = (x[:, :1].mean((2, 3), keepdim=True) > 0).long().expand(-1, 1, 17, 22).squeeze(1)
    optimiser = torch.optim.Adam(net.parameters(), 0.02)
    losses = []
    for _ in range(25):
        loss = pixel_loss(net(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    net.eval()
    p = net.segment(x, (0.5, 1.0), flip=True)
    torch.testing.assert_close(p.sum(1), torch.ones(4, 17, 22))
    torch.testing.assert_close(net.segment(x.flip(-1), (0.5, 1.0), flip=True).flip(-1), p, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(net.segment(x), net(x).softmax(1))


def v3(**settings: object) -> DeepLabV3:
    torch.manual_seed(0)
    return DeepLabV3(nn.Conv2d(3, 4, 3, 4, 1), 4, 3, output_stride=4, width=4, **settings)


def test_settings_of_the_head_are_reached_from_the_net() -> None:
    x = randn(1, 3, 16, 16).float()
    with pytest.raises(InputError, match="GroupNorm"):
        v3(rates=(1,))(x)
    net = v3(rates=(1,), norm=partial(nn.GroupNorm, 2), dropout=0.25)
    assert net(x).shape == (1, 3, 16, 16)
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.25]
    assert (
        v3(rates="auto", input_size=(128, 256)).head.aspp.rates
        == DeepLabV3ASPP(4, 4, "auto", input_size=(128, 256), output_stride=4).rates
    )


def test_testing_at_stride_8_with_the_scales_of_the_paper_leaves_the_mode_alone() -> None:
    torch.manual_seed(0)
    net = DeepLabV3(nn.Conv2d(3, 4, 3, 8, 1), 4, 3, output_stride=8, width=4).train()
    x, state = randn(2, 3, 33, 40).float(), copy.deepcopy(net.state_dict())
    p = net.segment(x, SCALES, flip=True)
    assert tuple(0.5 + 0.25 * i for i in range(6)) == SCALES
    assert net.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    net.eval()
    parts = []
    for s in SCALES:
        scaled = F.interpolate(x, scale_factor=s, mode="bilinear") if s != 1 else x
        for y in (net(scaled), net(scaled.flip(-1)).flip(-1)):
            parts.append(F.interpolate(y, (33, 40), mode="bilinear").softmax(1))
    torch.testing.assert_close(p, torch.stack(parts).mean(0))


def test_a_trained_net_is_made_denser_and_its_rates_double() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1))
    net = shaken(DeepLabV3(backbone, 4, 3, output_stride=8, rates=(1, (1, 2)), width=4, image_pool=False))
    x = randn(1, 3, 33, 33)
    dense = net.at_output_stride(4, x)
    assert net.head.aspp.rates == ((1, 1), (1, 2))
    assert dense.head.aspp.rates == ((2, 2), (2, 4)) == tuple(b[0].dilation for b in dense.head.aspp.branches[1:])
    assert (dense.output_stride, dense(x).shape) == (4, (1, 3, 33, 33))
    torch.testing.assert_close(dense.head(dense.backbone(x))[..., ::2, ::2], net.head(net.backbone(x)))
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in dense.state_dict().items())
    for wrong in (16, 3):
        with pytest.raises(InputError, match="output_stride"):
            net.at_output_stride(wrong, x)


@pytest.mark.parametrize("image_pool", [True, False])
def test_multiply_adds(image_pool: bool) -> None:
    aspp = DeepLabV3ASPP(10, image_pool=image_pool)
    ranges = 5 if image_pool else 4
    expected = 10 * 256 * 28 * 7 * 9 + ranges * 256 * 256 * 7 * 9 + (10 * 256 if image_pool else 0)
    assert aspp.multiply_adds(7, 9) == expected


def test_taps_are_told_as_a_convolution_of_ones_counts_them() -> None:
    lines = tap_diagnosis((65, 129), ((1, 2), 3, (4, 9)), output_stride=8).splitlines()
    assert lines[0] == "map of 9 x 17 cells"
    for line, (down, across) in zip(lines[1:], ((1, 2), (3, 3), (4, 9)), strict=True):
        ones = F.conv2d(
            torch.ones(1, 1, 9, 17), torch.ones(1, 1, 3, 3), padding=(down, across), dilation=(down, across)
        )
        assert (
            line
            == f"rate {down} x {across}: all nine taps inside at {100 * float((ones == 9).double().mean()):.1f} % "
            + ("of the positions")
        )
    assert "1 x 1 filter" in tap_diagnosis(128, (8,), output_stride=16)


def test_mobilevit_of_transformers_agrees() -> None:
    peer = pytest.importorskip("transformers.models.mobilevit.modeling_mobilevit")
    config = pytest.importorskip("transformers").MobileViTConfig(
        neck_hidden_sizes=[4, 4, 4, 4, 4, 4, 6], aspp_out_channels=5, atrous_rates=[2, 3, 4], aspp_dropout_prob=0.0
    )
    config.hidden_act = "relu"
    theirs = shaken(peer.MobileViTASPP(config))
    ours = shaken(DeepLabV3ASPP(4, 5, (2, 3, 4)))
    layers = [*theirs.convs[:-1], theirs.convs[-1].conv_1x1, theirs.project]
    with torch.no_grad():
        for unit, layer in zip([*ours.branches, ours.image, ours.project[0]], layers, strict=True):
            unit[0].weight.copy_(layer.convolution.weight)
            unit[1].load_state_dict(layer.normalization.state_dict())
            unit[1].eps = layer.normalization.eps
    x = randn(2, 4, 9, 8)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: DeepLabV3ASPP(4, 4, (0,)), "rates"),
        (lambda: DeepLabV3ASPP(4, 4, "auto"), "input_size"),
        (lambda: AtrousCascade(nn.Identity, 0), "blocks"),
        (lambda: DeepLabV3ASPP(4, 4)(torch.zeros(4, 5, 5)), "x: expected"),
        (lambda: DeepLabV3(nn.Identity(), 4, 2).segment(torch.zeros(1, 4, 5, 5), ()), "scales"),
    ],
)
def test_wrong_arguments_are_named(build, named: str) -> None:
    with pytest.raises(InputError, match=named):
        build()

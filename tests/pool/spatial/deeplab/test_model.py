import copy

import pytest
import torch
import torch.nn.functional as F
from tests.maps import randn
from torch import Tensor, nn

from cenote.core import InputError
from cenote.pool import DeepLab, DeepLabASPP, DenseCRF, MultiScale, score_map_loss, to_output_stride
from cenote.pool.spatial.deeplab.model import LARGE_FIELD_OF_VIEW
from cenote.pool.spatial.output_stride import upsampled


class Bottleneck(nn.Module):
    """A residual unit whose shortcut is strided too."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 1), nn.BatchNorm2d(after), nn.ReLU(), nn.Conv2d(after, after, 3, stride, 1)
        )
        self.short = nn.Conv2d(before, after, 1, stride) if stride > 1 or before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.short(x))


def residual() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 7, 2, 3),
        nn.MaxPool2d(3, 2, 1),
        Bottleneck(4, 5, 1),
        Bottleneck(5, 6, 2),
        Bottleneck(6, 6, 2),
        Bottleneck(6, 6, 1),
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net.double().eval()


@pytest.mark.parametrize("size", [(64, 64), (65, 47), (33, 80)])
@pytest.mark.parametrize("kept", [1, 2, 4, 8, 16])
def test_a_dense_net_gives_what_the_strided_one_gives_at_its_positions(kept: int, size: tuple[int, int]) -> None:
    net, x = residual(), randn(1, 3, *size)
    before = copy.deepcopy(net.state_dict())
    dense = to_output_stride(net, kept, x)
    expected, y = net(x), dense(x)
    step = 16 // kept
    assert y.shape[2:] == tuple(-(-n // kept) for n in size)
    torch.testing.assert_close(y[..., ::step, ::step], expected, atol=1e-12, rtol=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())


def test_rates_double_with_every_stride_that_is_removed() -> None:
    dense = to_output_stride(residual(), 4, torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    assert [dense[i].body[3].dilation[0] for i in (2, 3, 4, 5)] == [1, 1, 2, 4]
    assert [dense[i].body[3].stride[0] for i in (2, 3, 4, 5)] == [1, 1, 1, 1]


def test_strided_maximum_pooling_and_the_first_average_can_be_made_dense() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
    )
    net, x = net.double().eval(), randn(1, 3, 24, 24)
    y = to_output_stride(net, 1, x)(x)
    torch.testing.assert_close(y[..., ::8, ::8][..., :3, :3], net(x))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


@pytest.mark.parametrize(
    ("net", "stride", "named"),
    [
        (nn.Conv2d(3, 4, 3, 4, 1), 2, "output_stride"),
        (nn.Conv2d(3, 4, 3, 4, 1), 0, "output_stride"),
        (nn.Conv2d(3, 4, 3, (1, 2), 1), 1, "strides"),
        (nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.AvgPool2d(2)), 1, "average pooling"),
        (nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1)), 1, "AdaptiveAvgPool2d"),
        (nn.Sequential(nn.Conv2d(3, 3, 1, 2), nn.Conv2d(3, 3, 2, padding="same")), 1, "even kernel"),
        (Twice(), 1, "several strides"),
    ],
)
def test_what_cannot_be_made_dense_is_named(net: nn.Module, stride: int, named: str) -> None:
    with pytest.raises(InputError, match=named):
        to_output_stride(net, stride, torch.zeros(1, 3, 16, 16))


def test_a_branch_is_a_convolution_with_a_filter_full_of_zeros() -> None:
    aspp, x = DeepLabASPP(4, 3, rates=(1, 3)).double(), randn(2, 4, 9, 8)
    plain, atrous = aspp.branches
    stuffed = torch.zeros(3, 4, 7, 7, dtype=torch.float64)
    stuffed[..., ::3, ::3] = atrous.weight
    torch.testing.assert_close(atrous(x), F.conv2d(x, stuffed, atrous.bias, padding=3))
    torch.testing.assert_close(plain(x), F.conv2d(x, plain.weight, plain.bias, padding=1))


@pytest.mark.parametrize("hidden", [None, 6])
def test_branches_are_summed(hidden: int | None) -> None:
    aspp, x = DeepLabASPP(4, 3, rates=(2, 4), hidden=hidden).double().eval(), randn(2, 4, 9, 8)
    by_rate = aspp.by_rate(x)
    assert by_rate.shape == (2, 2, 3, 9, 8)
    torch.testing.assert_close(aspp(x), by_rate.sum(1))
    torch.testing.assert_close(by_rate[:, 1], aspp.branches[1](x))


def test_large_field_of_view_is_one_branch() -> None:
    assert len(DeepLabASPP(4, 3, LARGE_FIELD_OF_VIEW, hidden=5).branches) == 1


def test_the_largest_score_of_any_scale_wins() -> None:
    net, x = nn.Conv2d(3, 2, 1).double(), randn(2, 3, 8, 12)
    module = MultiScale(net, (0.5, 1.0))
    small = F.interpolate(net(F.interpolate(x, scale_factor=0.5, mode="bilinear")), (8, 12), mode="bilinear")
    torch.testing.assert_close(module(x), torch.maximum(small, net(x)))
    torch.testing.assert_close(MultiScale(net, (0.5, 1.0), fuse="mean")(x), (small + net(x)) / 2)
    torch.testing.assert_close(MultiScale(net, (1.0,))(x), net(x))


@pytest.mark.parametrize("size", [(17, 33), (16, 40), (10, 25)])
def test_enlarging_puts_every_cell_on_its_pixel(size: tuple[int, int]) -> None:
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    plane = (2.0 * rows + 3.0 * columns).expand(1, 1, *size)
    y = upsampled(plane[..., ::8, ::8], 8, size)
    torch.testing.assert_close(y[..., ::8, ::8], plane[..., ::8, ::8])
    last = [8 * ((n - 1) // 8) + 1 for n in size]
    torch.testing.assert_close(y[..., : last[0], : last[1]], plane[..., : last[0], : last[1]])


def test_the_whole_system_trains_and_segments() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
    net = DeepLab(backbone, 8, 2, rates=(1, 2), output_stride=4, scales=(0.5, 1.0), crf=DenseCRF(4.0, 5.0, 20.0))
    images = torch.zeros(4, 3, 33, 33)
    for i in range(4):
        images[i, :, :, 6 + 6 * i :] = 255.0
    labels = (images[:, 0] > 0).long()
    x = images / 255 - 0.5
    optimiser = torch.optim.Adam(net.parameters(), 0.02)
    losses = []
    for _ in range(60):
        loss = score_map_loss(net(x), labels, 4)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    net.eval()
    rough, fine = net.segment(x).argmax(1), net.segment(x, images).argmax(1)
    assert (fine == labels).double().mean() > max(0.95, (rough == labels).double().mean().item())


def small(scales: tuple[float, ...] = (1.0,), **settings: object) -> DeepLab:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
    return DeepLab(backbone, 8, 3, rates=(1, 2), output_stride=4, scales=scales, **settings)


def test_every_scale_has_a_loss_of_its_own() -> None:
    net, x, labels = small((0.5, 1.0)).eval(), randn(2, 3, 16, 24).float(), torch.arange(24).expand(2, 16, 24) % 3
    by_scale = net.scores.by_scale(x)
    each = [score_map_loss(m, labels, 4) for m in (by_scale.amax(1), by_scale[:, 0], by_scale[:, 1])]
    torch.testing.assert_close(net.loss(x, labels), sum(each))
    alone = small().eval()
    torch.testing.assert_close(alone.loss(x, labels), score_map_loss(alone(x), labels, 4))


@pytest.mark.parametrize("hidden", [None, 6])
def test_class_scores_learn_ten_times_as_fast(hidden: int | None) -> None:
    net = small(hidden=hidden)
    slow, fast = net.parameter_groups(0.01)
    heads = {id(p) for conv in net.scores.net[1].classifiers() for p in conv.parameters()}
    assert {id(p) for p in fast["params"]} == heads
    assert all(p.shape[0] == 3 for p in fast["params"])
    assert (slow["lr"], fast["lr"]) == (0.01, 0.1)
    assert len(slow["params"]) + len(fast["params"]) == len(list(net.parameters()))


def test_dropout_is_that_of_the_branches() -> None:
    rates = {m.p for m in small(hidden=6, dropout=0.25).modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.25}


def test_segmenting_is_done_in_eval_mode_and_leaves_every_mode_alone() -> None:
    net, x = small(hidden=6).train(), randn(2, 3, 17, 22).float()
    net.scores.net[0].eval()
    modes, state = [m.training for m in net.modules()], copy.deepcopy(net.state_dict())
    p = net.segment(x)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    torch.testing.assert_close(p, net.eval().segment(x))


def test_labels_that_do_not_fit_the_map_are_named() -> None:
    with pytest.raises(InputError, match="labels"):
        score_map_loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 9, 16).long(), 8)
    ignored = torch.full((1, 8, 8), 255)
    ignored[0, 0, 0] = 1
    loss = score_map_loss(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2), ignored, 4)
    torch.testing.assert_close(loss, torch.tensor([0.0, 1.0]).log_softmax(0)[1].neg())


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: DeepLabASPP(4, 2, rates=()), "rates"),
        (lambda: DeepLabASPP(4, 2, rates=(0,)), "rates"),
        (lambda: MultiScale(nn.Identity(), ()), "scales"),
        (lambda: MultiScale(nn.Identity(), fuse="min"), "fuse"),
    ],
)
def test_wrong_arguments_are_named(build, named: str) -> None:
    with pytest.raises(InputError, match=named):
        build()

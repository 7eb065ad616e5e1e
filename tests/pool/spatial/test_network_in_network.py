from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote import InputError
from cenote.pool import GlobalAveragePool, MLPConv, NetworkInNetwork, SoftPool2d, class_maps
from cenote.pool.spatial.network_in_network import Whitening


def small(**options: Any) -> NetworkInNetwork:
    torch.manual_seed(0)
    return NetworkInNetwork(3, 5, ((8, 6), (8,)), (3, 3), **options).double().eval()


def images(size: int = 12) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_mlpconv_is_a_perceptron_on_every_patch() -> None:
    block = MLPConv(3, (8, 6, 4), 3, stride=2, padding=1).double()
    x = images()
    patches = F.unfold(x, 3, padding=1, stride=2).transpose(1, 2)
    for layer in block.layers[::2]:
        patches = F.relu(F.linear(patches, layer.weight.flatten(1), layer.bias))
    torch.testing.assert_close(block(x), patches.transpose(1, 2).unflatten(2, (6, 6)))
    assert len(MLPConv(3, (8, 4), final_relu=False).layers) == 3


def test_one_by_one_convolutions_are_linear_maps_of_the_channels() -> None:
    x, linear = images(), nn.Linear(3, 4).double()
    conv = MLPConv(3, (4,), 1, final_relu=False).double()
    with torch.no_grad():
        conv.layers[0].weight.copy_(linear.weight[:, :, None, None])
        conv.layers[0].bias.copy_(linear.bias)
    torch.testing.assert_close(conv(x), linear(x.movedim(1, -1)).movedim(-1, 1))


def test_global_average_pool_is_torchs_and_its_gradient_uniform() -> None:
    maps = images().requires_grad_()
    y = GlobalAveragePool()(maps)
    torch.testing.assert_close(y, F.adaptive_avg_pool2d(maps, 1).flatten(1))
    (g,) = torch.autograd.grad(y.sum(), maps)
    torch.testing.assert_close(g, torch.full_like(g, 1 / 144))
    torch.testing.assert_close(GlobalAveragePool()(torch.full((1, 2, 3, 4), 7.0)), torch.full((1, 2), 7.0))


def test_a_mask_is_a_crop() -> None:
    maps = images()
    mask = torch.zeros(2, 12, 12, dtype=torch.bool)
    mask[0, 2:5, 3:9] = True
    expected = maps[0, :, 2:5, 3:9].mean((1, 2))
    hidden = maps.masked_fill(~mask.unsqueeze(1), float("nan"))
    y = GlobalAveragePool()(hidden, mask)
    torch.testing.assert_close(y[0], expected)
    assert (y[1] == 0).all()


def test_logits_are_the_means_of_the_class_maps() -> None:
    net = small()
    logits, maps = net.evidence(images())
    assert maps.shape == (2, 5, 6, 6)
    torch.testing.assert_close(logits, maps.mean((2, 3)))
    torch.testing.assert_close(net(images()), logits)
    # another size needs no other net
    assert net(images(17)).shape == (2, 5)


def test_class_maps_of_a_linear_classifier() -> None:
    features, classifier = images(), nn.Linear(3, 7).double()
    maps = class_maps(features, classifier)
    torch.testing.assert_close(maps.mean((2, 3)), classifier(features.mean((2, 3))))
    at = features[1, :, 4, 5]
    torch.testing.assert_close(maps[1, :, 4, 5], classifier(at))


def test_shifting_the_content_around_leaves_the_logits() -> None:
    torch.manual_seed(0)
    blocks = [MLPConv(3, (8, 6)).double(), MLPConv(6, (8, 5), final_relu=False).double()]

    def logits(x: Tensor) -> Tensor:
        for block in blocks:
            x = block(F.pad(x, (1, 1, 1, 1), mode="circular"))
        return GlobalAveragePool()(x)

    x = images()
    torch.testing.assert_close(logits(x), logits(x.roll((3, -5), (2, 3))))


def test_relu_before_the_mean_keeps_logits_from_being_negative() -> None:
    x = images()
    assert (small()(x) < 0).any()
    assert (small(final_relu=True)(x) >= 0).all()


def test_the_net_for_cifar_is_the_published_one() -> None:
    net = NetworkInNetwork()
    shapes = [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert shapes == [
        (3, 192, 5),
        (192, 160, 1),
        (160, 96, 1),
        (96, 192, 5),
        (192, 192, 1),
        (192, 192, 1),
        (192, 192, 3),
        (192, 192, 1),
        (192, 10, 1),
    ]
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    assert net.evidence(torch.zeros(1, 3, 32, 32)).maps.shape == (1, 10, 8, 8)


def test_any_pooling_stands_between_blocks() -> None:
    pools = [functools.partial(SoftPool2d, 2)]
    net = small(pools=pools)
    assert isinstance(net.trunk[1], SoftPool2d)
    assert net.evidence(images()).maps.shape == (2, 5, 6, 6)


def test_evidence_is_located_in_the_image() -> None:
    net = (
        NetworkInNetwork(1, 2, ((4,), (4,)), (3, 3), [functools.partial(nn.AvgPool2d, 2)], dropout=0.0).double().eval()
    )
    # a net whose class 0 is bright where the image is, and class 1 where it is not
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.zero_()
            if name.endswith("weight") and p.shape[-1] == 3:
                p[0, 0, 1, 1] = 1
        last = net.trunk[-1].layers[-1]
        last.weight[0, 0], last.weight[1, 0] = 1, -1
    for size in (16, 24):
        x = torch.zeros(2, 1, size, size, dtype=torch.float64)
        x[0, :, 4:8, 10:12] = 1
        x[1, :, 12:16, 2:8] = 1
        found = net.locate(x)
        assert found.classes.tolist() == [0, 0]
        assert found.maps.shape == (2, 2, size, size)
        torch.testing.assert_close(
            found.maps[:, 0], F.interpolate(F.avg_pool2d(x, 2), (size, size), mode="bilinear")[:, 0]
        )
        assert [float(x[i, 0, r, c]) for i, (r, c) in enumerate(found.position.tolist())] == [1, 1]
        # the enlarged map is above a half just where the object is
        assert found.box.tolist() == [[4, 10, 8, 12], [12, 2, 16, 8]]
        away = net.locate(x, target=1)
        assert away.classes.tolist() == [1, 1]
        assert [float(x[i, 0, r, c]) for i, (r, c) in enumerate(away.position.tolist())] == [0, 0]


def test_whitened_images_are_uncorrelated_and_the_fit_is_saved() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    train, test = ((torch.randn(n, 12, generator=generator, dtype=torch.float64) @ mixing) for n in (4000, 50))
    train, test = train.view(-1, 3, 2, 2), test.view(-1, 3, 2, 2)
    whitening = Whitening((3, 2, 2), zca_eps=1e-9).double().fit(train)
    made = whitening(train).flatten(1)
    # an image has no mean of its own left, so one direction is empty
    variances = torch.linalg.eigvalsh(made.T.cov(correction=0))
    torch.testing.assert_close(variances[1:], torch.ones(11, dtype=torch.float64), atol=1e-5, rtol=0)
    assert float(variances[0]) < 1e-5
    torch.testing.assert_close(whitening.matrix, whitening.matrix.T)
    # brightness and contrast do not matter
    torch.testing.assert_close(whitening(3 * test + 5), whitening(test), atol=1e-5, rtol=1e-5)
    again = nn.Sequential(Whitening((3, 2, 2), zca_eps=1e-9).double(), nn.Flatten())
    again.load_state_dict(nn.Sequential(whitening, nn.Flatten()).state_dict())
    torch.testing.assert_close(again(test), whitening(test).flatten(1), rtol=0, atol=0)
    plain = Whitening((3, 2, 2)).double()(test).flatten(1)
    torch.testing.assert_close(plain.mean(1), torch.zeros(50, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(plain.var(1, correction=0), torch.ones(50, dtype=torch.float64))


def test_dropout_only_in_training() -> None:
    net, x = small(), images()
    torch.testing.assert_close(net(x), net(x), rtol=0, atol=0)
    net.train()
    assert not torch.equal(net(x), net(x))


def test_the_net_differentiates_compiles_exports_and_runs_in_half_precision() -> None:
    net, x = small(), images(7)
    assert torch.autograd.gradcheck(net, x.clone().requires_grad_(), fast_mode=True)
    expected = net(x)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), expected)
    half = copy.deepcopy(net).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, atol=0.05 * float(expected.detach().abs().max()), rtol=0)
    net.train()
    net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: MLPConv(3, ()), "widths"),
        (lambda: MLPConv(3, (4, 0)), "widths"),
        (lambda: NetworkInNetwork(blocks=((4,), (4,)), kernels=(3,)), "blocks"),
        (lambda: NetworkInNetwork(pools=[]), "blocks"),
        (lambda: NetworkInNetwork().locate(torch.zeros(1, 3, 8, 8), share=0.0), "share"),
        (lambda: NetworkInNetwork().locate(torch.zeros(1, 3, 8, 8), target=10), "target"),
        (lambda: Whitening((3, 2, 0)), "size"),
        (lambda: Whitening((3, 2, 2), zca_eps=0.0), "zca_eps"),
        (lambda: Whitening((3, 2, 2))(torch.zeros(1, 3, 4, 4)), "images"),
        (lambda: Whitening((3, 2, 2)).fit(torch.zeros(1, 3, 2, 2)), "images"),
        (lambda: GlobalAveragePool()(torch.ones(2, 3, 4)), "maps"),
        (lambda: GlobalAveragePool()(torch.ones(2, 3, 4, 4), torch.ones(2, 5, 4, dtype=torch.bool)), "mask"),
        (lambda: class_maps(torch.ones(2, 3, 4, 4), nn.Linear(4, 2)), "features"),
    ],
)
def test_wrong_arguments_are_named(call: Any, named: str) -> None:
    with pytest.raises(InputError, match=f"^{named}: "):
        call()

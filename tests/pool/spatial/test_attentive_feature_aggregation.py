import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tests.maps import randn
from torch import Tensor, nn

from cenote.core import InputError
from cenote.pool import (
    AFAChannelAttention,
    AFADLAUp,
    AFAIDAUp,
    AFASegmenter,
    AFASpatialAttention,
    BinaryAFA,
    MultiAFA,
    scale_space_rendering,
)
from cenote.pool.spatial.attentive_feature_aggregation.dla import bilinear_up, log_loss
from cenote.pool.spatial.attentive_feature_aggregation.fusion import hierarchical_fusion, in_front
from cenote.pool.spatial.attentive_feature_aggregation.rivals import (
    ConcatenationFusion,
    LevelSoftmax,
    PartialAFA,
    SumFusion,
)
from cenote.pool.spatial.attentive_feature_aggregation.rmi import EPS, rmi_loss
from cenote.pool.spatial.attentive_feature_aggregation.training import train_afa

C = 16


def shaken(module: nn.Module) -> nn.Module:
    """In float64 and eval mode, with statistics that are not 0 and 1."""
    torch.manual_seed(0)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
            # no ReLU is dead
            nn.init.uniform_(m.bias, 1, 3)
    return module.double().eval()


def fixed(fusion: BinaryAFA | MultiAFA, a_s: float, a_c: float) -> None:
    """Let both attentions give constants."""
    fusion.spatial.forward = lambda x: torch.full_like(x[:, :1], a_s)
    fusion.channel.forward = lambda x, mask=None: torch.full_like(x[:, :, :1, :1], a_c)


@pytest.mark.parametrize(
    ("a_s", "a_c", "expected"),
    [(1, 0, lambda s, d: s), (0, 1, lambda s, d: d), (0.5, 0.5, lambda s, d: (s + d) / 4)],
)
def test_gates_choose_between_shallow_and_deep(a_s: float, a_c: float, expected) -> None:
    fusion, shallow, deep = BinaryAFA(C).double(), randn(2, C, 5, 4), randn(2, C, 5, 4, seed=1)
    fixed(fusion, a_s, a_c)
    torch.testing.assert_close(fusion(shallow, deep), expected(shallow, deep))


def test_last_layers_of_zeros_give_a_quarter_of_the_sum() -> None:
    fusion, shallow, deep = BinaryAFA(C).double().eval(), randn(2, C, 5, 4), randn(2, C, 5, 4, seed=1)
    nn.init.zeros_(fusion.spatial.final.weight)
    nn.init.zeros_(fusion.channel.excite.weight)
    torch.testing.assert_close(fusion(shallow, deep), (shallow + deep) / 4)


def test_the_shallow_map_says_where_and_the_deep_one_what() -> None:
    fusion, shallow, deep = shaken(BinaryAFA(C)), randn(2, C, 5, 4), randn(2, C, 5, 4, seed=1)
    output, a_s, a_c = fusion.attend(shallow, deep)
    torch.testing.assert_close(a_s, fusion.spatial(shallow))
    torch.testing.assert_close(a_c, fusion.channel(deep))
    torch.testing.assert_close(output, a_s * (1 - a_c) * shallow + (1 - a_s) * a_c * deep)
    assert fusion.attend(shallow, shallow).spatial.equal(a_s)


@pytest.mark.parametrize(("activation", "of"), [("sigmoid", torch.sigmoid), ("abs", torch.abs), ("relu", torch.relu)])
def test_spatial_attention_written_out(activation: str, of) -> None:
    module, x = shaken(AFASpatialAttention(6, 2, 5, activation)), randn(2, 6, 5, 4)
    y = x
    for conv, norm, _ in (module.inner, module.outer):
        assert conv.bias is None
        y = torch.relu(norm(F.conv2d(y, conv.weight, padding=1)))
    logits = F.conv2d(y, module.final.weight)
    torch.testing.assert_close(module.logits(x), logits)
    torch.testing.assert_close(module(x), of(logits))


def test_channel_attention_sees_mean_and_maximum_through_the_same_layers() -> None:
    module, x = shaken(AFAChannelAttention(2 * C)), randn(2, 2 * C, 5, 4)
    assert module.squeeze[0].weight.shape[:2] == (2, 2 * C)
    ends = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    torch.testing.assert_close(module(x), sum(module.excite(module.squeeze(v)) for v in ends).sigmoid())


def test_the_reduction_is_an_option() -> None:
    assert AFAChannelAttention(15, 8).squeeze[0].weight.shape[:2] == (1, 15)
    for fusion in (BinaryAFA(C, reduction=2), MultiAFA(C, reduction=2)):
        assert fusion.channel.squeeze[0].weight.shape[:2] == (C // 2, C)


def test_masked_positions_say_nothing_of_channels() -> None:
    module, x = shaken(AFAChannelAttention(C)), randn(2, C, 5, 4)
    mask = torch.zeros(2, 5, 4, dtype=torch.bool)
    mask[:, :3, :2] = True
    poisoned = x.masked_fill(~mask.unsqueeze(1), torch.nan)
    torch.testing.assert_close(module(poisoned, mask), module(x[..., :3, :2]))


def test_one_level_is_gated_by_both_attentions() -> None:
    fusion, x = shaken(MultiAFA(C)), randn(2, C, 5, 4)
    torch.testing.assert_close(fusion([x]), fusion.spatial(x) * fusion.channel(x) * x)


def test_what_is_in_front_hides_what_is_behind() -> None:
    a = torch.rand(4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.stack(in_front(list(a)))
    torch.testing.assert_close(weights.sum(0), 1 - (1 - a).prod(0))
    torch.testing.assert_close(weights[-1], a[-1])
    torch.testing.assert_close(weights[1], a[1] * (1 - a[2]) * (1 - a[3]))


def test_several_levels_written_out() -> None:
    fusion = shaken(MultiAFA(C, (20, 24)))
    levels = [randn(2, 20, 2, 2), randn(2, 24, 4, 4), randn(2, C, 8, 6)]
    maps = [
        F.interpolate(p(x), (8, 6), mode="bilinear", align_corners=False)
        for p, x in zip(fusion.projections, levels[:2], strict=True)
    ]
    maps.append(levels[2])
    s, c = ([module(x) for x in maps] for module in (fusion.spatial, fusion.channel))
    expected = s[2] * c[2] * maps[2]
    expected = expected + s[1] * (1 - s[2]) * c[1] * (1 - c[2]) * maps[1]
    expected = expected + s[0] * (1 - s[1]) * (1 - s[2]) * c[0] * (1 - c[1]) * (1 - c[2]) * maps[0]
    output, spatial, channel = fusion.attend(levels)
    torch.testing.assert_close(output, expected)
    assert spatial.shape == (2, 3, 8, 6)
    assert channel.shape == (2, 3, C)
    torch.testing.assert_close(spatial[:, 2:], s[2])


def scales(*y: float) -> tuple[list[Tensor], list[Tensor]]:
    p = [randn(1, 3, 2, 2, seed=i).softmax(1) for i in range(len(y))]
    return p, [torch.full((1, 1, 2, 2), v, dtype=torch.float64) for v in y]


def test_rendering_of_two_even_densities() -> None:
    p, y = scales(math.log(2), math.log(2))
    output, weights = scale_space_rendering(p, y)
    torch.testing.assert_close(weights[0, :, 0, 0], torch.tensor([0.5, 0.25], dtype=torch.float64))
    torch.testing.assert_close(output, 0.5 * p[0] + 0.25 * p[1])


def test_an_opaque_first_scale_hides_all_and_an_empty_one_nothing() -> None:
    p, y = scales(1e4, 3.0)
    torch.testing.assert_close(scale_space_rendering(p, y).output, p[0])
    p, y = scales(0.0, 1e4)
    torch.testing.assert_close(scale_space_rendering(p, y).output, p[1])
    assert scale_space_rendering(*scales(0.0, 0.0)).output.abs().max() == 0
    assert scale_space_rendering(*scales(0.0, 0.0), normalise=True).output.isfinite().all()


def test_weights_of_scales_sum_to_what_is_stopped() -> None:
    p, y = scales(0.3, 1.2, 0.1)
    weights = scale_space_rendering(p, y).weights
    torch.testing.assert_close(weights.sum(1), 1 - torch.exp(-sum(y)).squeeze(1))
    swapped = scale_space_rendering(p, [y[1], y[0], y[2]]).weights
    assert not torch.allclose(swapped[:, 0], weights[:, 1])
    whole = scale_space_rendering(p, y, normalise=True)
    torch.testing.assert_close(whole.weights.sum(1), torch.ones(1, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(whole.output.argmax(1), scale_space_rendering(p, y).output.argmax(1))


def test_weights_are_rendered_on_the_grid_of_the_densities_and_then_enlarged() -> None:
    p = [randn(1, 3, 8, 8, seed=i).softmax(1) for i in (0, 1)]
    y = [3 * randn(1, 1, 4, 4, seed=i).abs() for i in (2, 3)]
    on_grid = [1 - torch.exp(-y[0]), torch.exp(-y[0]) * (1 - torch.exp(-y[1]))]
    expected = [F.interpolate(w, (8, 8), mode="bilinear", align_corners=False) for w in on_grid]
    output, weights = scale_space_rendering(p, y)
    torch.testing.assert_close(weights, torch.cat(expected, 1))
    torch.testing.assert_close(output, expected[0] * p[0] + expected[1] * p[1])
    even = scale_space_rendering(p, y, normalise=True).weights.sum(1)
    torch.testing.assert_close(even, torch.ones(1, 8, 8, dtype=torch.float64))


def test_hierarchical_fusion_goes_from_the_largest_scale_down() -> None:
    p = [randn(1, 3, 2, 2, seed=i).softmax(1) for i in range(3)]
    a = [randn(1, 1, 2, 2, seed=5 + i).sigmoid() for i in range(3)]
    q = a[1] * p[1] + (1 - a[1]) * p[2]
    q = a[0] * p[0] + (1 - a[0]) * q
    output, weights = hierarchical_fusion(p, a)
    torch.testing.assert_close(output, q)
    torch.testing.assert_close(weights.sum(1), torch.ones(1, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(hierarchical_fusion(p[:1], a[:1]).output, p[0])


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_enlarging_begins_as_interpolation(factor: int) -> None:
    x, up = randn(1, 2, 6, 5).float(), bilinear_up(2, factor)
    y = up(x)
    assert y.shape == (1, 2, 6 * factor, 5 * factor)
    inner = (..., slice(factor, -factor), slice(factor, -factor))
    expected = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    torch.testing.assert_close(y[inner], expected[inner])


def test_a_node_chains_fusions_from_shallow_to_deep() -> None:
    node = shaken(AFAIDAUp((C, 20, C), (1, 2, 4)))
    layers = [randn(2, C, 8, 8), randn(2, 20, 4, 4), randn(2, C, 2, 2)]
    assert isinstance(node.projections[2], nn.Identity)
    first = node.fuse[0](layers[0], node.enlarge[1](node.projections[1](layers[1])))
    second = node.fuse[1](first, node.enlarge[2](layers[2]))
    for got, expected in zip(node(layers), (first, second), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_pyramid_is_aggregated_from_deep_to_shallow() -> None:
    neck = shaken(AFADLAUp((C, 18, 20, 24)))
    pyramid = [randn(2, c, s, s) for c, s in ((C, 16), (18, 8), (20, 4), (24, 2))]
    a, b, c = neck.nodes
    (third,) = a(pyramid[2:])
    seconds = b([pyramid[1], pyramid[2], third])
    firsts = c([pyramid[0], pyramid[1], *seconds])
    assert neck.out_channels == (20, 18, C)
    nodes = neck.by_node(pyramid)
    for got, expected in zip(nodes, (third, seconds[-1], firsts[-1]), strict=True):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(neck(pyramid), neck.last(nodes))
    two = shaken(AFADLAUp((C, 18, 20, 24), fused=1))
    assert two(pyramid).shape == (2, C, 16, 16)


def test_a_fusion_of_ones_own() -> None:
    class Sum(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()

        def forward(self, shallow: Tensor, deep: Tensor) -> Tensor:
            return shallow + deep

    node = AFAIDAUp((C, C), (1, 1), fuse=Sum)
    x, y = randn(2, 1, C, 3, 3)
    torch.testing.assert_close(node([x, y])[0], x + y)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, s, 1) for a, b, s in ((3, C, 1), (C, C, 2), (C, 18, 2)))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.layers:
            x = torch.relu(layer(x))
            found.append(x)
        return found


def test_the_segmenter_trains_and_renders_any_scales() -> None:
    torch.manual_seed(0)
    net = AFASegmenter(Backbone(), (C, C, 18), classes=2)
    x = torch.randn(4, 3, 16, 16)
    labels = (x[:, 0] > 0).long()
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    losses = []
    for _ in range(12):
        loss = net.loss(net.at_scales(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None for p in net.parameters())
    net.eval()
    found = net.at_scales(x, (2.0, 0.5, 1.0))
    assert found.by_scale.shape == (4, 3, 2, 16, 16)
    assert found.auxiliary.shape == (4, 2, 2, 16, 16)
    torch.testing.assert_close(found.output, (found.weights.unsqueeze(2) * found.by_scale).sum(1))
    own = found.by_scale[:, 1]
    torch.testing.assert_close(own, net.classifier(net.neck(net.backbone(x))).softmax(1))
    torch.testing.assert_close(net(x)[:1], net(x[:1]), atol=1e-5, rtol=1e-4)


def test_the_loss_has_its_three_terms_and_takes_probabilities_of_zero() -> None:
    net, x = AFASegmenter(Backbone(), (C, C, 18), classes=2).eval(), torch.randn(2, 3, 8, 8)
    found, labels = net.at_scales(x), torch.zeros(2, 8, 8).long()
    labels[0, 0] = 255
    parts = [log_loss(found.output, labels)]
    parts += [0.05 * log_loss(p, labels) for t in (found.by_scale, found.auxiliary) for p in t.unbind(1)]
    torch.testing.assert_close(net.loss(found, labels), sum(parts))
    assert log_loss(torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1).long()).isfinite()


def test_the_segmenter_fuses_scales_hierarchically_too() -> None:
    net = shaken(AFASegmenter(Backbone(), (C, C, 18), classes=2, fusion="hierarchical"))
    x = randn(2, 3, 16, 16)
    found = net.at_scales(x, (0.5, 1.0))
    small = F.interpolate(x, (8, 8), mode="bilinear", align_corners=False)
    attention = net.density(net.neck(net.backbone(small)))
    assert (attention > 0).all()
    assert (attention < 1).all()
    attention = F.interpolate(attention, (16, 16), mode="bilinear", align_corners=False)
    p = found.by_scale
    torch.testing.assert_close(found.output, attention * p[:, 0] + (1 - attention) * p[:, 1])
    torch.testing.assert_close(net(x), found.output)


@pytest.mark.parametrize("build", [lambda: BinaryAFA(C), lambda: MultiAFA(C)])
def test_gradients_compile_export_and_copies(build) -> None:
    module, x, y = shaken(build()), randn(2, C, 4, 3), randn(2, C, 4, 3, seed=1)

    class Two(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.inner(a, b) if isinstance(self.inner, BinaryAFA) else self.inner([a, b])

    module = Two(module)
    assert torch.autograd.gradcheck(module, (x.requires_grad_(), y.requires_grad_()), fast_mode=True)
    module(x, y).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), module(x, y))
    torch.testing.assert_close(torch.export.export(module, (x, y)).module()(x, y), module(x, y))
    torch.testing.assert_close(torch.cat([module(x[i : i + 1], y[i : i + 1]) for i in (0, 1)]), module(x, y))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: AFAChannelAttention(15), "channels"),
        (lambda: AFAChannelAttention(C, reduction=0), "reduction"),
        (lambda: AFASpatialAttention(4, activation="tanh"), "activation"),
        (lambda: AFAChannelAttention(C)(torch.zeros(1, C, 3, 3)), "cannot train on one map"),
        (lambda: BinaryAFA(C)(torch.zeros(2, C, 3, 3), torch.zeros(2, C, 2, 3)), "deep"),
        (lambda: MultiAFA(C, (18,))([torch.zeros(2, C, 3, 3)]), "levels"),
        (lambda: MultiAFA(C)([]), "levels"),
        (lambda: scale_space_rendering([torch.zeros(1, 2, 1, 1)], []), "densities"),
        (lambda: hierarchical_fusion([torch.zeros(1, 2, 1, 1)], []), "attentions"),
        (lambda: AFAIDAUp((C,), (1,)), "up_factors"),
        (lambda: AFAIDAUp((C, C), (1, 2))([torch.zeros(2, C, 4, 4)]), "layers"),
        (lambda: AFADLAUp((C, C), (1, 2, 4)), "scales"),
        (lambda: AFADLAUp((C, C, C), (1, 2, 3)), "scales"),
        (lambda: AFADLAUp((C, C), fused=0), "fused"),
        (lambda: AFADLAUp((C, C))([torch.zeros(2, C, 4, 4)]), "pyramid"),
        (lambda: AFASegmenter(nn.Identity(), (C, C), 2, scales=()), "scales"),
        (lambda: AFASegmenter(nn.Identity(), (C, C), 2, fusion="mean"), "fusion"),
    ],
)
def test_wrong_arguments_are_named(call, named: str) -> None:
    with pytest.raises(InputError, match=named):
        call()


def test_region_mutual_information_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(1, 1, 5, 6, dtype=torch.float64, generator=generator)
    labels = torch.zeros(1, 5, 6, dtype=torch.long)
    # of one class every pixel is: only its prediction varies, and all of the truth's covariance is 0
    regional = 9 * math.log(EPS) / 18
    pixelwise = -p.log().mean()
    expected = 0.25 * pixelwise + 0.75 * regional
    torch.testing.assert_close(rmi_loss(p, labels, pool=1, weight=0.75), expected)
    two = torch.cat([p, 1 - p], 1)
    labels = (torch.rand(1, 5, 6, generator=generator) > 0.5).long()
    total = 0.0
    for c in range(2):
        windows = [[], []]
        for maps, kept in zip((labels == c, two[:, c]), windows, strict=True):
            kept += [maps[0, i : i + 3, j : j + 3].flatten().double() for i in range(3) for j in range(4)]
        y, found = (torch.stack(w, 1) - torch.stack(w, 1).mean(1, keepdim=True) for w in windows)
        damped = EPS * torch.eye(9, dtype=torch.float64)
        m = y @ y.T - (y @ found.T) @ torch.inverse(found @ found.T + damped) @ (y @ found.T).T
        total += float(torch.logdet(m + damped)) / 18
    assert rmi_loss(two, labels, pool=1, weight=1.0).item() == pytest.approx(total)


def test_region_mutual_information_leaves_out_what_is_ignored() -> None:
    p = torch.rand(2, 3, 12, 12)
    labels = torch.randint(3, (2, 12, 12))
    labels[:, :6] = 255
    changed = p.clone()
    changed[:, :, :6] = torch.rand(2, 3, 6, 12)
    torch.testing.assert_close(rmi_loss(p, labels), rmi_loss(changed, labels))
    with pytest.raises(InputError, match="probabilities: a window of 3 x 3 squares of 3 x 3"):
        rmi_loss(p[..., :4, :4], labels[:, :4, :4])
    with pytest.raises(InputError, match="labels: expected the size"):
        rmi_loss(p, labels[:, :4])
    with pytest.raises(InputError, match="weight"):
        rmi_loss(p, labels, weight=2.0)


def test_the_recipe_takes_either_main_loss() -> None:
    torch.manual_seed(0)
    net = AFASegmenter(Backbone(), (C, C, 18), classes=2, scales=(1.0,))
    x = torch.randn(3, 12, 12)
    labels = (x[0] > 0).long()
    found = net.at_scales(torch.stack([x, -x]))
    both = torch.stack([labels, 1 - labels])
    without = net.loss(found, both) - log_loss(found.output, both)
    torch.testing.assert_close(net.loss(found, both, rmi=True), without + rmi_loss(found.output, both))
    for rmi in (False, True):
        before = net.classifier.weight.detach().clone()
        history = train_afa(net, [(x, labels)], steps=2, batch=2, crop=12, scale=(1.0, 1.0), warm_up=1, rmi=rmi)
        assert len(history.losses) == 1
        assert not torch.equal(net.classifier.weight, before)


def test_rival_fusions() -> None:
    shallow, deep = randn(2, 2, C, 5, 4)
    torch.testing.assert_close(SumFusion(C)(shallow, deep), shallow + deep)
    assert ConcatenationFusion(C, 3).double()(shallow, deep).shape == shallow.shape
    spatial = shaken(PartialAFA(C, "spatial"))
    a = spatial.spatial(shallow)
    torch.testing.assert_close(spatial(shallow, deep), a * shallow + (1 - a) * deep)
    channel = shaken(PartialAFA(C, "channel"))
    a = channel.channel(deep)
    torch.testing.assert_close(channel(shallow, deep), (1 - a) * shallow + a * deep)
    swapped = shaken(PartialAFA(C, "swapped"))
    a_c, a_s = swapped.channel(shallow), swapped.spatial(deep)
    torch.testing.assert_close(swapped(shallow, deep), a_c * (1 - a_s) * shallow + (1 - a_c) * a_s * deep)
    levels = shaken(LevelSoftmax(C))
    torch.testing.assert_close(levels([shallow, shallow]), shallow)
    nn.init.zeros_(levels.score.final.weight)
    torch.testing.assert_close(levels([shallow, deep]), (shallow + deep) / 2)
    node = AFAIDAUp((C, C), (1, 2), fuse=SumFusion)
    assert node([torch.randn(2, C, 8, 8), torch.randn(2, C, 4, 4)])[-1].shape == (2, C, 8, 8)

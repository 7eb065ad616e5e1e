import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.pools import features, shaken
from torch import nn

from cenote.core import InputError, files
from cenote.pool.attention.joint_attention.estimator import (
    Group,
    JointAttentionConfig,
    JointAttentionEstimator,
    SceneBranch,
    drawn,
)
from cenote.pool.attention.joint_attention.field import FieldHead, coordinates, mean_map
from cenote.pool.attention.joint_attention.fusion import JointAttentionFusion
from cenote.pool.attention.joint_attention.heads import MapHead
from cenote.pool.attention.joint_attention.measure import (
    detection_curve,
    distance,
    gaze_cones,
    nearest_to_rays,
    trivial_points,
)
from cenote.pool.attention.joint_attention.model import JointAttention
from cenote.pool.attention.joint_attention.pool import JointAttentionPool
from cenote.pool.attention.joint_attention.targets import best_point, gaussian_target
from cenote.pool.attention.joint_attention.training import found_points, map_loss, train_in_stages

SIZE = (4, 6)
AGGREGATIONS = ["token_only", "ind_only", "ind_and_token_ind_based"]


def group(people: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return features(2, people, 2), features(2, people, 2, seed=2), features(2, people, 3, seed=3)


def small(**settings: object) -> JointAttention:
    return shaken(JointAttention(**{"actions": 3, "width": 8} | settings))


def test_pool_is_torchs_attention_with_one_norm() -> None:
    pool = shaken(JointAttentionPool(6, width=8, layers=2, heads=2))
    x = features(2, 5, 6)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    z = torch.cat([pool.embedding(x), pool.joint_token.expand(2, 1, 8)], 1)
    hidden = F.pad(~mask, (0, 1), value=False)
    attentions = []
    for layer in pool.layers:
        reference = nn.MultiheadAttention(8, 2, batch_first=True).double()
        reference.load_state_dict(
            {
                "in_proj_weight": layer.in_proj.weight,
                "in_proj_bias": layer.in_proj.bias,
                "out_proj.weight": layer.out_proj.weight,
                "out_proj.bias": layer.out_proj.bias,
            }
        )
        y, attention = reference(z, z, z, key_padding_mask=hidden, average_attn_weights=False)
        y = y + z
        z = pool.norm(y + layer.fc2(torch.relu(layer.fc1(y))))
        attentions.append(attention)
    output, weights = pool.attend(x, mask)
    torch.testing.assert_close(output, z[:, -1])
    torch.testing.assert_close(weights, attentions[-1][:, :, -1, :-1])
    encoded = pool.encode(x, mask)
    torch.testing.assert_close(encoded.people[mask], z[:, :-1][mask])
    assert not encoded.people[~mask].any()
    real = F.pad(mask, (0, 1), value=True)
    queries = real[:, None, None, :, None].expand_as(encoded.attention)
    torch.testing.assert_close(encoded.attention[queries], torch.stack(attentions, 1)[queries])


def test_split_first_layer_is_the_full_one() -> None:
    head = shaken(FieldHead(5, hidden=7, depth="deep"))
    z = features(2, 3, 5)
    pixels = torch.tensor([[j / 6, i / 4] for i in range(4) for j in range(6)], dtype=torch.float64)
    joined = torch.cat([z.unsqueeze(2).expand(-1, -1, 24, -1), pixels.expand(2, 3, -1, -1)], -1)
    h = torch.relu(head.first(joined))
    for layer in head.middle:
        h = torch.relu(layer(h))
    expected = head.last(h).squeeze(-1).unflatten(-1, SIZE)
    torch.testing.assert_close(head(z, SIZE), expected)
    assert [len(FieldHead(5, depth=d).middle) for d in ("shallow", "middle", "deep")] == [0, 2, 4]


def test_field_in_pieces_is_the_field() -> None:
    head, z = FieldHead(5), torch.randn(1, 2, 5, requires_grad=True)
    large = head(z, (300, 150))  # more pixels than go through at once
    assert large.shape == (1, 2, 300, 150)
    pixels = coordinates((300, 150))
    rows = torch.cat([z[0, 1].expand(len(pixels), -1), pixels], -1)
    h = torch.relu(head.first(rows))
    for layer in head.middle:
        h = torch.relu(layer(h))
    torch.testing.assert_close(large[0, 1].flatten(), head.last(h).squeeze(-1), atol=1e-5, rtol=1e-5)
    (grad,) = torch.autograd.grad(large.square().mean(), z)
    assert grad.any()


def test_any_points_of_the_field() -> None:
    head, z = shaken(FieldHead(5)), features(2, 3, 5)
    chosen = torch.tensor([7, 0, 23])
    torch.testing.assert_close(head.at(z, coordinates(SIZE).double()[chosen]), head(z, SIZE).flatten(2)[..., chosen])


def test_resolution_only_resamples_the_field() -> None:
    head, z = shaken(FieldHead(5)), features(1, 2, 5)
    torch.testing.assert_close(head(z, (8, 12))[..., ::2, ::2], head(z, SIZE))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_order_of_people(aggregation: str) -> None:
    model = small(aggregation=aggregation)
    given, order = group(), torch.randperm(5)
    maps, moved = model(*given, size=SIZE), model(*(v[:, order] for v in given), size=SIZE)
    torch.testing.assert_close(moved.joint, maps.joint)
    torch.testing.assert_close(moved.people, maps.people[:, order])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_padded_people_are_not_seen(aggregation: str) -> None:
    model = small(aggregation=aggregation)
    given = group()
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    dirty = [v.masked_fill(~mask.unsqueeze(-1), float("nan")) for v in given]
    maps = model(*dirty, mask, size=SIZE)
    alone = model(*(v[1:, :2] for v in given), size=SIZE)
    torch.testing.assert_close(maps.joint[1:], alone.joint)
    torch.testing.assert_close(maps.people[1:, :2], alone.people)
    assert not maps.people[~mask].any()
    nobody = model(*dirty, torch.zeros_like(mask), size=SIZE)
    assert nobody.joint.isfinite().all()


def test_a_person_at_the_origin_who_does_nothing_is_a_person() -> None:
    model, given = small(), group()
    silent = [torch.cat([v, torch.zeros_like(v[:, :1])], 1) for v in given]
    mask = torch.ones(2, 6, dtype=torch.bool)
    seen = model(*silent, mask, size=SIZE)
    assert not torch.allclose(seen.joint, model(*given, size=SIZE).joint)
    assert seen.people[:, 5].any()
    torch.testing.assert_close(seen.joint, model(*silent, size=SIZE).joint)


def test_only_the_form_with_all_tokens_side_by_side_limits_the_number_of_people() -> None:
    given = group(13)
    for aggregation in AGGREGATIONS:
        assert small(aggregation=aggregation)(*given, size=SIZE).people.shape == (2, 13, *SIZE)
    with pytest.raises(InputError, match="built for 12 people, got 13"):
        small(aggregation="token_only_concat")(*given, size=SIZE)


def test_aggregations() -> None:
    given = group()
    token, each, both = (small(aggregation=a) for a in AGGREGATIONS)
    maps = token(*given, size=SIZE)
    encoded = token.group.encode(torch.cat(given, -1))
    torch.testing.assert_close(maps.joint[:, 0], token.field(encoded.joint.unsqueeze(1), SIZE)[:, 0])
    torch.testing.assert_close(each(*given, size=SIZE).joint, maps.people.mean(1, keepdim=True))
    summed = token.field(encoded.people + encoded.joint.unsqueeze(1), SIZE)
    torch.testing.assert_close(both(*given, size=SIZE).joint, summed.mean(1, keepdim=True))
    joined = small(aggregation="token_only_concat", people=5)
    encoded = joined.group.encode(torch.cat(given, -1))
    side_by_side = torch.cat([encoded.people.flatten(1), encoded.joint], -1).unsqueeze(1)
    torch.testing.assert_close(joined(*given, size=SIZE).joint, joined.joined_field(side_by_side, SIZE))
    for model in (token, each, both, joined):
        encoded = model.group.encode(torch.cat(given, -1))
        torch.testing.assert_close(model.paint_joint(encoded, None, SIZE), model(*given, size=SIZE).joint)
    bounded = small(sigmoid=True)(*given, size=SIZE)
    torch.testing.assert_close(bounded.joint, maps.joint.sigmoid())


def test_without_attention_the_token_map_knows_no_people() -> None:
    model = small()
    with torch.no_grad():
        for layer in model.group.layers:  # values of zero
            layer.in_proj.weight[16:] = 0
            layer.in_proj.bias[16:] = 0
    a = model(*group(), size=SIZE).joint
    b = model(*(v + 1 for v in group()), size=SIZE).joint
    torch.testing.assert_close(a, b)


def test_attributes_that_are_switched_off_are_not_read() -> None:
    model = small(use=("gaze", "position"))
    position, gaze, action = group()
    assert model.group.dim == 4
    maps = model(position, gaze, action, size=SIZE)
    torch.testing.assert_close(model(position, gaze, action + 1, size=SIZE).joint, maps.joint)
    assert not torch.allclose(model(position + 1, gaze, action, size=SIZE).joint, maps.joint)


def test_fusion() -> None:
    a, b = features(2, 4, 6).unsqueeze(1), features(2, 4, 6, seed=2).unsqueeze(1)
    weighted = JointAttentionFusion("scalar_weight").double()
    torch.testing.assert_close(weighted(a, b), JointAttentionFusion("simple_average")(a, b))
    torch.testing.assert_close(weighted(a, b), (a + b) / 2)
    with torch.no_grad():
        weighted.weights.copy_(torch.tensor([1.0, 3.0]))
    share = torch.tensor([1.0, 3.0], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(weighted(a, b), share[0] * a + share[1] * b)
    mid, early = (shaken(JointAttentionFusion(kind)) for kind in ("mid", "early"))
    for fusion in (mid, early):
        assert fusion(a, b).shape == a.shape
        assert not torch.allclose(fusion(a, b), fusion(b, a))
    assert [tuple(p.shape) for p in mid.people.parameters() if p.dim() == 4] == [
        (4, 1, 5, 5),
        (8, 4, 5, 5),
        (8, 8, 5, 5),
    ]
    bounded = JointAttentionFusion("simple_average", sigmoid=True)(a, b)
    torch.testing.assert_close(bounded, ((a + b) / 2).sigmoid())
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    maps = features(2, 4, 6).unsqueeze(2).expand(-1, -1, 3, -1)
    torch.testing.assert_close(mean_map(maps, mask)[0, 0], maps[0, :2].mean(0))
    assert not mean_map(maps, mask)[1].any()
    torch.testing.assert_close(mean_map(maps), maps.mean(1, keepdim=True))


def test_targets() -> None:
    points = torch.tensor([[[0.5, 0.25], [0.5, 0.25]], [[0.0, 0.0], [0.75, 0.5]]])
    target = gaussian_target(points, (8, 8), sigma=1.5)
    assert target.max() == 1.0  # two people at one point are clipped
    i, j = 3, 6
    expected = min(1.0, 2 * torch.exp(torch.tensor(-((i - 2) ** 2 + (j - 4) ** 2) / (2 * 1.5**2))).item())
    assert target[0, 0, i, j].item() == pytest.approx(expected)
    one = gaussian_target(points, (8, 8), sigma=1.5, mask=torch.tensor([[True, False], [False, True]]))
    assert best_point(one[:, 0]).tolist() == [[0.5, 0.25], [0.75, 0.5]]


def test_distances_and_shares_are_in_pixels() -> None:
    found, truth = torch.tensor([[0.5, 0.5], [0.1, 0.2]]), torch.tensor([[0.5, 0.75], [0.4, 0.2]])
    apart = distance(found, truth, (40, 100))
    torch.testing.assert_close(apart, torch.tensor([10.0, 30.0]))
    assert detection_curve(apart, [9.9, 10.1, 30.1]).tolist() == [0.0, 0.5, 1.0]


def test_gaze_cones_by_hand_and_what_needs_no_training() -> None:
    torch.manual_seed(0)
    size = (20, 40)
    ball = torch.tensor([[0.5, 0.25], [0.75, 0.5]])
    position = torch.rand(2, 4, 2)
    way = (ball.unsqueeze(1) - position) * torch.tensor([40.0, 20.0])
    gaze = F.normalize(way, dim=-1)
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    gaze[0, 3] *= -1
    cones = gaze_cones(position, gaze, size, mask, spread=0.3)
    i, j = 7, 31
    angles = []
    for n in range(3):
        to = torch.tensor([j - position[0, n, 0] * 40, i - position[0, n, 1] * 20])
        angles.append(torch.acos(to @ gaze[0, n] / to.norm()))
    torch.testing.assert_close(cones[0, 0, i, j], torch.exp(-torch.stack(angles).square() / 0.3).mean())
    points = trivial_points(position, gaze, size, mask)
    assert distance(points["mean gaze cone"], ball, size).max() < 1.5
    torch.testing.assert_close(points["mean position"][0], position[0, :3].mean(0))
    assert points["image centre"].tolist() == [[0.5, 0.5]] * 2


def test_training_paints_the_point() -> None:
    torch.manual_seed(0)
    model = JointAttention(actions=1, width=8, layers=1)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    ball = torch.rand(16, 2)
    position = torch.rand(16, 4, 2)
    gaze = F.normalize(ball.unsqueeze(1) - position, dim=-1)
    target = gaussian_target(ball.unsqueeze(1), (8, 8), sigma=1.0)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(model(position, gaze, torch.zeros(16, 4, 1), size=(8, 8)).joint, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_errors() -> None:
    model, given = small(), group()
    for call, name in (
        (lambda: JointAttentionPool(6, layers=0), "layers"),
        (lambda: JointAttentionPool(6, heads=3), "heads"),
        (lambda: JointAttentionPool(6, embedding="conv"), "embedding"),
        (lambda: FieldHead(5, depth="middling"), "depth"),
        (lambda: FieldHead(5)(features(1, 2, 5).float(), (0, 4)), "size"),
        (lambda: JointAttention(aggregation="sum"), "aggregation"),
        (lambda: JointAttention(use=("hair",)), "use"),
        (lambda: JointAttention(actions=0, use=("action",)), "actions"),
        (lambda: model(given[0], given[1][:, :3], given[2]), "gaze"),
        (lambda: small(aggregation="token_only_concat", people=4)(*given, size=SIZE), "position"),
        (lambda: JointAttentionFusion("late"), "kind"),
        (lambda: JointAttentionFusion()(torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 5)), "people, scene"),
        (lambda: gaussian_target(torch.rand(1, 1, 2), (4, 4), sigma=0.0), "sigma"),
        (lambda: gaze_cones(torch.rand(1, 1, 2), torch.rand(1, 1, 2), (4, 4), spread=0.0), "spread"),
    ):
        with pytest.raises(InputError, match=name):
            call()


def scenes(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Group:
    """People who look at a ball; the patch of the ball lights up, and another one with it."""
    g = torch.Generator().manual_seed(seed)
    position, ball = torch.rand(count, 4, 2, generator=g), torch.rand(count, 2, generator=g)
    gaze = F.normalize((ball.unsqueeze(1) - position) * torch.tensor([2.0, 1.0]), dim=-1)
    patches = torch.zeros(count, 3, 4, 8)
    rows = torch.arange(count)
    for point in (ball, torch.rand(count, 2, generator=g)):
        patches[rows, 0, (point[:, 1] * 4).long(), (point[:, 0] * 8).long()] = 1
    action = torch.zeros(count, 4, 2)
    group = Group(
        position,
        gaze,
        action,
        scene=patches,
        target=ball,
        targets=ball.unsqueeze(1).expand(-1, 4, 2),
    )
    return Group(*(None if t is None else t.to(dtype) for t in group))


def config(**settings: object) -> JointAttentionConfig:
    return JointAttentionConfig(**{"actions": 2, "size": (8, 16), "patches": 3} | settings)


@pytest.mark.parametrize("fusion", ["mid", "early", "scalar_weight", "simple_average"])
def test_the_estimator_is_its_parts(fusion: str) -> None:
    estimator, group = shaken(JointAttentionEstimator(config(fusion=fusion))), scenes(3, 0, dtype=torch.float64)
    found = estimator(group)
    maps = estimator.people(group.position, group.gaze, group.action, size=(8, 16))
    scene = estimator.scene(group.scene, (8, 16))
    torch.testing.assert_close(found.joint, maps.joint)
    torch.testing.assert_close(found.fused, estimator.fusion(maps.joint, scene))
    torch.testing.assert_close(found.weights(), maps.attention[:, :, -1, :-1].mean(1))
    alone = estimator(group._replace(scene=None))
    torch.testing.assert_close(alone.fused, maps.joint)
    assert alone.scene is None
    given = shaken(JointAttentionEstimator(config(fusion=fusion, patches=None)))
    torch.testing.assert_close(given(group._replace(scene=scene)).scene, scene)


def test_the_image_branch_is_the_mean_over_the_real_people() -> None:
    branch = shaken(SceneBranch(3, 5))
    scene, crops = features(1, 3 * 4, 8).unflatten(1, (3, 4)), features(1, 4, 5, seed=2)
    mask = torch.tensor([[True, False, True, False]])
    each = [branch(scene, (8, 16), crops[:, i : i + 1]) for i in (0, 2)]
    torch.testing.assert_close(branch(scene, (8, 16), crops, mask), (each[0] + each[1]) / 2)
    with pytest.raises(InputError, match="crops: this image branch was built for the heads"):
        branch(scene, (8, 16))
    with pytest.raises(InputError, match="scene: expected patches of width 3"):
        branch(scene[:, :2], (8, 16), crops)


def test_points_are_in_pixels_of_the_map() -> None:
    estimator, group = shaken(JointAttentionEstimator(config())), scenes(3, 0, dtype=torch.float64)
    found = estimator(group)
    for (x, y), fused in zip(found.point().long().tolist(), found.fused[:, 0], strict=True):
        assert fused[y, x] == fused.max()


def test_estimators_are_saved_and_loaded(tmp_path: Path) -> None:
    estimator, group = JointAttentionEstimator(config(head="fc", mixing="uniform")).eval(), scenes(2, 0)
    estimator.save(tmp_path)
    loaded = JointAttentionEstimator.load(tmp_path)
    assert loaded.config == estimator.config
    torch.testing.assert_close(loaded(group).fused, estimator(group).fused)
    card = files.sealed({"format": 1, "config": {"actions": 2}})
    (tmp_path / "joint-attention.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match=r"joint-attention\.json is damaged"):
        JointAttentionEstimator.load(tmp_path)
    with pytest.raises(InputError, match="nowhere: holds no estimator"):
        JointAttentionEstimator.load(tmp_path / "nowhere")


def test_the_first_stage_trains_the_people_alone_and_the_second_both() -> None:
    torch.manual_seed(0)
    estimator = JointAttentionEstimator(config())
    before = {k: v.clone() for k, v in estimator.state_dict().items()}
    train, development = scenes(96, 1), scenes(48, 2)
    train_in_stages(estimator, train._replace(scene=None), development._replace(scene=None), sigma=1.5, passes=(1, 1))
    changed = {k.partition(".")[0] for k, v in estimator.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"people"}
    start = found_points(estimator, development).mean_distance
    stages = train_in_stages(estimator, train, development, sigma=1.5, passes=(6, 12), lr=5e-3, patience=4)
    assert stages.people.losses[-1] < stages.people.losses[0]
    assert stages.both.losses[-1] < stages.both.losses[0]
    found = found_points(estimator, development)
    assert found.mean_distance == pytest.approx(-max(stages.both.scores), rel=1e-5)
    assert found.mean_distance < start
    assert list(found.within) == [0.05, 0.1, 0.2]
    changed = {k.partition(".")[0] for k, v in estimator.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"people", "scene", "fusion"}


def test_losses_are_switched_on_by_name() -> None:
    estimator, group = shaken(JointAttentionEstimator(config())), scenes(2, 0, dtype=torch.float64)
    found = estimator(group)
    hill = gaussian_target(group.target.unsqueeze(1), (8, 16), 1.5)
    by_name = {
        "joint": F.mse_loss(found.joint, hill),
        "scene": F.mse_loss(found.scene, hill),
        "fused": F.mse_loss(found.fused, hill),
        "people": F.mse_loss(found.people, hill.expand(-1, 4, -1, -1)),
    }
    for name, expected in by_name.items():
        torch.testing.assert_close(map_loss(found, group, (name,), 1.5), expected)
    torch.testing.assert_close(map_loss(found, group, tuple(by_name), 1.5), sum(by_name.values()))
    soft = shaken(JointAttentionEstimator(config(sigmoid=True)))(group)
    torch.testing.assert_close(map_loss(soft, group, ("joint",), 1.5, True), F.binary_cross_entropy(soft.joint, hill))
    with pytest.raises(InputError, match="losses: expected some of"):
        map_loss(found, group, (), 1.5)
    with pytest.raises(InputError, match="target: expected the point"):
        map_loss(found, group._replace(target=None), ("joint",), 1.5)
    with pytest.raises(InputError, match="targets: the loss of each"):
        map_loss(found, group._replace(targets=None), ("people",), 1.5)
    with pytest.raises(InputError, match="scene: the loss 'scene' needs an image"):
        map_loss(found._replace(scene=None), group, ("scene",), 1.5)


@pytest.mark.parametrize("head", ["fc", "deconv"])
def test_rival_heads_have_as_many_parameters_as_the_field(head: str) -> None:
    field, rival = (JointAttention(actions=3, head=kind) for kind in ("field", head))
    counts = [sum(p.numel() for p in model.field.parameters()) for model in (field, rival)]
    assert abs(counts[0] - counts[1]) < 0.1 * counts[0]
    maps = rival.double()(*group(), size=(16, 32))
    assert maps.joint.shape == (2, 1, 16, 32)
    assert maps.people.shape == (2, 5, 16, 32)
    with pytest.raises(InputError, match="grid: expected"):
        MapHead(8, (6, 6), "deconv")


def test_uniform_attention_has_the_same_parameters_and_sees_all_alike() -> None:
    plain, uniform = JointAttentionPool(6, width=8), JointAttentionPool(6, width=8, mixing="uniform")
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in uniform.state_dict().items()}
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    attention = shaken(uniform).encode(features(2, 5, 6), mask).attention
    torch.testing.assert_close(attention[0], torch.full_like(attention[0], 1 / 6))
    torch.testing.assert_close(attention[1, :, :, -1, :3], torch.full_like(attention[1, :, :, -1, :3], 1 / 4))
    assert not attention[1, :, :, -1, 3:5].any()


def test_without_a_transformer_the_mean_of_the_people_is_painted() -> None:
    pool, x = shaken(JointAttentionPool(6, width=8, mixing="none")), features(2, 5, 6)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    encoded = pool.encode(x, mask)
    torch.testing.assert_close(encoded.joint[1], pool.norm(pool.embedding(x[1, :3]).mean(0) + pool.joint_token))
    torch.testing.assert_close(encoded.attention[1, 0, 0, -1], torch.tensor([1, 1, 1, 0, 0, 0], dtype=x.dtype) / 3)
    assert not [name for name, _ in pool.named_parameters() if name.startswith("layers")]


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (4, 4)])
def test_numbers_of_layers_and_heads(layers: int, heads: int) -> None:
    pool = shaken(JointAttentionPool(6, width=8, layers=layers, heads=heads))
    assert pool.encode(features(2, 5, 6)).attention.shape == (2, layers, heads, 6, 6)


def test_the_point_nearest_to_all_rays() -> None:
    group = scenes(4, 3, dtype=torch.float64)
    found = nearest_to_rays(group.position, group.gaze, (32, 64))
    torch.testing.assert_close(found, group.target)
    mask = torch.tensor([[True, True, False, True]] * 4)
    wrong = group.gaze.clone()
    wrong[:, 2] = 1.0
    torch.testing.assert_close(nearest_to_rays(group.position, wrong, (32, 64), mask), group.target)
    parallel = nearest_to_rays(torch.tensor([[[0.2, 0.2], [0.4, 0.4]]]), torch.tensor([[[1.0, 0.0]] * 2]), (32, 64))
    torch.testing.assert_close(parallel, torch.tensor([[0.3, 0.3]]))


def test_weights_are_drawn_on_the_scene() -> None:
    position, weights = torch.tensor([[0.25, 0.5], [0.75, 0.5], [0.5, 0.1]]), torch.tensor([0.2, 0.4, 0.9])
    mask = torch.tensor([True, True, False])
    picture = drawn(torch.zeros(3, 40, 80), position, weights, torch.tensor([10.0, 5.0]), mask)
    red = (picture[0] == 1) & (picture[1] == 0)
    halves = red[:, :40].sum(), red[:, 40:].sum()
    assert halves[1] > 2 * halves[0] > 0
    assert picture[:, 5, 10].tolist() == [0.0, 1.0, 0.0]
    assert not red[:10].any()

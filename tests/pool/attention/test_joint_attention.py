import pytest
import torch
import torch.nn.functional as F
from tests.pools import features, shaken
from torch import nn

from cenote.core import InputError
from cenote.pool.attention.joint_attention.field import FieldHead, coordinates, mean_map
from cenote.pool.attention.joint_attention.fusion import JointAttentionFusion
from cenote.pool.attention.joint_attention.measure import detection_curve, distance, gaze_cones, trivial_points
from cenote.pool.attention.joint_attention.model import JointAttention
from cenote.pool.attention.joint_attention.pool import JointAttentionPool
from cenote.pool.attention.joint_attention.targets import best_point, gaussian_target

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

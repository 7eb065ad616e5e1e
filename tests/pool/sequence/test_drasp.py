import pytest
import torch
from tests.pools import by_rules, features, shaken
from torch import Tensor

from cenote.core import Bags, InputError
from cenote.pool import AttentiveStatisticsPool, DraspPool, MeanPool, StatisticsPool
from cenote.pool.sequence.drasp.opinion import OpinionBatch, OpinionPredictor, opinion_loss, train_opinions
from cenote.testing import check_pool


def written_out(pool: DraspPool, clip: Tensor) -> Tensor:
    """One clip, segment by segment."""
    means = torch.stack([s.mean(0) for s in clip.split(pool.segment)])
    w = (torch.tanh(pool.sap_linear(means)) @ pool.attention).softmax(0)
    mean = (w * means).sum(0)
    fine = [mean, ((w * means**2).sum(0) - mean**2).clamp(min=pool.eps).sqrt()]
    coarse = [clip.mean(0), clip.var(0, correction=0).clamp(min=pool.eps).sqrt()]
    return pool.alpha * torch.cat(coarse) + pool.beta * torch.cat(fine)


@pytest.mark.parametrize("segment", [1, 3, 4, 9, 20])
@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_equals_the_equations_clip_by_clip(segment: int, tokens: int) -> None:
    pool, x = shaken(DraspPool(16, segment=segment)), features(3, tokens)
    expected = torch.stack([written_out(pool, clip) for clip in x])
    torch.testing.assert_close(pool(x), expected)
    clips = [x[0], x[1, : (tokens + 1) // 2], x[2, :1]]
    ragged = torch.stack([written_out(pool, clip) for clip in clips])
    torch.testing.assert_close(pool(Bags.from_list(clips)), ragged)
    torch.testing.assert_close(pool(*Bags.from_list(clips).to_padded()), ragged)


def test_at_first_it_is_statistics_pooling_and_only_beta_opens_the_fine_branch() -> None:
    pool, x = DraspPool(16, segment=4).double(), features()
    torch.testing.assert_close(pool(x), StatisticsPool(16, eps=0.0)(x))
    pool(x).sum().backward()
    assert torch.equal(pool.attention.grad, torch.zeros_like(pool.attention))
    assert pool.beta.grad.abs() > 1e-3


def test_the_fine_branch_of_single_frames_is_attentive_statistics() -> None:
    pool, x = shaken(DraspPool(16, branches="fine")), features()
    attentive = AttentiveStatisticsPool(16, hidden=16, heads=1, context=False, eps=pool.eps).double()
    with torch.no_grad():
        attentive.token.load_state_dict(pool.sap_linear.state_dict())
        attentive.score.weight.copy_(pool.attention.T)
    torch.testing.assert_close(pool(x), attentive(x))


def test_alpha_zero_and_beta_one_is_the_fine_branch() -> None:
    both, fine = shaken(DraspPool(16, segment=2)), DraspPool(16, segment=2, branches="fine").double()
    fine.load_state_dict({k: v for k, v in both.state_dict().items() if k not in ("alpha", "beta")})
    with torch.no_grad():
        both.alpha.zero_()
        both.beta.fill_(1.0)
    x = features()
    torch.testing.assert_close(both(x), fine(x))


def test_one_segment_has_the_mean_and_the_floor_as_deviation() -> None:
    for segment in (9, 30):
        pool, x = shaken(DraspPool(16, segment=segment, branches="fine")), features()
        torch.testing.assert_close(pool(x), torch.cat([x.mean(1), torch.full_like(x[:, 0], pool.eps**0.5)], -1))


def test_equal_scores_of_whole_segments_give_the_mean_and_less_deviation() -> None:
    pool, x = shaken(DraspPool(16, segment=3, branches="fine")), features()
    with torch.no_grad():
        pool.attention.zero_()
    mean, std = pool(x).chunk(2, -1)
    torch.testing.assert_close(mean, x.mean(1))
    torch.testing.assert_close(std, x.unflatten(1, (3, 3)).mean(2).std(1, correction=0))
    assert (std <= x.std(1, correction=0)).all()


def test_a_masked_frame_inside_a_clip_still_takes_time() -> None:
    pool, x = shaken(DraspPool(16, segment=2, branches="fine", statistics="mean")), features(1, 6)
    mask = torch.tensor([[True, False, False, False, True, True]])
    _, weights = pool.attend(x.masked_fill(~mask.unsqueeze(-1), float("nan")), mask)
    means = torch.stack([x[0, 0], x[0, 4:].mean(0)])
    w = (torch.tanh(pool.sap_linear(means)) @ pool.attention).softmax(0).squeeze(-1)
    expected = torch.stack([w[0], w.new_zeros(()), w.new_zeros(()), w.new_zeros(()), w[1] / 2, w[1] / 2])
    torch.testing.assert_close(weights[0, 0], expected)


@pytest.mark.parametrize("tokens", [8, 9])
def test_masked_frames_and_further_ones_change_nothing(tokens: int) -> None:
    pool, x = shaken(DraspPool(16, segment=4)), features(2, tokens)
    mask = torch.arange(tokens).expand(2, tokens) < torch.tensor([[tokens], [5]])
    expected = torch.cat([pool(x[:1]), pool(x[1:, :5])])
    longer = torch.cat([x, features(2, 6, seed=3)], 1)
    further = torch.cat([mask, torch.zeros(2, 6, dtype=torch.bool)], 1)
    for frames, real in ((x.masked_fill(~mask.unsqueeze(-1), 1e3), mask), (longer, further)):
        torch.testing.assert_close(pool(frames, real), expected)
    with pytest.raises(InputError, match="mask"):
        pool(x, mask.double() / 2)


@pytest.mark.parametrize("mask_from", [7, 9])
def test_weights_are_what_the_means_took_from_each_frame(mask_from: int) -> None:
    pool, x = shaken(DraspPool(16, segment=4, statistics="mean")), features()
    mask = torch.arange(9).expand(2, 9) < mask_from
    output, weights = pool.attend(x, mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, dtype=x.dtype))
    coarse, fine = (weights @ x).unbind(1)
    torch.testing.assert_close(pool.alpha * coarse + pool.beta * fine, output)
    bags = pool.attend(Bags.from_padded(x, mask)).weights
    torch.testing.assert_close(bags, torch.cat([w[:, m] for w, m in zip(weights, mask, strict=True)], 1))


def test_branches_of_one_are_the_plain_pools() -> None:
    x = features()
    torch.testing.assert_close(DraspPool(16, branches="coarse", statistics="mean")(x), MeanPool(16)(x))
    torch.testing.assert_close(DraspPool(16, branches="coarse")(x), StatisticsPool(16, eps=0.0)(x))


def test_variants_by_the_names_of_the_code() -> None:
    x = features()
    whole = shaken(DraspPool(16, segment=4))
    fine = {k: v for k, v in whole.state_dict().items() if k not in ("alpha", "beta")}
    coarse = [x.mean(1), x.std(1, correction=0)]
    parts = {}
    for name in ("sap", "asp", "gsap", "gasp"):
        pool = DraspPool.variant(name, 16, segment=4).double()
        pool.load_state_dict(fine)
        assert pool.segment == (4 if name[0] == "g" else 1)
        parts[name] = pool(x)
    torch.testing.assert_close(DraspPool.variant("tap", 16)(x), coarse[0])
    torch.testing.assert_close(DraspPool.variant("tsp", 16)(x), torch.cat(coarse, -1))
    torch.testing.assert_close(parts["asp"][:, :16], parts["sap"])
    torch.testing.assert_close(parts["gasp"][:, :16], parts["gsap"])
    for name, first, second in (("drap", coarse[0], parts["gsap"]), ("drsp", torch.cat(coarse, -1), parts["gasp"])):
        pool = DraspPool.variant(name, 16, segment=4).double()
        pool.load_state_dict(whole.state_dict())
        torch.testing.assert_close(pool(x), whole.alpha * first + whole.beta * second)
    assert DraspPool.variant("drsp", 16, fusion="concat").out_dim == 64
    with pytest.raises(InputError, match="name"):
        DraspPool.variant("gap", 16)


def test_fusions() -> None:
    x = features()
    joined = shaken(DraspPool(16, segment=4, fusion="concat"))
    coarse, fine = joined(x).chunk(2, -1)
    for fusion, expected in (("scalars", 0.3 * coarse - 2 * fine), ("sigmoid", 0.25 * coarse + 0.75 * fine)):
        pool = DraspPool(16, segment=4, fusion=fusion).double()
        pool.load_state_dict(joined.state_dict(), strict=False)
        with torch.no_grad():
            pool.alpha.fill_(0.3 if fusion == "scalars" else torch.logit(torch.tensor(0.25)).item())
            if fusion == "scalars":
                pool.beta.fill_(-2.0)
        torch.testing.assert_close(pool(x), expected, atol=1e-6, rtol=1e-6)


@by_rules(check_pool)
@pytest.mark.parametrize(
    "settings",
    [
        {"segment": 4},
        {"segment": 3, "statistics": "mean", "project": True},
        {"segment": 2, "fusion": "concat"},
        {"fusion": "sigmoid"},
    ],
)
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(DraspPool(16, **settings), leave_out=left_out)


def test_a_segment_that_is_longer_than_all_frames_and_no_frames() -> None:
    pool = shaken(DraspPool(16, segment=4))
    assert torch.equal(pool(features(2, 0)), torch.zeros(2, 32, dtype=torch.float64))
    assert pool(features(2, 1)).isfinite().all()


@pytest.mark.parametrize(
    "settings", [{"segment": 0}, {"statistics": "std"}, {"branches": "none"}, {"fusion": "sum"}, {"eps": 0.0}]
)
def test_wrong_arguments_are_named(settings: dict) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        DraspPool(16, **settings)


def test_a_predictor_is_its_equation() -> None:
    torch.manual_seed(0)
    model, x, text = OpinionPredictor(16, segment=3, shared=6).double(), features(3, 8), features(3, 1, 6).squeeze(1)
    mask = torch.arange(8) < torch.tensor([[8], [5], [2]])
    said = model(x, mask, text)
    e = torch.nn.functional.normalize(model.project(model.narrow(model.pool(x, mask))), dim=-1)
    torch.testing.assert_close(said.embedding, e)
    for head, given, found in ((model.quality, e, said.quality), (model.match, torch.cat([e, text], 1), said.match)):
        assert [layer.out_features for layer in head] == [256, 64, 1]
        for layer in head:
            given = given @ layer.weight.T + layer.bias
        torch.testing.assert_close(found, given.squeeze(1))
    assert model(x).match is None
    torch.testing.assert_close(model(x[1:2, :5]).quality, said.quality[1:2])
    with pytest.raises(InputError, match="text: expected one vector of width 6"):
        model(x, text=text[:, :4])
    backed = OpinionPredictor(16, backbone=Doubled(), segment=3, shared=6)
    backed.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(backed.double()(x / 2).quality, model(x).quality)


class Doubled(torch.nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return 2 * x, None


def test_both_heads_learn_until_development_clips_no_longer_gain() -> None:
    torch.manual_seed(0)
    model = OpinionPredictor(8, segment=4, shared=6)
    x, text = torch.randn(48, 10, 8), torch.randn(48, 6)
    batch = OpinionBatch(x, x[:, :, 0].mean(1), text=text, match=text[:, 0])
    said = model(x, text=text)
    expected = (said.quality - batch.quality).abs().mean() + (said.match - batch.match).abs().mean()
    torch.testing.assert_close(opinion_loss(model, batch), expected)
    history = train_opinions(
        model, lambda: [batch], [batch._replace(match=-batch.match)], passes=40, lr=0.05, patience=2
    )
    assert history.best < len(history.losses) - 1
    assert len(history.losses) < 40
    with pytest.raises(InputError, match="text: the match with a prompt"):
        opinion_loss(model, batch._replace(text=None))
    with pytest.raises(InputError, match="development"):
        train_opinions(model, lambda: [batch], [])


def test_where_the_glitch_is_in_seconds() -> None:
    model = OpinionPredictor(16, segment=4, shared=6).double()
    with torch.no_grad():
        model.pool.sap_linear.weight.copy_(torch.eye(16))
        model.pool.sap_linear.bias.zero_()
        model.pool.attention.zero_()[0] = 9.0
    x = torch.zeros(2, 11, 16, dtype=torch.float64)
    x[0, 4:8, 0] = 3.0
    x[1, 8:, 0] = 3.0
    first, second = model.attended(x, seconds=0.5, most=1)
    assert (first[0].start, first[0].end) == (2.0, 4.0)
    assert (second[0].start, second[0].end) == (4.0, 5.5)
    assert first[0].share > 0.9
    with pytest.raises(InputError, match="pooling: has no attention"):
        OpinionPredictor(16, pooling="tsp").attended(x.float())

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from cenote.core import Bags, InputError
from cenote.core.segments import segment_mean
from cenote.reduce.dynamic_token_pooling.boundaries import (
    BoundaryPredictor,
    binomial_loss,
    boundary_cross_entropy,
    entropy_spikes,
    fixed_boundaries,
    piece_boundaries,
    relaxed_bernoulli,
    space_boundaries,
    unigram_pieces,
)
from cenote.reduce.dynamic_token_pooling.decoding import HourglassDecoding, generate_text
from cenote.reduce.dynamic_token_pooling.measures import boundary_scores, shortening_of, step_cost
from cenote.reduce.dynamic_token_pooling.model import Boundaries, HourglassLM, objective
from cenote.reduce.dynamic_token_pooling.relative_attention import shifted
from cenote.reduce.dynamic_token_pooling.shortening import downsample, segment_assignment, segment_counts, upsample
from cenote.reduce.dynamic_token_pooling.text import SYMBOLS, chunks, decode, encode, plain
from cenote.reduce.dynamic_token_pooling.training import evaluate_hourglass, train_hourglass

MODES: tuple[Boundaries, ...] = ("none", "fixed", "whitespace", "unigram", "entropy", "gumbel")
VOCABULARY = 7


def model(boundaries: Boundaries = "whitespace", **settings: Any) -> HourglassLM:
    """Small, in float64, with weights so large that everything shows."""
    torch.manual_seed(1)
    made = HourglassLM(VOCABULARY, (1, 1, 1), 8, 2, inner=8, boundaries=boundaries, every=3, **settings).double().eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, 0, 0.5)
    return made


def ids(batch: int = 2, tokens: int = 12) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(0))


def test_cuts_everywhere_leave_every_token_as_it_is() -> None:
    x = torch.randn(2, 5, 3)
    ones = torch.ones(2, 5)
    short = downsample(ones, x, torch.zeros(1, 1, 3))
    assert torch.equal(short[:, 1:], x)
    assert torch.equal(upsample(ones, short), x)


def test_means_are_those_of_segments_and_each_token_reads_what_is_over() -> None:
    x, null = torch.randn(1, 7, 3), torch.randn(1, 1, 3)
    cuts = torch.tensor([[0.0, 1, 0, 0, 1, 0, 0]])
    short = downsample(cuts, x, null)
    offsets = torch.tensor([0, 2, 5])
    torch.testing.assert_close(short[0, 1:], segment_mean(Bags(x[0, :5], offsets).values, offsets))
    torch.testing.assert_close(short[:, :1], null)
    assert upsample(cuts, torch.arange(3.0).view(1, 3, 1)).flatten().tolist() == [0, 1, 1, 1, 2, 2, 2]
    assert segment_assignment(cuts).tolist() == [[0, 0, 1, 1, 1, 2, 2]]
    own = downsample(cuts, x, null, bidirectional=True)
    torch.testing.assert_close(own[0, 3], x[0, 5:].mean(0))
    assert upsample(cuts, torch.arange(4.0).view(1, 4, 1), bidirectional=True).flatten().tolist() == [
        1,
        1,
        2,
        2,
        2,
        3,
        3,
    ]


def test_the_gradient_of_the_cuts_is_that_of_the_authors_matrix() -> None:
    """`W = (1 - Z) 1[Z = 0]`, `Z = j - g`, written out."""
    x, coefficients = torch.randn(2, 6, 3).double(), torch.randn(2, 6, 3).double()
    cuts = torch.tensor([[0.0, 1, 0, 1, 0, 0], [1, 0, 0, 1, 0, 1]]).double().requires_grad_()
    null = torch.randn(1, 1, 3).double()

    def assigned(number: Tensor, segments: int, dim: int) -> Tensor:
        z = torch.arange(segments) - number[..., None]
        w = (1 - z) * (z == 0)
        return w / (w.sum(dim, keepdim=True) + 1e-9)

    segments = int(cuts.sum(1).max())
    short = assigned(cuts.cumsum(1) - cuts, segments, 1).mT @ x
    up = assigned(cuts.cumsum(1), segments + 1, 2) @ torch.cat([null.expand(2, -1, -1), short], 1).tanh()
    (expected,) = torch.autograd.grad((up * coefficients).sum(), cuts)
    ours = upsample(cuts, downsample(cuts, x, null).tanh())
    torch.testing.assert_close(ours, up)
    torch.testing.assert_close(torch.autograd.grad((ours * coefficients).sum(), cuts)[0], expected)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_a_token_never_changes_what_stands_before_it(mode: Boundaries) -> None:
    made, x = model(mode), ids()
    before = made(x).logits
    for t in (3, 8):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCABULARY
        after = made(changed).logits
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t:], before[:, t:])


@pytest.mark.parametrize("mode", MODES)
def test_step_by_step_gives_the_logits_of_the_whole(mode: Boundaries) -> None:
    made, x = model(mode), ids()
    whole = made(x)
    decoding = HourglassDecoding(made, len(x))
    torch.testing.assert_close(torch.stack([decoding.step(t) for t in x.unbind(1)], 1), whole.logits)
    # the null group, and no more than the segments that closed
    assert decoding.shortened == (0 if mode == "none" else len(x) + int(whole.segments.sum()))
    written = generate_text(made, x[:, :4], 3)
    for n in range(3):
        again = made(torch.cat([x[:, :4], written[:, :n]], 1)).logits[:, -1].argmax(-1)
        assert torch.equal(again, written[:, n])


def test_what_is_drawn_follows_its_generator() -> None:
    made, x = model(), ids()
    first, second = (generate_text(made, x, 4, 1.0, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


def test_no_boundary_at_all_gives_everyone_the_null_group_and_the_model_runs() -> None:
    null = torch.randn(1, 1, 3)
    zeros = torch.zeros(2, 5)
    short = downsample(zeros, torch.randn(2, 5, 3), null)
    assert torch.equal(short, null.expand(2, 1, 3))
    assert torch.equal(upsample(zeros, short), null.expand(2, 5, 3))
    made, x = model(), ids()
    read = made(x, x, torch.zeros_like(x))
    assert read.logits.isfinite().all()
    assert read.segments.tolist() == [0, 0]
    grads = torch.autograd.grad(read.losses.sum(), list(made.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)


def test_items_with_fewer_segments_have_rows_of_zeros_that_nothing_reads() -> None:
    cuts = torch.tensor([[0.0, 1, 0, 1, 0, 1], [0, 1, 0, 0, 0, 0]])
    hidden = torch.randn(2, 6, 3)
    short = downsample(cuts, hidden, torch.ones(1, 1, 3))
    assert not short[1, 2:].any()
    other = short.clone()
    other[1, 2:] = torch.nan
    assert torch.equal(upsample(cuts, other), upsample(cuts, short))
    made, x = model(), ids()
    x[0, :] = 0
    together = made(x).logits
    for item in range(2):
        torch.testing.assert_close(made(x[item : item + 1]).logits[0], together[item])


@pytest.mark.parametrize(
    ("mode", "both"), [(m, b) for m in MODES for b in (False, True) if (m, b) != ("entropy", True)]
)
def test_padding_is_in_no_segment_and_changes_nothing(mode: Boundaries, both: bool) -> None:
    made, x = model(mode, bidirectional=both), ids()
    alone = made(x, x)
    mask = torch.zeros(2, 17, dtype=torch.bool)
    mask[0, :12] = mask[1, 3:15] = True
    padded = torch.full((2, 17), 0).masked_scatter(mask, x)
    read = made(padded, padded, mask=mask)
    torch.testing.assert_close(read.logits[mask].view_as(alone.logits), alone.logits)
    assert torch.equal(read.segments, alone.segments)
    assert not read.boundaries[~mask].any()
    assert alone.losses is not None
    assert read.losses is not None
    torch.testing.assert_close(read.losses.sum(), alone.losses.sum())
    torch.testing.assert_close(read.boundary_loss, alone.boundary_loss)
    torch.testing.assert_close(objective(read, mask), objective(alone))
    assert (segment_assignment(read.boundaries, mask)[~mask] == -1).all()


@pytest.mark.parametrize("mode", MODES)
def test_every_variant_trains_a_step(mode: Boundaries) -> None:
    torch.manual_seed(0)
    made = HourglassLM(VOCABULARY, (1, 1, 1), 8, 2, inner=8, boundaries=mode, every=4)
    text = ids(1, 41)[0]
    cuts = space_boundaries(text, 0) if mode == "unigram" else None
    before = {k: v.clone() for k, v in made.state_dict().items()}
    trained = train_hourglass(made, text, cuts, steps=2, batch=2, length=10, warm_up=1, lr=1e-2)
    assert all(map(math.isfinite, trained.losses + trained.boundary_losses))
    assert all(rate > 0 for rate in trained.boundary_losses) == (mode in ("unigram", "entropy", "gumbel"))
    moved = {k for k, v in made.state_dict().items() if not torch.equal(v, before[k])}
    assert {k for k in before if k.startswith("predictor")} <= moved
    assert "stacks.1.0.qkv.weight" in moved


def test_the_loss_reaches_the_predictor_through_the_straight_through_cuts_only_with_gumbel() -> None:
    for mode in ("gumbel", "unigram"):
        made, x = model(mode), ids()  # type: ignore[arg-type]
        made.train()
        torch.manual_seed(0)
        read = made(x, x, space_boundaries(x, 0) if mode == "unigram" else None)
        assert made.predictor is not None
        assert read.losses is not None
        (grad,) = torch.autograd.grad(read.losses.sum(), made.predictor.layers[0].weight, allow_unused=True)
        assert (grad is not None and bool(grad.any())) == (mode == "gumbel")


def test_drawn_cuts_are_exactly_none_or_one_and_eval_draws_nothing() -> None:
    predictor = BoundaryPredictor(8, 8)
    h = torch.randn(4, 50, 8)
    drawn = predictor(h).hard
    assert set(drawn.flatten().tolist()) == {0.0, 1.0}
    predictor.eval()
    assert torch.equal(predictor(h).soft, predictor(h).soft)
    torch.testing.assert_close(predictor(h).soft, predictor.logits(h).sigmoid())
    predictor.deterministic_eval = False
    assert not torch.equal(predictor(h).soft, predictor(h).soft)
    extremes = relaxed_bernoulli(torch.zeros(2), torch.tensor([0.0, 1.0]), 0.5)
    assert extremes.isfinite().all()


def test_deterministic_mode_repeats_itself() -> None:
    x = ids()
    for mode in MODES:
        made = model(mode)
        assert torch.equal(made(x).logits, made(x).logits)
    released = model("gumbel", deterministic_eval=False)
    assert not torch.equal(released(x).logits, released(x).logits)


def test_five_ways_to_cut() -> None:
    assert fixed_boundaries(2, 7, 3).int().tolist() == [[1, 0, 0, 1, 0, 0, 1]] * 2
    assert space_boundaries(encode("ab c"), 0).int().tolist() == [0, 0, 1, 0]
    pieces = {"undoing": ["un", "doing"], "it": ["it"]}
    assert piece_boundaries("undoing it", pieces.__getitem__).int().tolist() == [0, 1, 0, 0, 0, 0, 0, 1, 0, 1]
    assert piece_boundaries("it ", lambda word: [word]).int().tolist() == [0, 0, 1]
    with pytest.raises(InputError, match="pieces: expected parts of the word 'it'"):
        piece_boundaries("it", lambda word: ["i"])
    spikes = entropy_spikes(torch.tensor([[1.0, 2, 3, 3, 2, 5]]), 2)
    assert spikes.int().tolist() == [[1, 1, 1, 0, 0, 1]]
    assert entropy_spikes(torch.tensor([[1.0, 0.5]]), 0).all()


def test_pieces_of_a_unigram_tokenizer_are_parts_of_their_words() -> None:
    parts = product(("un", "re", "over"), ("load", "turn", "think"), ("ing", "able", "s"))
    text = " ".join(map("".join, parts))
    few, many = (unigram_pieces(text, n) for n in (20, 40))
    for word in (*text.split(), "zebra"):
        assert "".join(few(word)) == "".join(many(word)) == word
    assert piece_boundaries(text, many).sum() < piece_boundaries(text, few).sum()
    assert space_boundaries(encode(text), 0).sum() <= piece_boundaries(text, many).sum()


def test_the_binomial_loss_is_least_near_its_prior() -> None:
    losses = [float(binomial_loss((torch.arange(20)[None] < n).double(), 0.2)) for n in range(21)]
    assert losses.index(min(losses)) == 4
    ours = binomial_loss(torch.tensor([[1.0, 0, 0, 1]]), 0.3)
    torch.testing.assert_close(
        ours, -torch.distributions.Binomial(4, torch.tensor(0.3)).log_prob(torch.tensor(2.0)) / 4
    )
    with pytest.raises(InputError, match="prior: expected a share between 0 and 1"):
        binomial_loss(torch.ones(1, 2), 1.0)


def test_the_released_loss_is_not_least_at_its_targets() -> None:
    target = torch.tensor([[True, False]])
    right, off = torch.tensor([[0.999, 0.001]]), torch.tensor([[0.9, 0.1]])
    assert boundary_cross_entropy(right, target) < 0.01
    assert boundary_cross_entropy(right, target, code_parity=True) > 0.4
    assert boundary_cross_entropy(off, target) > boundary_cross_entropy(right, target)


def test_distances_are_those_of_tokens() -> None:
    scores = torch.arange(5.0).expand(3, 5)
    # the table of both directions: distances 2 to -2
    assert shifted(scores).tolist() == [[2, 3, 4], [1, 2, 3], [0, 1, 2]]


def test_with_both_directions_a_token_reads_its_own_segment() -> None:
    made, x = model(bidirectional=True), ids()
    changed = x.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCABULARY
    assert not torch.allclose(made(changed).logits[:, 0], made(x).logits[:, 0])
    with pytest.raises(InputError, match="cannot go on with a text"):
        HourglassDecoding(made)


def test_plain_text_has_27_symbols() -> None:
    assert plain("  The Café's 2 doors -- OPEN") == "the cafe s two doors open"
    assert len(SYMBOLS) == 27
    assert decode(encode("two doors")) == "two doors"
    with pytest.raises(InputError, match="'D' at 4"):
        encode("two Doors")
    made = chunks(torch.arange(10), 4)
    assert made.data.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert (made.target == made.data + 1).all()
    assert made.start.tolist() == [0, 4]


@pytest.mark.parametrize(("context", "target"), [(8, 3), (6, 6), (64, 5)])
def test_evaluation_predicts_every_token_once_from_its_context(context: int, target: int) -> None:
    made, text = model(), ids(1, 30)[0]
    nats = 0.0
    for start in range(0, 29, target):
        end = min(start + target, 29)
        piece = text[max(0, start - (context - target)) : end]
        log = made(piece[None]).logits[0].log_softmax(-1)[-(end - start) :]
        nats -= float(log.gather(1, text[start + 1 : end + 1, None]).sum())
    found = evaluate_hourglass(made, text, context=context, target=target, batch=2)
    assert found.targets == 29
    assert found.bits_per_character == pytest.approx(nats / math.log(2) / 29)
    assert found.boundary_rate == pytest.approx(float((text[:-1] == 0).double().mean()))


def test_measures_of_a_case_made_by_hand() -> None:
    cuts = torch.tensor([[True, False, False, True, False, False], [False, True, False, False, False, False]])
    mask = torch.ones_like(cuts)
    mask[1, 3:] = False
    assert shortening_of(cuts, mask) == (3.0, 1 / 3)
    assert shortening_of(torch.zeros_like(cuts)).factor == math.inf
    wanted = torch.tensor([[True, False, False, False, True, False], [False, True, False, False, False, True]])
    scores = boundary_scores(cuts, wanted, mask)
    assert scores.precision == 2 / 3
    assert scores.recall == 2 / 3
    assert scores.f1 == pytest.approx(2 / 3)


def test_fewer_segments_keep_fewer_bytes() -> None:
    torch.manual_seed(0)
    made, x = HourglassLM(VOCABULARY, (1, 4, 1), 8, 2, inner=16, boundaries="whitespace"), ids(2, 40)
    many, few = (step_cost(made, x, x, cuts, repeats=1) for cuts in (x >= 0, x < 0))
    assert few.bytes < many.bytes / 2
    assert few.seconds > 0
    assert all(p.grad is None for p in made.parameters())


def test_what_does_not_fit_is_said() -> None:
    made, x = model(), ids()
    for message, call in (
        ("data: expected", lambda: made(x[:, :0])),
        ("target: expected 2 rows of 1 to 12", lambda: made(x, ids(2, 13))),
        ("boundaries: expected \\[2, 12\\]", lambda: made(x, None, x[:, :3])),
        ("boundaries: with boundaries='gumbel'", lambda: model("gumbel")(x, None, x)),
        ("boundaries: expected those of the pieces", lambda: model("unigram").train()(x, x)),
        ("mask: expected padding at the ends", lambda: made(x, mask=torch.arange(12).expand(2, -1) % 3 != 1)),
        ("layers: expected three", lambda: HourglassLM(3, (1, 1))),  # type: ignore[arg-type]
        ("dim: expected an even width", lambda: HourglassLM(3, dim=9, heads=3)),
        ("heads: 3 does not divide dim=8", lambda: HourglassLM(3, dim=8, heads=3)),
        ("bidirectional: knows no next", lambda: HourglassLM(3, boundaries="entropy", bidirectional=True)),
        ("model: expected one in eval mode", lambda: HourglassDecoding(model().train())),
        ("read: has no losses", lambda: objective(made(x))),
        ("prompt: expected", lambda: generate_text(made, x[:, :0], 1)),
        ("context: expected at least target=5", lambda: evaluate_hourglass(made, x[0], context=4, target=5)),
        ("text: expected at least two", lambda: evaluate_hourglass(made, x[0, :1])),
        ("ids: expected more than 12", lambda: chunks(x[0], 12)),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_half_precision_counts_segments_rightly() -> None:
    cuts = torch.ones(1, 600, dtype=torch.bfloat16)
    x = torch.arange(600, dtype=torch.bfloat16).view(1, 600, 1)
    assert torch.equal(upsample(cuts, downsample(cuts, x, torch.zeros(1, 1, 1, dtype=torch.bfloat16))), x)
    assert int(segment_counts(cuts)) == 600

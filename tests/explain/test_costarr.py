from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.explain import Costarr
from cenote.explain.costarr import open_set
from cenote.explain.costarr.last_layer import tap
from tests.models.live import zoo


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, BIAS = drawn(3, 8), drawn(3, seed=1)
FEATURES = drawn(60, 8, seed=2).relu()
LABELS = (FEATURES @ WEIGHT.T + BIAS).argmax(1)


def fitted(**options: object) -> Costarr:
    return Costarr(WEIGHT, BIAS, **options).fit(FEATURES, LABELS)


def test_the_score_is_its_formula() -> None:
    found, f = fitted(), drawn(5, 8, seed=3)
    logits = f @ WEIGHT.T + BIAS
    m = logits.argmax(1)
    largest = (FEATURES @ WEIGHT.T + BIAS).amax(1)
    h = f * WEIGHT[m]
    mean = torch.stack([FEATURES[k == LABELS].mean(0) for k in range(3)])
    mean_h = torch.stack([(FEATURES[k == LABELS] * WEIGHT[k]).mean(0) for k in range(3)])
    cosine = nn.functional.cosine_similarity
    scale = ((logits.amax(1) - largest.min()) / (largest.max() - largest.min())).clamp(0, 1)
    expected = scale * (cosine(f, mean[m], dim=1) + cosine(h, mean_h[m], dim=1)) / 2
    assert torch.allclose(found.score_samples(f), expected, atol=1e-6)
    assert torch.allclose(h.sum(1) + BIAS[m], logits.amax(1), atol=1e-6)
    assert torch.allclose(found.means * WEIGHT, mean_h, atol=1e-6)


def test_streamed_means_are_those_of_one_block() -> None:
    whole, parts = fitted(), Costarr(WEIGHT, BIAS)
    for part in torch.arange(60).split(7):
        parts.partial_fit(FEATURES[part], LABELS[part])
    assert torch.allclose(whole.means, parts.means, atol=1e-7)
    assert parts.range == pytest.approx(whole.range, abs=1e-6)
    assert torch.allclose(whole.score_samples(FEATURES), parts.score_samples(FEATURES), atol=1e-6)


def test_only_correct_samples_count_unless_all_are_asked_for() -> None:
    wrong = LABELS.clone()
    wrong[0] = (wrong[0] + 1) % 3
    strict, lax = (
        Costarr(WEIGHT, BIAS).fit(FEATURES, wrong),
        Costarr(WEIGHT, BIAS, only_correct=False).fit(FEATURES, wrong),
    )
    assert strict.counts.sum() == 59
    assert lax.counts.sum() == 60
    assert torch.allclose(lax.means[wrong[0]], FEATURES[wrong == wrong[0]].mean(0), atol=1e-6)


def test_weights_of_one_leave_the_features() -> None:
    ones, labels = torch.ones(1, 8), torch.zeros(60, dtype=torch.long)
    found, pre = (Costarr(ones, halves=h).fit(FEATURES, labels).score_samples(FEATURES) for h in ("both", "pre"))
    assert torch.allclose(found, pre, atol=1e-6)
    z = FEATURES.sum(1)
    scale = (z - z.min()) / (z.max() - z.min())
    expected = scale * nn.functional.cosine_similarity(FEATURES, FEATURES.mean(0), dim=1)
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_mean_of_its_class_has_a_cosine_of_one() -> None:
    plain, scaled = fitted(scale=None), fitted()
    means = plain.means
    m = plain.logits(means).argmax(1)
    at = m == torch.arange(3)
    assert bool(at.any())
    assert torch.allclose(plain.score_samples(means)[at], torch.ones(int(at.sum())), atol=1e-6)
    least, most = scaled.range
    scale = ((scaled.logits(means).amax(1) - least) / (most - least)).clamp(0, 1)
    assert torch.allclose(scaled.score_samples(means)[at], scale[at], atol=1e-6)


@pytest.mark.parametrize("halves", ["both", "pre", "post"])
@pytest.mark.parametrize("combine", ["mean", "concat"])
def test_the_length_of_features_does_not_change_the_cosines(halves: str, combine: str) -> None:
    found = Costarr(WEIGHT, halves=halves, combine=combine, scale=None).fit(FEATURES, LABELS)
    assert torch.allclose(found.score_samples(5 * FEATURES), found.score_samples(FEATURES), atol=1e-6)


def test_permuting_dimensions_leaves_the_score() -> None:
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    moved = Costarr(WEIGHT[:, order], BIAS).fit(FEATURES[:, order], LABELS)
    assert torch.allclose(moved.score_samples(FEATURES[:, order]), fitted().score_samples(FEATURES), atol=1e-6)


def test_the_scale_lies_between_zero_and_one_and_is_one_at_the_training_maximum() -> None:
    found = fitted()
    scale = found._scales(found.logits(torch.cat([FEATURES, 9 * FEATURES, -9 * FEATURES]))).gather(
        1, found.logits(torch.cat([FEATURES, 9 * FEATURES, -9 * FEATURES])).argmax(1, keepdim=True)
    )
    assert bool(((scale >= 0) & (scale <= 1)).all())
    assert scale[found.logits(FEATURES).amax(1).argmax()] == 1


def test_the_z_score_and_the_largest_of_all_classes() -> None:
    f = drawn(5, 8, seed=3)
    logits = f @ WEIGHT.T + BIAS
    z = (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True, correction=0)
    argmax, best = fitted(scale="z-score"), fitted(scale="z-score", pick="max")
    cosines = fitted(scale=None).score_samples(f)
    assert torch.allclose(argmax.score_samples(f), z.amax(1) * cosines, atol=1e-6)
    assert bool((best.score_samples(f) >= argmax.score_samples(f) - 1e-6).all())


def test_equal_norms_of_the_halves_make_both_forms_equal() -> None:
    weight = torch.where(WEIGHT > 0, 1.0, -1.0)
    labels = (FEATURES @ weight.T).argmax(1)
    mean, concat = (
        Costarr(weight, combine=c).fit(FEATURES, labels).score_samples(FEATURES) for c in ("mean", "concat")
    )
    assert torch.allclose(mean, concat, atol=1e-6)


def test_features_of_zeros_score_zero() -> None:
    assert fitted().score_samples(torch.zeros(2, 8)).tolist() == [0.0, 0.0]
    assert fitted(scale=None).score_samples(torch.zeros(2, 8)).tolist() == [0.0, 0.0]


def test_a_class_without_samples_is_named_and_scores_zero() -> None:
    rest = LABELS != 2
    found = Costarr(WEIGHT, BIAS, names=["cat", "dog", "newt"])
    with pytest.warns(UserWarning, match="classes without a correctly classified training sample: newt"):
        found.fit(FEATURES[rest], LABELS[rest])
    assert not found.means[2].any()
    assert not found.score_samples(FEATURES[~rest]).any()


def test_negative_features_are_allowed_and_negative_cosines_keep_their_sign() -> None:
    signed = drawn(60, 8, seed=4)
    labels = (signed @ WEIGHT.T + BIAS).argmax(1)
    found = Costarr(WEIGHT, BIAS, scale=None, halves="pre").fit(signed, labels)
    k = int(labels[0])
    opposite = -found.means[k : k + 1]
    assert float(nn.functional.cosine_similarity(opposite, found.means[k : k + 1])) == pytest.approx(-1)
    assert float(found._cosines(opposite, torch.tensor([k]))) == pytest.approx(-1)


def test_one_class_works() -> None:
    found = Costarr(WEIGHT[:1]).fit(FEATURES, torch.zeros(60, dtype=torch.long)).calibrate(FEATURES)
    assert bool(found.score_samples(FEATURES).isfinite().all())
    assert set(found.predict(FEATURES).tolist()) <= {0, -1}


@pytest.mark.parametrize("accept", [0.5, 0.95, 1.0])
def test_the_threshold_lets_a_share_of_the_known_pass(accept: float) -> None:
    found = fitted(accept=accept).calibrate(FEATURES)
    predicted = found.predict(FEATURES)
    assert float((predicted >= 0).float().mean()) == pytest.approx(accept, abs=1 / 60 + 1e-6)
    assert torch.equal(predicted[predicted >= 0], LABELS[predicted >= 0])


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    found = fitted(combine="concat", scale="z-score", names=["a", "b", "c"]).calibrate(FEATURES)
    found.save(tmp_path / "score.safetensors")
    again = Costarr.load(tmp_path / "score.safetensors")
    assert torch.equal(found.predict(FEATURES), again.predict(FEATURES))
    assert torch.equal(found.score_samples(FEATURES), again.score_samples(FEATURES))
    assert again.names == ["a", "b", "c"]
    (tmp_path / "no").write_bytes(b"no")
    with pytest.raises(InputError, match="holds no such score"):
        Costarr.load(tmp_path / "no")


def test_the_last_layer_of_a_vision_transformer_and_of_a_cnn_is_tapped() -> None:
    case = zoo.vision("ViTForImageClassification", num_labels=3)("sdpa")
    found = tap(case.model, case.inputs)
    assert torch.allclose(found.features @ found.weight.T + found.bias, found.logits, atol=1e-5)
    torch.manual_seed(0)
    cnn = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4, bias=False)
    )
    found = tap(cnn.eval(), {"input": drawn(2, 3, 6, 6)})
    assert found.features.shape == (2, 5)
    assert Costarr(found.weight, found.bias).logits(found.features).equal(found.features @ found.weight.T)


def test_measures_by_hand() -> None:
    known, unknown = torch.tensor([0.9, 0.8, 0.7, 0.2]), torch.tensor([0.75, 0.1])
    correct = torch.tensor([True, False, True, True])
    assert open_set.auroc(known, unknown) == pytest.approx(6 / 8)
    assert open_set.fpr_at(known, unknown, 0.5) == 0.0
    assert open_set.fpr_at(known, unknown, 1.0) == 0.5
    # correct ones above each unknown: .25 at the first, .75 at the second
    assert open_set.oscr(known, correct, unknown) == pytest.approx((0.25 + 0.75) / 2)


def test_usual_scores() -> None:
    logits = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    assert open_set.max_logit(logits).tolist() == [2.0, 1.0]
    assert open_set.max_probability(logits)[1].item() == pytest.approx(0.5)
    assert open_set.energy(logits)[1].item() == pytest.approx(1 + torch.tensor(2.0).log().item())
    near = open_set.nearest(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.1]]), 1)
    assert near[0] > near[1]


def test_max_logit_is_that_of_pytorch_ood() -> None:
    library = pytest.importorskip("pytorch_ood.detector", reason="pytorch-ood is not installed")
    logits = drawn(6, 4)
    assert torch.allclose(-library.MaxLogit(None).predict_features(logits), open_set.max_logit(logits))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fitted(halves="none"), "halves: expected 'both', 'pre' or 'post'"),
        (lambda: fitted(accept=0.0), "accept: expected a share"),
        (lambda: fitted(names=["a"]), "names: expected 3 as the rows of weight, got 1"),
        (lambda: fitted().predict(FEATURES), "threshold: is not set"),
        (lambda: Costarr(WEIGHT).score_samples(FEATURES), "means: are not there"),
        (lambda: fitted().score_samples(drawn(2, 5)), "features: expected 8 channels as weight, got 5"),
        (lambda: Costarr(WEIGHT).fit(FEATURES, LABELS + 3), "labels: expected 60 numbers of classes from 0 to 2"),
        (lambda: tap(nn.Sequential(nn.ReLU()).eval(), {"input": drawn(2, 3)}), "model: has no torch.nn.Linear"),
        (
            lambda: tap(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval(), {"input": drawn(2, 3)}),
            "layer: '0' times what",
        ),
        (lambda: open_set.auroc(torch.zeros(0), torch.zeros(2)), "known, unknown: expected at least one"),
    ],
)
def test_what_cannot_be_used_is_named(call: Callable[[], object], message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match=message):
            call()

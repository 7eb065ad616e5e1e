"""How few tokens an encoder needs: planted answers on a small vision transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.jobs.reduce import EncoderFrontier, compare_encoder
from cenote.jobs.reduce.encoder_measure import Bench, Probe
from cenote.models.live import Shorten, edited
from cenote.reduce.basic.controls import FirstTokens

COUNT = 40


def tiny(seed: int = 0) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48
    )
    return transformers.ViTModel(config, add_pooling_layer=False).eval()


def pictures(count: int = COUNT) -> tuple[Tensor, Tensor]:
    """Of two classes, told by a bright patch that stands anywhere."""
    generator = torch.Generator().manual_seed(0)
    images = 0.1 * torch.randn(count, 3, 16, 16, generator=generator)
    labels = torch.arange(count) % 2
    at = torch.randint(4, (count, 2), generator=generator) * 4
    for image, label, (y, x) in zip(images, labels, at.tolist(), strict=True):
        image[label, y : y + 4, x : x + 4] += 3.0
    return images, labels


@pytest.fixture(scope="module")
def found() -> EncoderFrontier:
    images, labels = pictures()
    return compare_encoder(tiny(), images, labels, ["top-attention"], (2.0,), blocks=[0, 2], seeds=2)


def test_controls_and_the_unreduced_model_are_always_there(found: EncoderFrontier) -> None:
    assert {r.method for r in found.results} == {
        "unreduced",
        *(f"{name} x2 behind block {b}" for name in ("top-attention", "random-drop", "evenly-spaced") for b in (0, 2)),
    }
    assert {r.reducer for r in found.results if r.control} == {"random-drop", "evenly-spaced"}
    whole = found["unreduced"]
    assert (whole.agreement, whole.tokens, whole.speedup) == (1.0, (17,) * 4, None)


def test_tokens_and_multiply_adds_are_those_that_blocks_read(found: EncoderFrontier) -> None:
    assert found["top-attention x2 behind block 0"].tokens == (17, 9, 9, 9)
    assert found["top-attention x2 behind block 2"].tokens == (17, 17, 17, 9)
    maps = 4 * 24 * 24 + 2 * 24 * 48
    per_block = [n * maps + 2 * n * n * 24 for n in (17, 9)]
    assert found["unreduced"].multiply_adds == 4 * per_block[0]
    assert found["top-attention x2 behind block 0"].multiply_adds == per_block[0] + 3 * per_block[1]


def test_each_is_timed_beside_the_whole(found: EncoderFrontier) -> None:
    for r in found.results:
        if r.block is not None:
            assert r.images_per_s
            assert r.speedup
            assert r.reducer_ms
    assert found.words.cost == "multiply-adds"
    assert {row["method"] for row in found.table} == {r.method for r in found.results}


def test_what_is_recommended_loses_no_more_than_allowed(found: EncoderFrontier) -> None:
    lower = {t.first: t.interval[0] for t in found.against_baseline}
    fit = [r for r in found.results if not r.control and r.block is not None and lower[r.method] >= -1.0]
    assert found.smallest(1.0) == min(fit, key=lambda r: r.multiply_adds).method
    assert found.smallest(-1.0) is None
    assert found.sentence
    assert found.recommended in {r.method for r in found.results}


def test_a_planted_token_is_found_by_who_looks_and_lost_by_who_does_not() -> None:
    images, labels = pictures(80)

    model = tiny()
    # blocks that hand on what they read: features are means of patches
    with torch.no_grad():
        model.embeddings.position_embeddings.zero_()
        for name, parameter in model.named_parameters():
            if "layer" in name and "norm" not in name:
                parameter.zero_()
    found = compare_encoder(model, images + 1.0, labels, ["diverse"], (4.0,), blocks=[0], read="mean", seeds=2)
    assert found["unreduced"].metric > 0.8
    assert found["diverse x4 behind block 0"].metric > found["random-drop x4 behind block 0"].metric + 0.1


def test_finished_cells_are_found_again(tmp_path: Path) -> None:
    images, labels = pictures()
    heard: list[tuple[str, float]] = []
    settings: dict[str, Any] = {"blocks": [1], "seeds": 1, "out": tmp_path}
    first = compare_encoder(tiny(), images, labels, ["top-attention"], (2.0,), **settings)
    again = compare_encoder(
        tiny(), images, labels, ["top-attention"], (2.0,), on_method=lambda *told: heard.append(told), **settings
    )
    assert {share for _, share in heard} == {1.0}
    assert again.results == first.results
    assert EncoderFrontier.load(tmp_path).results == first.results
    other = compare_encoder(tiny(1), images, labels, ["top-attention"], (2.0,), **settings)
    assert other.results != first.results


def test_features_are_those_of_the_shortened_model() -> None:
    images, labels = pictures(6)
    model = tiny()
    bench = Bench.of(model, images, labels, "mean", 1, None, 4, None)
    reducer = FirstTokens(factor=2)
    seen = bench.seen(lambda: Shorten(reducer, 1, protect=1))
    with torch.no_grad(), edited(model, Shorten(reducer, 1, protect=1)):
        states = model(images, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(seen.features, states[:, 1:].mean(1), rtol=1e-5, atol=1e-5)
    assert seen.tokens == {0: 17, 1: 17, 2: 9, 3: 9}
    with torch.no_grad():
        whole = model(images, output_hidden_states=True).hidden_states[2][:, 0]
    torch.testing.assert_close(Bench.of(model, images, labels, "cls", 1, 2, 4, None).whole.features, whole)


def test_no_image_is_answered_by_a_probe_that_has_seen_it() -> None:
    images, labels = pictures(30)
    bench = Bench.of(tiny(), images, labels, "cls", 1, None, 32, None)
    folds = bench.folds
    assert sorted(folds.bincount().tolist()) == [6] * 5
    assert len(bench.probes) == 5
    probe = Probe.fitted(bench.whole.features[folds != 2], labels[folds != 2])
    own = folds == 2
    assert torch.equal(bench.answers(bench.whole.features)[own], probe.classes(bench.whole.features[own]))


def test_a_probe_is_ridge_regression_on_classes() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    probe = Probe.fitted(x, labels)
    a = ((x.double() - probe.mean) / probe.deviation).numpy()
    y = torch.nn.functional.one_hot(labels, 3).double().numpy()
    weights = [linear_model.Ridge(alpha=d * 60).fit(a, y).coef_.T for d in (1e-4, 1e-2, 1.0)]
    assert min(abs(probe.weight.numpy() - w).max() for w in weights) < 1e-8


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"methods": ["mean"]}, "methods: mean is no reducer"),
        ({"methods": ["top-tokens"]}, "methods: top-tokens asks for saliency"),
        ({"methods": ["hierarchical"]}, "methods: hierarchical makes vectors of norm 1"),
        ({"factors": (1.0,)}, "factors: expected numbers above 1"),
        ({"blocks": [3]}, "blocks: expected some of 0 to 2"),
        ({"state": 9}, "state: expected one of 1 to 4"),
        ({"prefix": 0}, "prefix: 0, and read='cls'"),
        ({"labels": [0] * COUNT}, "labels: expected at least two classes"),
        ({"labels": [0, 1]}, "labels: expected one for each of 40"),
        ({"labels": [0] * (COUNT - 1) + [1]}, "labels: class 1 has one image"),
        ({"stack": "other"}, "stack: 'other' is none of"),
    ],
)
def test_wrong_input_says_so(given: dict[str, Any], says: str) -> None:
    images, labels = pictures()
    with pytest.raises(InputError, match=says):
        compare_encoder(tiny(), images, **{"labels": labels, **given})


def test_a_model_in_training_is_refused() -> None:
    images, labels = pictures()
    with pytest.raises(InputError, match="model: is in training mode"):
        compare_encoder(tiny().train(), images, labels)


def test_another_activation_is_another_encoder() -> None:
    from torch import nn

    from cenote.jobs.reduce.encoder_measure import Bench

    prints = set()
    for activation in (nn.GELU, nn.ReLU):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=activation()).eval()
        with torch.no_grad():
            for p in layer.parameters():
                p.fill_(0.1)
        model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()
        images, labels = torch.zeros(4, 5, 8), torch.tensor([0, 1, 0, 1])
        prints.add(Bench(model, images, labels, "cls", 1, 4, 2, "layers").fingerprint())
    assert len(prints) == 2

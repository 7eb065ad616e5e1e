from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.explain import DeepSimilarity, pair_map, terms
from cenote.explain.deep_similarity import faithful, maps
from cenote.explain.deep_similarity.maps import Terms
from tests.models.live import zoo

KINDS = ("average", "max", "average, head", "max, head", "flatten")


def features(seed: int = 0, items: int = 2, places: int = 6, channels: int = 5) -> Tensor:
    return torch.randn(items, places, channels, generator=torch.Generator().manual_seed(seed)).relu()


def linear(inputs: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, 3, bias=bias)


def of(x: Tensor, kind: str, mask: Tensor | None = None) -> Terms:
    if kind == "flatten":
        return terms(x, mask, "flatten", linear(x.shape[1] * x.shape[2]))
    pooling, _, head = kind.partition(", ")
    return terms(x, mask, pooling, linear(x.shape[2]) if head else None)


def embedded(x: Tensor, kind: str) -> Tensor:
    """What a network computes."""
    if kind == "flatten":
        return linear(x.shape[1] * x.shape[2])(x.flatten(1))
    pooled = x.mean(1) if kind.startswith("average") else x.amax(1)
    return linear(x.shape[2])(pooled) if kind.endswith("head") else pooled


@pytest.mark.parametrize("kind", KINDS)
def test_maps_sum_to_the_cosine_of_the_embeddings(kind: str) -> None:
    a, b = features(), features(1)
    found = pair_map(of(a, kind), of(b, kind))
    cosine = nn.functional.cosine_similarity(embedded(a, kind), embedded(b, kind))
    assert torch.allclose(found.cosine, cosine, atol=1e-6)
    assert float(found.completeness_error.max()) < 1e-6
    matrix = maps.pair_matrix(of(a, kind), of(b, kind))
    assert torch.allclose(matrix.sum(2), found.a, atol=1e-6)
    assert torch.allclose(matrix.sum(1), found.b, atol=1e-6)
    parts = maps.channel_parts(of(a, kind), of(b, kind))
    assert torch.allclose(parts.sum(1), cosine, atol=1e-6)
    by_channel = [maps.channel_map(of(a, kind), of(b, kind), k) for k in range(parts.shape[1])]
    assert torch.allclose(torch.stack(by_channel).sum(0), found.a, atol=1e-6)
    assert torch.allclose(by_channel[1].sum(1), parts[:, 1], atol=1e-6)


def test_the_average_is_its_formula() -> None:
    a, b = features().double(), features(1).double()
    pa, pb = a.mean(1), b.mean(1)
    expected = (a @ pb.unsqueeze(2)).squeeze(2) / (6 * pa.norm(dim=1) * pb.norm(dim=1))[:, None]
    assert torch.allclose(pair_map(terms(a), terms(b)).a, expected, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_items_have_maps_that_sum_to_one(kind: str) -> None:
    found = pair_map(of(features(), kind), of(features(), kind))
    assert torch.allclose(found.a.sum(1), torch.ones(2))
    assert torch.allclose(found.a, found.b)


@pytest.mark.parametrize("kind", KINDS[:4])
def test_permuting_places_permutes_the_map(kind: str) -> None:
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    plain, moved = (pair_map(of(x, kind), of(features(1), kind)) for x in (features(), features()[:, order]))
    assert torch.allclose(plain.a[:, order], moved.a, atol=1e-6)
    assert torch.allclose(plain.b, moved.b, atol=1e-6)


def test_one_place_each_is_the_cosine() -> None:
    a, b = features(places=1), features(1, places=1)
    found = pair_map(terms(a), terms(b))
    assert torch.allclose(found.a, nn.functional.cosine_similarity(a[:, 0], b[:, 0])[:, None])


def test_the_maximum_of_equal_places_is_their_average() -> None:
    a, b = features(places=1).expand(2, 6, 5), features(1, places=1).expand(2, 6, 5)
    assert torch.allclose(pair_map(of(a, "max"), of(b, "max")).a, pair_map(of(a, "average"), of(b, "average")).a)


def test_ties_of_the_maximum_are_split_equally() -> None:
    x = torch.tensor([[[2.0, 1.0], [2.0, 0.0], [1.0, -1.0]]])
    assert terms(x, pooling="max").values.tolist() == [[[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]]
    below = terms(-x - 1, torch.tensor([[True, True, False]]), "max")
    assert below.embedding.tolist() == [[-3.0, -1.0]]


@pytest.mark.parametrize("pooling", ["average", "max"])
def test_the_size_of_features_does_not_matter(pooling: str) -> None:
    plain, scaled = (
        pair_map(terms(c * features(), pooling=pooling), terms(features(1), pooling=pooling)) for c in (1, 7)
    )
    assert torch.allclose(plain.a, scaled.a, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS[:4])
def test_padding_changes_nothing_and_gets_nothing(kind: str) -> None:
    a, b = features(), features(1)
    padded = torch.cat([a, torch.full((2, 3, 5), torch.nan)], 1)
    mask = torch.arange(9).expand(2, 9) < 6
    plain, found = (pair_map(x, of(b, kind)) for x in (of(a, kind), of(padded, kind, mask)))
    assert torch.allclose(plain.a, found.a[:, :6], atol=1e-6)
    assert not found.a[:, 6:].any()
    assert torch.equal(found.attributions()[0].mask, mask)


def test_an_embedding_of_zeros_has_maps_of_zeros() -> None:
    found = pair_map(terms(torch.zeros(1, 4, 5)), terms(features(items=1)))
    assert not found.a.any()
    assert not found.b.any()
    assert found.cosine.item() == 0
    assert not maps.norm_map(terms(torch.zeros(1, 4, 5))).any()


def test_regions_add_up_to_the_cosine() -> None:
    query, gallery = of(features(items=1), "average"), embedded(features(1, items=7), "average")
    region = torch.tensor([True, True, False, False, True, False])
    whole = nn.functional.cosine_similarity(query.embedding, gallery)
    parts = [maps.region_scores(query, r, gallery) for r in (region, ~region, region | ~region)]
    assert torch.allclose(parts[0] + parts[1], whole, atol=1e-6)
    assert torch.allclose(parts[2], whole, atol=1e-6)
    alone = maps.region_scores(query, region, gallery, "region")
    assert torch.allclose(
        alone, nn.functional.cosine_similarity(features(items=1)[:, region].sum(1), gallery), atol=1e-6
    )
    assert maps.region_search(query, region, gallery, 3).tolist() == parts[0].argsort(descending=True)[:3].tolist()


def test_grad_cam_of_averages_is_the_map_up_to_scale() -> None:
    a, b = features(), terms(features(1))
    cam, found = maps.grad_cam(a, b), pair_map(terms(a), b).a
    ratio = cam.sum(1) / found.sum(1)
    assert torch.allclose(cam, found * ratio[:, None], atol=1e-6)


class Embedding(nn.Module):
    def __init__(self, pooling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1) if pooling == "average" else nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.body(images)).flatten(1))


@pytest.mark.parametrize("pooling", ["average", "max"])
def test_an_image_network_is_explained_as_it_embeds(pooling: str) -> None:
    model = Embedding(pooling).eval()
    explainer = DeepSimilarity(model, "body", pooling, "head")
    a, b = (
        torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(s)) for s, size in ((0, (6, 9)), (1, (7, 5)))
    )
    found = explainer.explain({"images": a}, {"images": b})
    with torch.no_grad():
        assert torch.allclose(found.cosine, nn.functional.cosine_similarity(model(a), model(b)), atol=1e-5)
    assert float(found.completeness_error.max()) < 1e-5
    first, second = found.on_grids()
    assert first.shape == (2, 4, 7)
    assert second.shape == (2, 5, 3)
    kept = explainer.terms({"images": b})
    assert torch.equal(explainer.explain({"images": a}, kept).a, found.a)
    assert explainer.search(kept.item(0), torch.ones(15, dtype=torch.bool), kept.embedding, 2)[0] == 0
    assert not model.body._forward_hooks


def test_patches_of_a_vision_transformer_lie_on_their_grid() -> None:
    case = zoo.vision("ViTModel")("sdpa")
    side = case.model.config.image_size // case.model.config.patch_size
    explainer = DeepSimilarity(case.model, prefix=1, grid=(side, side))
    found = explainer.explain(case.inputs, explainer.terms(case.inputs).item(1))
    with torch.no_grad():
        pooled = case.model(**case.inputs).last_hidden_state[:, 1:].mean(1)
    assert torch.allclose(found.cosine, nn.functional.cosine_similarity(pooled, pooled[1:]), atol=1e-5)
    assert found.units == "patches"
    assert found.on_grids()[0].shape == (2, side, side)


def test_a_sentence_encoder_with_mean_pooling_is_explained_by_its_tokens() -> None:
    model = zoo.text("BertModel")("sdpa").model
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    inputs = {"input_ids": zoo.ids(2, 7), "attention_mask": mask}
    found = DeepSimilarity(model).explain(inputs, inputs)
    assert torch.allclose(found.cosine, torch.ones(2))
    assert not found.a[1, 4:].any()
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    crossed = DeepSimilarity(model).explain(inputs, DeepSimilarity(model).terms(inputs).item(0))
    assert torch.allclose(crossed.cosine, nn.functional.cosine_similarity(pooled, pooled[:1]), atol=1e-6)


def test_removing_by_a_map_lowers_the_cosine_fastest() -> None:
    a, b = of(features(places=8), "average"), of(features(1, places=8), "average")
    by_map, by_norm = (faithful.removal_curve(a, b, s) for s in (pair_map(a, b).a, maps.norm_map(a)))
    assert torch.allclose(by_map[:, 0], pair_map(a, b).cosine, atol=1e-6)
    assert torch.allclose(by_norm[:, 0], by_map[:, 0])
    assert float(by_map.mean()) < float(by_norm.mean())


def test_pictures_and_words_show_the_signs() -> None:
    image, scores = torch.full((3, 4, 4), 0.5), torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    shown = faithful.overlaid(image, scores)
    assert shown.shape == image.shape
    assert float(shown[0, 0, 0]) > float(shown[2, 0, 0])
    assert float(shown[2, 3, 0]) > float(shown[0, 3, 0])
    assert torch.equal(faithful.overlaid(image, 0 * scores), image)
    pair = faithful.side_by_side([image, torch.rand(3, 8, 4)], [scores, scores])
    assert pair.shape == (3, 4, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: terms(features(), head=nn.ReLU()), "head: expected a torch.nn.Linear, got ReLU"),
        (lambda: terms(features(), head=nn.Linear(4, 2)), "head: takes 4 channels, and the features have 5"),
        (lambda: terms(features(), pooling="flatten"), "head: 'flatten' needs one of 6 x 5 inputs"),
        (lambda: terms(features(), torch.zeros(2, 6, dtype=torch.bool)), "mask: an item has no place"),
        (lambda: terms(features(), pooling="mean"), "pooling: expected 'average', 'max' or 'flatten'"),
        (lambda: pair_map(terms(features()), terms(features())).on_grids(), "grid: these units lie on no grid"),
        (lambda: pair_map(terms(features(), grid=(2, 2)), terms(features())), "grid_a: 2 x 2 are not the 6 units"),
        (lambda: DeepSimilarity(Embedding("max").train()), "model: expected one in eval mode"),
        (lambda: DeepSimilarity(Embedding("max").eval(), head="tail"), "head: the model has no module 'tail'"),
        (lambda: DeepSimilarity(Embedding("max").eval()).terms({"images": torch.rand(1, 3, 5, 5)}), "layer: gives"),
        (lambda: faithful.shaded(["a"], torch.ones(2)), "words: expected 2"),
    ],
)
def test_what_cannot_be_used_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()

"""The DINOv2 ViT-S/14 of a saliency model: its states, and what they tell at which layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from sklearn.datasets import load_digits, load_sample_image
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from cenote.models import Backbone, Prepared, load

pytestmark = pytest.mark.real("a vision transformer of 22 million parameters")

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
LAYERS = (10, 11, 12)
TRAIN = 300


@pytest.fixture(scope="module")
def backbone(model_folder: Callable[[str], Path]) -> Backbone:
    return load(str(model_folder("dinov2-small")))


@pytest.fixture(scope="module")
def untrained(dinov2: Any, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """The same model with random weights."""
    folder = tmp_path_factory.mktemp("untrained")
    torch.manual_seed(0)
    type(dinov2.model)(dinov2.model.config).save_pretrained(folder)
    dinov2.processor.save_pretrained(folder)
    return load(str(folder))


def cls_accuracy(
    backbone: Backbone, images: Float[Tensor, "items 3 height width"], labels: Int[np.ndarray, "items"], side: int
) -> dict[int, float]:
    """Of the 10 nearest [CLS] among the first images, per layer, on the others."""
    pixels = torch.nn.functional.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    pixels = (pixels - MEAN[:, None, None]) / STD[:, None, None]
    batches = [backbone.states(Prepared({"pixel_values": part}), LAYERS).layers for part in pixels.split(50)]
    found = {}
    for layer in LAYERS:
        cls = torch.cat([states[layer][:, 0] for states in batches]).numpy()
        nearest = KNeighborsClassifier(10, metric="cosine").fit(cls[:TRAIN], labels[:TRAIN])
        found[layer] = float(nearest.score(cls[TRAIN:], labels[TRAIN:]))
    return found


def photo(name: str) -> Any:
    from PIL import Image

    return Image.fromarray(load_sample_image(name))


def test_states_are_those_of_the_library(dinov2: Any, backbone: Backbone) -> None:
    layout = backbone.layout
    assert (layout.blocks, layout.dims[12], layout.heads, layout.notes) == (12, 384, 6, ())
    assert (layout.tokens[12], layout.prefix_tokens, layout.grid) == (257, 1, (16, 16))
    images = [photo("flower.jpg"), photo("china.jpg")]
    with torch.no_grad():
        expected = dinov2.model(**dinov2.processor(images=images, return_tensors="pt"), output_hidden_states=True)
    found = backbone(images, range(13))
    assert found.mask is None
    assert found.layers[12].shape == (2, 257, 384)
    for layer in range(12):
        torch.testing.assert_close(found.layers[layer], expected.hidden_states[layer])
    torch.testing.assert_close(found.layers[12], expected.last_hidden_state)


def test_patches_tell_a_flower_from_what_is_behind_it(backbone: Backbone) -> None:
    """The first principal component is large where the flower is: it stands in the middle, and the corners are behind it."""
    patches = backbone([photo("flower.jpg")], [11]).layers[11][0, 1:]
    centred = patches - patches.mean(0)
    component = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    seen = (centred @ component).view(16, 16)
    middle, corners = seen[6:10, 6:10].mean(), seen[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    assert middle * corners < 0


def test_tells_digits_apart_as_random_weights_do_not(backbone: Backbone, untrained: Backbone) -> None:
    digits = load_digits()
    some = np.random.RandomState(0).permutation(len(digits.images))[: TRAIN + 150]
    images = torch.from_numpy(digits.images[some] / 16).float().unsqueeze(1).expand(-1, 3, -1, -1)
    trained, random = (cls_accuracy(b, images, digits.target[some], side=56) for b in (backbone, untrained))
    for layer in (10, 11):
        assert trained[layer] > 0.6
        assert trained[layer] > random[layer] + 0.2


def test_its_output_knows_less_of_categories_than_the_layer_before(
    backbone: Backbone, untrained: Backbone, data_dir: Path
) -> None:
    """As a model that was fine-tuned for saliency: read layer 10 or 11."""
    images, labels = photos(data_dir / "cifar10")
    trained, random = (cls_accuracy(b, images, labels, side=84) for b in (backbone, untrained))
    for layer in (10, 11):
        assert trained[layer] > random[layer] + 0.15
        assert trained[layer] > trained[12] + 0.03


def photos(folder: Path) -> tuple[Float[Tensor, "items 3 height width"], Int[np.ndarray, "items"]]:
    """30 of each class to look among, then 20 of each to name."""
    from PIL import Image

    images, labels = [], []
    for split, count in (("train", TRAIN // 10), ("test", 20)):
        for label, name in enumerate(sorted(p.name for p in (folder / split).iterdir())):
            for file in sorted((folder / split / name).iterdir())[:count]:
                images.append(np.asarray(Image.open(file).convert("RGB"), dtype=np.float32) / 255)
                labels.append(label)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), np.asarray(labels)

"""Data that come with the package: real handwritten digits as token features, whole images and ragged bags."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from cenote.core import Bags
from cenote.features.dataset import SPLITS, TokenDataset
from cenote.features.digits_mae import GRID, DigitsEncoder

FILE = Path(__file__).parent / "data" / "digits_mae.safetensors"
SOURCE = "scikit-learn digits (UCI optical recognition of handwritten digits) through cenote's masked autoencoder"
WANTED = 9
BAGS = {"train": 400, "val": 100, "test": 300}
SHORTEST, LONGEST = 5, 40
BAGS_SEED = 0


class Digits(NamedTuple):
    """The embedded file: images with pixels from 0 to 16, and the backbone that has seen only those of split 0."""

    images: UInt8[Tensor, "items 8 8"]
    labels: Int[Tensor, "items"]
    split: Int[Tensor, "items"]
    encoder: DigitsEncoder


def digits() -> TokenDataset:
    """scikit-learn's 1,797 handwritten digits, each as a [CLS] token and a 4 x 4 grid of patch tokens of width 64.

    The 8 x 8 images are cut into patches of 2 x 2 and run through a frozen masked autoencoder that was trained, without
    labels, on the train images alone (`scripts/train_digits_backbone.py`). The split is fixed and stratified: 1000 train,
    200 val, 597 test. scikit-learn does not say who wrote which digit, so the split is by image, not by writer.

    Example:
        >>> data = digits()
        >>> data.x.shape, data.task, [len(data.indices(s)) for s in ("train", "val", "test")]
        (torch.Size([1797, 17, 64]), 'multiclass', [1000, 200, 597])

    Source: Pedregosa et al., "Scikit-learn: Machine Learning in Python", JMLR 2011 (the data); He et al., "Masked
    Autoencoders Are Scalable Vision Learners", CVPR 2022 (the backbone).
    """
    raw = _read()
    return TokenDataset(
        name="digits",
        x=_tokens().clone(),
        y=raw.labels.clone(),
        task="multiclass",
        classes=tuple(str(d) for d in range(10)),
        ids=tuple(f"digit-{i:04d}" for i in range(len(raw.labels))),
        split=raw.split.clone(),
        prefix_tokens=1,
        grid=(GRID, GRID),
        images=_pictures(raw.images),
        source=SOURCE,
    )


def digit_bags() -> TokenDataset:
    """800 bags of 5 to 40 digits: does the bag hold a 9? One vector per digit, `token_labels` 1 where it is a 9.

    An instance is the mean of a digit's 16 patch tokens. Bags take their digits from the images of their own split only
    (400 train, 100 val, 300 test bags), no image twice within a bag. Half of the bags hold a 9, and their sizes have the same
    distribution as those of the others. A bag with a 9 is a plain random draw from the split's images, repeated until it
    holds one; a bag without is a plain random draw from the other digits.

    Example:
        >>> data = digit_bags()
        >>> data.x, data.classes
        (Bags(batch=800, total=..., dim=64, dtype=torch.float32), ('no 9', 'a 9'))

    Source: the task of Ilse et al., "Attention-based Deep Multiple Instance Learning", ICML 2018, on scikit-learn's digits.
    """
    raw = _read()
    vectors = _tokens()[:, 1:].mean(1)
    # RandomState, because numpy promises that its stream never changes
    rng = np.random.RandomState(BAGS_SEED)
    bags: list[NDArray[np.int64]] = []
    y: list[int] = []
    for name, count in BAGS.items():
        images = (raw.split == SPLITS.index(name)).nonzero().squeeze(1).numpy()
        is_wanted = raw.labels.numpy()[images] == WANTED
        for positive in rng.permutation(count) % 2 == 0:
            bags.append(_draw(rng, images, is_wanted, bool(positive)))
            y.append(int(positive))
    members = torch.from_numpy(np.concatenate(bags))
    lengths = torch.tensor([len(b) for b in bags])
    names = [(number, name) for number, name in enumerate(SPLITS) for _ in range(BAGS[name])]
    return TokenDataset(
        name="digit-bags",
        x=Bags(vectors[members], torch.nn.functional.pad(lengths.cumsum(0), (1, 0))),
        y=torch.tensor(y),
        task="binary",
        classes=(f"no {WANTED}", f"a {WANTED}"),
        ids=tuple(f"bag-{i:03d}" for i in range(len(bags))),
        split=torch.tensor([number for number, _ in names]),
        token_labels=(raw.labels[members] == WANTED).long(),
        source=f"bags drawn with seed {BAGS_SEED} from {SOURCE}",
    )


def backbone() -> DigitsEncoder:
    """A copy of the frozen masked autoencoder's encoder, for those who want to go on training it.

    Example:
        >>> backbone()(torch.rand(2, 8, 8)).shape
        torch.Size([2, 17, 64])
    """
    return copy.deepcopy(_read().encoder)


class Classified(NamedTuple):
    """The encoder, a logistic regression on its [CLS] token, and the test images that neither has seen."""

    encoder: DigitsEncoder
    weight: Float[Tensor, "classes dim"]
    bias: Float[Tensor, "classes"]
    images: UInt8[Tensor, "items 8 8"]
    labels: Int[Tensor, "items"]
    ids: tuple[str, ...]


def classified() -> Classified:
    """A whole classifier of the embedded digits, for those who want to look into one.

    The regression is fitted anew each time, on the train images, in a fraction of a second.

    Example:
        >>> classified().weight.shape
        torch.Size([10, 64])
    """
    from sklearn.linear_model import LogisticRegression

    raw, cls = _read(), _tokens()[:, 0].numpy()
    train, test = ((raw.split == SPLITS.index(name)).numpy() for name in ("train", "test"))
    fitted = LogisticRegression(max_iter=2000).fit(cls[train], raw.labels.numpy()[train])
    weight, bias = (torch.from_numpy(numbers).float() for numbers in (fitted.coef_, fitted.intercept_))
    ids = tuple(f"digit-{i:04d}" for i in np.flatnonzero(test))
    return Classified(backbone(), weight, bias, raw.images[test], raw.labels[test], ids)


def _draw(
    rng: np.random.RandomState, images: NDArray[np.int64], is_wanted: NDArray[np.bool_], positive: bool
) -> NDArray[np.int64]:
    size = rng.randint(SHORTEST, LONGEST + 1)
    if not positive:
        return rng.choice(images[~is_wanted], size, replace=False)
    while True:
        rows = rng.choice(len(images), size, replace=False)
        if is_wanted[rows].any():
            return images[rows]


@cache
def _read() -> Digits:
    from safetensors.torch import load_file

    stored = load_file(FILE)
    encoder = DigitsEncoder()
    prefix = "encoder."
    encoder.load_state_dict({k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)})
    return Digits(
        images=stored["images"],
        labels=stored["labels"].long(),
        split=stored["split"].long(),
        encoder=encoder.eval(),
    )


@cache
def _tokens() -> Float[Tensor, "items 17 64"]:
    raw = _read()
    with torch.no_grad():
        return raw.encoder(raw.images.float() / 16)


def _pictures(images: UInt8[Tensor, "items 8 8"]) -> NDArray[np.uint8]:
    pictures: NDArray[np.uint8] = (images.numpy().astype(np.float32) * (255 / 16)).round().astype(np.uint8)
    return pictures

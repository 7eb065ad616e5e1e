from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests import tiny

from cenote.features.raw import RawItems, open_raw
from cenote.jobs.extract import ModelSpec

Photos = Callable[[int], Path]


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    """Make a folder of so many small images of two classes."""

    def make(count: int) -> Path:
        from PIL import Image

        rng = np.random.RandomState(0)
        for i in range(count):
            folder = tmp_path / "photos" / ("cat" if i % 2 else "dog")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.randint(0, 256, (24, 36, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
        return tmp_path / "photos"

    return make


@pytest.fixture
def items(photos: Photos) -> RawItems:
    """20 images."""
    return open_raw(photos(20))


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """A tiny ViT."""
    return ModelSpec(str(tiny.vit(tmp_path_factory.mktemp("vit"))))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """A tiny BERT."""
    return ModelSpec(str(tiny.bert(tmp_path_factory.mktemp("bert"))))


def content(store: Path) -> dict[str, bytes]:
    """Every file of a store and its bytes, apart from those that tell times and processes."""
    return {
        str(f.relative_to(store)): f.read_bytes()
        for f in sorted(store.rglob("*"))
        if f.is_file() and f.name not in (".lock", "times.json")
    }

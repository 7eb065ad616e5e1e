"""Files through real models into a store, and every fast pool on what was stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from cenote import create, methods
from cenote.core import Bags
from cenote.features import TokenDataset, read
from cenote.features.raw import open_raw
from cenote.jobs.extract import ModelSpec, Options, extract

pytestmark = pytest.mark.real("extracts with four models")

SENTENCES = (
    "A good film.", "I liked every minute of it.", "Warm, funny and true.",
    "A bad film.", "I left before its end.", "Cold, dull and false: nobody should have to see this twice.",
)  # fmt: skip


def images(folder: Path) -> Path:
    """Three crops of each of scikit-learn's photos."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    for name in ("china", "flower"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(load_sample_image(f"{name}.jpg")[:, 100 * i : 100 * i + 400]).save(
                folder / name / f"{i}.png"
            )
    return folder


def sounds(folder: Path) -> Path:
    """Tones and noises of different lengths."""
    random = np.random.RandomState(0)
    for i in range(3):
        time = np.arange(8000 * (i + 1) // 2) / 8000
        for name, sound in (("noise", random.randn(len(time)) / 8), ("tone", np.sin(2 * np.pi * 220 * (i + 1) * time))):
            (folder / name).mkdir(parents=True, exist_ok=True)
            wavfile.write(folder / name / f"{i}.wav", 8000, sound.astype(np.float32))
    return folder


def texts(folder: Path) -> Path:
    folder.mkdir()
    rows = [f"{text}\t{'good' if i < 3 else 'bad'}" for i, text in enumerate(SENTENCES)]
    (folder / "texts.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", "utf-8")
    return folder / "texts.tsv"


CASES = {
    "dinov2-small": (images, 11, [257] * 6),
    "whisper-tiny.en": (sounds, 2, [25, 50, 75] * 2),
    "minilm-l6-v2": (texts, 6, None),
    "smollm2-135m-instruct": (texts, 15, None),
}


@pytest.fixture(scope="module", params=CASES)
def stored(
    request: pytest.FixtureRequest, model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> TokenDataset:
    """Six items through the model, compared on the way with its states of each item alone."""
    make, layer, lengths = CASES[request.param]
    folder = tmp_path_factory.mktemp("real")
    items, spec = open_raw(make(folder / "raw")), ModelSpec(str(model_folder(request.param)))
    backbone = spec.load()
    extract(items, spec, folder / "store", Options(layer, dtype="float32", batch=4), backbone=backbone)
    data = read(folder / "store")
    for i, item in enumerate(items.items):
        states = backbone([item.read().content], [layer])
        x = states.layers[layer][0]
        torch.testing.assert_close(data.item(i), x if states.mask is None else x[states.mask[0]], rtol=1e-3, atol=1e-2)
    assert lengths is None or data.lengths().tolist() == lengths
    return data


def test_every_fast_pool_gives_the_same_padded_and_ragged(stored: TokenDataset) -> None:
    rows = [stored.item(i) for i in range(len(stored.ids))]
    x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"))
    mask = torch.arange(x.shape[1]) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    for method in methods(room="pool", kind="sets", fast=True):
        torch.manual_seed(0)
        pool = create(method.name, dim=stored.dim).eval()
        with torch.no_grad():
            padded, ragged = pool(x, mask), pool(Bags.from_padded(x, mask))
        assert torch.isfinite(padded).all(), method.name
        scale = float(padded.abs().max())
        torch.testing.assert_close(
            padded, ragged, rtol=1e-3, atol=1e-4 * scale, msg=lambda said, name=method.name: f"{name}: {said}"
        )

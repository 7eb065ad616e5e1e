"""MNIST and two photographs through a small ViT that this script trains: from image files to a report.

    python examples/images.py [--data-dir DIR] [--out DIR]

The ViT learns from 4,000 images to tell odd digits from even ones, and is then asked, frozen, which digit the others show.
DIR/mnist10k must hold the MNIST test images and labels (IDX, gzip).
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
from commands import cenote

SEEN, ITEMS = 4000, 8000
EPOCHS, BATCH = 3, 64


def mnist(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images `[10000, 28, 28]` and labels."""
    files = sorted(folder.glob("*.gz"))
    images = next(f for f in files if "images" in f.name)
    labels = next(f for f in files if "labels" in f.name)
    pixels = np.frombuffer(gzip.decompress(images.read_bytes())[16:], np.uint8).reshape(-1, 28, 28)
    return pixels, np.frombuffer(gzip.decompress(labels.read_bytes())[8:], np.uint8)


def train(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """A ViT of 4 x 4 patches that tells odd from even, saved as transformers saves models."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, image_size=28, patch_size=7,
        num_labels=2,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).train()
    x = (torch.from_numpy(images[:SEEN].copy()).float() / 127.5 - 1).unsqueeze(1).expand(-1, 3, -1, -1)
    y = torch.from_numpy(labels[:SEEN] % 2).long()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(EPOCHS):
        losses = []
        for items in torch.randperm(SEEN).split(BATCH):
            loss = model(pixel_values=x[items], labels=y[items]).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}", flush=True)
    model.vit.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)


def save_digits(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """`folder/train/7/04000.png` and so on: the names of the folders are splits and labels."""
    from PIL import Image

    for i in range(SEEN, len(images)):
        place = folder / ("train" if i < ITEMS else "test") / str(labels[i])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(place / f"{i:05d}.png")


def save_crops(folder: Path, count: int = 60, size: int = 96) -> None:
    """Crops of scikit-learn's two photographs, a folder each."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    sample = load_sample_images()
    rng = np.random.RandomState(0)
    for picture, name in zip(sample.images, sample.filenames, strict=True):
        place = folder / Path(name).stem
        place.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            top, left = rng.randint(picture.shape[0] - size), rng.randint(picture.shape[1] - size)
            Image.fromarray(picture[top : top + size, left : left + size]).save(place / f"{i:02d}.jpg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("cenote-out/examples/images"))
    arguments = parser.parse_args()
    out = arguments.out
    images, labels = mnist(arguments.data_dir / "mnist10k")
    if not (out / "vit" / "config.json").is_file():
        train(out / "vit", images, labels)
    if not (out / "digits").is_dir():
        save_digits(out / "digits", images, labels)
    if not (out / "photos").is_dir():
        save_crops(out / "photos")
    cenote("models", "show", out / "vit")
    cenote(
        "extract", out / "digits", "--backbone", out / "vit", "--layers", "all", "--out", out / "tokens", "--dry-run"
    )
    cenote("extract", out / "digits", "--backbone", out / "vit", "--layers", "all", "--out", out / "tokens")
    methods = ("--methods", "mean,max,cls,abmil", "--seeds", 1, "--epochs", 30)
    cenote("probe", out / "tokens", "--out", out / "digits-report", *methods)
    cenote("probe", out / "photos", "--backbone", out / "vit", "--out", out / "photos-report", *methods, "--folds", 1)


if __name__ == "__main__":
    main()

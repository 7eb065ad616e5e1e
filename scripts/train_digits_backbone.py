"""Train the masked autoencoder behind `cenote.features.digits` and write its one file.

Only the images of the train split are seen, and no label. The file holds the encoder (float16), the images and labels of
scikit-learn's digits, and the split, so that backbone and split cannot come apart.

    python scripts/train_digits_backbone.py
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from cenote.core.files import write_whole
from cenote.features.digits_mae import PATCHES, PIXELS, Block, DigitsEncoder, patches

OUT = Path(__file__).resolve().parents[1] / "src/cenote/features/data/digits_mae.safetensors"
TRAIN, VAL = 1000, 200
KEPT = 6  # of 16 patches: 62 % are masked
EPOCHS, WARMUP, BATCH = 100, 10, 50
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.05
SEED = 0


class Decoder(nn.Module):
    """One narrow block that guesses the pixels of the patches that the encoder has not seen."""

    def __init__(self, dim: int, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.masked = nn.Parameter(torch.randn(width) * 0.02)
        self.position = nn.Parameter(torch.randn(PATCHES, width) * 0.02)
        self.block = Block(width, heads)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pixels = nn.Linear(width, PIXELS)

    def forward(
        self, tokens: Float[Tensor, "batch seen dim"], order: Int[Tensor, "batch patches"]
    ) -> Float[Tensor, "batch patches pixels"]:
        seen = self.embed(tokens)
        cls, seen = seen[:, :1], seen[:, 1:]
        hidden = self.masked.expand(len(seen), PATCHES - seen.shape[1], -1)
        x = torch.cat([seen, hidden], 1)
        x = x.gather(1, order.argsort(1).unsqueeze(-1).expand(-1, -1, x.shape[-1])) + self.position
        return self.pixels(self.norm(self.block(torch.cat([cls, x], 1)))[:, 1:])


def loss_on_masked(
    encoder: DigitsEncoder, decoder: Decoder, images: Float[Tensor, "batch 8 8"], generator: torch.Generator
) -> Tensor:
    """Mean squared error of the pixels of masked patches, under a fresh random mask per image."""
    order = torch.rand(len(images), PATCHES, generator=generator).argsort(1)
    guessed = decoder(encoder(images, order[:, :KEPT]), order)
    error = (guessed - patches(images)).square().mean(-1)
    return error.gather(1, order[:, KEPT:]).mean()


def split_of(labels: np.ndarray) -> np.ndarray:
    """0 = train, 1 = val, 2 = test; stratified by digit."""
    items = np.arange(len(labels))
    train, rest = train_test_split(items, train_size=TRAIN, stratify=labels, random_state=SEED)
    val, test = train_test_split(rest, train_size=VAL, stratify=labels[rest], random_state=SEED)
    split = np.zeros(len(labels), np.uint8)
    split[val], split[test] = 1, 2
    assert (split == 0).sum() == len(train)
    assert (split == 2).sum() == len(test)
    return split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    start = time.perf_counter()
    raw = load_digits()
    split = split_of(raw.target)
    images = torch.from_numpy(raw.images / 16).float()
    train, val = images[split == 0], images[split == 1]

    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    encoder = DigitsEncoder()
    decoder = Decoder(encoder.norm.normalized_shape[0])
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.95))
    steps = TRAIN // BATCH
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, WARMUP * steps),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, (EPOCHS - WARMUP) * steps),
        ],
        [WARMUP * steps],
    )
    for epoch in range(EPOCHS):
        losses = []
        for chosen in torch.randperm(TRAIN, generator=generator).split(BATCH):
            loss = loss_on_masked(encoder, decoder, train[chosen], generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        with torch.no_grad():
            held_out = loss_on_masked(encoder, decoder, val, torch.Generator().manual_seed(SEED)).item()
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: masked error {np.mean(losses):.4f} on train, {held_out:.4f} on val")

    tensors = {f"encoder.{k}": v.half() for k, v in encoder.state_dict().items()}
    tensors["images"] = torch.from_numpy(raw.images.astype(np.uint8))
    tensors["labels"] = torch.from_numpy(raw.target.astype(np.uint8))
    tensors["split"] = torch.from_numpy(split)
    record = {
        "epochs": EPOCHS,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "patches_kept": KEPT,
        "seed": SEED,
        "masked_error_train": round(float(np.mean(losses)), 5),
        "masked_error_val": round(held_out, 5),
        "torch": torch.__version__,
        "data": "scikit-learn digits: UCI optical recognition of handwritten digits, test set",
        "made_by": "scripts/train_digits_backbone.py",
    }
    write_whole(out, save({k: v.contiguous() for k, v in tensors.items()}, {"training": json.dumps(record)}))
    print(f"{out}: {out.stat().st_size:,} bytes, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

"""Spoken digits through a small wav2vec 2.0 that this script trains: from wav files to a report.

    python examples/sound.py [--data-dir DIR] [--out DIR]

The model learns from some of the recordings who is speaking, and is then asked, frozen, which digit the others say.
DIR/fsdd must hold the free spoken digit dataset, `digit_speaker_index.wav`, in any subfolder.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from commands import cenote

EPOCHS, BATCH, RATE = 3, 32, 16000
FRAMES = 6400


def recordings(folder: Path) -> list[tuple[Path, int, str, int]]:
    """`(file, digit, speaker, index)` of each recording."""
    found = []
    for file in sorted(folder.rglob("*.wav")):
        digit, speaker, index = file.stem.split("_")
        found.append((file, int(digit), speaker, int(index)))
    return found


def train(folder: Path, files: list[tuple[Path, int, str, int]]) -> None:
    """A wav2vec 2.0 that tells the speakers apart, saved as transformers saves models."""
    import transformers
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    speakers = sorted({speaker for _, _, speaker, _ in files})
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False)
    config = transformers.Wav2Vec2Config(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, conv_dim=(32, 32, 64, 64),
        conv_kernel=(10, 8, 4, 4), conv_stride=(5, 4, 4, 4), num_feat_extract_layers=4, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, num_labels=len(speakers), classifier_proj_size=64, layerdrop=0.0,
        mask_time_prob=0.0,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForSequenceClassification(config).train()
    sounds, y = [], []
    for file, _, speaker, index in files:
        if 5 <= index < 20:
            rate, samples = wavfile.read(file)
            wave = resample_poly(samples.astype(np.float64), RATE // rate, 1)[:FRAMES]
            sounds.append(np.pad(wave, (0, FRAMES - len(wave))).astype(np.float32))
            y.append(speakers.index(speaker))
    x = extractor(sounds, sampling_rate=RATE, return_tensors="pt").input_values
    target = torch.tensor(y)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(EPOCHS):
        losses = []
        for items in torch.randperm(len(x)).split(BATCH):
            loss = model(input_values=x[items], labels=target[items]).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}", flush=True)
    model.wav2vec2.save_pretrained(folder)
    extractor.save_pretrained(folder)


def save_labels(path: Path, folder: Path, files: list[tuple[Path, int, str, int]]) -> None:
    """A row per recording that the model has not seen: the data set's own split, its indices 0 to 4 are the test."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "split"])
        for source, digit, _, index in files:
            if index < 5 or index >= 20:
                writer.writerow([source.relative_to(folder).as_posix(), digit, "test" if index < 5 else "train"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("cenote-out/examples/sound"))
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    files = recordings(arguments.data_dir / "fsdd")
    if not (out / "wav2vec2" / "config.json").is_file():
        train(out / "wav2vec2", files)
    sounds = out / "recordings"
    if not sounds.is_dir():
        sounds.mkdir()
        for file, _, _, index in files:
            if index < 5 or index >= 20:
                (sounds / file.name).write_bytes(file.read_bytes())
    kept = [(sounds / file.name, *rest) for file, *rest in files]
    save_labels(out / "labels.csv", sounds, kept)  # type: ignore[arg-type]
    cenote("models", "show", out / "wav2vec2")
    cenote(
        "probe", sounds, "--backbone", out / "wav2vec2", "--labels", out / "labels.csv", "--out", out / "report",
        "--methods", "mean,max,abmil,statistics", "--seeds", 1, "--epochs", 30,
    )  # fmt: skip


if __name__ == "__main__":
    main()

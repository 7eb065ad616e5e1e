"""DRASP and the layer-aware TDNN on real recordings: writes docs/tables/real-speech.md.

python -m benchmarks.real_speech --data-dir ../shared/data

The folder holds `fsdd`, 3,000 recordings of spoken digits (`digit_speaker_index.wav`). The arms and the rules are those of
`cenote study drasp` and `cenote study layer-aware-tdnn`, which make their speech up.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from examples.speech.front import LogMel, read_wav
from torch import Tensor

import cenote
from cenote.study import drasp
from cenote.study import layer_aware_tdnn as layered
from cenote.study.harness import Check, Size, above, decide
from cenote.study.harness.checks import bounds, effect
from cenote.study.harness.pages import outcome
from cenote.study.harness.speech import BANDS, FLOOR

TABLES = Path(__file__).resolve().parents[1] / "docs" / "tables"
SIZES: dict[str, tuple[Size, int]] = {"smoke": ("smoke", 2), "small": ("small", 10)}
# recordings 0 to 4 of each digit and speaker are for testing: the official split
TEST = 5


class Recording(NamedTuple):
    samples: Tensor
    digit: int
    speaker: int
    testing: bool


def recordings(folder: Path) -> tuple[list[Recording], LogMel]:
    files = sorted(folder.rglob("*.wav"))
    speakers = sorted({f.stem.split("_")[1] for f in files})
    found, rate = [], 8000
    for file in files:
        digit, speaker, index = file.stem.split("_")
        samples, rate = read_wav(file)
        found.append(Recording(samples, int(digit), speakers.index(speaker), int(index) < TEST))
    return found, LogMel(rate, BANDS)


def damaged(own: Sequence[Recording], mel: LogMel, seeds: tuple[int, ...], count: int, offset: int) -> drasp.Clips:
    """Digits of one speaker one after the other, under noise, with a burst of five frames somewhere."""
    by_speaker = [[r for r in own if r.speaker == s] for s in range(1 + max(r.speaker for r in own))]
    xs, ys = torch.zeros(len(seeds), count, drasp.LONGEST, BANDS), torch.zeros(len(seeds), count)
    mask = torch.zeros(xs.shape[:3], dtype=torch.bool)
    for s, seed in enumerate(seeds):
        g = torch.Generator().manual_seed(seed + 1 + offset)
        for i in range(count):
            frames = int(torch.randint(drasp.SHORTEST, drasp.LONGEST + 1, (), generator=g))
            voice = by_speaker[int(torch.randint(len(by_speaker), (), generator=g))]
            length, parts = mel.length + (frames - 1) * mel.hop, torch.zeros(0)
            while len(parts) < length:
                parts = torch.cat([parts, voice[int(torch.randint(len(voice), (), generator=g))].samples])
            clean = parts[:length]
            steady, glitch = torch.rand(2, generator=g).tolist()
            loud = clean.square().mean().sqrt()
            # noise from 40 to 5 decibels below the speech
            sound = clean + loud * 10 ** ((-40 + 35 * steady) / 20) * torch.randn(length, generator=g)
            burst = drasp.GLITCH * mel.hop
            start = int(torch.randint(length - burst, (), generator=g))
            sound[start : start + burst] += 2 * glitch * loud * torch.randn(burst, generator=g)
            xs[s, i, :frames], mask[s, i, :frames] = mel(sound), True
            ys[s, i] = 5 - drasp.COST * (steady + glitch)
    return drasp.Clips(drasp.Frames(xs, mask), ys)


def scaled(clips: drasp.Clips, like: drasp.Frames) -> drasp.Clips:
    """Each band with the mean and deviation of the real frames of `like`, which become 0 and 1."""
    x, mask = clips.x
    real = like.x[like.mask]
    return clips._replace(x=drasp.Frames((x - real.mean(0)) / real.std(0) * mask.unsqueeze(-1), mask))


def quality(
    own: Sequence[Recording], mel: LogMel, size: Size, seeds: tuple[int, ...]
) -> tuple[list[Check], list[dict]]:
    train = damaged([r for r in own if not r.testing], mel, seeds, drasp.TRAIN[size], 0)
    test = damaged([r for r in own if r.testing], mel, seeds, drasp.TEST[size], 1000)
    train, test = (scaled(clips, train.x) for clips in (train, test))
    found = drasp.findings(seeds, train, test, drasp.EPOCHS[size])
    return [*(c for part in found.parts for c in part.checks(part.method)), *found.checks], found.table


def spoken_digits(
    own: Sequence[Recording], mel: LogMel, seed: int, size: Size
) -> tuple[layered.Stacks, layered.Stacks]:
    """All hidden states of an encoder that learned which digit each frame is of; who speaks is to be named."""
    frames = []
    for r in own:
        x = mel(r.samples)
        x = x[torch.linspace(0, len(x) - 1, layered.FRAMES).round().long()]
        frames.append(x - x.mean(0))
    x = torch.stack(frames)
    testing = torch.tensor([r.testing for r in own])
    # the scale that the encoder expects
    x = FLOOR + 2 * x / x[~testing].std()
    digit, speaker = (torch.tensor([getattr(r, name) for r in own]) for name in ("digit", "speaker"))
    torch.manual_seed(seed)
    encoder = layered.Encoder()
    labels = digit[~testing].unsqueeze(1).expand(-1, layered.FRAMES)
    layered.train_on(encoder, layered.Stacks(x[~testing], labels), layered.ENCODER_STEPS[size], seed)
    encoder.eval()
    with torch.no_grad():
        states = torch.cat([encoder.hidden_states(part) for part in x.split(200)])
    order = torch.randperm(int((~testing).sum()), generator=torch.Generator().manual_seed(seed))[: layered.TRAIN[size]]
    return (
        layered.Stacks(states[~testing][order], speaker[~testing][order]),
        layered.Stacks(states[testing], speaker[testing]),
    )


def speakers(
    own: Sequence[Recording], mel: LogMel, size: Size, seeds: tuple[int, ...]
) -> tuple[list[Check], list[dict]]:
    arms = layered.accuracies(lambda seed, size: spoken_digits(own, mel, seed, size), seeds, size)
    choice, whole, even, last = layered.CHOICE, layered.WHOLE, layered.SUM, layered.LAST
    checks = [
        above("accuracy, choice per frame minus weighted sum", arms.minus(choice, even), 0.0, -0.02),
        above("accuracy, weighted sum minus last layer", arms.minus(even, last), 0.0, in_rule=False),
        above("accuracy, choice per frame minus last layer", arms.minus(choice, last), 0.0, in_rule=False),
        above("accuracy, whole network minus weighted sum", arms.minus(whole, even), 0.0, in_rule=False),
    ]
    return checks, arms.table("accuracy")


def section(title: str, about: str, checks: list[Check], table: list[dict]) -> list[str]:
    lines = [
        f"## {title}",
        "",
        about,
        "",
        f"**{decide(checks).capitalize()}.**",
        "",
        "| check | measured (95 % interval) | expected | part of the rule | outcome |",
        "| --- | --- | --- | --- | --- |",
    ]
    for c in checks:
        rule = "yes" if c.in_rule else "no, reported only"
        lines.append(f"| {c.what} | {effect(c)} | {bounds(c)} | {rule} | {outcome(c)} |")
    lines += ["", "| arm | metric | mean | 95 % interval |", "| --- | --- | --- | --- |"]
    lines += [f"| {r['arm']} | {r['metric']} | {r['mean']:.3f} | {r['low']:.3f} to {r['high']:.3f} |" for r in table]
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--tables", type=Path, default=TABLES)
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    given = parser.parse_args()
    if not (given.data_dir / "fsdd").is_dir():
        print(f"skipped: no {given.data_dir / 'fsdd'}; name the folder of data with --data-dir")
        return
    torch.set_num_threads(1)
    start = time.process_time()
    size, count = SIZES[given.size]
    seeds = tuple(range(count))
    own, mel = recordings(given.data_dir / "fsdd")
    mos, who = quality(own, mel, size, seeds), speakers(own, mel, size, seeds)
    lines = [
        "# DRASP and the layer-aware TDNN on real recordings",
        "",
        f"{len(own):,} recordings of spoken digits by six speakers (free spoken digit dataset, 8 kHz; recordings 0 to "
        f"{TEST - 1} of each digit and speaker for testing), {BANDS} log-mel energies every 10 ms. Arms, training and rules "
        "are those of the studies of [DRASP](../studies/drasp.md) and of the "
        "[layer-aware TDNN](../studies/layer-aware-tdnn.md), "
        f"whose speech is made up. Intervals are Student's, over {count} seeds. {time.process_time() - start:.0f} CPU seconds. "
        "Written by",
        "",
        "```bash",
        "python -m benchmarks.real_speech --data-dir ../shared/data",
        "```",
        "",
        *section(
            "DRASP: how damaged is a clip?",
            f"Digits of one speaker, one after the other, {drasp.SHORTEST} to {drasp.LONGEST} frames, with white noise 40 to 5 "
            f"decibels below the speech and a burst of {drasp.GLITCH} frames; the score falls by {drasp.COST} times the "
            f"strength of each. {drasp.TRAIN[size]:,} clips to train on, {drasp.TEST[size]:,} for testing.",
            *mos,
        ),
        *section(
            "Layer-aware TDNN: who speaks?",
            f"A transformer of {layered.LAYERS} layers learns which digit each frame is of and is frozen; from the hidden "
            f"states of its entrance and all layers, {layered.FRAMES} frames spread over each recording, the speaker is to be "
            f"named. {layered.TRAIN[size]:,} recordings to train on. Every clip's mean is taken away: it is more microphone "
            "than voice. Equal error rates of large encoders, as in the paper, are not reached.",
            *who,
        ),
        f"torch {torch.__version__}, cenote {cenote.__version__}.",
    ]
    given.tables.mkdir(parents=True, exist_ok=True)
    (given.tables / "real-speech.md").write_text("\n".join(lines) + "\n", "utf-8")
    kept = {"seeds": list(seeds), "drasp": mos[1], "layer-aware-tdnn": who[1]}
    (given.tables / "real-speech.json").write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

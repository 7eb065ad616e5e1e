"""Which language is it, moment by moment? Streaming language identification on synthesised speech.

    python -m examples.speech.languages --out docs/examples

Speaks sentences in ten languages with espeak-ng (Debian: apt-get install espeak-ng), trains a small causal network with five
ways of pooling everything heard so far, and follows streams of voices and sentences that were never trained on, piece by piece.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import subprocess
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from examples.speech.bootstrap import two_sided_p
from examples.speech.front import LogMel, StreamingTdnn, read_wav
from scipy.signal import resample_poly
from torch import Tensor, nn

from cenote.compare.intervals import of_draws
from cenote.compare.statistics import holm
from cenote.pool import AttentiveTemporalPool

NAME = "speech-languages"
SENTENCES: dict[str, list[str]] = tomllib.loads(Path(__file__).with_name("sentences.toml").read_text("utf-8"))
LANGUAGES = list(SENTENCES)
TRAIN_SENTENCES = 8
# variants of espeak-ng's voices: other formants and pitch
TRAIN_VOICES = ("m1", "m2", "m3", "m4", "f1", "f2", "f3", "klatt2")
TEST_VOICES = ("m5", "m7", "f4", "f5")
RATE, BINS = 16_000, 40
# log-mel frames every 10 ms, four side by side, every third of these: one row every 30 ms
STACK, STRIDE = 4, 3
SECONDS_PER_ROW = 0.01 * STRIDE
STREAM_SECONDS = 12.0
NOISE = 0.5
WIDTH, BATCH, RATE_OF_LEARNING = 48, 16, 3e-3
FIRST_ROW, EVERY = 10, 15
PACKET = 17
# streams of each voice and language, passes over them
SIZES = {"smoke": (1, 2), "small": (6, 16), "full": (15, 25)}
TEST_STREAMS = 3
RESAMPLES = 1999

POOLS: dict[str, dict[str, Any] | None] = {
    "last frame alone": None,
    "running mean": {"statistics": "mean", "weighted": False},
    "running mean and deviation": {"statistics": "mean_std", "weighted": False},
    "attentive mean": {"statistics": "mean"},
    "attentive mean and deviation": {"statistics": "mean_std"},
}
BASE, BEST = "running mean", "attentive mean and deviation"


class Stream(NamedTuple):
    """Rows of stacked log-mels, which of them are noise, and the language."""

    rows: Tensor
    noise: Tensor
    language: int


class Model(nn.Module):
    """Causal network, pooling of everything heard so far, linear map: scores of the languages at every row."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.front = StreamingTdnn(STACK * BINS, WIDTH)
        settings = POOLS[pool]
        self.pool = None if settings is None else AttentiveTemporalPool(WIDTH, **settings)
        self.out = nn.Linear(WIDTH if self.pool is None else self.pool.out_dim, len(LANGUAGES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        return self.out(x if self.pool is None else self.pool.running(x))

    def step(self, x: Tensor, state: tuple[Any, Any] | None = None) -> tuple[Tensor, tuple[Any, Any]]:
        """The scores at the next rows, and what to remember."""
        heard, pooled = (None, None) if state is None else state
        x, heard = self.front.step(x, heard)
        if self.pool is not None:
            x, pooled = self.pool.step(x, pooled)
        return self.out(x), (heard, pooled)


def speak(voice: str, language: str, sentence: int, folder: Path) -> Path:
    """The wav file of a sentence; spoken if it is not there yet."""
    file = folder / f"{language}-{sentence}-{voice}.wav"
    if not file.exists():
        part = file.with_suffix(".part")
        number = (*TRAIN_VOICES, *TEST_VOICES).index(voice) + sentence
        # voices also differ in pace and pitch
        command = ["espeak-ng", "-v", f"{language}+{voice}", "-s", str(140 + 10 * (number % 5))]
        command += ["-p", str(35 + 7 * (number % 6)), "-w", str(part), SENTENCES[language][sentence]]
        subprocess.run(command, check=True, capture_output=True)
        part.rename(file)
    return file


def synthesised(folder: Path) -> dict[tuple[str, int, int], np.ndarray]:
    """(voice, language, sentence) -> samples at 16 kHz."""
    if shutil.which("espeak-ng") is None:
        raise SystemExit("espeak-ng is not installed; on Debian and Ubuntu: apt-get install espeak-ng")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [
        (voice, language, sentence)
        for voices, sentences in (
            (TRAIN_VOICES, range(TRAIN_SENTENCES)),
            (TEST_VOICES, range(TRAIN_SENTENCES, len(SENTENCES[LANGUAGES[0]]))),
        )
        for voice, language, sentence in itertools.product(voices, LANGUAGES, sentences)
    ]
    with ThreadPoolExecutor(2) as threads:
        files = list(threads.map(lambda w: speak(*w, folder), wanted))
    out = {}
    for (voice, language, sentence), file in zip(wanted, files, strict=True):
        samples, rate = read_wav(file)
        sound = resample_poly(samples.numpy(), RATE, rate)
        out[voice, LANGUAGES.index(language), sentence] = sound / max(float(np.abs(sound).max()), 1e-9)
    return out


def stream(sounds: dict[Any, np.ndarray], voice: str, language: int, sentences: list[int], seed: int) -> Stream:
    """Sentences with stretches of noise between and around them, half of the time; a little noise everywhere."""
    rng = np.random.default_rng(seed)
    pieces, noisy, length = [], [], 0
    wanted = int(STREAM_SECONDS * RATE)
    for sentence in itertools.cycle(rng.permutation(sentences)):
        sound = sounds[voice, language, int(sentence)]
        # speech in parts, each followed by about as much noise
        for part in np.array_split(sound, max(1, round(len(sound) / RATE / 0.8))):
            stretch = int(len(part) * NOISE / (1 - NOISE) * rng.uniform(0.6, 1.4))
            for samples, is_noise in ((part, False), (noise(stretch, rng), True)):
                pieces.append(samples)
                noisy.append(np.full(len(samples), is_noise))
                length += len(samples)
        if length >= wanted:
            break
    samples = np.concatenate(pieces)[:wanted]
    samples = samples + 0.01 * rng.standard_normal(wanted)
    frames = LogMel(RATE, BINS)(torch.from_numpy(samples.astype(np.float32)))
    ends = torch.arange(STACK - 1, len(frames), STRIDE)
    rows = frames.unfold(0, STACK, STRIDE).flatten(1)
    at = (ends * 0.01 * RATE).long().clamp(max=wanted - 1)
    return Stream(rows, torch.from_numpy(np.concatenate(noisy)[:wanted])[at], language)


def noise(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of a random colour and loudness, or a humming chord."""
    if rng.random() < 0.3:
        tones = rng.uniform(80, 900, 4)
        t = np.arange(samples) / RATE
        return 0.1 * np.sin(2 * np.pi * tones[:, None] * t + rng.uniform(0, 6, (4, 1))).sum(0) * rng.uniform(0.3, 1)
    spectrum = np.fft.rfft(rng.standard_normal(max(samples, 2)))
    spectrum *= np.arange(1, len(spectrum) + 1) ** -rng.uniform(0, 1)
    sound = np.fft.irfft(spectrum, max(samples, 2))[:samples]
    return rng.uniform(0.05, 0.4) * sound / max(float(np.abs(sound).max()), 1e-9)


def data(folder: Path, size: str) -> tuple[list[Stream], list[Stream]]:
    sounds = synthesised(folder)
    every = range(len(SENTENCES[LANGUAGES[0]]))
    count = SIZES[size][0]
    train = [
        stream(sounds, voice, language, list(every[:TRAIN_SENTENCES]), seed=1000 * i + language + 100 * number)
        for i in range(count)
        for number, voice in enumerate(TRAIN_VOICES)
        for language in range(len(LANGUAGES))
    ]
    test = [
        stream(sounds, voice, language, list(every[TRAIN_SENTENCES:]), seed=10**6 + 1000 * i + language + 100 * number)
        for i in range(TEST_STREAMS)
        for number, voice in enumerate(TEST_VOICES)
        for language in range(len(LANGUAGES))
    ]
    return train, test


def stacked(streams: list[Stream], scale: tuple[Tensor, Tensor]) -> Tensor:
    """One length for all, normalised by what training frames look like: nothing of the future is read."""
    return (torch.stack([s.rows for s in streams]) - scale[0]) / scale[1]


def fitted(pool: str, seed: int, x: Tensor, y: Tensor, passes: int) -> Model:
    """Trained to name the language at every fifteenth row of random pieces of the streams."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = Model(pool)
    steps = passes * (len(x) // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE_OF_LEARNING, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE_OF_LEARNING, total_steps=steps + 1)
    for _ in range(passes):
        order = torch.randperm(len(x))
        for start in range(0, len(x) - BATCH + 1, BATCH):
            own = order[start : start + BATCH]
            begin = rng.randrange(x.shape[1] // 2)
            logits = model(x[own, begin : begin + x.shape[1] // 2])[:, FIRST_ROW::EVERY]
            loss = F.cross_entropy(logits.flatten(0, 1), y[own].repeat_interleave(logits.shape[1]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def followed(model: Model, x: Tensor) -> tuple[Tensor, int]:
    """Scores at every row, packet by packet as they arrive, and the bytes that a stream remembers."""
    scores, state = [], None
    for packet in x.split(PACKET, 1):
        found, state = model.step(packet, state)
        scores.append(found)
    assert state is not None
    remembered = [*state[0], *(() if state[1] is None else state[1])]
    size = sum(t.untyped_storage().nbytes() for t in remembered if t is not None) // len(x)
    return torch.cat(scores, 1), size


def run(job: tuple[str, int], kept: Path, size: str) -> None:
    """Train, follow the test streams, keep the scores."""
    pool, seed = job
    start = time.process_time()
    torch.set_num_threads(1)
    prepared = torch.load(kept / f"data-{size}.pt", weights_only=True)
    model = fitted(pool, seed, prepared["train"], prepared["train_y"], SIZES[size][1])
    x = prepared["test"]
    scores, remembered = followed(model, x)
    with torch.inference_mode():
        apart = float((scores - model(x)).abs().max())
        weights = torch.zeros(x.shape[:2])
        if model.pool is not None and model.pool.scorer is not None:
            weights = torch.sigmoid(model.pool.scorer(model.front(x))).squeeze(-1)
    found = {"scores": scores.half(), "weights": weights.half(), "apart": apart, "bytes": remembered}
    torch.save(found | {"seconds": time.process_time() - start}, kept / f"{file_of(job, size)}.part")
    (kept / f"{file_of(job, size)}.part").rename(kept / file_of(job, size))


def file_of(job: tuple[str, int], size: str) -> str:
    return f"{NAME}-{list(POOLS).index(job[0])}-{job[1]}-{size}.pt"


def summary(size: str, seeds: int, kept: Path) -> dict[str, Any]:
    prepared = torch.load(kept / f"data-{size}.pt", weights_only=True)
    y, noisy = prepared["test_y"], prepared["test_noise"]
    rng = np.random.default_rng(0)
    draws = rng.multinomial(len(y), np.full(len(y), 1 / len(y)), size=RESAMPLES) / len(y)
    rows, curves, ends, seconds = [], {}, {}, 0.0
    for pool in POOLS:
        found = [torch.load(kept / file_of((pool, s), size), weights_only=True) for s in range(seeds)]
        right = torch.stack([f["scores"].float().argmax(-1) == y[:, None] for f in found]).float().numpy()
        curves[pool] = right.mean((0, 1))
        ends[pool] = draws @ right[:, :, -1].mean(0)
        seconds += sum(f["seconds"] for f in found)
        weights = torch.stack([f["weights"].float() for f in found])
        on = [float(weights[:, m].mean()) for m in (~noisy, noisy)] if weights.any() else None
        rows.append(
            {
                "pooling": pool,
                "accuracy": 100 * float(right[:, :, -1].mean()),
                "per seed": [100 * float(v) for v in right[:, :, -1].mean(1)],
                "interval": [100 * v for v in of_draws(ends[pool])],
                "after 3 s": 100 * float(right[:, :, round(3 / SECONDS_PER_ROW)].mean()),
                "after 6 s": 100 * float(right[:, :, round(6 / SECONDS_PER_ROW)].mean()),
                "weight on speech and noise": on,
                "bytes": max(f["bytes"] for f in found),
                "streamed minus whole": max(f["apart"] for f in found),
            }
        )
    others = [pool for pool in POOLS if pool != BASE]
    adjusted = dict(zip(others, holm([two_sided_p(ends[p] - ends[BASE]) for p in others]), strict=True))
    for row in rows:
        row["p"] = adjusted.get(row["pooling"])
    best = torch.load(kept / file_of((BEST, 0), size), weights_only=True)
    # neither the easiest nor the hardest to follow: the stream whose number of changes of mind is the median
    posterior = best["scores"].float().softmax(-1)
    changes = (posterior.argmax(-1).diff(dim=1) != 0).sum(1).float() + (posterior[:, -1].argmax(-1) == y) * 0.5
    shown = int(changes.argsort()[len(changes) // 2])
    return {
        "rows": rows,
        "curves": {pool: [round(float(v), 4) for v in c] for pool, c in curves.items()},
        "shown": {
            "language": LANGUAGES[int(y[shown])],
            "posterior": [[round(float(v), 4) for v in r] for r in posterior[shown].T],
            "weight": [round(float(v), 4) for v in best["weights"][shown].float()],
            "noise": noisy[shown].int().tolist(),
        },
        "seconds": seconds,
        "train streams": len(prepared["train_y"]),
        "test streams": len(y),
        "noise share": float(noisy.float().mean()),
    }


def page(result: dict[str, Any]) -> str:
    lines = [
        "# Streaming language identification",
        "",
        f"Written by `python -m examples.speech.languages --size {result['size']}`; do not edit. Speech of espeak-ng in "
        f"{len(LANGUAGES)} languages ({', '.join(LANGUAGES)}); {result['train streams']} training streams of "
        f"{len(TRAIN_VOICES)} voices, {result['test streams']} test streams of {len(TEST_VOICES)} other voices and other "
        f"sentences, {STREAM_SECONDS:.0f} s each, {100 * result['noise share']:.0f} % of the time noise in place of speech; "
        f"{result['seeds']} seeds, {result['seconds']:.0f} CPU seconds of training.",
        "",
        "A small causal network over log-mel frames; the pooling sums up everything heard so far, and a linear map names the "
        f"language every {1000 * SECONDS_PER_ROW:.0f} ms. The test streams are taken in packets of {PACKET} rows.",
        "",
        "Accuracy in percent at the end of the streams, in brackets the 95 % interval of a bootstrap over test streams; p: "
        "paired bootstrap against the running mean, Holm-adjusted.",
        "",
        "| pooling | at the end | p | after 3 s | after 6 s | mean weight on speech / noise | state, bytes "
        "| streamed minus whole |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in result["rows"]:
        low, high = r["interval"]
        weights = (
            ""
            if r["weight on speech and noise"] is None
            else "{:.2f} / {:.2f}".format(*r["weight on speech and noise"])
        )
        p = "" if r["p"] is None else f"{r['p']:.3f}"
        lines.append(
            f"| {r['pooling']} | {r['accuracy']:.1f} ({low:.1f} to {high:.1f}) | {p} | {r['after 3 s']:.1f} "
            f"| {r['after 6 s']:.1f} | {weights} | {r['bytes']:,} | {r['streamed minus whole']:.1g} |"
        )
    lines += [
        "",
        f"![Accuracy over time, and one stream]({NAME}.svg)",
        "",
        f"Left: accuracy over elapsed time. Right: one test stream ({result['shown']['language']}; the one with a median "
        f"number of changes of mind), {BEST}: posterior of each language over time, the weight of each row below; grey: noise.",
        "",
        "The state holds the last frames of the causal network and the three sums of the pooling, whatever the length of the "
        "stream. *Streamed minus whole* is the largest difference of a score to that of the whole stream taken at once.",
        "",
        "espeak-ng's voices are far more alike than people: the numbers compare poolings, and are no accuracy for real speech.",
        "",
    ]
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": NAME, "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplot_mosaic([["curves", "stream"], ["curves", "weight"]], height_ratios=(3, 1))
        left, right, below = panels["curves"], panels["stream"], panels["weight"]
        for pool, curve in result["curves"].items():
            seconds = SECONDS_PER_ROW * np.arange(1, len(curve) + 1)
            left.plot(seconds, 100 * np.array(curve), label=pool, linewidth=1.2)
        left.set(xlabel="elapsed seconds", ylabel="accuracy, %", xlim=(0, STREAM_SECONDS), ylim=(0, 100))
        left.legend(frameon=False, fontsize=8)
        shown = result["shown"]
        noisy = np.array(shown["noise"], bool)
        for language, posterior in zip(LANGUAGES, shown["posterior"], strict=True):
            is_it = language == shown["language"]
            seen = is_it or max(posterior[len(posterior) // 4 :]) > 0.2
            style = {"linewidth": 2.0 if is_it else 0.9, "label": language if seen else None}
            right.plot(seconds, posterior, **style)
        right.set(ylabel="posterior", xlim=(0, STREAM_SECONDS), ylim=(0, 1.02))
        right.legend(frameon=False, fontsize=8, ncols=3, loc="center right")
        below.plot(seconds, shown["weight"], color="#0b57d0", linewidth=0.8)
        below.set(xlabel="elapsed seconds", ylabel="weight", xlim=(0, STREAM_SECONDS), ylim=(0, 1))
        for axes in (right, below):
            axes.fill_between(seconds, 0, 1, where=noisy, color="#e8eaed", transform=axes.get_xaxis_transform())
        for axes in panels.values():
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cenote-out/speech"), help="folder of page, picture, numbers")
    parser.add_argument(
        "--runs", type=Path, default=Path("cenote-out/speech-runs"), help="where sounds and trainings are kept"
    )
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    options = parser.parse_args(arguments)
    options.runs.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    prepared = options.runs / f"data-{options.size}.pt"
    if not prepared.exists():
        train, test = data(options.runs / "espeak", options.size)
        rows = torch.cat([s.rows for s in train])
        scale = rows.mean(0), rows.std(0)
        streams = {"train": stacked(train, scale), "test": stacked(test, scale)}
        for name, found in (("train", train), ("test", test)):
            streams[f"{name}_y"] = torch.tensor([s.language for s in found])
            streams[f"{name}_noise"] = torch.stack([s.noise for s in found])
        torch.save(streams, prepared.with_suffix(".part"))
        prepared.with_suffix(".part").rename(prepared)
        print(f"{len(train)} training and {len(test)} test streams", flush=True)
    todo = [
        job
        for job in itertools.product(POOLS, range(options.seeds))
        if not (options.runs / file_of(job, options.size)).exists()
    ]
    one = partial(run, kept=options.runs, size=options.size)
    with ProcessPoolExecutor(options.workers) as workers:
        for done, _ in enumerate(workers.map(one, todo), 1):
            print(f"{done} of {len(todo)} trainings", flush=True)
    result = summary(options.size, options.seeds, options.runs)
    result |= {"size": options.size, "seeds": options.seeds, "torch": torch.__version__}
    (options.out / f"{NAME}.json").write_text(json.dumps(result) + "\n")
    (options.out / f"{NAME}.md").write_text(page(result))
    draw(result, options.out / f"{NAME}.svg")
    print(f"{options.out / NAME}.md, .svg, .json; {result['seconds']:.0f} CPU seconds of training")


if __name__ == "__main__":
    main()

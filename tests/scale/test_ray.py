"""The Ray engine on a cluster of two nodes in this machine: the same store, also when a worker or a node is killed."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cenote.core import InputError
from cenote.features.raw import RawItems, Read
from cenote.features.raw.files import FileItem
from cenote.scale import ModelSpec, Options, Progress, extract

from .conftest import content

pytestmark = pytest.mark.slow
OPTIONS = Options(items_per_shard=2, batch=2)


@pytest.fixture
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="cenote[ray] is not installed")
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def with_items(items: RawItems, make: Callable[[FileItem], FileItem]) -> RawItems:
    changed: Sequence[Any] = [make(item) for item in items.items]  # type: ignore[arg-type]
    return replace(items, items=changed)


def test_the_same_store_on_two_nodes_with_a_worker_and_a_node_killed(
    tmp_path: Path, items: RawItems, vit: ModelSpec, cluster: Any
) -> None:
    from cenote.scale.ray_engine import RayEngine

    extract(items, vit, tmp_path / "local", OPTIONS)
    reference = content(tmp_path / "local")
    done = extract(items, vit, tmp_path / "ray", OPTIONS, engine=RayEngine(workers=2))
    assert (done.computed, content(tmp_path / "ray")) == (10, reference)

    # a worker kills itself while it reads an item, once
    marker = tmp_path / "killed"

    class Deadly(FileItem):
        def read(self) -> Read:
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().read()

    def deadly(item: FileItem) -> FileItem:
        return Deadly(item.id, item.path, item.kind) if item.id == items.items[9].id else item

    # the driver reads every item before it begins: it must not be the one that dies
    options = replace(OPTIONS, skip_bad=True)
    engine = RayEngine(workers=2)
    done = extract(with_items(items, deadly), vit, tmp_path / "worker", options, engine=engine)
    assert marker.exists()
    assert not done.skipped
    assert content(tmp_path / "worker") == reference

    # a node goes when the first items are done
    node = next(iter(cluster.worker_nodes))
    removed: list[int] = []

    def remove(now: Progress) -> None:
        if not removed:
            removed.append(now.done)
            cluster.remove_node(node, allow_graceful=False)

    done = extract(items, vit, tmp_path / "node", OPTIONS, engine=engine, on_progress=remove)
    assert removed
    assert removed[0] < len(items)
    assert content(tmp_path / "node") == reference
    written = [entry.file for entry in done.manifest.shards or ()]
    assert len(written) == len(set(written)) == 10

    # what a worker cannot use is told as it would be here
    broken = tmp_path / "photos" / "cat" / "001.png"
    whole = broken.read_bytes()

    class Breaking(RayEngine):
        def run(self, *arguments: Any) -> None:
            broken.write_bytes(whole[:50])
            super().run(*arguments)

    with pytest.raises(InputError, match=r"item 'cat/001.png' is no whole image"):
        extract(items, vit, tmp_path / "broken", OPTIONS, engine=Breaking(workers=1))


def test_no_cluster() -> None:
    ray = pytest.importorskip("ray", reason="cenote[ray] is not installed")
    from cenote.scale.ray_engine import RayEngine

    assert not ray.is_initialized()
    with pytest.raises(InputError, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        RayEngine("127.0.0.1:1")

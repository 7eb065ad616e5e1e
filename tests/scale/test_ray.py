"""A Ray cluster of two nodes in this machine: the same store and the same table, also when a worker or a node is killed."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from tests.jobs.extract.conftest import content

from cenote.compare.arms import Arm, OnShare
from cenote.compare.cells import Cell
from cenote.core import InputError
from cenote.features import digits
from cenote.features.raw import RawItems, Read
from cenote.features.raw.files import FileItem
from cenote.features.store.shards import finished_shards
from cenote.jobs.extract import ModelSpec, Options, Progress, extract
from cenote.jobs.probe import Comparison, Recipe, compare
from cenote.jobs.probe.arms import Trial
from cenote.jobs.probe.references import reference_names
from cenote.scale import RayEngine, RaySweep

pytestmark = [
    pytest.mark.slow("starts clusters of Ray"),
    # where it copies its options it sets those too that it has given up
    pytest.mark.filterwarnings(r"ignore:::ray\.data\.context"),
]
REFERENCES = reference_names("multiclass")
OPTIONS = Options(items_per_shard=2, batch=2)


@contextmanager
def two_nodes(**environment: str) -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="cenote[ray] is not installed")
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    environment = {"OMP_NUM_THREADS": "1", **environment}
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": environment})
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def cluster() -> Iterator[Any]:
    with two_nodes() as cluster:
        yield cluster


def with_items(items: RawItems, make: Callable[[FileItem], FileItem]) -> RawItems:
    changed: Sequence[Any] = [make(item) for item in items.items]  # type: ignore[arg-type]
    return replace(items, items=changed)


def test_the_same_store_on_two_nodes_with_a_worker_and_a_node_killed(
    tmp_path: Path, items: RawItems, vit: ModelSpec, cluster: Any
) -> None:
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


def test_a_shard_that_brings_down_its_workers_ends_the_run(
    tmp_path: Path, items: RawItems, vit: ModelSpec, cluster: Any
) -> None:
    class Deadly(FileItem):
        def read(self) -> Read:
            os.kill(os.getpid(), signal.SIGKILL)
            return super().read()

    def deadly(item: FileItem) -> FileItem:
        return Deadly(item.id, item.path, item.kind) if item.id == items.items[9].id else item

    store, options = tmp_path / "store", replace(OPTIONS, skip_bad=True)
    with pytest.raises(InputError, match=r"shard 4 was lost with its worker 5 times; what is finished is kept"):
        extract(with_items(items, deadly), vit, store, options, engine=RayEngine(workers=2))
    finished = set(finished_shards(store))
    assert 4 not in finished
    # the same command goes on where that item is gone from the way
    done = extract(items, vit, store, options)
    assert (done.kept, done.computed) == (len(finished), 10 - len(finished))


def test_a_trial_that_brings_down_its_workers_ends_the_sweep(tmp_path: Path, cluster: Any) -> None:
    class Deadly(Trial):
        def run(self, on_share: OnShare = lambda _name, _share: None) -> Cell:
            if self.name == "max":
                os.kill(os.getpid(), signal.SIGKILL)
            return super().run(on_share)

    class Sweep(RaySweep):
        def __call__(self, trials: Sequence[Arm], on_share: OnShare) -> Iterator[tuple[Arm, Cell]]:
            yield from super().__call__(as_class(Deadly, trials), on_share)

    with pytest.raises(
        InputError, match=r"trial max was lost with its worker 5 times \(.*\); what is finished is kept"
    ):
        compare(digits(), "mean,max", seeds=1, recipe=Recipe(epochs=1), out=tmp_path, engine=Sweep(workers=1))
    assert [file.stem for file in (tmp_path / "cells").glob("*.safetensors")] == ["mean"]


def as_class(kind: type[Trial], arms: Sequence[Arm]) -> list[Arm]:
    """The same arms, trials of another class; references as they are."""
    of_trial = [f.name for f in fields(Trial)]
    return [kind(**{n: getattr(a, n) for n in of_trial}) if isinstance(a, Trial) else a for a in arms]


def numbers(comparison: Comparison) -> list[dict[str, Any]]:
    """The table, without what a clock said."""
    timed = ("latency_ms", "seconds")
    return [{k: v for k, v in asdict(r).items() if k not in timed} for r in comparison.results]


def test_the_same_table_from_a_sweep_with_a_worker_killed(tmp_path: Path, cluster: Any) -> None:
    data, methods, recipe = digits(), "mean,max,gem,abmil", Recipe(epochs=3)
    here = compare(data, methods, seeds=2, recipe=recipe)
    marker, trained = tmp_path / "killed", []

    class Deadly(Trial):
        def run(self, on_share: OnShare = lambda _name, _share: None) -> Cell:
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().run(on_share)

    class Sweep(RaySweep):
        def __call__(self, trials: Sequence[Arm], on_share: OnShare) -> Iterator[tuple[Arm, Cell]]:
            for trial, cell in super().__call__(as_class(Deadly, trials), on_share):
                trained.append(trial.name)
                yield trial, cell

    out = tmp_path / "out"
    there = compare(data, methods, seeds=2, recipe=recipe, out=out, engine=Sweep(workers=2))
    assert marker.exists()
    assert sorted(trained) == sorted(["abmil", "gem", "max", "mean", *REFERENCES])
    assert numbers(there) == numbers(here)
    assert there.pairs == here.pairs

    # what is finished is kept: a cell that is lost is trained again, alone
    (out / "cells" / "gem.safetensors").unlink()
    trained.clear()
    again = compare(data, methods, seeds=2, recipe=recipe, out=out, engine=Sweep(workers=2))
    assert trained == ["gem"]
    assert numbers(again) == numbers(here)


def test_the_same_table_from_a_sweep_with_a_node_killed(cluster: Any) -> None:
    data, methods, recipe = digits(), "mean,max,gem,abmil", Recipe(epochs=3)
    here = compare(data, methods, seeds=2, recipe=recipe)
    # there are two nodes of one CPU, so one of two workers lives on each
    node = next(iter(cluster.worker_nodes))
    trained: list[str] = []

    def remove(name: str, share: float) -> None:
        if share == 1.0:
            trained.append(name)
        if len(trained) == 1 and node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)

    there = compare(data, methods, seeds=2, recipe=recipe, engine=RaySweep(workers=2), on_method=remove)
    assert node not in cluster.worker_nodes
    assert sorted(trained) == sorted(["abmil", "gem", "max", "mean", *REFERENCES])
    assert numbers(there) == numbers(here)
    assert there.pairs == here.pairs


def test_a_sweep_tells_how_far_its_trials_are(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Trial):
        def run(self, on_share: OnShare = lambda _name, _share: None) -> Cell:
            for share in (0.25, 0.5):
                time.sleep(1)
                on_share(self.name, share)
            time.sleep(1)
            return super().run()

    class Sweep(RaySweep):
        def __call__(self, trials: Sequence[Arm], on_share: OnShare) -> Iterator[tuple[Arm, Cell]]:
            yield from super().__call__(as_class(Slow, trials), on_share)

    class Dying:
        def tell(self, number: int, share: float) -> None: ...

        def news(self) -> None:
            os._exit(1)

    def told() -> dict[str, list[float]]:
        shares: dict[str, list[float]] = {}
        compare(
            digits(), "mean,max", seeds=1, recipe=Recipe(epochs=1), references=False, engine=Sweep(workers=2),
            on_method=lambda name, share: shares.setdefault(name, []).append(share),
        )  # fmt: skip
        return shares

    for shares in (found := told()).values():
        assert shares in ([0.25, 0.5, 1.0], [0.25, 1.0], [0.5, 1.0])
    assert set(found) == {"mean", "max"}
    # what tells it is a worker too, and may be lost
    monkeypatch.setattr("cenote.scale.sweep._Board", Dying)
    assert told() == {"mean": [1.0], "max": [1.0]}


def test_raw_images_to_a_table_by_the_command(
    tmp_path: Path, items: RawItems, vit: ModelSpec, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cenote.cli import main

    tables = {}
    for engine in ("local", "ray"):
        out = tmp_path / engine
        command = ["probe", tmp_path / "photos", "--backbone", vit.name, "--layers", "all", "--methods", "max,abmil"]
        command += [
            "--folds",
            1,
            "--epochs",
            2,
            "--seeds",
            1,
            "--out",
            out,
            "--engine",
            engine,
            "--address",
            cluster.address,
        ]
        monkeypatch.setattr(sys, "argv", ["cenote", *map(str, command)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        tables[engine] = numbers(Comparison.load(out))
        assert (out / "report.html").is_file()
    assert len(tables["ray"]) == 12 + len(REFERENCES)
    assert tables["ray"] == tables["local"]
    assert content(tmp_path / "ray" / "features") == content(tmp_path / "local" / "features")


def test_other_libraries_elsewhere_are_told(
    tmp_path: Path, items: RawItems, vit: ModelSpec, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cenote.core import libraries
    from cenote.scale import ray_engine, sweep

    def other() -> dict[str, str]:
        return {**libraries.everything(), "torch": "1.0"}

    for module in (ray_engine, sweep):
        monkeypatch.setattr(module, "everything", other)
    told = r"engine: .* has torch 2.*, and the machine that started the job has 1\.0; .* install the same versions"
    with pytest.raises(InputError, match=told):
        extract(items, vit, tmp_path / "store", OPTIONS, engine=RayEngine(workers=1))
    with pytest.raises(InputError, match=told):
        compare(digits(), "mean", seeds=1, engine=RaySweep(workers=1))


def test_machines_without_cenote_are_told(tmp_path: Path, items: RawItems, vit: ModelSpec) -> None:
    package = tmp_path / "elsewhere" / "cenote"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('no cenote on this machine')")
    missing = r"ImportError: no cenote on this machine\)"
    with two_nodes(PYTHONPATH=str(package.parent)):
        with pytest.raises(InputError, match=rf"engine: no worker can be started \(.*{missing}"):
            extract(items, vit, tmp_path / "store", OPTIONS, engine=RayEngine(workers=1))
        with pytest.raises(
            InputError, match=rf"engine: a machine of the cluster lacks what trial mean needs \({missing}"
        ):
            compare(digits(), "mean", seeds=1, engine=RaySweep(workers=1))


def test_no_cluster() -> None:
    ray = pytest.importorskip("ray", reason="cenote[ray] is not installed")
    assert not ray.is_initialized()
    with pytest.raises(InputError, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        RayEngine("127.0.0.1:1")

"""A finished comparison in trackers of experiments, through their own clients: Weights & Biases, MLflow, TensorBoard.

Nothing is kept there alone: what a folder of results holds is logged once all is done. A tracker's own settings (project,
server, offline) are taken from its own environment.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from cenote.core import InputError
from cenote.core.requirements import require_one_of
from cenote.jobs.probe.result import Comparison

PROJECT = "cenote"
NEEDS = {"wandb": ("wandb",), "mlflow": ("mlflow",), "tensorboard": ("tensorboard",)}
"""Of each tracker, the modules that it cannot do without."""
LONGEST = 500
"""Characters of a setting: MLflow servers of before take no more."""


class Point(NamedTuple):
    """One number of a curve: of a method's training, seed by seed, at an epoch."""

    name: str
    epoch: int
    value: float


def require_trackers(names: Sequence[str]) -> None:
    """That these can be logged to, told before anything is trained.

    Raises:
        InputError: where one is unknown, or not installed.

    Example:
        >>> require_trackers(["diary"])
        Traceback (most recent call last):
        cenote.core.errors.InputError: track: expected 'wandb', 'mlflow' or 'tensorboard', got 'diary'
    """
    for name in names:
        require_one_of(NEEDS, track=name)
        for module in NEEDS[name]:
            try:
                import_module(module)
            except ImportError as error:
                raise InputError(
                    f"track: {module} cannot be imported ({error}); pip install {module}, or leave --track out"
                ) from None


def track(comparison: Comparison, tracker: str, out: str | Path, name: str | None = None) -> str:
    """Log a comparison: its settings, a number per method and measure, the curves of training, the sentence, and the page.

    Args:
        comparison: that was saved in `out`.
        tracker: `"wandb"`, `"mlflow"` or `"tensorboard"`.
        out: folder of results. TensorBoard's events lie in `out/tensorboard`.
        name: of the run; default: that of the folder.

    Returns:
        Where it was logged to.

    Raises:
        InputError: where the tracker is unknown or not installed, or its client fails.
    """
    require_trackers([tracker])
    out = Path(out)
    try:
        return TRACKERS[tracker](comparison, out, name or out.resolve().name)
    except Exception as error:  # whatever a client raises, of networks and accounts too
        raise InputError(
            f"track: {tracker} failed ({type(error).__name__}: {error}); the results are in {out}, and the same command again "
            f"logs them without training"
        ) from error


def settings(comparison: Comparison) -> dict[str, Any]:
    """What a run is told by, flat."""
    facts = {
        k: comparison.dataset.get(k) for k in ("name", "source", "task", "items", "tokens", "dim", "prefix_tokens")
    }
    found = {"data": facts, "metric": comparison.metric_name, "baseline": comparison.baseline, **comparison.provenance}
    return dict(_flat(found))


def numbers(comparison: Comparison) -> dict[str, float]:
    """`method/measure` -> a finite number."""
    found = {}
    for row in comparison.to_rows():
        for measure, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                found[f"{row['method']}/{measure}"] = float(value)
    return found


def curves(comparison: Comparison) -> Iterator[Point]:
    """Losses and validation metrics of every method, seed by seed."""
    for result in comparison.results:
        for curve in ("train_loss", "validation_curve"):
            for seed, values in enumerate(getattr(result, curve)):
                for epoch, value in enumerate(values):
                    if math.isfinite(value):
                        yield Point(f"{result.method}/{curve}/{seed}", epoch, value)


def _flat(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{before}{name}.")
        else:
            yield f"{before}{name}", inner if isinstance(inner, str | int | float | None) else str(inner)


def _wandb(comparison: Comparison, out: Path, name: str) -> str:
    import wandb

    run = wandb.init(project=PROJECT, name=name, dir=str(out), config=settings(comparison))
    try:
        by_epoch: dict[int, dict[str, float]] = {}
        for point in curves(comparison):
            by_epoch.setdefault(point.epoch, {})[point.name] = point.value
        for epoch in sorted(by_epoch):
            run.log({"epoch": epoch, **by_epoch[epoch]})
        rows = comparison.to_rows()
        columns = list(rows[0])
        run.log({"leaderboard": wandb.Table(columns=columns, data=[[row[c] for c in columns] for row in rows])})
        run.summary.update({**numbers(comparison), "sentence": comparison.sentence, "winner": comparison.winner})
        return str(getattr(run, "url", None) or run.dir)
    finally:
        run.finish()


def _mlflow(comparison: Comparison, out: Path, name: str) -> str:
    import mlflow

    mlflow.set_experiment(PROJECT)
    with mlflow.start_run(run_name=name) as run:
        mlflow.log_params({_name(k): str(v)[:LONGEST] for k, v in settings(comparison).items()})
        mlflow.log_metrics({_name(k): v for k, v in numbers(comparison).items()})
        for point in curves(comparison):
            mlflow.log_metric(_name(point.name), point.value, step=point.epoch)
        mlflow.set_tags({"sentence": comparison.sentence, "winner": comparison.winner})
        for file in ("comparison.json", "report.html"):
            if (out / file).is_file():
                mlflow.log_artifact(str(out / file))
        return f"{mlflow.get_tracking_uri()}, run {run.info.run_id}"


def _tensorboard(comparison: Comparison, out: Path, name: str) -> str:
    from torch.utils.tensorboard import SummaryWriter

    folder = out / "tensorboard" / name
    with SummaryWriter(log_dir=str(folder)) as writer:
        for point in curves(comparison):
            writer.add_scalar(point.name, point.value, point.epoch)
        for measure, value in numbers(comparison).items():
            writer.add_scalar(measure, value, 0)
        writer.add_text("sentence", comparison.sentence)
        table = "\n".join(f"    {k}: {v}" for k, v in settings(comparison).items())
        writer.add_text("settings", table)
    return str(folder)


def _name(text: str) -> str:
    """As MLflow takes names.

    >>> _name("simpool@4/p,q"), _name("GeM+/metric")
    ('simpool-4/p-q', 'GeM-/metric')
    """
    return re.sub(r"[^\w\-. /]", "-", text)


TRACKERS: dict[str, Callable[[Comparison, Path, str], str]] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
    "tensorboard": _tensorboard,
}

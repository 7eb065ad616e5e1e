"""What every job on a Ray cluster needs: to find the cluster, and to give out tasks until all are done."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from cenote.core import InputError

ATTEMPTS = 5
CONNECT_SECONDS = 10
LOOK_SECONDS = 0.5
"""Between two calls of `meanwhile`."""
AHEAD = 2
"""Tasks that wait at each actor, so that it never waits for the driver."""

Task = TypeVar("Task")


def connect(address: str) -> Any:
    """The module `ray`, connected to a cluster.

    Raises:
        InputError: where ray is not installed, or there is no cluster.
    """
    ray = _ray()
    if not ray.is_initialized():
        _reachable(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"address: no Ray cluster at {address!r} ({str(error).splitlines()[0]}); start one with ray start --head"
            ) from error
    return ray


def room(ray: Any, cpus: int, on_gpu: bool = False) -> int:
    """For how many actors the cluster has room."""
    held = ray.cluster_resources()
    return max(1, int(held.get("GPU", 0)) if on_gpu else int(held.get("CPU", 1)) // cpus)


def spread(
    ray: Any,
    make: Callable[[], Any],
    todo: Iterator[Task],
    name: Callable[[Task], str],
    workers: int,
    attempts: int = ATTEMPTS,
    meanwhile: Callable[[], None] | None = None,
) -> Iterator[tuple[Task, Any]]:
    """Give tasks to actors until all are done; what a dead actor held is given to others.

    Args:
        ray: the module.
        make: a new actor, with methods `ready()` and `compute(task)`.
        todo: the tasks; read as actors become free.
        name: of a task, for messages; no two tasks share one.
        workers: how many actors.
        attempts: how often a task may be lost, and how often in a row a new actor may die before it is ready.
        meanwhile: called again and again while none has finished.

    Yields:
        Each task with what `compute` gave, as they finish.

    Raises:
        InputError: as a worker raised it, or where a task, or a new actor, was lost too often.
    """
    from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

    again: list[Task] = []
    lost: dict[str, int] = {}
    stillborn = 0
    # an actor gets tasks when it stands: one that waits for room on a smaller cluster must not hold any
    coming: dict[Any, Any] = {}
    load: dict[Any, int] = {}
    running: dict[Any, tuple[Any, Task]] = {}

    def hire() -> None:
        actor = make()
        coming[actor.ready.remote()] = actor

    def answer(reference: Any) -> Any:
        try:
            return ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise InputError(str(error.cause)) from error
            raise

    def give(actor: Any) -> bool:
        if not again:
            more = next(todo, None)
            if more is None:
                return False
            again.append(more)
        task = again.pop()
        running[actor.compute.remote(task)] = actor, task
        load[actor] += 1
        return True

    first = next(todo, None)
    again += [] if first is None else [first]
    for _ in range(workers if again else 0):
        hire()
    try:
        while again or running:
            known, _ = ray.wait([*running, *coming], num_returns=1, timeout=LOOK_SECONDS if meanwhile else None)
            if meanwhile and not known:
                meanwhile()
                continue
            reference = known[0]
            if reference in coming:
                actor = coming.pop(reference)
                try:
                    answer(reference)
                    load[actor], stillborn = 0, 0
                except (RayActorError, ActorUnavailableError) as error:
                    stillborn += 1
                    if stillborn >= attempts:
                        raise InputError(f"engine: no worker can be started ({reason(error)})") from error
                    hire()
            else:
                actor, task = running.pop(reference)
                if actor in load:
                    load[actor] -= 1
                try:
                    found = answer(reference)
                except (RayActorError, ActorUnavailableError) as error:
                    key = name(task)
                    lost[key] = lost.get(key, 0) + 1
                    if lost[key] >= attempts:
                        raise InputError(
                            f"{key} was lost with its worker {attempts} times ({reason(error)}); what is finished is "
                            f"kept: look at the workers' logs, and run the same command again"
                        ) from error
                    again.append(task)
                    # all that it held fails, one by one; it is replaced once
                    if load.pop(actor, None) is not None:
                        hire()
                else:
                    yield task, found
            for actor in load:
                while load[actor] < AHEAD and give(actor):
                    pass
    finally:
        for actor in [*load, *coming.values()]:
            ray.kill(actor)


def reason(error: Exception) -> str:
    """The last line that names an exception, as an actor that cannot import something ends with it; else the first one."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in plain.splitlines() if line.strip()] or [type(error).__name__]
    named = [line for line in lines[1:] if line.partition(":")[0].endswith(("Error", "Exception"))]
    return f"{lines[0]} {named[-1]}" if named else lines[0]


def _reachable(address: str) -> None:
    """Ray itself waits for minutes where nobody listens."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"address: no Ray cluster at {address!r} ({error.strerror or error}); start one with ray start --head"
        ) from error


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError("engine: ray needs the package ray; pip install 'cenote[ray]'") from error
    return ray

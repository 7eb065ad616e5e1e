"""What every job on a Ray cluster needs: to find the cluster, and to say what went wrong there."""

from __future__ import annotations

import re
import socket
from typing import Any

from cenote.core import InputError

ATTEMPTS = 5
"""How often a piece of work may be begun, when its workers die of it."""
CONNECT_SECONDS = 10


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
    """For how many workers the cluster has room."""
    held = ray.cluster_resources()
    return max(1, int(held.get("GPU", 0)) if on_gpu else int(held.get("CPU", 1)) // cpus)


def answer(ray: Any, reference: Any, name: str) -> Any:
    """What a task gave.

    Raises:
        InputError: as the task raised it, or where the task was lost too often, or a machine cannot import what it needs.
    """
    errors = ray.exceptions
    try:
        return ray.get(reference)
    except errors.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from error
        if isinstance(error.cause, ImportError):
            missing = f"{type(error.cause).__name__}: {error.cause}"
            raise InputError(f"engine: a machine of the cluster lacks what {name} needs ({missing})") from error
        raise
    except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError) as error:
        raise InputError(
            f"{name} was lost with its worker {ATTEMPTS} times ({reason(error)}); what is finished is kept: look at the "
            f"workers' logs, and run the same command again"
        ) from error


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

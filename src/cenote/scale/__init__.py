"""The same jobs on Ray: engines that decide who computes what, and change nothing of what comes out."""

from typing import TYPE_CHECKING

from cenote.core.moved import formerly
from cenote.scale.ray_engine import RayEngine
from cenote.scale.sweep import RaySweep

__all__ = ["RayEngine", "RaySweep"]

if not TYPE_CHECKING:
    __getattr__ = formerly(__name__)

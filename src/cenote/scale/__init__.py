"""The same jobs on Ray: engines that decide who computes what, and change nothing of what comes out."""

from cenote.scale.ray_engine import RayEngine
from cenote.scale.sweep import RaySweep

__all__ = ["RayEngine", "RaySweep"]

"""The same jobs on one machine or many.

`extract` cuts the raw items into shards, finds out which are finished, and hands the others to an `Engine`. A shard is a fixed
range of items; whoever computes it, the same file comes out under the same name, written in one step. So an engine only
decides who computes which shard, and nothing that it does wrong can damage a store.
"""

from cenote.scale.engine import Engine, LocalEngine
from cenote.scale.extract import Estimate, Extracted, Options, Progress, estimate, extract, planned
from cenote.scale.job import Job, ModelSpec, Shard, shards
from cenote.scale.ray_engine import RayEngine
from cenote.scale.sweep import RaySweep
from cenote.scale.work import Worker

__all__ = [
    "Engine",
    "Estimate",
    "Extracted",
    "Job",
    "LocalEngine",
    "ModelSpec",
    "Options",
    "Progress",
    "RayEngine",
    "RaySweep",
    "Shard",
    "Worker",
    "estimate",
    "extract",
    "planned",
    "shards",
]

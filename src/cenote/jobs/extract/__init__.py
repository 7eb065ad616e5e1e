"""Raw items and a model -> a feature store.

`extract` cuts the raw items into shards, finds out which are finished, and hands the others to an `Engine`. A shard is a fixed
range of items; whoever computes it, the same file comes out under the same name, written in one step. So an engine only
decides who computes which shard, and nothing that it does wrong can damage a store.
"""

from cenote.jobs.extract.engine import Engine, LocalEngine
from cenote.jobs.extract.job import extract
from cenote.jobs.extract.measure import estimate
from cenote.jobs.extract.plan import Options, planned
from cenote.jobs.extract.result import Estimate, Extracted, Progress
from cenote.jobs.extract.spec import Job, ModelSpec, Shard, shards
from cenote.jobs.extract.work import Worker

__all__ = [
    "Engine",
    "Estimate",
    "Extracted",
    "Job",
    "LocalEngine",
    "ModelSpec",
    "Options",
    "Progress",
    "Shard",
    "Worker",
    "estimate",
    "extract",
    "planned",
    "shards",
]

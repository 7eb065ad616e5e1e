"""N vectors -> k vectors."""

from cenote.pool.attention.abmil import ABMIL
from cenote.pool.attention.efficient_probing import EfficientProbing
from cenote.pool.attention.simpool import SimPool
from cenote.pool.base import PaddedPool, Pool, Pooled
from cenote.pool.basic.cls import ClsMeanPool, ClsPool
from cenote.pool.basic.last import LastPool
from cenote.pool.basic.max import MaxPool
from cenote.pool.basic.mean import MeanPool
from cenote.pool.basic.statistics import StatisticsPool
from cenote.pool.basic.sum import SumPool
from cenote.pool.spatial.ggem import GeM, GGeM

__all__ = [
    "ABMIL",
    "ClsMeanPool",
    "ClsPool",
    "EfficientProbing",
    "GGeM",
    "GeM",
    "LastPool",
    "MaxPool",
    "MeanPool",
    "PaddedPool",
    "Pool",
    "Pooled",
    "SimPool",
    "StatisticsPool",
    "SumPool",
]

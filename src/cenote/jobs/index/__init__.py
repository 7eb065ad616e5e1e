"""Documents, a model and a reducer -> a store that can be searched; searches of it."""

from cenote.jobs.index.job import index, search
from cenote.jobs.index.measure import recall_of
from cenote.jobs.index.result import Indexed

__all__ = ["Indexed", "index", "recall_of", "search"]

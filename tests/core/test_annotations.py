"""The annotations of cenote hold in every test, shapes included: `tests/checked.py` has them checked."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

import cenote

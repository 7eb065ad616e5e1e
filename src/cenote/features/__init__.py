"""What people have on disk -> labelled token features."""

from cenote.features.dataset import LayeredDataset, TokenDataset
from cenote.features.description import describe, facts
from cenote.features.embedded import digit_bags, digits
from cenote.features.given import Dataset
from cenote.features.labelling import Labelling
from cenote.features.reading import read

__all__ = [
    "Dataset",
    "Labelling",
    "LayeredDataset",
    "TokenDataset",
    "describe",
    "digit_bags",
    "digits",
    "facts",
    "read",
]

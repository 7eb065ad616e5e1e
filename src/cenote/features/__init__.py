"""What people have on disk -> labelled token features in memory."""

from cenote.features.dataset import TokenDataset
from cenote.features.embedded import digit_bags, digits

__all__ = ["TokenDataset", "digit_bags", "digits"]

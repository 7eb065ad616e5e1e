import pytest

from cenote.core import InputError
from cenote.jobs.probe import measure


def test_a_metric_that_does_not_fit_the_task_is_named() -> None:
    with pytest.raises(InputError, match="'R2' does not fit a binary task; choose from AUROC"):
        measure.metric_name("binary", "R2")
    assert measure.metric_name("multiclass", "Balanced Accuracy") == "balanced accuracy"

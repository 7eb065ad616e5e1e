import cenote
from cenote.core import InputError


def test_input_errors_are_value_errors_and_public() -> None:
    assert issubclass(InputError, ValueError)
    assert cenote.InputError is InputError

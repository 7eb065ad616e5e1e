"""The one exception that tells a person their input is wrong."""


class InputError(ValueError):
    """Something that the caller gave cannot be used.

    The message names the argument, what came, what was expected, and what to do. The command line turns it into
    exit code 2 and prints the message without a traceback.
    """

"""The one exception that is the user's to mend: shown as a line on stderr, exit code 2, no traceback."""


class InputError(Exception):
    """The input or the environment is at fault. The message says what, where and how to mend it; one line per fault."""

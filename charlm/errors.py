"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class InputError(ValueError):
    """Bad input: one line that says what is wrong and what to do about it.

    The command line prints it without a traceback and exits with code 2; every other exception is a bug of ours
    and keeps its traceback.
    """

"""The one exception a user is meant to see."""


class UserError(Exception):
    """A failure the user can mend: one line saying what, where, and what to do.

    The command line prints it as ``error: ...`` without a traceback and exits with `exit_code`.
    """

    exit_code = 2

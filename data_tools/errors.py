"""The exceptions whose messages are meant for the person at the keyboard.

Shared by `data_tools`, `pipeline` and `launch`; imports nothing.
"""


class UserError(Exception):
    """Something the user can mend. One or two lines: what is wrong, where, and what to do.

    The command line prints the message without a traceback (unless `--debug`) and exits with `exit_code`.
    """

    exit_code = 1


class Unfinished(UserError):
    """A store out of reach, a lost machine: nothing is wrong with the request, and what is done stays done."""


class Interrupted(Unfinished):
    """Ctrl-C or SIGTERM: what is committed stays, the same call goes on from there."""

    exit_code = 130

"""The one exception whose message is meant for the person at the keyboard.

Shared by `data_tools`, `pipeline` and `launch`; imports nothing.
"""


class UserError(Exception):
    """Something the user can mend. One or two lines: what is wrong, where, and what to do.

    The command line prints the message without a traceback (unless `--debug`) and exits with `exit_code`.
    """

    exit_code = 1

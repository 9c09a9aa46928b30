"""How every script reports something wrong with its input: one line on stderr and exit code 2."""

import functools
import os
import sys


class InputError(Exception):
    """What the user gave cannot be used.

    The message is all the user sees, so it names the file and line, or the option, and what to do.
    """


def reports_input_errors(main):
    """Decorate a script's `main`: an `InputError` becomes one line on stderr and exit code 2, as argparse does it."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except InputError as error:
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapper

"""How every script reports what went wrong outside it: one line on stderr and exit code 2 (130 when interrupted)."""

import argparse
import functools
import os
import sys
import threading
from contextlib import contextmanager
from typing import NoReturn


class InputError(Exception):
    """What the user gave cannot be used.

    The message is all the user sees, so it names the file and line, or the option, and what to do.
    """


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser whose complaints are `InputError`s."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def reports_input_errors(main):
    """Decorate a script's `main`: each of these becomes one line on stderr.

    `InputError`, and an `OSError` about a file (no permission, a full disk): exit code 2, as argparse does it.
    `KeyboardInterrupt`: exit code 130, as shells do it; its text says how to go on.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        shown, threading.excepthook = threading.excepthook, _show_unless_of_a_file
        try:
            return main(*args, **kwargs)
        except InputError as error:
            code, line = 2, f"error: {error}"
        except OSError as error:
            if error.filename is None:
                raise
            code, line = 2, f"error: {os.fsdecode(error.filename)}: {error.strerror}"
        except KeyboardInterrupt as interrupt:
            code, line = 130, "; ".join(["interrupted", *map(str, interrupt.args)])
        finally:
            threading.excepthook = shown
        print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr)
        sys.exit(code)

    return wrapper


def _show_unless_of_a_file(raised: threading.ExceptHookArgs) -> None:
    """A library's own thread that cannot write a log: the main thread comes to the same error, and reports it."""
    if not issubclass(raised.exc_type, OSError):
        threading.__excepthook__(raised)


@contextmanager
def reading(what: str):
    """Around a library's loading of what the user named: damage shows as whatever it meets first, here an `InputError`
    that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what}: {loading_reason(error)}") from None


_CANNOT = "cannot be written: "


@contextmanager
def writing(path: str | os.PathLike, *more: type[Exception]):
    """Around the writing of `path`: a failure becomes an `OSError` that names it.

    A write to a full disk names no file. `more`: what a library raises in place of an `OSError`.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, *more) as error:
        if isinstance(error, OSError) and str(error.strerror).startswith(_CANNOT):
            raise  # a file inside that has been named already
        code = getattr(error, "errno", None)
        raise OSError(code, f"{_CANNOT}{reason(error)}", os.fspath(path)) from error


def loading_reason(error: Exception) -> str:
    """Why something cannot be loaded, and the file where the error names one."""
    return f"cannot be loaded: {reason_and_file(error)}"


def reason_and_file(error: Exception) -> str:
    """The reason in one line, after the file where the error names one."""
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    return f"{where}{reason(error)}"


def reason(error: Exception) -> str:
    """The reason in one line: libraries' messages run over several paragraphs, and some are no more than a name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    plain = isinstance(error, OSError | ValueError | RuntimeError) or type(error) is Exception
    return text if plain and text else f"{type(error).__name__}: {text}".removesuffix(": ")

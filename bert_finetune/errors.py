"""How every script reports what went wrong outside it: one line on stderr and exit code 2 (130 when interrupted).

What the user gave and cannot be used is an `InputError`, its cause chained; BERT_EMD_DEBUG=1 shows that with its
traceback. What is wrong in this project itself is neither caught nor renamed: it keeps its traceback.
"""

import argparse
import functools
import io
import os
import pickle
import sys
import threading
import traceback
import zipfile
import zlib
from contextlib import contextmanager
from typing import NoReturn

from safetensors import SafetensorError


class InputError(Exception):
    """What the user gave cannot be used.

    The message is all the user sees, so it names the file and line, or the option, and what to do.
    """


# What Python's and the libraries' readers raise when they meet a damaged file: json, toml and Unicode (ValueError),
# zip and npz, pickles, safetensors, torch (RuntimeError).
DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    RuntimeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    SafetensorError,
)


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
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a class name may be more than a console can show
        try:
            return main(*args, **kwargs)
        except InputError as error:
            _show_in_debugging(error)
            code, line = 2, f"error: {error}"
        except OSError as error:
            if error.filename is None:
                raise
            _show_in_debugging(error)
            code, line = 2, f"error: {os.fsdecode(error.filename)}: {error.strerror}"
        except KeyboardInterrupt as interrupt:
            code, line = 130, "; ".join(["interrupted", *map(str, interrupt.args)])
        finally:
            threading.excepthook = shown
        print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr)
        sys.exit(code)

    return wrapper


def _show_in_debugging(error: Exception) -> None:
    if os.environ.get("BERT_EMD_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)


def _show_unless_of_a_file(raised: threading.ExceptHookArgs) -> None:
    """A library's own thread that cannot write a log: the main thread comes to the same error, and reports it."""
    if not issubclass(raised.exc_type, OSError):
        threading.__excepthook__(raised)


@contextmanager
def reading(what: str, *more: type[Exception]):
    """Around the reading of what the user named: damage becomes an `InputError` that names it.

    `more`: what a library raises for damage beside `DAMAGE`.
    """
    try:
        yield
    except InputError:
        raise
    except (*DAMAGE, *more) as error:
        raise InputError(f"{what}: {loading_reason(error)}") from error


_CANNOT = "cannot be written: "


@contextmanager
def writing(path: str | os.PathLike):
    """Around the writing of `path`: a failure becomes an `OSError` that names it.

    A write to a full disk names no file, and some libraries raise no OSError for it.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_writing(error) or str(getattr(error, "strerror", "")).startswith(_CANNOT):
            raise  # not about writing, or about a file inside that has been named already
        code = getattr(error, "errno", None)
        raise OSError(code, f"{_CANNOT}{reason(error)}", os.fspath(path)) from error


def _is_of_writing(error: Exception) -> bool:
    if isinstance(error, OSError | SafetensorError):
        return True
    # torch.save raises a RuntimeError, out of its zip writer; tokenizers a plain Exception.
    return (isinstance(error, RuntimeError) and "inline_container" in str(error)) or type(error) is Exception


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

"""Bad input gets one clear line; a bug of ours keeps its traceback."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from typing import NoReturn

from tqdm.auto import tqdm


class UserError(ValueError):
    """What the user can mend: a wrong value, file, dataset or checkpoint. Its text says what is wrong and what to do.

    Every other exception, a plain ValueError too, is a bug or has a cause that nobody foresaw.
    """


def require(condition: object, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """A block that only reads what the user gave: a ValueError in it, which models and pipelines raise since the files
    that travel with a repository have no UserError, becomes one."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def first_line(error: BaseException) -> str:
    """What an exception says, without its tail; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line and exit code 2 on an error that the user can cause; a bug keeps its traceback."""
    try:
        yield
    except (UserError, FileNotFoundError, PermissionError, NotADirectoryError) as error:
        fail(" ".join(str(error).split()))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(f"The disk is full: {first_line(error)}")
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed: pip install 'hf_ae[eval]' {error.name}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def fail(message: str) -> NoReturn:
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, whatever bar is half drawn
    sys.exit(2)

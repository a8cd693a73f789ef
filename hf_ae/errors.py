"""Bad input gets one clear line; a bug of ours keeps its traceback."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from typing import NoReturn

from safetensors import SafetensorError
from tqdm.auto import tqdm


class UserError(ValueError):
    """What the user can mend: a wrong value, file, dataset or checkpoint. Its text says what is wrong and what to do.

    Every other exception, a plain ValueError too, is a bug or has a cause that nobody foresaw.
    """


class StoppedError(Exception):
    """A training was asked to stop (SIGTERM) and has saved a checkpoint. Its text says which; it is empty in all
    processes but the main one."""


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
    """End the program with one line and exit code 2 on an error that the user can cause; a bug keeps its traceback.

    A training that was stopped by SIGTERM ends with code 143, as the shell says of such a program."""
    try:
        yield
    except (UserError, FileNotFoundError, PermissionError, NotADirectoryError) as error:
        fail(" ".join(str(error).split()))
    except (OSError, SafetensorError) as error:
        if not is_full_disk(error):
            raise
        fail(f"The disk is full: {first_line(error)}")
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed: pip install 'hf_ae[eval]' {error.name}")
    except StoppedError as stopped:
        if str(stopped):
            tqdm.write(f"stopped: {stopped}", file=sys.stderr)
        sys.exit(143)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def is_full_disk(error: BaseException) -> bool:
    """Whether an exception says that the disk or the user's share of it is full; safetensors says so in words."""
    if isinstance(error, SafetensorError):
        return any(f"os error {number}" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def fail(message: str) -> NoReturn:
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, whatever bar is half drawn
    sys.exit(2)

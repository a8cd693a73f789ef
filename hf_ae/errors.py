"""Bad input gets one clear line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

from tqdm.auto import tqdm


def require(condition: object, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def first_line(error: BaseException) -> str:
    """What an exception says, without its tail; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line and exit code 2 on an error that the user can cause; a bug keeps its traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError, PermissionError, NotADirectoryError) as error:
        fail(" ".join(str(error).split()))
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed: pip install 'hf_ae[eval]' {error.name}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def fail(message: str) -> NoReturn:
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, whatever bar is half drawn
    sys.exit(2)

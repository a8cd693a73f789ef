"""The command line `hf-ae`: measure, compare, compress, draw, publish autoencoders, and use what they encode.

hf-ae COMMAND --help tells of each. In Python: import hf_ae.
"""

from __future__ import annotations

import sys

import typer  # alone: each command imports what it needs, so that --help answers at once

from . import models, representations  # noqa: F401  they add their commands, in this order
from .options import app

app.info.help = __doc__


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Bad input ends with one line and exit code 2."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = app(arguments or ["--help"], standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "format_message"):  # a wrong option or argument
            print(f"error: {error.format_message()} See hf-ae --help.", file=sys.stderr)
            sys.exit(2)
        from hf_ae.errors import one_line_errors

        with one_line_errors():
            raise error
    sys.exit(code or 0)

"""A quicker import of Gradio."""

from __future__ import annotations

import contextlib
import inspect
import sys


@contextlib.contextmanager
def without_stubs():
    """Within it, `import gradio` writes no type stubs for editors, which takes it as long as nearly all the rest.

    Gradio leaves them out for components that lie in no file, which it learns from an OSError of `inspect.getfile`.
    """
    getfile = inspect.getfile

    def no_file(thing):
        if sys._getframe(1).f_globals.get("__name__") == "gradio.component_meta":
            raise OSError("no stubs, please")
        return getfile(thing)

    inspect.getfile = no_file
    try:
        yield
    finally:
        inspect.getfile = getfile

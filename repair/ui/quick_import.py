"""Gradio imported without what only its developers need: more than a third of the app's start.

At import Gradio parses the source of each of its components and writes a stub beside it, for
editors (`gradio.component_meta.create_or_modify_pyi`). Where a component's file is not known it
leaves that out, so that is what it is told. Nothing else asks for the file of such a class.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_editor_stubs() -> Iterator[None]:
    """Import Gradio inside of this; everything is as before afterwards."""
    whole = inspect.getfile

    def getfile(thing: object) -> str:
        if isinstance(thing, type) and thing.__module__.startswith("gradio."):
            raise OSError(f"no stub for {thing.__name__}")
        return whole(thing)

    inspect.getfile = getfile
    try:
        yield
    finally:
        inspect.getfile = whole

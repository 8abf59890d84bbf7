"""Faster imports for the command line."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Import torch, Lightning and the like within it: nothing is collected meanwhile, nor looked through afterwards.

    Their imports make half a million objects that stay, which the collector would walk through again and again: a
    fifth of the time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

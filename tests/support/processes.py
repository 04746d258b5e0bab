"""The machine's processes, as tests look for them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import psutil


def every_process(attributes: Collection[str] = ()) -> Iterator[psutil.Process]:
    """Yield every process of the machine, with the given attributes in `info`.

    psutil hands out again what it yielded before for the same number, and refuses that object's children
    once another process has the number. A long suite uses each number several times.
    """
    psutil.process_iter.cache_clear()
    return psutil.process_iter(list(attributes) or None)

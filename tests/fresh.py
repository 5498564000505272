"""Work done in a process of its own, for figures that other tests' leavings would change."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns, done by a new interpreter; it must stand at the top of its module.

    Memory is defined as what a process holds above its value after imports. In a worker that has run hundreds of tests,
    caches that grow and pages that come and go are in the same figure.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()

"""Threads of which each computes by itself: work that fits a processor's cache is split between them, not within."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from threadpoolctl import threadpool_limits


@cache
def single_threads(n: int) -> ThreadPoolExecutor:
    """`n` threads, in each of which torch computes with one thread alone."""

    def alone() -> None:
        torch.get_num_threads()  # torch asks for its number when a thread first needs it, and not again
        # For this thread alone; torch.set_num_threads would be for others, too.
        threadpool_limits(1, user_api="openmp")

    return ThreadPoolExecutor(n, thread_name_prefix="single", initializer=alone)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=single_threads.cache_clear)  # threads do not come along

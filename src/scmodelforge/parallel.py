"""One function over many files: one after another, in processes beside each other, or on a Dask cluster.

A file that cannot be used does not stop the others; at the end one error names all such files. Processes and not
threads, because HDF5 serves one thread at a time. They end with the process that started them, also when that is
killed, so that nothing writes behind the back of a conversion that was started again.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, TypeVar

from scmodelforge.errors import UserError, require_extra

Result = TypeVar("Result")
CONNECT_SECONDS = 10
Outcome = tuple[
    str, Callable[[], Any]
]  # name of a job, and a call that returns its result or raises its error


def map_files(
    function: Callable[..., Result],
    jobs: Mapping[str, tuple[Any, ...]],
    processes: int = 1,
    dask: str | None = None,
    done: Callable[[str, Result], None] = lambda name, result: None,
) -> dict[str, Result]:
    """Call `function(*arguments)` for each job; return the results by name, in the order of the jobs.

    Parameters
    ----------
    function
        Importable by its name; with processes or Dask its arguments and results are pickled.
    jobs
        Name of a file → arguments.
    processes
        Jobs side by side on this machine.
    dask
        Address of a Dask scheduler whose workers see the same files; instead of processes.
    done
        Called here with each result as it comes.

    Raises
    ------
    UserError
        If jobs failed with a `UserError`, after all others are done: each name with its message. Or if the cluster
        cannot be reached, or a worker was killed.
    """
    if dask is not None:
        outcomes = _on_cluster(function, jobs, dask)
    elif processes > 1 and len(jobs) > 1:
        outcomes = _in_processes(function, jobs, min(processes, len(jobs)))
    else:
        outcomes = ((name, partial(function, *arguments)) for name, arguments in jobs.items())
    results, failed = {}, {}
    for name, result in outcomes:
        try:
            results[name] = result()
        except UserError as error:
            failed[name] = error
        else:
            done(name, results[name])
    if len(jobs) == 1 and failed:
        raise next(iter(failed.values()))
    if failed:
        told = "\n\n".join(f"{name}: {failed[name]}" for name in jobs if name in failed)
        raise UserError(f"{len(failed)} of {len(jobs)} files failed, the others are done.\n\n{told}")
    return {name: results[name] for name in jobs}


def _in_processes(
    function: Callable[..., Any], jobs: Mapping[str, tuple[Any, ...]], processes: int
) -> Iterator[Outcome]:
    spawn = multiprocessing.get_context("spawn")  # forked threads of HDF5 and torch may hang
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=_end_with_parent) as pool:
        futures = {pool.submit(function, *arguments): name for name, arguments in jobs.items()}
        for future in as_completed(futures):
            yield futures[future], partial(_result, future.result, BrokenProcessPool)


def _on_cluster(
    function: Callable[..., Any], jobs: Mapping[str, tuple[Any, ...]], address: str
) -> Iterator[Outcome]:
    require_extra("distributed", "dask", "--dask")
    import distributed

    try:
        client = distributed.Client(address, timeout=CONNECT_SECONDS)
    except (OSError, ValueError, ImportError) as error:  # ImportError: a protocol that is not installed
        raise UserError(
            f"No Dask scheduler answers at '{address}' ({error}).\n"
            "Give the address that 'dask scheduler' printed, such as tcp://192.0.2.1:8786."
        ) from error
    with client:
        futures = {client.submit(function, *arguments, pure=False): name for name, arguments in jobs.items()}
        for future in distributed.as_completed(futures):
            yield futures[future], partial(_result, future.result, distributed.KilledWorker)


def _result(result: Callable[[], Any], killed: type[Exception]) -> Any:
    try:
        return result()
    except killed as error:
        raise UserError(
            "The process that worked on it was killed; often there was too little memory for so many side by side.\n"
            "Start again with fewer: what is done is kept."
        ) from error


def _end_with_parent() -> None:
    """Let this worker end when the process that started it does, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

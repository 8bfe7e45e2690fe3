"""A cluster to scan on: one that runs somewhere, or one made here for the time being."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from hotpixd import __version__

_CONNECT_WITHIN_S = 10.0
_WORKERS_WITHIN_S = 60.0
"""A batch system starts workers when it has room; who starts one by hand has done so by then."""

_MUST_AGREE = ("hotpixd", "numpy", "rawpy", "simplejpeg", "dask", "distributed")
"""Packages on whose versions the result, or the way to it, depends."""


class ClusterError(Exception):
    """The cluster cannot be used, or is gone. The message is a sentence that says what to do."""


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Yield a client of a cluster with a worker at least.

    Parameters
    ----------
    address : of a scheduler, such as tcp://10.0.0.1:8786; or local, or local:4 for as many workers here

    Raises
    ------
    ClusterError
        If there is none, or its machines differ from this one in what counts.
    """
    local = re.fullmatch(r"local(?::([1-9][0-9]{0,3}))?", address)
    if local is None and "://" not in address:
        raise ClusterError(
            f"--cluster takes local, local:4 or a scheduler's address (tcp://HOST:8786), not {address!r}"
        )
    try:
        import dask
        import distributed
    except ImportError as error:
        raise ClusterError(f"to scan on a cluster, Dask is needed ({error}): pip install 'hotpixd[cluster]'") from error
    # What becomes of workers is told by what becomes of the scan.
    dask.config.set({"logging.distributed": "critical"})
    for name in ("distributed", "tornado", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with ExitStack() as held:
        if local is not None:
            count = int(local[1] or len(os.sched_getaffinity(0)))
            place = held.enter_context(tempfile.TemporaryDirectory(prefix="hotpixd-cluster-"))
            # Here a worker that dies is most likely killed by its file: two more are given to it, not three.
            dask.config.set({"distributed.scheduler.worker-ttl": "60s", "distributed.scheduler.allowed-failures": 2})
            cluster = held.enter_context(
                distributed.LocalCluster(
                    n_workers=count,
                    threads_per_worker=1,
                    # Nobody looks at it; a fixed port might be taken.
                    dashboard_address="127.0.0.1:0",
                    local_directory=place,
                    preload=["hotpixd.cluster.worker"],
                    silence_logs=logging.CRITICAL,
                )
            )
            address = cluster.scheduler_address
        try:
            client = held.enter_context(distributed.Client(address, timeout=_CONNECT_WITHIN_S))
        except (OSError, TimeoutError, ValueError) as error:
            raise ClusterError(
                f"no scheduler answers at {address} ({error or 'it took too long'}). Start one with `dask scheduler`,"
                " and workers with `dask worker ADDRESS`."
            ) from error
        _check(client, address)
        yield client


def _check(client: Any, address: str) -> None:
    """Raise `ClusterError` unless there are workers, all with the versions that are here."""
    try:
        client.wait_for_workers(1, timeout=_WORKERS_WITHIN_S)
    except TimeoutError:
        raise ClusterError(
            f"the scheduler at {address} has no workers: start some with `dask worker {address}`"
        ) from None
    here = {name: importlib.metadata.version(name) for name in _MUST_AGREE}
    for name, ours in here.items():
        # A function of Python's own: this much works on whatever is there.
        for worker, theirs in client.run(importlib.metadata.version, name, on_error="return").items():
            if theirs != ours:
                found = f"{name} {theirs}" if isinstance(theirs, str) else f"no {name}"
                raise ClusterError(
                    f"the worker {worker} has {found}, and here is {ours}: results could differ. Install there what is"
                    f" here: pip install 'hotpixd[cluster]=={__version__}' '{name}=={ours}'"
                )

"""Joins the processes of one run: found in the environment, or said by flags.

A TPU pod (also under GKE), Slurm and Open MPI tell JAX all it needs; anywhere else three
flags do. One process alone is left alone.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping

import jax


class DistributedError(RuntimeError):
    """The processes of a run cannot find one another."""


def found_in(environ: Mapping[str, str]) -> str | None:
    """What says that this is one process of several, or None; looks only, starts nothing."""
    several = lambda name: environ.get(name, '1').isdigit() and int(environ.get(name, '1')) > 1
    if environ.get('JAX_COORDINATOR_ADDRESS'):
        return 'JAX_COORDINATOR_ADDRESS'
    if several('SLURM_NTASKS') and 'SLURM_PROCID' in environ:
        return 'Slurm'
    if several('OMPI_COMM_WORLD_SIZE'):
        return 'Open MPI'
    # An interactive machine of a pod is a TPU host like any other: JAX asks its metadata.
    wanted = environ.get('JAX_PLATFORMS', '')
    chips = glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*')
    if chips and (wanted == '' or 'tpu' in wanted):
        return 'TPU'
    return None


def start(coordinator: str | None, num_processes: int | None, process_id: int | None,
          environ: Mapping[str, str]) -> None:
    """Initialises `jax.distributed` if this process is one of several; before any other JAX call.

    Args:
      coordinator: ``host:port`` of process 0, or None to look in the environment.
      num_processes, process_id: how many there are and which this is; go with `coordinator`.
      environ: `os.environ`.

    Raises:
      DistributedError: flags that do not go together, or nobody answers.
    """
    given = {'--coordinator': coordinator, '--num_processes': num_processes,
             '--process_id': process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise DistributedError(f'{", ".join(missing)} not given; the three of '
                               f'{", ".join(given)} go together')
    if not missing and not 0 <= process_id < num_processes:
        raise DistributedError(f'--process_id {process_id} must lie in 0..{num_processes - 1}')
    source = 'the flags' if not missing else found_in(environ)
    if source is None:
        return
    if environ.get('JAX_PLATFORMS') == 'cpu':
        jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except Exception as e:  # grpc, sockets and cluster detection have no common ancestor
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise DistributedError(f'the processes could not be joined as {source} says ({reason}); '
                               'check that all of them were started with one coordinator') from e

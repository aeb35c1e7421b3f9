"""``python tests/faults/collective.py PORT COUNT PROCESS TIMEOUT``: one process of several.

It does what a run does with the others, and nothing else, and prints a line for each round. With
JOINING=SECONDS it waits no longer than that for all of them.
"""

import faulthandler
import os
import sys

from ddmd_jax.parallel import distributed

faulthandler.enable()  # as absl does: pages for each thread of a process that aborts
port, count, process, timeout = map(int, sys.argv[1:])
distributed.JOINING = int(os.environ.get('JOINING', distributed.JOINING))
with distributed.ending_together():
    distributed.start(f'127.0.0.1:{port}', count, process, os.environ, timeout)
    from jax.experimental import multihost_utils

    for step in range(10**6):
        multihost_utils.process_allgather(step)
        multihost_utils.reached_preemption_sync_point(step)
        print(step, flush=True)

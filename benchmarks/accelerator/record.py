"""What every part of `benchmarks/accelerator.sh` leaves: OUT/PART.json."""

import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any


def device() -> dict[str, Any]:
    """The first device, how many there are, and the host's cores."""
    import jax

    first = jax.devices()[0]
    return {'kind': first.device_kind, 'platform': first.platform, 'count': jax.device_count(),
            'host_cores': os.cpu_count()}


def peak_bytes() -> int | None:
    """The most memory that was in use on the first device; None where it does not count."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')


def write(out: Path, part: str, figures: dict[str, Any]) -> None:
    """Writes ``out/PART.json``: device, versions, command and `figures`."""
    from ddmd_jax.train.durable import checkpoint
    from ddmd_jax.util import files

    versions = {name.removeprefix(checkpoint.VERSION): version
                for name, version in checkpoint.versions().items()}
    command = ['python', '-m', f'benchmarks.accelerator.{part}', *sys.argv[1:]]
    files.write_json(out / f'{part}.json', {
        'part': part, 'device': device(),
        'versions': versions | {'python': platform.python_version()},
        'command': shlex.join(command), 'figures': figures})

"""What every part of `benchmarks/accelerator.sh` leaves: OUT/PART.json."""

import math
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


def environment() -> dict[str, str]:
    """Variables that change how programs are compiled and run, where they are set."""
    names = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'GLIBC_TUNABLES', 'OMP_NUM_THREADS',
             'XLA_CLIENT_MEM_FRACTION', 'JAX_COMPILATION_CACHE_DIR',
             'JAX_DISABLE_MOST_OPTIMIZATIONS')
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def peak_bytes() -> int | None:
    """The most memory that was in use so far on the first device; None where it does not count.

    Of a program that ran after another it is that of both: it never falls.
    """
    import jax

    return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')


# FLOP/s of dense bf16 products, as sold, by how a device's kind begins; the vendors' data sheets.
PEAK_BF16 = {'NVIDIA H200': 989.4e12, 'NVIDIA H100 PCIe': 756e12, 'NVIDIA H100': 989.4e12,
             'NVIDIA A100': 312e12, 'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5': 459e12,
             'TPU v6 lite': 918e12}


def peak_flops(kind: str, dtype: str) -> float | None:
    """The most FLOP/s of a device of that kind in products of `dtype`; None where not known."""
    found = next((x for name, x in PEAK_BF16.items() if kind.startswith(name)), None)
    return found if dtype == 'bfloat16' else None


def write(out: Path, part: str, figures: dict[str, Any], module: str = '') -> None:
    """Writes ``out/PART.json``: device, versions, command and `figures`.

    `module` is the part's where it has another name. What is not finite is written as a string.
    """
    from ddmd_jax.train.durable import checkpoint
    from ddmd_jax.util import files

    versions = {name.removeprefix(checkpoint.VERSION): version
                for name, version in checkpoint.versions().items()}
    command = ['python', '-m', f'benchmarks.accelerator.{module or part}', *sys.argv[1:]]
    files.write_json(out / f'{part}.json', {
        'part': part, 'device': device(), 'environment': environment(),
        'versions': versions | {'python': platform.python_version()},
        'command': shlex.join(command), 'figures': _plain(figures)})


def _plain(value: Any) -> Any:
    """`value` with infinities and NaNs, which JSON has not, as strings."""
    if isinstance(value, dict):
        return {k: _plain(x) for k, x in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_plain, value))
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)

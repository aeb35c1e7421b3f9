"""Spec-sheet numbers of TPU chips, and the least time that a program's costs take on one."""

import dataclasses
import re

from ddmd_jax.util.errors import UserError

GIB = 2**30
DOCS = 'https://docs.cloud.google.com/tpu/docs'


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, with rates as sold, not as measured.

    Attributes:
      name: as topologies are named, `v5e` of `v5e:4x4`. A device of a v4 topology is a chip only
        with ``get_topology_desc(..., chip_config_name='megacore')``; else it is a core, half of
        one. On the others a device is a chip anyway.
      hbm_bytes: capacity as sold.
      usable_bytes: what the compiler gives to programs, as libtpu 0.0.42.1 reports it.
      peak_bf16_flops: FLOP/s of bf16 matrix products.
      hbm_bandwidth: bytes/s.
      ici_bandwidth: bytes/s that a chip can send over all its links together, that is half of
        the bidirectional figure in the documentation. A collective along one axis of the torus
        has only that axis' links.
      source: where the numbers are from.
    """

    name: str
    hbm_bytes: int
    usable_bytes: int
    peak_bf16_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    source: str


CHIPS = {chip.name: chip for chip in (
    Chip('v4', 32 * GIB, 123 * GIB // 4, 275e12, 1.2e12, 300e9,
         f'{DOCS}/v4; interconnect from memory of arXiv:2304.01433: 6 links of 50 GB/s each way'),
    Chip('v5e', 16 * GIB, 63 * GIB // 4, 197e12, 819e9, 200e9,
         f'{DOCS}/v5e: 16 GB, 819 GBps, 400 GBps bidirectional'),
    Chip('v5p', 95 * GIB, 9574 * GIB // 100, 459e12, 2765e9, 600e9,
         f'{DOCS}/v5p: 95 GiB, 2765 GBps, 1200 GBps bidirectional'),
    Chip('v6e', 32 * GIB, 125 * GIB // 4, 918e12, 1638e9, 400e9,
         f'{DOCS}/v6e: 32 GB, 1638 GBps, 800 GBps bidirectional'),
)}
ALIASES = {'v5litepod': 'v5e', 'v5lite': 'v5e'}


class UnknownChip(UserError, ValueError):
    """A topology of chips whose figures are not in the table."""


def split_slices(topology_name: str) -> tuple[int, str]:
    """(number of slices, topology of each): ``2xv5e:4x4`` is two of ``v5e:4x4``."""
    found = re.fullmatch(r'([1-9][0-9]*)x(v.*)', topology_name)
    return (int(found[1]), found[2]) if found else (1, topology_name)


def chip_for(topology_name: str) -> Chip:
    """Chip of a topology (`v5e:4x4`, `2xv5e:4x4`) or accelerator type (`v5litepod-16`).

    Raises:
      UnknownChip: a generation that is not in the table.
    """
    generation = re.split('[:-]', split_slices(topology_name)[1])[0]
    chip = CHIPS.get(ALIASES.get(generation, generation))
    if chip is None:
        raise UnknownChip(f'no chip is known for topology {topology_name!r}: '
                          f'it starts with one of {", ".join(CHIPS)}, as in v5e:4x4')
    return chip


def roofline(chip: Chip, flops: float, hbm_bytes: float,
             collective_bytes: float) -> tuple[float, str]:
    """Least seconds for a chip's costs, and the bound: `compute`, `memory` or `network`.

    The three are taken to overlap perfectly, each at its peak rate; a real step takes longer.

    Args:
      chip: whose rates.
      flops: of matrix products, per chip.
      hbm_bytes: read and written, per chip.
      collective_bytes: sent, per chip.
    """
    seconds = {
        'compute': flops / chip.peak_bf16_flops,
        'memory': hbm_bytes / chip.hbm_bandwidth,
        'network': collective_bytes / chip.ici_bandwidth,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return seconds[bound], bound

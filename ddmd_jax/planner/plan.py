"""The plan of a run: every program measured, the largest batch, advice, and the whole run."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jax.sharding import Mesh

from ddmd_jax.parallel import sharding
from ddmd_jax.planner import chips, search
from ddmd_jax.planner.measure import measure, quick_peak
from ddmd_jax.planner.programs import PlanError, Program, evaluations, programs, runs
from ddmd_jax.train.distillation import parts_of_batch
from ddmd_jax.util.text import in_units

STEPS = ('generator_step', 'critic_step')


def plan(config: Any, parts_of: Any, mesh: Mesh, name: str, look: bool = True,
         only: Sequence[str] = ()) -> dict[str, Any]:
    """All that is known of a distillation on the topology `name`, per chip; see docs/scaling.md.

    Args:
      config: of a distillation.
      parts_of: ``(config, mesh) -> `` what `programs` takes beside the config.
      mesh: over the topology's devices.
      name: of the topology, for the chip's figures.
      look: whether to search for the largest batch, and for levers where something does not fit.
      only: programs to compile; none: all. Figures of a whole run need all of them, the
        search both steps.

    Raises:
      PlanError: `only` names a program that the run does not have.
    """
    chip = chips.chip_for(name)
    build = lambda c: programs(c, *parts_of(c, mesh))
    found, resident = build(config)
    if set(only) - set(found):
        raise PlanError(f'--only {",".join(only)}: the programs are {", ".join(found)}')
    wanted = {k: p for k, p in found.items() if not only or k in only}
    look = look and set(STEPS) <= set(wanted)
    measured, quick = compiled_together(wanted, chip, look)
    result = {
        'topology': name, 'chips': mesh.size, 'hbm_bytes_per_chip': chip.hbm_bytes,
        'usable_bytes_per_chip': chip.usable_bytes, 'global_batch': config.data.global_batch,
        'resident_bytes': resident, 'programs': measured}
    if all('roofline_seconds' in measured.get(k, ()) for k in found):
        result['run'] = whole_run(config, measured, mesh.size)
    if look:
        search_ = _Search(config, mesh, build, measured, chip.usable_bytes, {STEPS[0]: quick})
        result |= search_.largest(resident) | search_.advice()
    return result


def compiled_together(found: dict[str, Program], chip: chips.Chip,
                      look: bool) -> tuple[dict[str, Any], float | None]:
    """(`measure` of every program, with `look` also `quick_peak` of the generator's step).

    Two at a time: one alone leaves a core idle. The largest goes first, beside the small ones,
    as two large ones at once take the most memory.
    """
    first, *rest = found
    with ThreadPoolExecutor(2) as pool:
        done = {name: pool.submit(measure, found[name], chip) for name in (first, *rest[::-1])}
        quick = pool.submit(quick_peak, found[STEPS[0]]) if look else None
        return {name: done[name].result() for name in found}, quick and quick.result()


@dataclasses.dataclass(frozen=True)
class _Search:
    """Searches for other batches and levers that fit, from a config whose programs were measured.

    Attributes:
      config, mesh: of the plan.
      build: ``config -> (programs, resident bytes)``.
      measured: of its programs.
      limit: bytes of a chip.
      quick: peaks by the least effort, as far as they are known.
    """

    config: Any
    mesh: Mesh
    build: Any
    measured: dict[str, Any]
    limit: float
    quick: dict[str, float]

    @property
    def steps(self) -> list[str]:
        """The programs that a step of training runs."""
        return [name for name in (*STEPS, 'rollout') if name in self.measured]

    def unit(self, config: Any) -> int:
        """What the batches of a config are multiples of."""
        return math.lcm(sharding.batch_ways(self.mesh) * parts_of_batch(config),
                        config.student.steps * config.train.accumulate)

    def largest(self, resident: int) -> dict[str, int]:
        """`largest_batch` of all that a step runs."""
        # The program that needs most decides; one that was refused needs more than any.
        which = max(self.steps, key=lambda k: self.measured[k].get('peak_bytes', float('inf')))
        known = self.measured[which].get('peak_bytes')
        config = self.config

        def peak(batch: int) -> float:
            if known is not None and batch == config.data.global_batch:
                return known
            return self.peak(which, search.with_field(config, 'data.global_batch', batch))

        return {'largest_batch': search.largest_batch(
            peak, config.data.global_batch, self.unit(config), resident, self.limit)}

    def advice(self) -> dict[str, Any]:
        """`advice` on each program of a step that does not fit; nothing where all do."""
        short = [k for k in self.steps if not self.measured[k]['fits']]
        found = {k: search.advice(self.config, functools.partial(self.peak, k), self.limit)
                 for k in short}
        return {'advice': found} if found else {}

    def peak(self, which: str, config: Any) -> float:
        """Peak bytes by the least effort, set right by what is known of this config's own.

        Infinite of a config whose batch does not divide.
        """
        if config.data.global_batch % self.unit(config):
            return math.inf
        program = self.build(config)[0][which]
        return program.beside + self.ratio(which) * (quick_peak(program) - program.beside)

    def ratio(self, which: str) -> float:
        """Temporaries of the usual effort to those of the least, of one program; 1 if unknown."""
        real = self.measured[which]
        if 'peak_bytes' not in real:
            return 1.0
        program = self.build(self.config)[0][which]
        if which not in self.quick:
            self.quick[which] = quick_peak(program)
        quick = self.quick[which] - program.beside
        return (real['peak_bytes'] - program.beside) / quick if 0 < quick < math.inf else 1.0


def whole_run(config: Any, measured: dict[str, Any], count: int) -> dict[str, float]:
    """The config's run if every program took its least time; evaluation is left out."""
    seconds = {k: p['roofline_seconds'] for k, p in measured.items()}
    often, encode = runs(config), seconds.get('encode', 0.0)
    # Updates on one rollout share its batch; in DMD2's order one is on the generator's.
    shared = config.critic.get('order') == 'same_images'
    batches = 1 if 'rollout' in often else sum(often.values()) - shared
    step = batches * encode + sum(count * seconds[name] for name, count in often.items())
    critic = seconds['critic_step'] + (
        (encode + seconds['rollout']) / config.student.steps if 'rollout' in often else encode)
    total = config.train.steps * step + config.critic.warmup * critic
    drawn = measured['sample']['rows']
    drawing = seconds['sample'] + drawn * seconds.get('decode', 0.0)
    asked, images = evaluations(config), (1 + config.critic.updates) * config.data.global_batch
    return {'evaluations_per_step': sum(count * asked[name] for name, count in often.items()),
            'seconds_per_step': step, 'hours': total / 3600, 'chip_hours': total * count / 3600,
            'training_images_per_second': images / step,
            'sampled_images_per_second': drawn / drawing}


def table(plan: dict[str, Any]) -> str:
    """The plan for the terminal."""
    hbm, usable = (in_units(plan[f'{name}_bytes_per_chip']) for name in ('hbm', 'usable'))
    lines = [f'{plan["topology"]}: {plan["chips"]} chips of {hbm} ({usable} for programs), '
             f'global batch {plan["global_batch"]}; per chip:',
             f'  resident: {in_units(plan["resident_bytes"])}']
    lines += [_program_line(name, p) for name, p in plan['programs'].items()]
    if 'largest_batch' in plan:
        lines.append(f'  largest global batch: {plan["largest_batch"]}' if plan['largest_batch']
                     else '  no batch fits')
    for name, levers in plan.get('advice', {}).items():
        lines.append(f'  {name} would fit with' if levers else
                     f'  {name}: no lever makes it fit, nor do all together: take more chips')
        lines += [f'    {" ".join(f"--config.{k}={v}" for k, v in one["fields"].items())}: about '
                  f'{in_units(int(one["peak_bytes"]))}; costs {one["costs"]}' for one in levers]
    if 'run' in plan:
        r = plan['run']
        lines.append(f'  at best (all at peak rates): {r["seconds_per_step"]:.1f} s a step, '
                     f'{r["training_images_per_second"]:.1f} training images/s; the run '
                     f'{r["hours"]:.1f} h, {r["chip_hours"]:.0f} chip-hours; '
                     f'{r["sampled_images_per_second"]:.1f} sampled images/s')
    return '\n'.join(lines)


def _program_line(name: str, p: dict[str, Any]) -> str:
    if 'error' in p:
        return f'  {name}: does not fit: {p["error"]}'
    silent = p['kernel_calls_without_flops']
    return (
        f'  {name}: {"fits" if p["fits"] else "does not fit"}, peak {in_units(p["peak_bytes"])} '
        f'(temporaries {in_units(p["temp_bytes"])}, headroom {in_units(p["headroom_bytes"])}); '
        f'{p["flops"] / 1e12:.2f} TFLOP'
        + (f' without {silent} kernels' if silent else '')
        + (f', {p["flops"] / p["analytic_flops"]:.2f} x analytic' if p['analytic_flops'] else '')
        + f'; {in_units(p["hbm_bytes"])} through memory, '
        f'{in_units(sum(p["collective_bytes"].values()))} sent; at least '
        f'{p["roofline_seconds"]:.2f} s, bound by {p["bound_by"]}; compiled in '
        f'{p["compile_seconds"]:.0f} s')

"""Task `distill`: wires teacher, prompts and Algorithm 1 into the loop, then evaluates."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddmd_jax import families as teachers
from ddmd_jax.data import conditioning, loader
from ddmd_jax.data.order import Order, Shape
from ddmd_jax.diffusion import drawing, process, sampling
from ddmd_jax.diffusion.time import FewSteps, Shift, chosen
from ddmd_jax.evaluation import evaluate, pictures, suites
from ddmd_jax.method import health as diagnostics
from ddmd_jax.method.recipe import Method, feature_width, method_from
from ddmd_jax.models import discriminator
from ddmd_jax.parallel import sharding
from ddmd_jax.train import loop, optim, prompts as prompt_sources, state as st
from ddmd_jax.train.startup import Compiling, Startup
from ddmd_jax.train.step import Steps, make_steps
from ddmd_jax.train.watch import draws
from ddmd_jax.train.watch.profiling import NOTHING, Beside

GRID = 8  # prompts in the picture logged during training
PANEL_TAU = 0.5  # pre-shift level at which the panels compare teacher and critic
# What `train.offload` keeps in the hosts' memory, to be fetched by the generator's step alone.
OFFLOAD = {'none': (), 'ema': ('ema',), 'teacher': ('teacher',),
           'ema+teacher': ('ema', 'teacher')}


def make_advance(steps: Steps, frozen: Any, updates: int, warmup: int) -> Callable:
    """One step of the loop: `updates` critic updates, then one of the generator.

    The critic goes first, as everything the generator does leans on it; a fresh run's first
    step begins with `warmup` more, and every step has `state.critic_extra` more. `steps` take a
    `loader.Batch`.
    """
    extra = 0

    def advance(state: st.TrainState, next_batch: Callable[[], Any], first: bool):
        nonlocal extra
        more = 0
        if first:  # only then, as these have to be waited for
            extra = int(state.critic_extra)
            more = warmup if not int(state.critic_step) else 0
        critic_metrics = []
        for _ in range(updates + extra + more):
            state, metrics = steps.critic(state, next_batch())
            critic_metrics.append(metrics)
        state, metrics = steps.generator(state, frozen, next_batch())
        if not critic_metrics:
            return state, metrics
        # Means, so that a NaN in any of the critic's updates is seen under its own name.
        mean = jax.tree.map(lambda *xs: sum(xs) / len(xs), *critic_metrics)
        return state, mean | metrics | {'finite': metrics['finite'] & (mean['finite'] == 1)}

    return advance


def make_annotate(data_std: float | None) -> Callable:
    """Adds the health verdict to a logged interval, given those before it."""
    def annotate(history: Sequence[dict[str, Any]], step: int,
                 values: dict[str, Any]) -> dict[str, Any]:
        word, reason = diagnostics.verdict([*history, {'step': step, **values}], data_std)
        return values | {'health': word, 'health_reason': reason}

    return annotate


def words(v: dict[str, Any]) -> str:
    """The line beside the progress bar."""
    fake = f'fake {v["fake_loss"]:.3f} ' if 'fake_loss' in v else ''  # the critic may rest
    return (f'loss {v["loss"]:.3f} {fake}gap {v["dm_rel_gap"]:.3f} '
            f'dm/ca {v["dm_to_ca"]:.2f} std {v["x_std"]:.3f} {v["health"]}')


def make_sampler(config: Any, teacher: teachers.Teacher, m: Method, mesh: Mesh, count: int,
                 key: jax.Array) -> Callable[[Any, Any], jax.Array]:
    """Few-step pictures of `count` prompts: ``draw(params, cond) -> latents [count, ...]``.

    `cond` has `drawn_rows` rows, so that the devices share the work; the surplus is cut off.
    The same `key` gives the same pictures on any mesh.
    """
    rows = drawn_rows(count, mesh)

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def draw(params: Any, cond: Any) -> jax.Array:
        cond = jax.lax.with_sharding_constraint(cond, sharding.batch_sharding(mesh))
        x = sampling.sample_student(
            functools.partial(teacher.predict_clean, sharding.on_device(params)), cond,
            FewSteps(Shift(m.shift), m.num_steps), key, (rows, *teacher.latents.shape),
            config.student.sampler)
        return x[:count]

    return draw


def drawn_rows(count: int, mesh: Mesh) -> int:
    """`count`, filled up to what splits over the mesh."""
    ways = sharding.batch_ways(mesh)
    return -(-count // ways) * ways


def predict_noised(teacher: teachers.Teacher, m: Method, key: jax.Array, params: Any, x: jax.Array,
                   cond: Any) -> jax.Array:
    """What `params` predict of samples `x` ``[B, ...]`` re-noised to `PANEL_TAU`.

    The same `key` gives the same noise, so that teacher and critic can be compared.
    """
    tau = Shift(m.shift)(jnp.full(x.shape[:1], PANEL_TAU))
    x_tau = process.renoise(x, tau, jax.random.normal(jax.random.fold_in(key, 1), x.shape))
    return teacher.predict_clean(sharding.on_device(params), x_tau, tau, cond)


def make_pictures(config: Any, teacher: teachers.Teacher, prompts: conditioning.Prompts,
                  frozen: Any, m: Method, mesh: Mesh) -> Callable:
    """Sample grids and student / real / fake / difference panels for TensorBoard."""
    if teacher.latents.decode is None:
        return lambda state, step, log: None
    rows = drawn_rows(GRID, mesh)
    shown = shown_rows(prompts, GRID, config.seed)
    cond = prompts.cond(np.resize(shown, rows))
    key = jax.random.key(config.seed)
    draw = make_sampler(config, teacher, m, mesh, GRID, key)

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def predict(params: Any, x: jax.Array, cond: Any) -> jax.Array:
        x = jnp.resize(x, (rows, *teacher.latents.shape))
        return predict_noised(teacher, m, key, params, x, cond)[:GRID]

    def show(state: st.TrainState, step: int, log: Any) -> None:
        x = draw(state.ema, cond)
        real, fake = (predict(p, x, cond) for p in (frozen['teacher'], state.critic))
        x, real, fake = (np.asarray(teacher.latents.decode(z)) for z in (x, real, fake))
        log.image(step, 'panels/student_real_fake_difference',
                  pictures.rows_of_images([x, real, fake, real - fake]))

    return show


def make_probe(config: Any, teacher: teachers.Teacher, prompts: conditioning.Prompts,
               frozen: Any, m: Method, mesh: Mesh) -> Callable[[st.TrainState], dict[str, Any]]:
    """`diagnostics.probe` of the averaged student on fixed prompts and noise."""
    count = config.log.probe
    if not count:
        return lambda state: {}
    shown = shown_rows(prompts, count, config.seed)
    cond = prompts.cond(np.resize(shown, drawn_rows(count, mesh)))
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    draw = make_sampler(config, teacher, m, mesh, count, key)
    judge, start = jax.jit(functools.partial(diagnostics.probe, limit=m.limit)), []

    def probe(state: st.TrainState) -> dict[str, Any]:
        # The student began as the teacher, so that a resumed run finds the same start.
        if not start:
            start.append(draw(frozen['teacher'], cond))
        return judge(draw(state.ema, cond), start[0])

    return probe


def make_judge(config: Any, teacher: teachers.Teacher,
               mesh: Mesh) -> Callable[[st.TrainState], dict[str, Any]]:
    """Figures of the suite for the EMA student on fixed prompts, a third of them held out."""
    count, suite = config.log.judge, suite_of(config)
    if not count or suite is None or suite.watched is None:
        return lambda state: {}
    examples = suite.watched(count - count // 3, count // 3, config.seed)
    request = drawing.Request(drawing.names(examples.captions, 1, config.seed),
                              teacher.encode(examples.captions), teacher.encode(['']))
    sampler = drawing.of_student(teacher, config.student.steps,
                                 chosen(teacher.time, config.method.shift), config.student.sampler)
    draw = drawing.drawer(sampler, request, mesh)
    return lambda state: examples.measure(np.clip(teacher.latents.decode(draw(state.ema)), -1, 1))


def shown_rows(prompts: conditioning.Prompts, count: int, seed: int) -> np.ndarray:
    """`count` different training prompts (fewer if there are fewer, then again)."""
    rows = np.random.default_rng(seed).permutation(np.unique(prompts.rows))
    return np.resize(rows, count)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A distillation's programs and layouts, from shapes alone: nothing is on a device yet."""

    method: Method
    make_state: Callable[[Any], st.TrainState]
    rules: sharding.Rules  # of the state
    state: Any  # ShapeDtypeStructs
    state_shardings: Any
    frozen_shardings: Any
    steps: dict[Shape, Steps]  # by the shape of a latent


def host_fields(config: Any) -> tuple[str, ...]:
    """Fields of the state that `train.offload` keeps in the hosts' memory."""
    return tuple(name for name in OFFLOAD[config.train.offload] if name != 'teacher')


def shapes(config: Any, teacher: teachers.Teacher) -> tuple[Shape, ...]:
    """Shapes of latents that a run has, by `data.sizes`; the teacher's own if it names none.

    Raises:
      WeightsError: a size that the teacher cannot have.
    """
    sizes = config.data.get('sizes', ())
    return tuple(map(teacher.latents.shape_of, sizes)) or (teacher.latents.shape,)


def plan(config: Any, teacher: teachers.Teacher, null: Any, mesh: Mesh) -> Plan:
    """What `config` makes of `teacher` and its null prompt, arrays or shapes, on `mesh`."""
    m = method_from(config, teacher)
    student_tx = optim.make_optimizer(config.optim.student, config.train.steps)
    critic_tx = optim.make_optimizer(config.optim.critic, config.train.steps
                                     * config.critic.updates + config.critic.warmup)
    head = lambda: discriminator.init(
        feature_width(teacher), jax.random.key(config.seed)) if m.gan else None
    # Student and critic both start at the teacher (Algorithm 1, line 1).
    make_from = lambda params: st.fresh(params, student_tx, params, critic_tx, head())
    rules = (*discriminator.RULES, *teacher.rules) if m.gan else teacher.rules
    state, shardings = st.abstract_and_shardings(
        make_from, rules, mesh, teacher.params, host=host_fields(config))
    frozen = {'teacher': sharding.shard_tree(teacher.params, teacher.rules, mesh),
              'null': jax.tree.map(lambda _: sharding.replicated(mesh), null)}
    if 'teacher' in OFFLOAD[config.train.offload]:
        frozen['teacher'] = sharding.in_host_memory(frozen['teacher'])
    steps = {shape: make_steps(teacher.predict_clean, student_tx, critic_tx, m, shape,
                               config.seed, mesh, shardings, frozen)
             for shape in shapes(config, teacher)}
    return Plan(m, make_from, rules, state, shardings, frozen, steps)


def compiled_steps(p: Plan, frozen: Any, batches: Sequence[loader.Batch],
                   critic: bool = True) -> tuple[Compiling, Steps]:
    """The plan's steps to be compiled beside other work, and as functions that wait for that.

    `frozen` are arrays or shapes with their shardings, `batches` one of each kind there will be,
    likewise: the first to come first, as it is the first to be needed. The functions take a
    `loader.Batch` and find its program. The critic's comes first, as it is the first to run; it
    is left out of a run without `critic` updates.
    """
    shape = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    state = jax.tree.map(shape, p.state, p.state_shardings)
    frozen = jax.tree.map(shape, frozen, p.frozen_shardings)
    kind = lambda b: (b.shape, b.rows['mask'].shape[1])
    work: dict[Any, Callable[[], Any]] = {}
    for b in batches:
        steps = p.steps[b.shape]
        if critic:
            work['critic', *kind(b)] = lambda s=steps, x=b.rows: s.critic.lower(state, x).compile()
        work['generator', *kind(b)] = lambda s=steps, x=b.rows: (
            s.generator.lower(state, frozen, x).compile())
    programs = Compiling(work)
    return programs, Steps(
        generator=lambda state, frozen, b: programs['generator', *kind(b)](state, frozen, b.rows),
        critic=lambda state, b: programs['critic', *kind(b)](state, b.rows))


def batch_kinds(order: Order, prompts: conditioning.Prompts, rows: int, mesh: Mesh,
                soon: int) -> list[loader.Batch]:
    """What `prompts.place` makes of batches, as shapes: one of every kind that may come.

    Those of the first `soon` batches come first, in their order.
    """
    split = sharding.batch_sharding(mesh)
    some = np.resize(prompts.rows, sharding.batch_ways(mesh))  # what an encoder can split
    one = lambda x: jax.ShapeDtypeStruct(
        (rows, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype), sharding=split)

    def batch(length: int | None, shape: Shape) -> loader.Batch:
        found = prompts.lookup(some, length)
        if prompts.encode:
            found = jax.eval_shape(prompts.encode, found)
        return loader.Batch(jax.tree.map(one, found), shape)

    return [batch(*kind) for kind in order.kinds(soon)]


def make_task(config: Any, teacher: teachers.Teacher, mesh: Mesh,
              startup: Startup | None = None) -> loop.Task:
    """Everything the loop needs to distil `teacher` by `config`."""
    prompts = prompt_sources.load(config, teacher, mesh)
    p = plan(config, teacher, prompts.null, mesh)
    m, startup, batch = p.method, startup or Startup(), config.data.global_batch
    frozen = jax.device_put({'teacher': teacher.params, 'null': prompts.null}, p.frozen_shardings)
    probe = make_probe(config, teacher, prompts, frozen, m, mesh)
    judge = make_judge(config, teacher, mesh)
    order = Order(prompts.rows, batch, config.seed, prompts.lengths,
                  config.data.get('lengths', ()), shapes(config, teacher))
    soon = config.critic.updates + 1 + config.critic.warmup
    startup.compiling, steps = compiled_steps(
        p, frozen, batch_kinds(order, prompts, batch, mesh, soon),
        critic=config.critic.updates + config.critic.warmup > 0)
    return loop.Task(
        name='distill', make_state=p.make_state, source=(frozen['teacher'],), rules=p.rules,
        data=loader.batches(order, prompts.lookup, batch),
        place=prompt_sources.placer(prompts, mesh),
        advance=make_advance(steps, frozen, config.critic.updates, config.critic.warmup),
        words=words, probe=lambda state: probe(state) | judge(state),
        annotate=make_annotate(teacher.latents.std),
        pictures=make_pictures(config, teacher, prompts, frozen, m, mesh), startup=startup,
        host=host_fields(config), data_identity=prompts.identity, order=order,
        read_weights=lambda path: load_teacher(config, mesh, path).params,
        draws=functools.partial(draws.write, m, config.seed, batch, teacher.latents.std))


def load_teacher(config: Any, mesh: Mesh, path: str = '') -> teachers.Teacher:
    """The teacher that `config` names; or, of its family, the network at `path`, unrounded."""
    t = config.teacher
    return teachers.get(t.name).load(teachers.LoadOptions(
        path or t.path, mesh, t.dtype, _first_size(config), t.remat, t.attention,
        'float32' if path else t.param_dtype))


def prepare(config: Any, mesh: Mesh) -> tuple[teachers.Teacher, loop.Task]:
    """The teacher that `config` names, and what the loop needs to distil it."""
    startup = Startup()
    with startup.stage('weights'):
        teacher = load_teacher(config, mesh)
    return teacher, make_task(config, teacher, mesh, startup)


def run(config: Any, workdir: Path, mesh: Mesh, beside: Beside = NOTHING) -> None:
    """Distils, evaluates, and writes ``eval.json`` and ``samples.png``."""
    began, suite = time.monotonic(), suite_of(config)
    teacher, task = prepare(config, mesh)
    state, seconds = loop.run(task, config, workdir, mesh, teacher.identity, beside)
    compared = evaluate.Comparison(config, teacher, state.ema, mesh)
    if suite is not None:
        evaluate.evaluate(compared, suite, teacher.encode, workdir, lambda: {
            **seconds._asdict(), 'total': time.monotonic() - began})
    elif teacher.latents.decode is not None:
        evaluate.sheet(compared, prompt_sources.load(config, teacher, mesh), workdir)


def suite_of(config: Any) -> suites.Suite | None:
    """The suite that `eval.suite` names, or the family's own; None if it has none.

    Raises:
      DataFileError: `eval.suite` cannot be imported.
    """
    named = config.eval.get('suite', '')
    return suites.find(named) if named else teachers.get(config.teacher.name).suite


def _first_size(config: Any) -> Sequence[int] | None:
    """The size of pictures that are shown, (height, width) in pixels."""
    return next(iter(config.data.get('sizes', ())), None)

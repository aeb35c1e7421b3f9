"""The task `distill`: how a distillation steps.

`train/train.py` builds it and runs it; `plan` is what the planner and the study read of it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from ddmd_jax import families
from ddmd_jax.data import loader
from ddmd_jax.data.batch import NULLS, Batch
from ddmd_jax.data.conditioning import Prompts
from ddmd_jax.data.order import Order, OrderByShape, Planned
from ddmd_jax.families import Family, LoadOptions, Teacher
from ddmd_jax.method import recipe as recipes
from ddmd_jax.method.recipe import Recipe
from ddmd_jax.models import adapters
from ddmd_jax.models.adapters import AdapterError, Binding, Full
from ddmd_jax.parallel import sharding
from ddmd_jax.train import optim, prompts as prompt_sources
from ddmd_jax.train.feed import Feed
from ddmd_jax.train.startup import Compiling, Startup
from ddmd_jax.train.state import StateSpec, TrainState, fresh
from ddmd_jax.train.update import Frozen, Mechanics, Program, Updates
from ddmd_jax.train.watch.logs import RunLog
from ddmd_jax.train.watch.student import StudentWatch
from ddmd_jax.util import places
from ddmd_jax.weights import flat, lora
from ddmd_jax.weights.flat import WeightsError

# What `train.offload` keeps in the hosts' memory, to be fetched by the generator's update alone.
OFFLOAD = {'none': (), 'ema': ('ema',), 'teacher': ('teacher',), 'ema+teacher': ('ema', 'teacher')}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A distillation's programs and layouts; nothing is on a device yet.

    Attributes:
      recipe: of its objectives.
      spec: of its state.
      frozen: teacher and null prompt, arrays or shapes, and `frozen_shardings` where they lie.
      program: the two jitted updates.
      student, critic: how what is trained of each becomes its network's.
    """

    recipe: Recipe
    spec: StateSpec
    frozen: Frozen
    frozen_shardings: Frozen
    program: Program
    student: Binding = Full()
    critic: Binding = Full()


def plan(config: Any, teacher: Teacher, null: Any, mesh: Mesh) -> Plan:
    """Recipe, state and updates of a config for a teacher and null prompt, arrays or shapes.

    `null` is the encoded empty text; `method.null` says what is made of it.

    Raises:
      AdapterError: `student.adapter` or `critic.adapter` does not fit the teacher's network.
    """
    recipe, c = recipes.from_config(config, teacher), config
    null = NULLS[c.method.get('null', 'encoded')](null)
    student_tx = optim.make_optimizer(c.optim.student, c.train.steps)
    critic_tx = optim.make_optimizer(
        c.optim.critic, c.train.steps * c.critic.updates + c.critic.warmup)
    mechanics = Mechanics(
        student_tx, critic_tx, c.seed, c.train.accumulate, c.student.ema, c.student.ema_ramp,
        c.critic.merge, c.train.teacher_passes, adapters.from_section(c.student.get('adapter')),
        adapters.from_section(c.critic.get('adapter')))

    def make(params: Any) -> TrainState:
        # Student and critic both start at the teacher (Algorithm 1, line 1).
        root, of_student, of_critic = initial_keys(c.seed)
        extra = {name: r.init(jax.random.fold_in(root, place))
                 for place, (name, r) in enumerate(recipe.regularisers.items())}
        student = _begun('student', mechanics.student, params, of_student)
        # Factors are merged one by one, which moves their product only where A is the same.
        critic = _begun('critic', mechanics.critic, params,
                        of_critic if mechanics.merge == 1.0 else of_student)
        return fresh(student, student_tx, critic, critic_tx,
                     {name: x for name, x in extra.items() if x is not None})

    # A regulariser's rules are for its own parameters, and for nothing else in the state.
    own = [(rf'^extra(_opt/.*)?/{name}/.*(?:{pattern})', axes)
           for name, r in recipe.regularisers.items() for pattern, axes in r.rules]
    host = OFFLOAD[c.train.offload]
    spec = StateSpec(make, (*own, *teacher.rules), mesh, (teacher.params,),
                     tuple(name for name in host if name != 'teacher'))
    layout = Frozen(sharding.shard_tree(teacher.params, teacher.rules, mesh),
                    jax.tree.map(lambda _: sharding.replicated(mesh), null))
    if 'teacher' in host:
        layout = dataclasses.replace(layout, teacher=sharding.in_host_memory(layout.teacher))
    updates = Updates(teacher.predict_clean, recipe, mechanics)
    return Plan(recipe, spec, Frozen(teacher.params, null), layout,
                updates.jitted(mesh, spec.shardings, layout), mechanics.student, mechanics.critic)


def parts_of_batch(config: Any) -> int:
    """Parts of a batch that need rows on every device: micro-batches times the student's steps.

    On one rollout all rows take all steps.
    """
    simulated = config.critic.get('order') != 'one_rollout'
    return config.train.accumulate * (config.student.steps if simulated else 1)


def _begun(whose: str, binding: Binding, base: Any, key: jax.Array) -> Any:
    """`Binding.init`; an `AdapterError` says in which section of the config it is to be mended."""
    try:
        return binding.init(base, key)
    except AdapterError as e:
        raise AdapterError(f'config.{whose}.{e}') from e


def initial_keys(seed: int) -> tuple[jax.Array, ...]:
    """Of a run's initial values: the regularisers', the student's adapters', the critic's."""
    key = jax.random.key(seed)  # 0 and 1 are the updates'
    return tuple(jax.random.fold_in(key, place) for place in (2, 3, 4))


def load_teacher(config: Any, mesh: Mesh, path: str = '') -> Teacher:
    """The teacher that `config` names; or, of its family, the network at `path`, unrounded.

    Raises:
      WeightsError: it cannot be read, or guidance was distilled into it already.
    """
    t = config.teacher
    if not (path or t.allow_distilled) and config.method.weight_ca:
        _refuse_distilled(families.get(t.name), t.path)
    size = next(iter(config.data.get('sizes', ())), None)  # of the images that are shown
    return families.get(t.name).load_teacher(LoadOptions(
        path or t.path, mesh, t.dtype, size, t.remat, t.attention,
        'float32' if path else t.param_dtype, '' if path else t.variant))


def network_at(family: Family, path: str) -> str:
    """Where a student's network lies in what `export` has written, a pipeline or it alone.

    Any other path is its own.
    """
    if family.export:
        network = places.of(path) / family.export.names['safetensors'][0]
        if network.exists():
            return os.fspath(network)
    return path


def _refuse_distilled(family: Family, path: str) -> None:
    """Raises `WeightsError`, before any weights are read."""
    if family.distilled and (why := family.distilled(path)):
        raise WeightsError(
            f'{path} has no guidance signal left for CA: guidance was distilled into it ({why}). '
            'Give its base model, or config.teacher.allow_distilled=True to distil it all the same')


def identities(teacher: Teacher, prompts: Prompts) -> dict[str, str]:
    """Of what a run distils and on what: the weights' does not say by which time they draw, nor
    the prompts', which are encoded as they are needed, by whom."""
    return {'teacher_identity': teacher.identity, 'teacher_time': teacher.time.identity,
            'data_identity': prompts.identity,
            **({'encoder_identity': prompts.encoder} if prompts.encoder else {})}


class Distillation:
    """A distillation as a `train.Task`."""

    name = 'distill'

    def __init__(self, config: Any, teacher: Teacher, prompts: Prompts,
                 order: Order | OrderByShape, planned: Plan, startup: Startup):
        self.config, self.teacher, self.prompts, self.order = config, teacher, prompts, order
        self.recipe, self.startup = planned.recipe, startup
        self.bindings = {'student': planned.student, 'critic': planned.critic}
        if not any(r.needs_real for r in self.recipe.regularisers.values()):
            self.prompts = dataclasses.replace(prompts, real=None)
        self.frozen = jax.device_put(planned.frozen, planned.frozen_shardings)
        # The one copy there is: `train.offload` frees the devices of the teacher's.
        self.teacher = dataclasses.replace(teacher, params=self.frozen.teacher)
        self.spec = dataclasses.replace(planned.spec, source=(self.frozen.teacher,))
        self.identities = identities(teacher, prompts)
        self.extra_updates = 0  # of the critic, in every step, as the health verdict has it
        self._compile(planned)
        self.watch = StudentWatch(config, self.teacher, self.recipe, self.prompts, self.spec.mesh)

    # --- Programs and batches ---

    def _compile(self, planned: Plan) -> None:
        """Lines up the programs of every kind of batch there may be, in their order in a step."""
        c, state, work = self.config, self.spec.targets, {}
        frozen = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                              planned.frozen, planned.frozen_shardings)
        order = c.critic.get('order', 'critic_first')
        self.same_images, self.one_rollout = order == 'same_images', order == 'one_rollout'
        if self.one_rollout:
            of_step = 1 + -(-c.critic.warmup // c.student.steps)
        else:
            of_step = c.critic.updates + 1 - self.same_images + c.critic.warmup
        critic = (c.critic.updates + c.critic.warmup > self.same_images
                  or c.train.on_health == 'raise_critic')
        for length, shape in self.order.kinds(of_step):
            batch = self._shapes_of_batch(length, shape)
            begun, made = (dataclasses.replace(batch, **{name: batch.latents}) for name in 'zx')
            if self.one_rollout:
                inputs = [('rollout', batch), *[('critic', made)] * critic, ('generator', begun)]
            elif self.same_images:
                inputs = [('generator', batch), ('critic', made), *[('critic', batch)] * critic]
            else:
                inputs = [*[('critic', batch)] * critic, ('generator', batch)]
            for kind, given in inputs:
                work[kind, given.signature] = (getattr(planned.program, kind),
                                               (frozen, state, given))
        self.startup.compiling = self._programs = Compiling(work)
        self._jitted = planned.program

    def _shapes_of_batch(self, length: int | None, shape: tuple[int, ...]) -> Batch:
        """A batch as `feed` gives it, as shapes."""
        mesh = self.spec.mesh
        some = self.prompts.some(sharding.batch_ways(mesh), shape)
        read = self.prompts.read(Planned(some, length, shape))
        if self.prompts.encode:
            read = dataclasses.replace(read, cond=jax.eval_shape(self.prompts.encode, read.cond))
        rows, split = self.config.data.global_batch, sharding.batch_sharding(mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
            (rows, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype), sharding=split), read)

    def feed(self, skip: frozenset[int]) -> Feed:
        mesh, rows = self.spec.mesh, self.config.data.global_batch
        read = loader.batches(self.order, self.prompts.read, sharding.rows_here(mesh, rows))
        return Feed(read, prompt_sources.placer(self.prompts, mesh, rows), skip)

    def read_weights(self, path: str) -> Any:
        """What a student that begins at `path` trains at its step 0, in any layout.

        `path` is a student's weights, or a LoRA over the teacher's: that becomes the adapters, or
        is merged where everything is trained.

        Raises:
          WeightsError: it cannot be read, or is of another base.
          AdapterError: a LoRA of other modules, or of a higher rank, than the run's.
        """
        place = places.of(path, places.ANY)
        if places.is_url(place) or not (file := lora.find(place)):
            network = network_at(families.get(self.config.teacher.name), path)
            return load_teacher(self.config, self.spec.mesh, network).params
        base, binding = self.frozen.teacher, self.bindings['student']
        export = families.get(self.config.teacher.name).export
        if not (export and export.adapters):
            raise WeightsError(f'{path} is a LoRA, whose names are not known of the family '
                               f'{self.teacher.family}; merge it into its base')
        kernels = {name: leaf.shape for name, leaf in flat.flatten(base).items()
                   if name.endswith(adapters.KERNEL)}
        given = lora.read(file, kernels, export.adapters, self.teacher.identity)
        key = initial_keys(self.config.seed)[1]
        try:
            if isinstance(binding, adapters.LoRA):
                # On the host, as each process of a run has all of it.
                return jax.device_get(binding.start(base, key, given))
        except AdapterError as e:
            raise AdapterError(f'config.init_from: {file}: {e}') from e
        merge = lambda base, given: adapters.materialised(
            adapters.over(sharding.on_device(base), given))
        return jax.jit(merge)(base, given)

    # --- A step ---

    def step(self, state: TrainState, next_batch: Callable[[], Any],
             fresh: bool) -> tuple[TrainState, dict[str, Any]]:
        """Critic updates, each on a fresh batch, then one of the generator (two time scales).

        The critic goes first, as everything the generator does leans on it. A new run's first step
        begins with `critic.warmup` more; the verdict may have added some to every step.

        With `critic.order` 'same_images' the generator goes first, the critic follows on the images
        that it learnt from, and then on fresh batches. With 'one_rollout' a step has one batch,
        whose prompts the student is taken through once; a warm-up has one for as many updates as
        the student has steps.
        """
        c, warmup = self.config.critic, 0
        if fresh:  # only then, as these have to be waited for
            self.extra_updates = int(state.critic_extra)
            warmup = 0 if int(state.critic_step) else c.warmup
        kinds = ['critic'] * (c.updates + self.extra_updates)
        kinds = ['generator', *kinds] if self.same_images else [*kinds, 'generator']
        metrics, critic_metrics, made, n = {}, [], None, self.recipe.steps.n
        for place, kind in enumerate(['critic'] * warmup + kinds, -warmup):
            if self.one_rollout:
                # The student stays as it is until its own update: N samples of each prompt serve.
                if place == 0 or (place < 0 and (place + warmup) % n == 0):
                    prompts = next_batch()
                    z, samples = self._run('rollout', state, prompts)
                given = {'z': z} if kind == 'generator' else {'x': samples[place % n]}
                batch = dataclasses.replace(prompts, **given)
            elif self.same_images and place == 1:
                batch = dataclasses.replace(batch, x=made)
            else:
                batch = next_batch()
            if kind == 'critic':
                state, found = self._run(kind, state, batch)
                critic_metrics.append(found)
            else:
                state, metrics, made = self._run(kind, state, batch)
        if not critic_metrics:
            return state, metrics
        # Means, so that a NaN in any of the critic's updates is seen under its own name.
        mean = jax.tree.map(lambda *xs: sum(xs) / len(xs), *critic_metrics)
        return state, mean | metrics | {'finite': metrics['finite'] & (mean['finite'] == 1)}

    def _run(self, kind: str, state: TrainState, batch: Batch) -> Any:
        name = kind, batch.signature
        # `raise_critic` may have added updates to a run that is gone on with without it.
        program = self._programs[name] if name in self._programs else getattr(self._jitted, kind)
        return program(self.frozen, state, batch)

    # --- What it is watched by ---

    def network(self, trained: Any, whose: str = 'student') -> Any:
        """A network's parameters, given what is trained of it: the student's or the critic's."""
        return self.bindings[whose].bind(self.frozen.teacher, trained)

    def measure(self, state: TrainState, history: list[dict[str, Any]],
                values: dict[str, Any]) -> tuple[dict[str, Any], str]:
        return self.watch.measure(self.network(state.ema), history, values)

    def show(self, state: TrainState, step: int, log: RunLog) -> None:
        self.watch.show(self.network(state.ema), self.network(state.critic, 'critic'), step, log)

"""A teacher family as one value: `FAMILY` in the family's folder.

A family of a user's own is a module with a `FAMILY`, named in full: ``teacher.name =
'my_package.my_family'``. `name` and `load` are enough to distil it; every other field says
something that a command or a check of the config asks, and no code outside `families/` compares
names. docs/extending.md has a worked example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from ddmd_jax.config import rules
from ddmd_jax.diffusion.time import Shift, TimeMap
from ddmd_jax.families.base import ImageEncoder, LoadOptions, Teacher, TextEncoder
from ddmd_jax.parallel.sharding import Rules
from ddmd_jax.weights.flat import WeightsError
from ddmd_jax.weights.lora import Names

if TYPE_CHECKING:
    from ddmd_jax.config.fields import Field
    from ddmd_jax.data.conditioning import Prompts
    from ddmd_jax.evaluation.suites import Suite
    from ddmd_jax.families.codec import CodecTraining
    from ddmd_jax.families.pretraining import Pretraining


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Examples that come with a family, by ``data.name``; `load` takes (config, teacher, mesh)."""

    load: Callable[[Any, Teacher, Mesh], Prompts]  # raises `DataFileError`
    fields: Sequence[Field] = ()  # of the config's section `data`, its own
    has_reals: bool = False  # batches can hold real latents of their prompts, which a GAN needs


@dataclasses.dataclass(frozen=True)
class Source:
    """A teacher as far as its student's export needs it."""

    identity: str | None  # of the weights; None where they are not there, as a student has its own
    abstract: Any  # ShapeDtypeStructs of the parameters
    rules: Rules  # lay them out over a mesh
    time: TimeMap
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the network, as published
    own: Any = None  # the family's own, for its writers


@dataclasses.dataclass(frozen=True)
class Exported:
    """A student about to be written."""

    params: Any  # fp32, over the mesh; None where adapters are written
    source: Source  # its teacher
    step: int  # student updates
    steps: int  # network evaluations of an image
    time: TimeMap
    dtype: str  # of the tensors that are written
    sampler: str  # of its pipeline, one of `sampling.STUDENT_MODES`

    @property
    def shift(self) -> float:
        """Of time, where it is one; raises `WeightsError`: diffusers' scheduler knows no other."""
        if not isinstance(self.time, Shift):
            raise WeightsError(f'{self.time} is no shift of time, which a pipeline needs; give '
                               '--format=safetensors')
        return self.time.shift


@dataclasses.dataclass(frozen=True)
class Export:
    """How a family's students are written for others to load.

    `names` are files and folders written, by format ('safetensors', 'diffusers'), the model's
    first. `alone` and `use` are programs that load the network alone, and draw with the pipeline;
    ``{folder}``, ``{dtype}`` and ``{steps}`` are filled in.

    `adapters` are the names of a LoRA's tensors. Beside it `write_scheduler` writes
    ``FOLDER/scheduler``, which takes the student's steps; `use_adapters` is a program that draws
    with both, where ``{base}`` is the teacher, and ``{scheduler}`` the scheduler's class. `credits`
    are whose works pictures show, by which licences, for the model card.
    """

    # Of the teacher's path, and of its variant if there is one; raises `WeightsError`.
    open_source: Callable[..., Source]
    write_weights: Callable[[Exported, Path], None]  # the network alone, into a folder
    names: Mapping[str, tuple[str, ...]]
    alone: str
    write_pipeline: Callable[[Exported, Path], None] | None = None  # diffusers', if there is one
    use: str = ''
    adapters: Names | None = None
    write_scheduler: Callable[[Exported, Path], None] | None = None
    use_adapters: str = ''
    credits: str = ''


@dataclasses.dataclass(frozen=True)
class Family:
    """A teacher family."""

    name: str  # a built-in one's folder, or a module's full name (``__name__``)
    load: Callable[[LoadOptions], Teacher] | None = None  # None: the text encoder alone
    text: Callable[[LoadOptions], TextEncoder] | None = None  # None: it comes with the teacher
    # `TextEncoder.identity` by the teacher's path, and by its variant if there is one; None where
    # it cannot be known.
    text_identity: Callable[..., str | None] | None = None
    # Of its codec, by the teacher's path and variant; None: no latents are made of images here.
    images: Callable[[LoadOptions], ImageEncoder] | None = None
    # As `load`, with shapes for weights, and with its text side: to compile for, not to run.
    # Keywords are fields of its network's config that are not to be as published.
    # None: the planner loads the teacher.
    abstract: Callable[..., Teacher] | None = None
    # (path) -> what in its folder says that guidance has been distilled into the teacher already,
    # which leaves CA without a signal; '' if nothing does. Reads no weights; raises `WeightsError`.
    distilled: Callable[[str], str] | None = None
    class_names: tuple[str, ...] = ()  # of pipelines and networks, in a folder's or file's metadata
    ships: bool = False  # weights come with the package: `path` may be empty
    variants: bool = False  # reads `LoadOptions.variant`
    one_size: tuple[int, int] | None = None  # (height, width) in pixels if there is no other
    attention: tuple[str, ...] = ('auto', 'xla')  # of `attention.KINDS`
    dtype: str = 'float32'  # of activations where no run says it
    guidance: float = 4.0  # default of its own sampler
    nulls: tuple[str, ...] = ('encoded',)  # null prompts that it offers, of `batch.NULLS`
    table_steps: int = 0  # steps of the table that is its time; 0: its time is continuous
    knows_moments: bool = False  # teachers know mean and variance of real latents
    data_sets: Mapping[str, DataSet] = dataclasses.field(default_factory=dict)  # by ``data.name``
    suite: Suite | None = None  # the evaluation after training, and the probe's judge
    export: Export | None = None  # None: weights by their names here
    architecture: tuple[Field, ...] = ()  # fields of ``teacher.model``, if `pretrain` trains it
    pretraining: Callable[[Any], Pretraining] | None = None  # of a config; None: it comes trained
    codec: Callable[[Any], CodecTraining] | None = None  # of a config; None: it comes trained

    def of_variant(self, variant: str) -> tuple[str, ...]:
        """The arguments after a path that name a variant of its files; '' is none.

        Raises:
          WeightsError: the family's files have no variants, or this is no name of one.
        """
        if variant and not self.variants:
            raise WeightsError(f'weights of {self.name} have no variants; leave out {variant} '
                               '(config.teacher.variant, --variant)')
        if not rules.VARIANT.ok(variant):
            raise WeightsError(f'variant {variant!r} must be {rules.VARIANT.allowed} '
                               '(config.teacher.variant, --variant)')
        return (variant,) if variant else ()

    def load_teacher(self, options: LoadOptions) -> Teacher:
        """The teacher; raises `WeightsError`."""
        self.of_variant(options.variant)
        if self.load is None:
            raise WeightsError(f'only the text encoder of {self.name} is supported')
        return self.load(options)

    def load_images(self, options: LoadOptions) -> ImageEncoder:
        """The encoder of its codec; raises `WeightsError`."""
        self.of_variant(options.variant)
        if self.images is None:
            raise WeightsError(f'{self.name} has no codec that makes latents of images here')
        return self.images(options)

    def load_text(self, options: LoadOptions) -> TextEncoder:
        """The text side, loaded apart or with its teacher; raises `WeightsError`."""
        self.of_variant(options.variant)
        text = self.text(options) if self.text else self.load_teacher(options).text
        if text is None:
            raise WeightsError(f'{self.name} has no text side')
        return text

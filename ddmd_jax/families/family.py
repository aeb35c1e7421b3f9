"""What the package asks of a teacher family, as one value: `FAMILY` in the family's folder.

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

from ddmd_jax.diffusion.time import Shift, TimeMap
from ddmd_jax.families.base import LoadOptions, Teacher, TextEncoder
from ddmd_jax.parallel.sharding import Rules
from ddmd_jax.weights.flat import WeightsError

if TYPE_CHECKING:
    from ddmd_jax.config.fields import Field
    from ddmd_jax.data.conditioning import Prompts
    from ddmd_jax.evaluation.suites import Suite
    from ddmd_jax.families.pretraining import Pretraining


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Examples that come with a family, chosen by ``data.name``.

    Attributes:
      load: ``(config, teacher, mesh) -> Prompts``; raises `DataFileError`.
      fields: of the config's section `data`, its own.
      has_reals: its batches can hold real latents of their prompts, which a GAN needs.
    """

    load: Callable[[Any, Teacher, Mesh], Prompts]
    fields: Sequence[Field] = ()
    has_reals: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
    """A teacher as far as its student's export needs it.

    Attributes:
      identity: names the weights; None where they are not there, as a student has its own.
      abstract: ShapeDtypeStructs of the parameters.
      rules: lay them out over a mesh.
      time: its time map.
      config: of the network, as it is published.
      own: what the family wants to find again.
    """

    identity: str | None
    abstract: Any
    rules: Rules
    time: TimeMap
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    own: Any = None


@dataclasses.dataclass(frozen=True)
class Exported:
    """A student about to be written.

    Attributes:
      params: fp32, over the mesh.
      source: its teacher.
      step: the update that it is of.
      steps: its network evaluations.
      time: its time map.
      dtype: of the tensors that are written.
      sampler: of its pipeline, one of `sampling.STUDENT_MODES`.
    """

    params: Any
    source: Source
    step: int
    steps: int
    time: TimeMap
    dtype: str
    sampler: str

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

    Attributes:
      open_source: ``teacher's path -> Source``; raises `WeightsError`.
      write_weights: writes the network alone into a folder.
      write_pipeline: writes a diffusers pipeline; None where there is none to write.
      names: of what these two write, by format, 'safetensors' and 'diffusers'; the model's first.
      use, alone: a program that draws with the pipeline, and one that loads the network alone;
        ``{folder}``, ``{dtype}`` and ``{steps}`` are filled in.
    """

    open_source: Callable[[str], Source]
    write_weights: Callable[[Exported, Path], None]
    names: Mapping[str, tuple[str, ...]]
    alone: str
    write_pipeline: Callable[[Exported, Path], None] | None = None
    use: str = ''


@dataclasses.dataclass(frozen=True)
class Command:
    """A word of `python -m ddmd_jax.prepare`: defines its absl flags, and runs."""

    flags: Callable[[], None]
    run: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Family:
    """A teacher family.

    Attributes:
      name: by which it is found: a built-in one's folder, or a module's full name (``__name__``).
      load: ``LoadOptions -> Teacher``; None of a family whose text side alone is here.
      text: ``LoadOptions -> TextEncoder`` where it is loaded apart; None: the teacher's own.
      abstract: as `load`, with shapes for weights and its text side too: to compile for, not to
        run. None: the planner loads the teacher.
      class_names: of its pipelines and networks, as a folder's or a file's metadata has them.
      ships: `path` may be empty, the weights come with the package.
      one_size: (height, width) in pixels if there is no other.
      attention: kinds of attention that its network takes, of `attention.KINDS`.
      dtype: of activations where no run says it.
      guidance: of its own sampler, where nobody says another.
      knows_moments: its teachers know mean and variance of real latents.
      data_sets: by the names that ``data.name`` has for them.
      suite: the evaluation at the end of a run, and the judge during it.
      export: None: weights by their names here.
      architecture: fields of ``teacher.model``, if the task `pretrain` trains such teachers.
      pretraining: ``config -> Pretraining`` of the task `pretrain`; None: it comes trained.
      commands: words of `prepare`.
    """

    name: str
    load: Callable[[LoadOptions], Teacher] | None = None
    text: Callable[[LoadOptions], TextEncoder] | None = None
    abstract: Callable[[LoadOptions], Teacher] | None = None
    class_names: tuple[str, ...] = ()
    ships: bool = False
    one_size: tuple[int, int] | None = None
    attention: tuple[str, ...] = ('auto', 'xla')
    dtype: str = 'float32'
    guidance: float = 4.0
    knows_moments: bool = False
    data_sets: Mapping[str, DataSet] = dataclasses.field(default_factory=dict)
    suite: Suite | None = None
    export: Export | None = None
    architecture: tuple[Field, ...] = ()
    pretraining: Callable[[Any], Pretraining] | None = None
    commands: Mapping[str, Command] = dataclasses.field(default_factory=dict)

    def load_teacher(self, options: LoadOptions) -> Teacher:
        """The teacher; raises `WeightsError`."""
        if self.load is None:
            raise WeightsError(f'of {self.name} the text side alone can be read, not its teacher')
        return self.load(options)

    def load_text(self, options: LoadOptions) -> TextEncoder:
        """The text side, loaded apart or with its teacher; raises `WeightsError`."""
        text = self.text(options) if self.text else self.load_teacher(options).text
        if text is None:
            raise WeightsError(f'{self.name} has no text side')
        return text

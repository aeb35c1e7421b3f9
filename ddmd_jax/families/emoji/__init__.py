"""The embedded default: text to scenes of emoji, 64 x 64 pixels; weights and drawings ship."""

from ddmd_jax.config.fields import FIXED, Field, of_class
from ddmd_jax.config.rules import COUNT
from ddmd_jax.families.emoji import codec, prompts, scenes, teacher
from ddmd_jax.families.emoji.export import EXPORT
from ddmd_jax.families.emoji.pretraining import pretraining
from ddmd_jax.families.emoji.suite import SUITE
from ddmd_jax.families.family import DataSet, Family
from ddmd_jax.models.nextdit import NextDiTConfig
from ddmd_jax.models.text.caption import CaptionEncoderConfig

SCENES = Field('scenes', COUNT, 131_072, FIXED, 'scenes of an epoch, by number')
FAMILY = Family(
    'emoji', load=teacher.load, abstract=teacher.abstract,
    class_names=(teacher.ARCHITECTURE,), guidance=2.0, ships=True,
    one_size=(scenes.SIDE, scenes.SIDE), knows_moments=True,
    data_sets={'emoji': DataSet(prompts.load, (SCENES,), has_reals=True)},
    suite=SUITE, export=EXPORT, pretraining=pretraining, codec=codec.training,
    architecture=of_class('denoiser', NextDiTConfig) + of_class('text', CaptionEncoderConfig))

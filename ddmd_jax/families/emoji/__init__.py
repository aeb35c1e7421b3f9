"""The embedded default: text to emoji at 24 x 24 pixels, teacher and data in the package."""

from ddmd_jax.config.fields import FIXED, Field, of_class
from ddmd_jax.config.rules import COUNT
from ddmd_jax.families.emoji import codec, data, prompts, teacher
from ddmd_jax.families.emoji.export import EXPORT
from ddmd_jax.families.emoji.pretraining import pretraining
from ddmd_jax.families.emoji.suite import SUITE
from ddmd_jax.families.family import DataSet, Family
from ddmd_jax.models.nextdit import NextDiTConfig
from ddmd_jax.models.text.caption import CaptionEncoderConfig

WHITE_REPEAT = Field('white_repeat', COUNT, 2, FIXED,
                     'how often a prompt without a background stands in an epoch')
FAMILY = Family(
    'emoji', load=teacher.load, class_names=(teacher.ARCHITECTURE,), ships=True,
    one_size=(data.SIZE, data.SIZE), knows_moments=True,
    data_sets={'emoji': DataSet(prompts.load, (WHITE_REPEAT,), has_reals=True)},
    suite=SUITE, export=EXPORT, pretraining=pretraining, codec=codec.training,
    architecture=of_class('denoiser', NextDiTConfig) + of_class('text', CaptionEncoderConfig))

"""The embedded world of scenes while its teacher is being trained; it becomes `emoji`."""

from ddmd_jax.config.fields import FIXED, Field, of_class
from ddmd_jax.config.rules import COUNT
from ddmd_jax.families.emoji import latent_teacher, scenes
from ddmd_jax.families.emoji.latent_pretraining import pretraining
from ddmd_jax.families.family import DataSet, Family
from ddmd_jax.models.nextdit import NextDiTConfig
from ddmd_jax.models.text.caption import CaptionEncoderConfig

SCENES = Field('scenes', COUNT, 131_072, FIXED, 'scenes of an epoch; their latents are kept')
FAMILY = Family(
    __name__, load=latent_teacher.load, ships=True, one_size=(scenes.SIDE, scenes.SIDE),
    knows_moments=True, data_sets={'scenes': DataSet(lambda *_: None, (SCENES,))},  # type: ignore
    pretraining=pretraining,
    architecture=of_class('denoiser', NextDiTConfig) + of_class('text', CaptionEncoderConfig))

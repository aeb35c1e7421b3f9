"""``python -m ddmd_jax.config``: prints docs/config.md."""

from ddmd_jax.config import reference

print(reference.page(), end='')

"""The training loop, Algorithm 1, the state pytree, checkpoints and health."""

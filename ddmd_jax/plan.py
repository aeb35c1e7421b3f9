"""``python -m ddmd_jax.plan``: the planner's command, see `planner.command`."""

from ddmd_jax.planner import command

if __name__ == '__main__':
    command.run()

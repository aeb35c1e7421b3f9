"""A schedule beside the paper's four: CFG augmentation just above the generator's step."""

from ddmd_jax.method.schedules import ANYWHERE, Bounds, Schedule

# tau_CA in [t, t + .3] in uniform time: what the next step will see, and no cleaner.
WINDOW = Schedule(ca=Bounds(low=lambda t: t, high=lambda t: t + 0.3), dm=ANYWHERE)

"""A schedule, a regulariser and a suite of one's own: a module each, named by a config.

    export PYTHONPATH=examples
    python -m own_teacher.train teacher.safetensors
    python -m ddmd_jax.main --config=examples/extensions/config.py --workdir=RUN \\
        --config.teacher.path=teacher.safetensors

docs/extending.md goes through them.
"""

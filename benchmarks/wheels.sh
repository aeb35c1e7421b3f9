#!/usr/bin/env bash
# Fills .whl/, which git ignores, with the packages that a machine for accelerator.sh lacks: one that has
# Python 3.12 on x86-64 Linux, JAX 0.11, Flax, Optax, Orbax, safetensors, scikit-image and their like, and no
# network. There:
#
#     python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .whl/*.whl
#     export PYTHONPATH=/tmp/site
#
# What is there already is not here, but for protobuf: the generated code of some needs one as new.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PY="${PYTHON:-python3}"
PACKAGES=(
    grain==0.2.18 array_record==0.8.6 portpicker==1.6.0
    tensorflow-datasets==4.9.10 dm-tree==0.1.10 immutabledict==4.3.1 simple-parsing==0.1.9 docstring_parser==0.18.0
    tensorflow-metadata==1.21.0 googleapis-common-protos==1.76.0 termcolor==3.3.0 toml==0.10.2
    ml_collections==1.1.0 tensorboardX==2.6.5 protobuf==7.36.2 diffusers==0.42.1
)
SOURCES=(promise==2.3)  # of tensorflow-datasets; plain Python without a wheel
LIMIT=40  # MiB in all

platforms=()
for name in manylinux_2_{28,27,24,17}_x86_64 manylinux2014_x86_64 manylinux1_x86_64; do
    platforms+=(--platform "$name")
done
rm -rf .whl
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$PY" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --dest .whl "${PACKAGES[@]}"
"$PY" -m pip wheel --quiet --no-deps --wheel-dir .whl "${SOURCES[@]}"
size=$(du -sm .whl | cut -f1)
echo "$(find .whl -type f -name '*.whl' | wc -l) wheels, $size MiB, in $PWD/.whl"
((size <= LIMIT)) || { echo "wheels: more than $LIMIT MiB" >&2; exit 1; }

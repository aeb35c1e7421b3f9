# Sourced by the launch scripts: a venv with ddmd_jax installed, made once and re-used.
#   make_venv EXTRAS      e.g. make_venv "" or make_venv "[test]"; sets $PY.
# DDMD_VENV names the folder (default .venv beside setup.py), PYTHON the interpreter.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${DDMD_VENV:-$ROOT/.venv}"
PY="$VENV/bin/python"

make_venv() {
  local extras="$1" stamp
  stamp="$VENV/.ddmd$(echo "$extras" | tr -cd 'a-z,')"
  if [ -f "$stamp" ] && [ "$stamp" -nt "$ROOT/setup.py" ]; then
    echo "== venv: re-using $VENV"
    return
  fi
  if [ ! -x "$PY" ]; then
    echo "== venv: making $VENV"
    "${PYTHON:-python3}" -m venv "$VENV" || { echo "venv: cannot make $VENV; Python 3.11+ with venv is needed" >&2; exit 1; }
  fi
  "$PY" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "venv: $("$PY" --version) is too old; Python 3.11+ is needed (set PYTHON=...)" >&2; exit 1; }
  echo "== venv: installing ddmd_jax$extras (a few minutes the first time)"
  # Files are compiled when they are imported: pip would compile all of them, one by one.
  "$PY" -m pip install --quiet --no-compile --disable-pip-version-check -e "$ROOT$extras" || { echo "venv: installation failed; see above" >&2; exit 1; }
  touch "$stamp"
}

"""What README and docs/ tell one to type, and what they link to.

Every block of shell is given to bash, where `python -m ddmd_jax...` only checks its arguments
(absl's ``--only_check_args``: flags, config file and fields are read, nothing is run), programs on
standard input are compiled, and everything else has to name a file that is there. One process
imports the package once and forks for each of the documented commands.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

PAGES = [tiny.ROOT / 'README.md', *sorted((tiny.ROOT / 'docs').glob('*.md'))]
BLOCKS = [(page.name, i, block) for page in PAGES for i, block in enumerate(
    re.findall(r'^```sh\n(.*?)^```', page.read_text(), re.DOTALL | re.MULTILINE))]
PREAMBLE = r'''
set -eu
there() {  # some argument names a file that is there
  for one in "$@"; do if [ -f "${one%%:*}" ]; then return 0; fi; done
  echo "no file among: $*"; return 1
}
python() {
  case "${1:-}${2:+ $2}" in
    "-m ddmd_jax"*)
      if [ -n "${LATER:-}" ]; then printf '%s\x1f' "${@:2}" --only_check_args >> "$LATER"
        printf '\n' >> "$LATER"
      else "$PY" "$@" --only_check_args; fi ;;
    "-m pytest"*) there "$@" ;;
    -c*) "$PY" -c 'import sys; compile(sys.argv[1], "-c", "exec")' "$2" ;;
    -*) "$PY" -c 'import sys; compile(sys.stdin.read(), "-", "exec")' ;;
    *) there "$1" ;;
  esac
}
bash() { there "$1"; }
pip() { [ "$1" = install ]; }
'''


# Runs `python -m MODULE ARG ...` for each line on standard input; prints those that failed.
FORKS = r'''
import os, runpy, sys
import ddmd_jax.export, ddmd_jax.families, ddmd_jax.prepare
for line in sys.stdin:
    argv = line.split("\x1f")[:-1]
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(write, 1), os.dup2(write, 2)
        sys.argv, code = argv, 1
        try:
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1 if e.code else 0
            print(e.code)
        except BaseException as e:
            print(repr(e))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # without JAX's own exit, which takes a second
    os.close(write)
    said = os.fdopen(read).read()
    if os.waitpid(child, 0)[1]:
        print(" ".join(argv), said[-400:], sep="\n")
'''


def given_to_bash(block, later=''):
    """(code, output) of a block; optional flags are taken, other ways to call bash's are undone.

    With `later`, a file, commands of the package are written there instead of being run.
    """
    text = re.sub(r'\[(--[^\]]+)\]', r'\1', block)
    text = re.sub(r"/usr/bin/time (-v|-f '[^']*') ", '', text)
    done = subprocess.run([shutil.which('bash'), '-c', PREAMBLE + text], cwd=tiny.ROOT, text=True,
                          capture_output=True, env={'PY': sys.executable, 'PATH': '/usr/bin:/bin',
                                                    'JAX_PLATFORMS': 'cpu', 'HOME': '/nowhere',
                                                    'LATER': later})
    return done.returncode, done.stdout + done.stderr


def test_every_command_can_be_typed_as_it_stands(tmp_path):
    assert len(BLOCKS) > 30
    commands = tmp_path / 'commands'
    for page, i, block in BLOCKS:
        code, out = given_to_bash(block, str(commands))
        assert not code, f'{page}, block {i}: {out[-400:]}\n{block}'
    lines = sorted(set(commands.read_text().splitlines()))
    assert len(lines) > 30
    done = subprocess.run([sys.executable, '-c', FORKS], input='\n'.join(lines), cwd=tiny.ROOT,
                          text=True, capture_output=True, check=True)
    assert not done.stdout, done.stdout


@pytest.mark.parametrize('block', [
    'python -m ddmd_jax.main --config=configs/emoji.py --workdir=D --config.method.alhpa=2',
    'python -m ddmd_jax.main --config=configs/nothing.py --workdir=D',
    'python -m ddmd_jax.sample --promt=x', 'python benchmarks/nothing.py', 'bash launch/nothing.sh',
    "python - <<'EOF'\nfor x in\nEOF", 'python -m pytest tests/test_nothing.py', 'sometool --flag',
])
def test_what_is_mistyped_is_found(block):
    assert given_to_bash(block)[0]


def anchors(page):
    """Anchors of a page's headings, as GitHub and mkdocs make them."""
    heads = re.findall(r'^#+ (.+)$', re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL),
                       re.MULTILINE)
    plain = [re.sub(r'[^\w\- ]', '', re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', h)).strip().lower()
             for h in heads]
    return {re.sub(r'[ ]+', '-', h) for h in plain}


GENERATED = ('config.md', 'bad_inputs.md', 'plans.md')


def test_the_docs_stay_short():
    words = {page.name: len(page.read_text().split())
             for page in PAGES if page.name not in GENERATED}
    assert sum(words.values()) <= 12_000, words


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_files_named_in_the_text_are_there(page):
    folders = (tiny.ROOT, tiny.ROOT / 'ddmd_jax')
    for name in re.findall(r'`(\w+/[\w/]+\.py)`', page.read_text()):
        assert any((folder / name).is_file() for folder in folders), f'{page.name}: {name}'


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = re.sub(r'```.*?```|`[^`\n]*`', '', page.read_text(), flags=re.DOTALL)
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if target.startswith(('http://', 'https://')):
            continue
        path, _, anchor = target.partition('#')
        file = (page.parent / path) if path else page
        assert file.exists(), f'{page.name}: {target}'
        if anchor and file.suffix == '.md':
            assert anchor in anchors(file), f'{page.name}: {target}'


@pytest.mark.extras
def test_the_site_has_every_page_and_is_built_without_a_warning(tmp_path):
    """With the extra `docs`: links and anchors checked, API pages from the docstrings."""
    pytest.importorskip('mkdocstrings')
    done = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '-d',
                           str(tmp_path / 'site')], cwd=tiny.ROOT, capture_output=True, text=True,
                          env={'PATH': '/usr/bin:/bin', 'HOME': str(tmp_path),
                               'NO_MKDOCS_2_WARNING': '1'}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'WARNING' not in done.stderr
    for page in PAGES[1:]:
        stem = '' if page.stem == 'index' else page.stem
        assert (tmp_path / 'site' / stem / 'index.html').is_file(), page.name
    api = (tmp_path / 'site' / 'api' / 'index.html').read_text()
    for name in ('method.algorithm.generator_objective', 'diffusion.sampling.sample_student',
                 'families.base.Teacher'):
        assert f'id="ddmd_jax.{name}"' in api
    html = (tmp_path / 'site' / 'index.html').read_text()
    assert 'fonts.googleapis' not in html  # nothing from other hosts


@pytest.mark.slow
@pytest.mark.parametrize(('page', 'block'), [
    (page, block) for page, _, block in BLOCKS
    if re.match(r'(JAX_PLATFORMS=cpu )?python - <<', block)],
    ids=lambda x: Path(x).stem if x.endswith('.md') else '')
def test_programs_in_the_docs_run(page, block):
    done = subprocess.run([shutil.which('bash'), '-c', f'python() {{ "{sys.executable}" "$@"; }}\n'
                           + block], cwd=tiny.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout

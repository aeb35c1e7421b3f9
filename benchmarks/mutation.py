"""Does a test notice? Small mistakes in `ddmd_jax/method` and `ddmd_jax/diffusion`, one at a time.

    python benchmarks/mutation.py --sample=200 --seed=0 --out=mutation.jsonl  # or goes on
    python benchmarks/mutation.py --files=ddmd_jax/diffusion/process.py --out=process.jsonl
    python benchmarks/mutation.py --report --out=mutation.jsonl                  # runs nothing

A mutant is a file with one change: a sign, an operator, a comparison, a constant, a condition, two
arguments, `stop_gradient` left out. It is killed if one of the fast tests that execute the file
fails. The first pass runs those tests unchanged, to know which of them pass, which lines each
executes and how long it takes; a mutant then meets the tests of its line first, the quickest first,
and the first failure ends it. Every mutant is a fork of a process that has imported JAX and
pytest, so that only this package and its tests are imported anew.

Messages of errors, annotations and docstrings are left alone. Each line of the output is a mutant:
file, line, change, killed or not, and by which test.
"""

from __future__ import annotations

import argparse
import ast
import collections
import copy
import hashlib
import importlib
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ('ddmd_jax/method', 'ddmd_jax/diffusion')
# What a test imports if it is to execute those files in its own process.
IMPORTS = ('ddmd_jax.method', 'ddmd_jax.diffusion', 'ddmd_jax.train.update', 'reference')
PRELOAD = ('jax.numpy', 'flax.nnx', 'optax', 'orbax.checkpoint', 'grain', 'numpy', 'pytest',
           'hypothesis', 'ml_collections', 'PIL.Image', 'safetensors', 'tokenizers', 'transformers')
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.Mod: ast.Mult, ast.FloorDiv: ast.Mult, ast.MatMult: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And, ast.Lt: ast.LtE, ast.LtE: ast.Lt,
    ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
NAMES = {'minimum': 'maximum', 'maximum': 'minimum', 'min': 'max', 'max': 'min', 'sum': 'mean',
         'mean': 'sum', 'any': 'all', 'all': 'any', 'zeros_like': 'ones_like', 'zeros': 'ones',
         'ones': 'zeros', 'ones_like': 'zeros_like', 'normal': 'uniform', 'square': 'abs'}
DROPPED = {'stop_gradient', 'sqrt', 'abs', 'exp', 'log', 'sigmoid', 'softplus', 'clip', 'sort'}
COMMUTE = {'minimum', 'maximum', 'min', 'max', 'zip', 'isinstance', 'array_equal', 'gcd'}


@dataclass
class Mutant:
    """One change: `node`, the number of a node in `ast.walk` order, is mutated by `change`."""

    file: str
    line: int
    column: int
    what: str
    node: int
    change: Callable[[ast.AST], ast.AST] = field(repr=False)

    @property
    def id(self) -> str:
        """Names the mutant as long as its file stays as it is."""
        digest = hashlib.sha256((ROOT / self.file).read_bytes()).hexdigest()[:8]
        return f'{self.file}:{self.line}:{self.column}:{self.what} @{digest}'


# --- What can be changed ---


def changes(node: ast.AST) -> Iterator[tuple[str, Callable[[ast.AST], ast.AST]]]:
    """``(what, change)`` of every mutation of a node; `change` edits a copy and returns it."""
    def put(**fields):
        def change(copied):
            for name, value in fields.items():
                setattr(copied, name, value)
            return copied
        return change

    text = ast.unparse(node) if isinstance(node, ast.expr) else ''
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)):
        swapped = SWAPS.get(type(node.op))
        if swapped:
            yield (f'{type(node.op).__name__} -> {swapped.__name__}: {text or ast.unparse(node)}',
                   put(op=swapped()))
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            ops = [*node.ops[:i], SWAPS[type(op)](), *node.ops[i + 1:]]
            yield f'{type(op).__name__} -> {type(ops[i]).__name__}: {text}', put(ops=ops)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield f'dropped {type(node.op).__name__}: {text}', lambda copied: copied.operand
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield (f'negated: {ast.unparse(node.test)}',
               lambda copied: put(test=ast.UnaryOp(ast.Not(), copied.test))(copied))
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield f'filter dropped: {ast.unparse(node.ifs[0])}', put(ifs=[])
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f'{node.value} -> {not node.value}', put(value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield f'{node.value} -> {node.value + 1}', put(value=node.value + 1)
        if node.value:
            yield f'{node.value} -> {node.value - 1}', put(value=node.value - 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        new = node.value * 2 or 1.0
        yield f'{node.value} -> {new}', put(value=new)
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield f'{text} -> {NAMES[node.attr]}', put(attr=NAMES[node.attr])
    elif isinstance(node, ast.Name) and node.id in ('min', 'max', 'any', 'all'):
        yield f'{text} -> {NAMES[node.id]}', put(id=NAMES[node.id])
    elif isinstance(node, ast.Call):
        name = ast.unparse(node.func).split('.')[-1]
        if name in DROPPED and node.args:
            yield f'dropped {name}: {text}', lambda copied: copied.args[0]
        swap = slice(1, 3) if name == 'where' else slice(0, 2)
        two = node.args[swap]
        if (len(two) == 2 and name not in COMMUTE and ast.dump(two[0]) != ast.dump(two[1])
                and not any(isinstance(x, ast.Starred) for x in two)):
            args = list(node.args)
            args[swap] = two[::-1]
            yield f'arguments swapped: {text}', put(args=args)


def untouched(tree: ast.AST) -> set[ast.AST]:
    """Nodes that say something to readers only: annotations, docstrings, messages of errors."""
    kept: set[ast.AST] = set()
    for node in ast.walk(tree):
        parts = [getattr(node, 'annotation', None), getattr(node, 'returns', None)]
        if isinstance(node, ast.Raise):
            parts.append(node)
        if isinstance(node, ast.Assert):
            parts.append(node.msg)
        if isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom)):
            parts.append(node)
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.BinOp, ast.Subscript)) and (
                all(isinstance(x, ast.Name) and x.id[0].isupper() and not x.id.isupper()
                    for x in node.targets)):
            parts.append(node)  # an alias of a type
        kept.update(x for part in parts if part is not None for x in ast.walk(part))
    return kept


def mutants(file: str) -> list[Mutant]:
    """All mutants of a file, in the order of its lines."""
    tree = ast.parse((ROOT / file).read_text())
    kept, found, line, column = untouched(tree), [], 1, 0
    for number, node in enumerate(ast.walk(tree)):
        if node in kept:
            continue
        where = node.iter if isinstance(node, ast.comprehension) else node
        line, column = getattr(where, 'lineno', line), getattr(where, 'col_offset', column)
        found += [Mutant(file, line, column, what, number, change)
                  for what, change in changes(node)]
    return sorted(found, key=lambda m: (m.line, m.column, m.what))


class Replaced(ast.NodeTransformer):
    """Puts `new` in the place of `old`."""

    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def mutated(mutant: Mutant) -> ast.Module:
    """The file's tree with the change in it."""
    tree = ast.parse((ROOT / mutant.file).read_text())
    old = next(n for i, n in enumerate(ast.walk(tree)) if i == mutant.node)
    new = mutant.change(copy.copy(old))
    return ast.fix_missing_locations(Replaced(old, ast.copy_location(new, old)).visit(tree))


# --- Tests, in a fork ---


class Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a tree instead of its file."""

    def __init__(self, file: str, tree: ast.Module):
        self.file, self.tree = file, tree
        self.name = '.'.join(Path(file).with_suffix('').parts).removesuffix('.__init__')

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            return importlib.util.spec_from_file_location(
                name, ROOT / self.file, loader=self,
                submodule_search_locations=[str((ROOT / self.file).parent)]
                if self.file.endswith('__init__.py') else None)
        return None

    def exec_module(self, module):
        exec(compile(self.tree, str(ROOT / self.file), 'exec'), module.__dict__)


class Lines:
    """A pytest plugin: seconds and executed lines of the targets, by test."""

    def __init__(self, files: list[str]):
        self.files = {str(ROOT / file): file for file in files}
        self.now: set[tuple[str, int]] = set()
        self.found: dict[str, Any] = {}

    def trace(self, frame, event, arg):
        file = self.files.get(frame.f_code.co_filename)
        if file is None:
            return None

        def local(frame, event, arg):
            self.now.add((file, frame.f_lineno))
            return local

        return local(frame, event, arg)

    def pytest_runtest_logreport(self, report):
        seen = self.found.setdefault(
            report.nodeid, {'seconds': 0.0, 'passed': True, 'lines': []})
        seen['seconds'] += report.duration
        seen['passed'] &= not report.failed
        seen['lines'] = sorted({*map(tuple, seen['lines']), *self.now})
        self.now.clear()


class First:
    """A pytest plugin: only tests that pass unchanged, those in `first` before the others.

    Files stay together, for their fixtures' sake.
    """

    def __init__(self, first: list[str], known: dict[str, Any]):
        self.order = {name: i for i, name in enumerate(first)}
        self.known = known
        self.failed = ''

    def pytest_collection_modifyitems(self, items):
        items[:] = [x for x in items if self.known.get(x.nodeid, {}).get('passed')]
        late = len(self.order)
        file = lambda item: item.nodeid.split('::')[0]
        best = collections.defaultdict(lambda: late)
        for item in items:
            best[file(item)] = min(best[file(item)], self.order.get(item.nodeid, late))
        items.sort(key=lambda x: (best[file(x)], file(x), self.order.get(x.nodeid, late)))

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.failed:
            self.failed = report.nodeid


def forked(work: Callable[[], Any], seconds: float) -> Any:
    """What `work` returns in a fork of this process, or None if it took longer or crashed."""
    handle, result = tempfile.mkstemp(suffix='.json')
    os.close(handle)
    child = os.fork()
    if not child:
        os.setsid()
        silent = os.open(os.environ.get('MUTATION_OUTPUT', os.devnull), os.O_WRONLY | os.O_CREAT)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        try:
            Path(result).write_text(json.dumps(work()))
        finally:
            os._exit(0)
    until = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.02)
    text = Path(result).read_text()
    os.unlink(result)
    return json.loads(text) if text else None


def run_tests(tests: list[str], plugin: Any, *flags: str) -> int:
    """pytest's exit code."""
    import pytest

    os.chdir(ROOT)
    return int(pytest.main(
        [*tests, '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-W', 'ignore',
         '--continue-on-collection-errors', *flags], plugins=[plugin]))


def tests_that_import() -> list[str]:
    """Files of tests with one of IMPORTS among their imports."""
    def names(tree):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (x.name for x in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield from (f'{node.module}.{x.name}' for x in node.names)

    found = []
    for path in sorted((ROOT / 'tests').glob('test_*.py')):
        if any(name.startswith(IMPORTS) for name in names(ast.parse(path.read_text()))):
            found.append(str(path.relative_to(ROOT)))
    return found


def survey(files: list[str], tests: list[str], flags: list[str]) -> dict[str, Any]:
    """Of each test on the unchanged files: whether it passes, its seconds, its lines."""
    def work():
        plugin = Lines(files)
        sys.settrace(plugin.trace)
        run_tests(tests, plugin, *flags)
        sys.settrace(None)
        return plugin.found

    known = forked(work, 7200)
    if not known:
        sys.exit('mutation: the tests could not be run on the unchanged files')
    return known


def try_mutant(mutant: Mutant, known: dict[str, Any], flags: list[str]) -> dict[str, Any]:
    """Runs the tests of a mutant's file, those of its line first: a line of the output."""
    line = [mutant.file, mutant.line]
    seconds = lambda name: known[name]['seconds']
    passing = [name for name, test in known.items() if test['passed']]
    first = sorted((x for x in passing if line in [list(y) for y in known[x]['lines']]),
                   key=seconds)
    tests = sorted({x.split('::')[0] for x in passing
                    if any(file == mutant.file for file, _ in known[x]['lines'])})
    out: dict[str, Any] = {'id': mutant.id, 'file': mutant.file, 'line': mutant.line,
                           'change': mutant.what}

    def work():
        sys.meta_path.insert(0, Importer(mutant.file, mutated(mutant)))
        plugin = First(first, known)
        code = run_tests(tests, plugin, '-x', *flags)
        return [code, plugin.failed]

    began = time.monotonic()
    limit = 60 + 4 * sum(seconds(x) for x in passing if x.split('::')[0] in tests)
    code, by = forked(work, limit) or (None, 'it hangs or crashes') if tests else (0, '')
    killed = code not in (0, 5)
    out |= {'killed': killed, 'by': by or ('it cannot be imported' if killed else ''),
            'tests': len(first), 'seconds': round(time.monotonic() - began, 1)}
    return out


# --- The command ---


def report(lines: list[dict[str, Any]]) -> None:
    """Prints the survivors and the share of the killed, by file."""
    by_file = collections.defaultdict(list)
    for line in lines:
        by_file[line['file']].append(line)
    for line in sorted(lines, key=lambda x: (x['file'], x['line'])):
        if not line['killed']:
            print(f'{line["file"]}:{line["line"]}: {line["change"]}'
                  + ('' if line['tests'] else '   (no test executes the line)'))
    for file, of in sorted(by_file.items()):
        print(f'{sum(x["killed"] for x in of):5} of {len(of):5}  {file}')
    killed = sum(x['killed'] for x in lines)
    print(f'{killed:5} of {len(lines):5} mutants killed: {killed / max(len(lines), 1):.1%}')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--files', nargs='*', help='of the targets; default: all')
    parser.add_argument('--tests', nargs='*', help='default: those that import the targets')
    parser.add_argument('--flags', nargs='*', default=[], help="pytest's, e.g. -k=...")
    parser.add_argument('--sample', type=int, help='so many mutants, drawn at random')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, default=Path('mutation.jsonl'))
    parser.add_argument('--list', action='store_true', help='lists the mutants; runs nothing')
    parser.add_argument('--report', action='store_true', help='of what was run; runs nothing')
    args = parser.parse_args()

    files = args.files or sorted(str(x.relative_to(ROOT)) for target in TARGETS
                                 for x in (ROOT / target).rglob('*.py'))
    chosen = [m for file in files for m in mutants(file)]
    if args.sample is not None and args.sample < len(chosen):
        chosen = random.Random(args.seed).sample(chosen, args.sample)
        chosen.sort(key=lambda m: (m.file, m.line, m.column))
    if args.list:
        print(*(m.id for m in chosen), f'{len(chosen)} mutants', sep='\n')
        return
    ids = {m.id for m in chosen}
    done = [x for x in map(json.loads, args.out.open()) if x['id'] in ids] if (
        args.out.exists()) else []
    have = {x['id'] for x in done}
    todo = [m for m in chosen if m.id not in have]
    if todo and not args.report:
        with tempfile.TemporaryDirectory(prefix='mutation_xla_') as cache:
            os.environ |= {'JAX_COMPILATION_CACHE_DIR': cache, 'JAX_PLATFORMS': 'cpu'}
            os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
            os.environ['PYTHONPATH'] = os.pathsep.join([
                str(ROOT), os.environ.get('PYTHONPATH', '')])
            sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
            sys.dont_write_bytecode = True
            for name in PRELOAD:
                importlib.import_module(name)
            known = survey(files, args.tests or tests_that_import(), args.flags)
            bad = [name for name, test in known.items() if not test['passed']]
            print(f'{len(known)} tests, {len(bad)} of them fail unchanged and are left out', *bad,
                  sep='\n  ', flush=True)
            with args.out.open('a') as out:
                for i, mutant in enumerate(todo, 1):
                    line = try_mutant(mutant, known, args.flags)
                    done.append(line)
                    out.write(json.dumps(line) + '\n')
                    out.flush()
                    print(f'[{i}/{len(todo)}] {"killed  " if line["killed"] else "SURVIVED"} '
                          f'{mutant.file}:{mutant.line} {mutant.what}  {line["by"]} '
                          f'({line["seconds"]} s)', flush=True)
    report(done)


if __name__ == '__main__':
    main()

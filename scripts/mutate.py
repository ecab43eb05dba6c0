"""Breaks the core in many small ways, one at a time, and tells which of them the tests notice.

python scripts/mutate.py                         # 60 mutations of the core, 40 to 50 minutes on 2 cores
python scripts/mutate.py --count 10 --only loss  # 10 of files whose name has "loss"
python scripts/mutate.py --json mutations.json   # name -> the test that noticed it, or null

A mutation negates a condition, exchanges an operator, shifts a whole number by one or leaves a statement out. Which ones are
made depends on the code alone: two states of the tests are compared by running this on both. A mutation is given to the tests
that call the function it is in. They run in forked processes, with torch and transformers imported once.
"""

from __future__ import annotations

import argparse
import ast
import collections
import copy
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ["ds_minis/tiling", "ds_minis/memory", "ds_minis/layer", "ds_minis/loss"]
TESTS = """
core/test_tiled_op loss/test_tiled_sum loss/test_deferred_logits loss/test_tiled_loss
loss/test_cross_entropy_rows loss/test_cross_entropy modules/test_token_wise layer/test_tiled_layer
layer/test_layer_analysis layer/test_layer_fallbacks layer/test_layer_calls layer/test_kept_attention
layer/test_kept_attention_kinds memory/test_offload convert/test_parity core/test_interrupted_chunks
convert/test_convert modules/test_adapters convert/test_after_conversion clients/test_trainer
layer/test_keep layer/test_kept_products layer/test_free_memory loss/test_one_factor
""".split()
MOST_TESTS = 150  # that call a function, the quickest of them, are run for a mutation of it
TIMEOUT = 240  # seconds; a mutation that hangs is noticed
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt,
    ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def mutations_of(tree: ast.Module) -> Iterator[tuple[str, int, Callable[[], ast.Module]]]:
    """Every mutation of a module: what it is, its line, and what makes the tree with it."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or function.name in ("__repr__", "__init_subclass__"):
            continue
        for node in ast.walk(function):
            for what, change in _changes(node):
                mutate = functools.partial(_with_change, tree, node, change)
                yield f"{function.name}: {what}: {ast.unparse(node).splitlines()[0][:70]}", node.lineno, mutate


def _changes(node: ast.AST):
    """Functions that change a copy of the node."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        yield "compare", lambda n: n.ops.__setitem__(0, OPERATORS[type(n.ops[0])]())
    if (
        isinstance(node, ast.BinOp)
        and type(node.op) in OPERATORS
        and not isinstance(node.right, ast.Constant | ast.JoinedStr)
    ):
        yield "operator", lambda n: setattr(n, "op", OPERATORS[type(n.op)]())
    if isinstance(node, ast.BoolOp):
        yield "and/or", lambda n: setattr(n, "op", OPERATORS[type(n.op)]())
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "negate", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 100:
        yield "number", lambda n: setattr(n, "value", n.value + 1)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "leave out", lambda n: setattr(n, "value", ast.Constant(None))
    if isinstance(node, ast.AugAssign):
        yield "leave out", lambda n: setattr(n, "op", ast.Sub()) if isinstance(n.op, ast.Add) else None


def _with_change(tree: ast.Module, node: ast.AST, change) -> ast.Module:
    node._here = True
    mutated = copy.deepcopy(tree)
    del node._here
    (place,) = [n for n in ast.walk(mutated) if hasattr(n, "_here")]
    change(place)
    return ast.fix_missing_locations(mutated)


def chosen(count: int, only: str) -> list[tuple[str, Path, str]]:
    """Name, file and new source of mutations, spread over the core by a hash of each, which a move does not change."""
    found, seen = [], collections.Counter()
    for path in sorted((path for part in CORE for path in (ROOT / part).rglob("*.py")), key=lambda path: path.name):
        if only not in path.stem or "kernel" in path.stem:  # Triton's source is no Python that CPU tests run
            continue
        for what, line, mutate in mutations_of(ast.parse(path.read_text(encoding="utf-8"))):
            seen[what] += 1
            digest = hashlib.sha256(f"{what} {seen[what]}".encode()).hexdigest()
            found.append((digest, f"{path.stem}:{line} {what}", path.relative_to(ROOT), mutate))
    return [(name, path, ast.unparse(mutate())) for _, name, path, mutate in sorted(found, key=lambda f: f[0])[:count]]


@functools.cache
def _is_core(filename: str) -> bool:
    return any(f"{part}/" in filename for part in CORE)


def run_tests(tree: Path, tests: list[str]) -> str | None:
    """The first test that fails in that tree, in a forked process; None if none does."""

    class Watch:
        failed = None

        def pytest_runtest_logreport(self, report):
            if report.failed:
                Watch.failed = Watch.failed or report.nodeid

    def run() -> str | None:
        status = _pytest(tree, ["-x", *tests], Watch())
        return None if status == 0 else Watch.failed or "the tests cannot be collected"

    return _in_fork(run, TIMEOUT)


def tests_by_function(tree: Path, tests: list[str]) -> dict[str, list[str]]:
    """ "file:function" of the core -> the tests in which it is called, the quickest first."""

    class Trace:
        seconds: dict[str, float] = {}
        called: dict[str, set[str]] = {}

        @pytest.hookimpl(hookwrapper=True)
        def pytest_runtest_protocol(self, item):
            called, start = self.called.setdefault(item.nodeid, set()), time.monotonic()

            def note(frame, event, arg):
                if event == "call" and _is_core(frame.f_code.co_filename):
                    called.add(f"{Path(frame.f_code.co_filename).stem}:{frame.f_code.co_name}")

            sys.setprofile(note)
            yield
            sys.setprofile(None)
            self.seconds[item.nodeid] = time.monotonic() - start

    def run() -> dict[str, list[str]]:
        _pytest(tree, tests, Trace())
        found: dict[str, list[str]] = {}
        for test in sorted(Trace.called, key=Trace.seconds.__getitem__):
            for function in Trace.called[test]:
                found.setdefault(function, []).append(test)
        return found

    return _in_fork(run, 3600)


def _in_fork(function, timeout: float):
    """What `function()` gives in a forked process, as JSON; or, in words, why it gives nothing."""
    with tempfile.NamedTemporaryFile() as file:
        pid = os.fork()
        if pid == 0:
            try:
                result = function()
                Path(file.name).write_text(json.dumps(result), encoding="utf-8")
            finally:
                os._exit(0)
        start = time.monotonic()
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            time.sleep(0.05)
            if time.monotonic() - start > timeout:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
                return "it hangs"
        return json.loads(Path(file.name).read_text(encoding="utf-8") or '"the process died"')


def _pytest(tree: Path, arguments: list[str], plugin) -> int:
    os.chdir(tree)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for name in [name for name in sys.modules if name.partition(".")[0] == "ds_minis"]:
        del sys.modules[name]
    sys.path[:0] = [str(tree), str(tree / "tests")]
    unit = "not engine and not large and not huge and not gpu"
    return pytest.main(["-q", "-p", "no:cacheprovider", "-m", unit, *arguments], plugins=[plugin])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="how many mutations (default: 60)")
    parser.add_argument("--only", default="", help="only of files whose name has this in it")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args(argv)
    os.environ |= {"DS_MINIS_AUTOLOAD": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import peft  # noqa: F401
    import torch
    import transformers.trainer  # noqa: F401

    torch.set_num_threads(1)
    tests = [f"tests/{name}.py" for name in TESTS if (ROOT / "tests" / f"{name}.py").exists()]
    results: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info", "outputs")
        shutil.copytree(ROOT, tree, ignore=ignored)
        covering = tests_by_function(tree, tests)
        for name, path, source in chosen(args.count, args.only):
            own = (tree / path).read_text(encoding="utf-8")
            (tree / path).write_text(source, encoding="utf-8")
            called_in = covering.get(f"{path.stem}:{name.split()[1].rstrip(':')}", [])
            results[name] = run_tests(tree, called_in[:MOST_TESTS]) if called_in else None
            (tree / path).write_text(own, encoding="utf-8")
            print(f"{'noticed' if results[name] else 'SURVIVES'}  {name}  {results[name] or ''}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    noticed = sum(bool(test) for test in results.values())
    print(f"{noticed} of {len(results)} mutations are noticed")
    return 0


if __name__ == "__main__":
    sys.exit(main())

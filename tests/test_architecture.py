"""The rules of the house, held by walking the imports (docs/architecture.md says why each one is there).

vocabulary <- codec <- transport; pure rules <- services; only `__main__` wires things together.
"""

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("registry_consumer", "dispatcher", "gpu_worker", "gateway", "millrace")
PRODUCT = ("bus", *PARTS)
LINES_MAX = 500

# Decide in pure functions: these take time, chance and environment as arguments, and touch no wire.
PURE = (
    "bus.ids",
    "bus.jobs",
    "bus.keys",
    "bus.codec.wire",
    "bus.codec.events",
    "bus.codec.entries",
    "bus.fleet",
    "bus.calls.following",
    "bus.chat_request",
    "dispatcher.rank",
    "dispatcher.plan",
    "dispatcher.sharing",
    "dispatcher.door",
    "dispatcher.board",
    "dispatcher.views",
    "registry_consumer.fold",
    "registry_consumer.news",
    "gateway.readiness",
    "gateway.registration",
    "gateway.sse",
    "gateway.openai_wire",
    "gateway.simple_wire",
)
IMPURE = frozenset({"asyncio", "redis", "aiohttp", "socket", "threading", "subprocess", "os", "bus.link", "bus.cell"})


def module_files() -> dict[str, Path]:
    """Every module of the product, by its dotted name."""
    found = {}
    for part in PRODUCT:
        for path in sorted((ROOT / part).rglob("*.py")):
            names = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


MODULES = module_files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


@functools.cache
def imports_of(name: str) -> tuple[str, ...]:
    """Dotted names that a module imports; `from a import b` gives `a.b` if that is a module of ours, else `a`."""
    return tuple(find_imports(name))


def find_imports(name: str) -> Iterator[str]:
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports hide where things live"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


def importers_of(package: str) -> set[str]:
    return {name for name in MODULES for one in imports_of(name) if one == package or one.startswith(package + ".")}


def without_main_block(tree: ast.Module) -> ast.Module:
    """The module as others import it: without what stands under `if __name__ == "__main__"`."""
    kept = [node for node in tree.body if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))]
    return ast.Module(body=kept, type_ignores=[])


def starts_with(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_the_bus_imports_no_other_part() -> None:
    assert {
        (name, one)
        for name in MODULES
        if starts_with(name, "bus")
        for one in imports_of(name)
        if starts_with(one, *PARTS)
    } == set()


@pytest.mark.parametrize("part", PARTS)
def test_parts_never_import_each_other(part: str) -> None:
    """They meet in bus/."""
    others = tuple(other for other in PARTS if other != part)

    assert {
        (name, one)
        for name in MODULES
        if starts_with(name, part)
        for one in imports_of(name)
        if starts_with(one, *others)
    } == set()


def test_only_the_bus_imports_redis() -> None:
    assert {name for name in importers_of("redis") if not starts_with(name, "bus")} == set()


def test_only_the_torch_engine_imports_torch() -> None:
    """A gateway or relay machine needs no torch."""
    assert {name for name in importers_of("torch") if not starts_with(name, "gpu_worker.torch_engine")} == set()


def test_aiohttp_is_where_http_is_spoken() -> None:
    assert {
        name
        for name in importers_of("aiohttp")
        if not starts_with(name, "gateway", "gpu_worker.relay_engine", "bus.address_guard")
    } == set()


def test_no_product_code_imports_tests_or_mocks() -> None:
    for foreign in ("tests", "benchmarks", "unittest", "pytest", "fakeredis"):
        assert importers_of(foreign) == set(), foreign


def test_only_main_modules_read_the_environment() -> None:
    """Each reads it once, into settings that are checked before anything connects."""
    readers = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(without_main_block(tree))
        if isinstance(node, ast.Attribute)
        and node.attr in {"environ", "getenv", "environb"}
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
    }

    assert {name for name in readers if not name.endswith("__main__")} == set()


def test_imports_stand_at_the_top() -> None:
    """So a cycle is a design question, and what a module needs is seen at once."""
    hidden = {
        (name, inner.lineno)
        for name, tree in TREES.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(function)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    }

    assert hidden == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: {one for one in imports_of(name) if one in MODULES and one != name} for name in MODULES}
    settled: set[str] = set()
    while free := {name for name, needs in graph.items() if name not in settled and needs <= settled}:
        settled |= free

    assert set(graph) - settled == set()


def test_every_foreign_import_is_a_declared_dependency() -> None:
    """What only another package brings along may be gone with its next release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    }
    names = {re.split(r"[\[<>=!; ]", requirement)[0].lower().replace("-", "_") for requirement in declared}
    locked = set()
    for kind in ("service", "worker"):
        text = (ROOT / "requirements" / f"{kind}.in").read_text(encoding="utf-8").splitlines()
        locked |= {re.split(r"[<>=]", line)[0].replace("-", "_") for line in text if line and not line.startswith("#")}
    foreign = (
        {one.partition(".")[0] for name in MODULES for one in imports_of(name)} - sys.stdlib_module_names - set(PRODUCT)
    )

    foreign -= {"triton"}  # part of torch for CUDA, and loaded only there (torch_engine/backends.py)
    assert foreign - names == set()
    assert foreign - locked - {"torch"} == set()


def test_benchmarks_run_without_what_only_tests_need() -> None:
    """A newcomer who ran `make run` can measure. What they share with the tests is in tests/harness."""
    locked = (ROOT / "requirements" / "dev.in").read_text(encoding="utf-8").splitlines()
    only_tests = {line.replace("-", "_") for line in locked if line and not line.startswith("#")}
    elsewhere = ("peers", "rivals")  # each runs in a venv of its own
    left = [path for path in (ROOT / "benchmarks").rglob("*.py") if path.parent.name not in elsewhere]
    reached: dict[Path, set[str]] = {}
    while left:
        path = left.pop()
        reached[path] = names = imported_names(ast.parse(path.read_text(encoding="utf-8")))
        ours = [
            ROOT.joinpath(*name.split(".")).with_suffix(".py")
            for name in names
            if starts_with(name, "benchmarks", "tests")
        ]
        left += [one for one in ours if one.is_file() and one not in reached]

    assert ROOT / "tests/harness/servers.py" in reached
    assert {
        (str(path.relative_to(ROOT)), name)
        for path, names in reached.items()
        for name in names
        if name.partition(".")[0] in only_tests
    } == set()


def imported_names(tree: ast.Module) -> set[str]:
    """Of every import statement: `from a import b` gives `a` and `a.b`."""
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_a_producer_needs_only_the_base_dependencies() -> None:
    """`pip install .` without extras gives `from millrace import Client` and the command."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = {re.split(r"[\[<>=!; ]", requirement)[0] for requirement in project["dependencies"]}
    reached = {name for name in MODULES if starts_with(name, "millrace")}
    while more := {one for name in reached for one in imports_of(name) if one in MODULES} - reached:
        reached |= more
    foreign = (
        {one.partition(".")[0] for name in reached for one in imports_of(name)} - sys.stdlib_module_names - set(PRODUCT)
    )

    assert foreign - base == set()


@pytest.mark.parametrize("name", PURE)
def test_pure_rules_touch_no_wire(name: str) -> None:
    """If a rule needs Redis, a GPU or a sleep to be tested, it is in the wrong module."""
    assert name in MODULES, "moved? keep the list in step"
    assert {one for one in imports_of(name) if starts_with(one, *IMPURE)} == set()


def test_only_bus_keys_builds_a_key() -> None:
    """One file names every key; docs/protocol.md is compared with it."""
    spelled = {
        (name, node.lineno)
        for name, tree in TREES.items()
        if name != "bus.keys"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("millrace:{")
    }

    assert spelled == set()


def test_a_file_can_be_read_in_one_sitting() -> None:
    sizes = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}

    assert {name: size for name, size in sizes.items() if size >= LINES_MAX} == {}


def test_a_module_says_what_it_is() -> None:
    assert [name for name, tree in TREES.items() if tree.body and not ast.get_docstring(tree)] == []

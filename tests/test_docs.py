"""What the documents promise to list, they list: settings, keys, scripts, events, commands."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from honcho.environ import parse as parse_env_file

from bus.keys import CellKeys
from bus.settings import Settings, env_name
from millrace.settings_table import settings_markdown
from tests.test_architecture import MODULES, TREES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SETTINGS = [setting.name for setting in Settings.__dataclass_fields__.values()]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_the_readme_lists_exactly_the_settings() -> None:
    """`millrace settings --markdown` prints the table to paste."""
    table = re.search(r"<!-- settings.*?-->\n(.*?)\n<!-- end", read(ROOT / "README.md"), re.DOTALL)

    assert table is not None
    assert table.group(1) == settings_markdown()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_does_something(name: str) -> None:
    """A setting that no code reads is a promise that nobody keeps."""
    readers = [
        module
        for module, tree in TREES.items()
        if module not in {"bus.settings"}
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == name
    ]
    procfile = env_name(Settings.__dataclass_fields__[name]) in read(ROOT / "Procfile")

    assert readers or procfile


DOCUMENTS = ["README.md", ".env.example", *(f"docs/{path.name}" for path in sorted(DOCS.glob("*.md")))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_no_setting_that_does_not_exist(document: str) -> None:
    known = {env_name(setting) for setting in Settings.__dataclass_fields__.values()}

    assert set(re.findall(r"MILLRACE_[A-Z0-9_]*[A-Z0-9]", read(ROOT / document))) - known == set()


def test_the_example_file_is_all_comments_that_would_work() -> None:
    """Uncommenting its lines gives settings that fit together."""
    lines = [
        line.removeprefix("# ") for line in read(ROOT / ".env.example").splitlines() if re.match(r"# [A-Z_]+=", line)
    ]
    parsed = parse_env_file("\n".join(lines))

    assert parse_env_file(read(ROOT / ".env.example")) == {}
    assert Settings.from_env(parsed) != Settings()


def every_key() -> Iterator[str]:
    """Each key of a cell without its prefix; parameters in angle brackets."""
    keys = CellKeys(0)
    for name, value in vars(keys).items():
        if not name.startswith("_") and isinstance(value, str) and name != "prefix":
            yield value.removeprefix(keys.prefix)
    for name, method in inspect.getmembers(keys, inspect.ismethod):
        if not name.startswith("_"):
            parameters = {parameter: f"<{parameter}>" for parameter in inspect.signature(method).parameters}
            yield method(**parameters).removeprefix(keys.prefix)


@pytest.mark.parametrize("key", sorted(set(every_key())))
def test_every_key_is_in_the_protocol_document(key: str) -> None:
    """By its shape: the document may name the parameters otherwise."""
    shape = re.sub(r"%3C\w+%3E|<\w+>", "<>", key)
    documented = {re.sub(r"<[^<>`]+>", "<>", found) for found in re.findall(r"`([^`\n]+)`", read(DOCS / "protocol.md"))}
    tails = {found.removeprefix("millrace:{cN}:") for found in documented}

    assert shape in tails or shape == "<>"


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "bus" / "scripts").glob("[a-z]*.lua")))
def test_every_script_is_in_the_protocol_document(script: str) -> None:
    assert f"`{script}`" in read(DOCS / "protocol.md")


def test_every_node_event_is_in_the_protocol_document() -> None:
    tags = set(re.findall(r'tag="(\w+)"', read(ROOT / "bus" / "codec" / "events.py")))

    assert {tag for tag in tags if f"`{tag}`" not in read(DOCS / "protocol.md")} == set()


def test_links_between_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", read(document)):
            assert (document.parent / target).exists(), f"{document.name} -> {target}"


def test_every_package_of_the_product_is_in_the_map() -> None:
    text = read(DOCS / "architecture.md")

    assert {name for name in MODULES if "." not in name and f"`{name}/`" not in text} == set()


def test_make_help_lists_every_command_that_the_documents_name() -> None:
    listed = set(
        re.findall(
            r"^  make ([a-z-]+)",
            subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout,
            re.MULTILINE,
        )
    )
    named = {
        word for path in [ROOT / "README.md", *DOCS.glob("*.md")] for word in re.findall(r"`make ([a-z-]+)", read(path))
    }

    assert named <= listed


def test_the_readme_names_only_commands_that_exist() -> None:
    named = set(
        re.findall(r"`(?:\.venv/bin/)?millrace ([a-z]+)", read(ROOT / "README.md") + read(DOCS / "operations.md"))
    )
    text = subprocess.run(
        [sys.executable, "-m", "millrace", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout

    assert named
    assert {name for name in named if f"    {name} " not in text} == set()

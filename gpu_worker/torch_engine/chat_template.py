"""A model's chat template, rendered in a sandbox.

Templates come with models, so they are other people's programs: immutable sandboxed jinja2, no loader, no access to
Python objects beyond the messages. Helpers are those that Hugging Face templates expect.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bus.jobs import Message


class TemplateError(Exception):
    """The template refuses these messages; the text says why, for the client."""


class GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant said, for training; it shows what it holds."""

    tags = {"generation"}  # noqa: RUF012 - how jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        """special: bos_token and the like, by name, as far as the model has them.

        Raises TemplateError on a template that does not parse.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
        self._special = dict(special)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the model's chat template does not parse: {error}") from error

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt up to where the assistant's answer begins."""
        plain = [_to_plain(message) for message in messages]
        try:
            return self._template.render(
                messages=plain, add_generation_prompt=True, tools=None, documents=None, **self._special
            )
        except TemplateError:
            raise
        except Exception as error:  # whatever somebody else's program raises on these messages
            raise TemplateError(f"the model's chat template refuses these messages: {error}") from error


def _to_plain(message: Message) -> dict[str, str]:
    """`developer` is what newer OpenAI clients call the system role; templates know the old name."""
    role = "system" if message.role == "developer" else message.role
    plain = {"role": role, "content": message.content}
    return plain if message.name is None else plain | {"name": message.name}


def _refuse(text: str) -> NoReturn:
    raise TemplateError(text)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own escapes HTML; these are the arguments that published templates give."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

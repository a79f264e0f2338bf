"""Templates come with models: they are rendered as Hugging Face does, and trusted with nothing."""

import json

import pytest

from bus.jobs import Message
from gpu_worker.torch_engine.chat_template import ChatTemplate, TemplateError
from tests.torch_engine.tiny import TEMPLATE

HELLO = (Message("user", "hello"),)


def test_messages_come_in_order_and_the_answer_begins_at_the_end() -> None:
    template = ChatTemplate(TEMPLATE, {})

    text = template.render((Message("system", "be brief"), *HELLO))

    assert text == "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_special_tokens_and_helpers_are_at_hand() -> None:
    source = "{{ bos_token }}{{ messages | tojson }}{% if strftime_now('%Y')|length == 4 %} now{% endif %}"

    text = ChatTemplate(source, {"bos_token": "<s>"}).render(HELLO)

    assert text.startswith("<s>")
    assert text.endswith(" now")
    assert json.loads(text[3:-4]) == [{"role": "user", "content": "hello"}]


def test_developer_is_the_new_name_of_system() -> None:
    assert "<|im_start|>system" in ChatTemplate(TEMPLATE, {}).render((Message("developer", "x"), *HELLO))


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}{{ messages.__class__.__subclasses__() }}",
        "{% set x = messages.append(1) %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages[5].content.nothing }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_what_a_template_must_not_or_cannot_do_is_a_refusal(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source, {}).render(HELLO)


def test_a_template_that_does_not_parse_is_said_at_the_start() -> None:
    with pytest.raises(TemplateError, match="does not parse"):
        ChatTemplate("{% for %}", {})

"""Chat templates: the same text as transformers gives, in a sandbox, and errors without content."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from stip.chat import ChatTemplate
from stip_protocol.errors import ConfigurationError, RequestInvalid

CHATML = """{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{% endif %}"""
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}
{% endfor %}"""
RICH = """{%- set found = namespace(last=none) %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {%- set found.last = message %}
    {{- message | tojson(indent=2) }}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}{% endif %}
{%- endfor %}
{{ found.last.content.split(' ')[0] | upper }} {{ unk_token }} {{ tools is none }} {{ documents is none }}
{%- if strftime_now is defined %} {{ strftime_now('%Y') }}{% endif %}
"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CONVERSATIONS = [
    [{"role": "user", "content": "  Hello <b>&amp; ümläut 日本 'quotes' \"double\"  "}],
    [
        {"role": "user", "content": "One two"},
        {"role": "assistant", "content": "Three\n four"},
        {"role": "user", "content": "Five", "extra": {"deep": [1, 2.5, None, True]}},
    ],
]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "three"])
@pytest.mark.parametrize("source", [CHATML, LLAMA_3, MISTRAL, RICH], ids=["chatml", "llama 3", "mistral", "rich"])
def test_a_template_renders_as_in_transformers(source: str, messages: Any, add_generation_prompt: bool):
    expected, _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=add_generation_prompt, **TOKENS
    )
    found = ChatTemplate(source, TOKENS).render(messages, add_generation_prompt=add_generation_prompt)
    assert found == expected[0]


def test_special_tokens_come_from_the_settings_in_either_form():
    settings = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>", "chat_template": "{{ bos_token + eos_token }}"}
    template = ChatTemplate.of(settings, None)
    assert template is not None
    assert template.render([{"role": "user", "content": "x"}]) == "<bos><eos>"


def test_of_several_named_templates_the_default_is_taken():
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    template = ChatTemplate.of({"chat_template": named}, None)
    assert template is not None
    assert template.render([{"role": "user", "content": "x"}]) == "yes"
    assert ChatTemplate.of({}, None) is None


def test_a_sentence_of_the_template_is_told_and_a_message_never_is():
    conversation = [{"role": "assistant", "content": "zebra"}]
    with pytest.raises(RequestInvalid, match="roles must alternate"):
        ChatTemplate(MISTRAL, TOKENS).render(conversation)
    for source in (
        "{{ raise_exception(messages[0].content) }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].content() }}",
    ):
        with pytest.raises(RequestInvalid) as caught:
            ChatTemplate(source, TOKENS).render(conversation)
        assert "zebra" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}"],
)
def test_a_template_cannot_leave_its_sandbox(source: str):
    with pytest.raises(RequestInvalid):
        ChatTemplate(source, TOKENS).render([{"role": "user", "content": "x"}])


def test_a_malformed_template_is_a_configuration_error():
    with pytest.raises(ConfigurationError, match="line 1"):
        ChatTemplate("{% for %}", TOKENS)

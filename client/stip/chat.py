"""Chat templates: messages to the text a model was trained on, rendered where the messages are.

The environment is the one of transformers (`transformers.utils.chat_template_utils`, 5.x): an immutable
sandbox with `trim_blocks`, `lstrip_blocks`, loop controls, the `generation` tag, `tojson` without HTML escapes,
`raise_exception` and `strftime_now`. The same template gives the same text here and there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, Self

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stip_protocol.errors import ConfigurationError, RequestInvalid

Message = Mapping[str, Any]
"""`role` and `content`, and whatever else the template reads."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names under which a template finds the special tokens of tokenizer_config.json."""


class ChatTemplate:
    """A compiled template with the special tokens it may name. Raises `ConfigurationError` where it is malformed."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigurationError(f"chat template: line {error.lineno} is not Jinja") from None

    @classmethod
    def of(cls, settings: Mapping[str, Any], source: str | None) -> Self | None:
        """The template of a tokenizer: its own file, or the one inside tokenizer_config.json; None where none is."""
        found = settings.get("chat_template") if source is None else source
        if isinstance(found, list):
            named = {one["name"]: one["template"] for one in found}
            found = named.get("default")
        if not isinstance(found, str):
            return None
        tokens = {name: _text(settings.get(name)) for name in SPECIAL_TOKENS}
        return cls(found, {name: text for name, text in tokens.items() if text is not None})

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation. Raises `RequestInvalid`, never quoting a message."""
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
                raise RequestInvalid.because("messages", "one of another form", "a role and a content each")
        if not messages:
            raise RequestInvalid.because("messages", "none", "at least one")
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # noqa: BLE001  # a template runs arbitrary expressions over private text
            raise RequestInvalid(f"messages: the chat template refuses them{self._reason(error)}") from None

    def _reason(self, error: Exception) -> str:
        """What may be told of a refusal: a sentence that stands in the template, never one made of messages."""
        text = error.message if isinstance(error, jinja2.TemplateError) else None
        literal = bool(text) and any(f"{quote}{text}{quote}" in self._source for quote in "'\"")
        return f": {text}" if literal else f" ({type(error).__name__})"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what an assistant wrote, for training masks; here its body is all there is."""

    tags = {"generation"}  # noqa: RUF012  # the name and form that Jinja's Extension gives it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return str(caller())


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005  # the user's own wall clock, as transformers gives it


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _text(token: object) -> str | None:
    """A special token is a string, or an added token's mapping with its `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None

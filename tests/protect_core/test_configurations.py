"""Every field of a configuration is known, or known not to matter: a new one of a newer transformers is noticed."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator

import pytest
from pydantic.fields import FieldInfo
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from stip_keyservice.protect.configuration import INERT
from stip_keyservice.protect.families import FAMILIES
from stip_keyservice.protect.families.fields import Fields

ELSEWHERE = {
    "_attn_implementation",  # how, not what
    "get_text_config",
    "head_dim",  # GPT-NeoX reads it for rotary tables only, and fails where it is not the quotient
    "image_token_id",
    "mm_tokens_per_image",
    "text_config",
    "vision_config",
}
"""Also read by the modules of the classes, but a method, or by classes that are not protected."""


def kinds(kind: type[Fields]) -> Iterator[type[Fields]]:
    for below in kind.__subclasses__():
        yield below
        yield from kinds(below)


def known(family: str) -> dict[str, FieldInfo]:
    """A family's fields by their names in a configuration."""
    (found,) = [
        kind
        for kind in kinds(Fields)
        if (field := kind.model_fields.get("model_type")) and family in getattr(field.annotation, "__args__", ())
    ]
    return {field.alias or name: field for name, field in found.model_fields.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_the_class_is_known_or_cannot_matter(family: str) -> None:
    stated = {field.name for field in dataclasses.fields(CONFIG_MAPPING[family])}
    assert stated - known(family).keys() - INERT == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_that_the_class_reads_is_known_or_cannot_matter(family: str) -> None:
    """Some classes read what their configurations do not declare, as head_dim."""
    config = CONFIG_MAPPING[family]
    source = inspect.getsource(sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[config].__module__])
    read = set(re.findall(r"config\.(\w+)", source)) | set(re.findall(r"getattr\((?:self\.)?config, \"(\w+)\"", source))
    assert read > {"vocab_size"}
    own = {config.attribute_map.get(name, name) for name in read}
    assert own - known(family).keys() - INERT - ELSEWHERE == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_that_is_left_out_means_what_the_class_takes_it_for(family: str) -> None:
    """But for the number of experts, which two fields may hold, and for two ways to say no."""
    declared = {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[family])}
    differing = {
        name: field.default
        for name, field in known(family).items()
        if name in declared and not field.is_required() and (field.default or None) != (declared[name] or None)
    }
    assert differing.keys() <= {"num_experts"}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_is_both_known_and_inert(family: str) -> None:
    assert not known(family).keys() & INERT

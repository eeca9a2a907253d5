"""A chat template that refuses, drops or breaks gives a prompt with everything in it, or an error a user can read."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from python_model.model.chat_template import template_ids, template_prompt

LOOP = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + LOOP
DROPS = (
    "{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['role'] }}] {{ m['content'] }}\n{% endif %}{% endfor %}"
)


def with_template(tokenizer: Any, template: Any) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_a_system_role_is_used_where_the_template_has_one(tokenizer: Any) -> None:
    own = with_template(tokenizer, LOOP)
    assert template_prompt(own, ["hi"], system="be brief") == "[system] be brief\n[user] hi\n"
    assert template_prompt(own, ["hi", "yes", "so"]) == "[user] hi\n[assistant] yes\n[user] so\n"
    assert own.decode(template_ids(own, ["hi"], prefix="It")) == "[user] hi\nIt"


@pytest.mark.parametrize("template", [REFUSES, DROPS])
def test_a_system_text_opens_the_first_turn_where_the_template_has_no_such_role(tokenizer: Any, template: str) -> None:
    own = with_template(tokenizer, template)
    want = "[user] be brief\n\nhi\n[assistant] yes\n[user] so\n"
    assert template_prompt(own, ["hi", "yes", "so"], system="be brief") == want
    assert template_prompt(own, ["hi"]) == "[user] hi\n"


def test_of_named_templates_the_default_one_is_used(tokenizer: Any) -> None:
    own = with_template(tokenizer, {"default": LOOP, "rag": "x"})
    assert template_prompt(own, ["hi"]) == "[user] hi\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'] }}", "template fails .*[Uu]nexpected end of template"),
        ("{{ messages[0]['content'] + 1 }}", "template fails"),
        ("{{ nothing.of_it }}", "template fails .*undefined"),
        ("{{ raise_exception('no chats') }}", "template fails .*no chats"),
        ({"rag": LOOP, "tool": LOOP}, "template fails"),
        ("x", "leaves the last turn out"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro again(x) %}{{ again(x) }}{% endmacro %}{{ again(1) }}", "maximum recursion depth"),
        ("{{ 2.0 ** 9999 }}", "(34, .*)|out of range|too large"),
    ],
)
@pytest.mark.parametrize("system", ["", "be brief"])
def test_a_template_that_is_broken_is_an_error_a_user_can_read(
    tokenizer: Any, template: Any, message: str, system: str
) -> None:
    with pytest.raises(ValueError, match=f"format: expected 'grit'.*{message}.*, got 'template'"):
        template_prompt(with_template(tokenizer, template), ["hi"], system=system)

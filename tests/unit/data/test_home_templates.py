"""Small chat templates of our own that write turns in every way Jinja has, each with what must be trained.

Expectations come from transformers' rendering, the markers that a template writes, and words that stand once in a
conversation (template_cases.py); where a template mixes messages, an error that says why is right too, a guess is not.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from template_cases import (
    CHATML,
    Chat,
    Family,
    Pair,
    check_spans,
    check_words,
    conversation,
    make_pair,
    reference,
    shown,
    trained_texts,
    trained_words,
    turns_and_mask,
    words_in,
)

from burnish.data.chat import Selection
from burnish.types import Conversation, Message, RowError

END = "<|im_end|>"
PIECES = "'<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n'"
TURN = "{{ " + PIECES + " }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
LOOP = "{% for m in messages %}" + TURN + "{% endfor %}"


def looped(body: str, over: str = "messages") -> str:
    return "{% for m in " + over + " %}" + body + "{% endfor %}" + ASK


def each(expression: str) -> str:
    """A loop that writes `expression`, in which TURN stands for the turn's text."""
    return looped("{% set t = " + PIECES + " %}{{ " + expression.replace("TURN", "t") + " }}")


def content(expression: str) -> str:
    """A loop whose turns hold `expression` for the content."""
    return looped("{{ '<|im_start|>' + m.role + '\\n' }}{{ " + expression + " }}{{ '<|im_end|>\\n' }}")


NAMESPACE = "{% set ns = namespace(out='', parts=[], i=0) %}"
WRAP = "{% macro wrap(role) %}{{ '<|im_start|>' + role + '\\n' }}{{ caller() }}{{ '<|im_end|>\\n' }}{% endmacro %}"
TEMPLATES = {
    # where the messages come from
    "a loop": looped(TURN),
    "indices": looped("{% set m = messages[m] %}" + TURN, "range(messages|length)"),
    "indices and the loop": looped("{% set m = messages[loop.index0] %}" + TURN),
    "a slice": looped(TURN, "messages[0:]"),
    "a slice behind a message": "{% set m = messages[0] %}" + TURN + looped(TURN, "messages[1:]"),
    "the last message outside": "{% for m in messages[:-1] %}"
    + TURN
    + "{% endfor %}{% set m = messages[-1] %}"
    + TURN
    + ASK,
    "no loop": "".join(
        "{% if messages|length > " + str(n) + " %}{% set m = messages[" + str(n) + "] %}" + TURN + "{% endif %}"
        for n in range(8)
    )
    + ASK,
    "selectattr": looped(TURN, "messages|selectattr('role', 'in', ['user', 'assistant'])"),
    "rejectattr": looped(TURN, "messages|rejectattr('role', 'equalto', 'system')|list"),
    "loop filter": "{% for m in messages if m.role != 'system' %}" + TURN + "{% else %}none{% endfor %}" + ASK,
    "reversed twice": looped(TURN, "messages|reverse|list|reverse"),
    "negative step twice": looped(TURN, "messages[::-1][::-1]"),
    "written backwards": NAMESPACE
    + "{% for m in messages|reverse %}{% set ns.out = "
    + PIECES
    + " + ns.out %}{% endfor %}{{ ns.out }}"
    + ASK,
    "batches": "{% for pair in messages|batch(2) %}{% for m in pair %}" + TURN + "{% endfor %}{% endfor %}" + ASK,
    "copied list": NAMESPACE
    + "{% for m in messages %}{% set ns.parts = ns.parts + [m] %}{% endfor %}"
    + looped(TURN, "ns.parts"),
    "copied messages": NAMESPACE
    + "{% for m in messages %}{% set ns.parts = ns.parts + [{'role': m.role, 'content': m.content}] %}{% endfor %}"
    + looped(TURN, "ns.parts"),
    "contents by map": "{% set texts = messages|map(attribute='content')|list %}"
    + looped("{{ '<|im_start|>' + m.role + '\\n' + texts[loop.index0] + '<|im_end|>\\n' }}"),
    "pairs": looped("{{ '<|im_start|>' + m[0] + '\\n' + m[1] + '<|im_end|>\\n' }}").replace(
        "{% for m in messages %}",
        NAMESPACE
        + "{% for m in messages %}{% set ns.parts = ns.parts + [(m.role, m.content)] %}{% endfor %}"
        + "{% for m in ns.parts %}",
    ),
    "unpacked": "{% for m in messages %}{% set role, text = m.role, m['content'] %}"
    "{{ '<|im_start|>' ~ role ~ '\\n' ~ text ~ '<|im_end|>\\n' }}{% endfor %}" + ASK,
    "items": looped(
        "{% for k, v in m.items() %}"
        "{{ '<|im_start|>' + v + '\\n' if k == 'role' else v + '<|im_end|>\\n' }}{% endfor %}"
    ),
    "get": content("m.get('content', '')"),
    "an inner loop's else that leaves the pass": "{% for m in messages %}"
    + "{% if m.role == 'assistant' %}"
    + TURN
    + "{% for x in [] %}{% else %}{% continue %}{% endfor %}{% endif %}{% if m.role != 'assistant' %}"
    + TURN
    + "{% endif %}{% endfor %}"
    + ASK,
    "recursion": NAMESPACE
    + "{% for m in messages[:1] recursive %}"
    + TURN
    + "{% set ns.i = ns.i + 1 %}{{ loop(messages[ns.i:ns.i + 1]) }}{% endfor %}"
    + ASK,
    "recursive macro": "{% macro rest(ms) %}{% if ms %}{% set m = ms[0] %}"
    + TURN
    + "{{ rest(ms[1:]) }}{% endif %}{% endmacro %}{{ rest(messages) }}"
    + ASK,
    # looking about
    "looks ahead": "{% for m in messages[::-1] %}{% if m.content == 'x' %}{% set y = 1 %}{% endif %}{% endfor %}"
    + looped(TURN),
    "neighbours": looped(
        "{% if loop.previtem is defined and loop.previtem.role == m.role %}{{ '<|im_start|>' + m.role + ' again\\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\\n' }}{% endif %}{{ m.content + '<|im_end|>' }}"
        "{% if loop.nextitem is defined %}{{ '\\n' }}{% endif %}"
    ),
    "changed": looped("{% if loop.changed(m.role) %}{{ '' }}{% endif %}" + TURN),
    "continue": looped("{% if m.role == 'tool' %}{% continue %}{% endif %}" + TURN),
    "break": looped(TURN + "{% if loop.last %}{% break %}{% endif %}"),
    "decides by the text": looped(
        "{% set d = {m.content: 'x'} %}{% if m.content in d and m.content == m.content + '' and m.content is string"
        " and m.content|length == (m.content ~ '')|length and not 'qzz' in m.content and m.content|int == 0 %}"
        + TURN
        + "{% endif %}"
    ),
    "joiner": "{% set line = joiner('\\n') %}"
    + looped("{{ line() }}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}").replace(
        ASK, ASK.replace("{{ '", "{{ line() }}{{ '")
    ),
    # how it is put together
    "macro": "{% macro turn(m, end='<|im_end|>') %}"
    + TURN.replace("'<|im_end|>\\n'", "end + '\\n'")
    + "{% endmacro %}"
    + looped("{{ turn(m) }}"),
    "macro over all": "{% macro all() %}" + LOOP + "{% endmacro %}{{ all() }}" + ASK,
    "macro of a text": "{% macro text(x) %}{{ x }}{% endmacro %}" + content("text(m.content)"),
    "macro, then string methods": "{% macro turn(m) %}"
    + TURN
    + "{% endmacro %}"
    + looped("{{ turn(m).strip() + '\\n' }}"),
    "call block": WRAP + looped("{% call wrap(m.role) %}{{ m.content }}{% endcall %}"),
    "filter block": looped("{% filter trim %}" + TURN + "{% endfilter %}{{ '\\n' }}"),
    "filter block over all": "{% filter replace('\\r', '') %}" + LOOP + "{% endfilter %}" + ASK,
    "block": "{% block body %}{% for m in messages %}" + TURN + "{% endfor %}{% endblock %}" + ASK,
    "with": looped(
        "{% with text = m.content %}{{ '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>\\n' }}{% endwith %}"
    ),
    "captured loop": "{% set chat %}" + LOOP + "{% endset %}{{ chat }}" + ASK,
    "captured loop, trimmed": "{% set chat %}" + LOOP + "{% endset %}{{ chat | trim }}{{ '\\n' }}" + ASK,
    "captured by a filtering set": "{% set chat | trim %}" + LOOP + "{% endset %}{{ chat }}{{ '\\n' }}" + ASK,
    "captured turn": looped("{% set t %}" + TURN + "{% endset %}{{ t }}"),
    "namespace string": NAMESPACE
    + "{% for m in messages %}{% set ns.out = ns.out + "
    + PIECES
    + " %}{% endfor %}{{ ns.out }}"
    + ASK,
    "namespace list": NAMESPACE
    + "{% for m in messages %}{% set ns.parts = ns.parts + ["
    + PIECES
    + "] %}{% endfor %}{{ ns.parts|join }}"
    + ASK,
    "list joined by lines": NAMESPACE + "{% for m in messages %}"
    "{% set ns.parts = ns.parts + ['<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>'] %}"
    "{% endfor %}{{ ns.parts|join('\\n') }}{{ '\\n' }}" + ASK,
    "method join": NAMESPACE
    + "{% for m in messages %}{% set ns.parts = ns.parts + ["
    + PIECES
    + "] %}{% endfor %}{{ ''.join(ns.parts) }}"
    + ASK,
    # work on a turn's text
    "trim": each("TURN|trim + '\\n'"),
    "strip": each("TURN.strip() + '\\n'"),
    "slice of a turn": each("TURN[:-1] + TURN[-1:]"),
    "replace": each("TURN|replace('zzz', 'y')"),
    "replace of a marker": each("TURN.replace('<|im_start|>', '<|im_start|>')"),
    "replace of a letter": each("TURN|replace('q', 'Q')"),
    "split and join": each("'<|im_end|>'.join(TURN.split('<|im_end|>'))"),
    "split and join by filter": each("TURN.split('\\n')|join('\\n')"),
    "lines": each("TURN.splitlines()|join('\\n') + '\\n'"),
    "partition": each("TURN.partition('\\n')|join"),
    "upper": content("m.content|upper"),
    "lower": content("m.content.lower()"),
    "title": content("m.content|title"),
    "capitalize": content("m.content|capitalize"),
    "indent": content("m.content|indent(2)"),
    "indent with the first": content("m.content|indent(2, first=true)"),
    "format": each("'%s'|format(TURN)"),
    "format of parts": looped("{{ '<|im_start|>%s\\n%s<|im_end|>\\n'|format(m.role, m.content) }}"),
    "format by name": looped("{{ '<|im_start|>%(r)s\\n%(c)s<|im_end|>\\n'|format(r=m.role, c=m.content) }}"),
    "percent": looped("{{ '<|im_start|>%s\\n%s<|im_end|>\\n' % (m.role, m.content) }}"),
    "percent of one": content("'%s' % m.content"),
    "format method": looped("{{ '<|im_start|>{}\\n{c}<|im_end|>\\n'.format(m.role, c=m.content) }}"),
    "string filter": content("m.content|string"),
    "default": content("m.content|default('', true)"),
    "or": content("m.content or ''"),
    "condition": content("m.content if m.content else ''"),
    "safe": content("m.content|safe"),
    "escape": content("m.content|e"),
    "tojson": content("m.content|tojson"),
    "tojson in ASCII": content("m.content|tojson(ensure_ascii=true)"),
    "the whole message as JSON": looped("{{ '<|im_start|>' + m.role + '\\n' + m|tojson + '<|im_end|>\\n' }}"),
    "list as text": content("[m.content]|string"),
    "letters": content("m.content|list|join"),
    "letter by letter": looped(
        "{{ '<|im_start|>' + m.role + '\\n' }}{% for c in m.content %}{{ c }}{% endfor %}{{ '<|im_end|>\\n' }}"
    ),
    "words": content("m.content.split(' ')|join(' ')"),
    "first and rest": content("m.content[:1] + m.content[1:]"),
    "reversed twice as text": content("m.content|reverse|reverse"),
    "removeprefix": content("m.content.removeprefix('zzz').removesuffix('zzz')"),
    "wordwrap": content("m.content|wordwrap(60)"),
    "centre": content("m.content|center(80)"),
    "ljust": content("m.content.ljust(40)"),
    "urlize": content("m.content|striptags"),
    "truncate": content("m.content|truncate(1000)"),
    "twice the text": content("m.content * 2"),
    "forceescape": content("m.content|forceescape"),
    "autoescape": "{% autoescape true %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}{{ '\\n' }}{{ m.content }}<|im_end|>{{ '\\n' }}{% endfor %}{% endautoescape %}" + ASK,
    # generation blocks
    "generation": looped(
        "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    ),
    "generation without the end": looped(
        "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}"
    ),
    "generation with a line break": looped(
        "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>\\n' }}"
        "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}"
    ),
    "generation around the header": looped(
        "{% if m.role == 'assistant' %}{% generation %}" + TURN + "{% endgeneration %}{% else %}" + TURN + "{% endif %}"
    ),
    # around the messages
    "the day": "{{ '<|im_start|>system\\n' + strftime_now('%d %B %Y') + '<|im_end|>\\n' }}" + looped(TURN),
    "the prompt in the loop": "{% for m in messages %}"
    + TURN
    + "{% if loop.last and add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}{% endfor %}",
    "a frame": "{{ bos_token }}" + LOOP + "{{ eos_token }}" + ASK,
    "the prompt always": LOOP + "{{ '<|im_start|>assistant\\n' }}",
    "no prompt": LOOP,
    "white space control": "{%- for m in messages -%}\n  {{- '<|im_start|>' -}} "
    "{{- m.role }}\n{{ m.content -}}\n<|im_end|>\n{% endfor -%}" + ASK,
}
KINDS_HERE = ("many turns", "markers", "white space", "non-Latin", "empty", "consecutive", "user last")
HEADERS = {
    # No prompt says "again", and what it has in common with one ends behind a marker.
    "neighbours": r"<\|im_start\|>(?:assistant\n)?",
    "no prompt": r"(?=<\|im_start\|>assistant\n)",
}
"""Where the header that a prompt writes is other than `<|im_start|>assistant` and a line break."""
HOME = Family("home", CHATML, END, bos="<|im_start|>")


@pytest.fixture(scope="module")
def vocabulary(shared: Path) -> str:
    return (shared / "tokenizers" / "minimind" / "tokenizer.json").read_text()


@pytest.fixture(scope="module")
def pairs(vocabulary: str) -> Any:
    made: dict[str, Pair] = {}

    def get(template: str) -> Pair:
        if template not in made:
            made[template] = make_pair(vocabulary, template, eos=END, bos="<|endoftext|>")
        return made[template]

    return get


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_are_found_in_whatever_way_they_are_written(pairs: Any, name: str) -> None:
    pair, family = pairs(TEMPLATES[name]), replace(HOME, header=HEADERS.get(name, ""))
    for kind in KINDS_HERE:
        chat = conversation(family, kind)
        ids, turns, mask = turns_and_mask(pair, family, chat)
        encoded = pair.ours.encode(chat)
        assert encoded.tokens.tolist() == ids
        assert shown(pair, ids, encoded.loss_weights) == shown(pair, ids, mask), kind
        check_words(pair, chat, encoded)
        check_spans(pair, chat, encoded, turns)


# --- several authors in one turn, or a turn in several places: right, or an error that says why ---

MIXED = {
    "the question in the turn": looped(
        "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% if m.role == 'assistant' %}"
        "{{ ' (asked: ' + messages[loop.index0 - 1].content + ')' }}{% endif %}{{ '<|im_end|>\n' }}"
    ),
    "the chat twice": LOOP + looped(TURN),
    "the answer quoted by the user": looped(
        "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% if m.role == 'user' and not loop.first %}"
        "{{ ' (you said: ' + messages[loop.index0 - 1].content + ')' }}{% endif %}{{ '<|im_end|>\n' }}"
    ),
    "letters of all, sorted": NAMESPACE
    + "{% for m in messages %}{% set ns.out = ns.out + m.content %}{% endfor %}"
    + "{{ '<|im_start|>user\n' + ns.out|list|sort|join + '<|im_end|>\n' }}"
    + looped(TURN),
    "a pair in one turn": "{% for pair in messages|batch(2) %}{{ '<|im_start|>assistant\n' + pair[0].content }}"
    "{{ ' -> ' + pair[1].content + '<|im_end|>\n' }}{% endfor %}" + ASK,
    "the chat as JSON": "{{ messages|tojson }}{{ '<|im_end|>' }}" + ASK,
    "the chat as Python": "{{ messages }}{{ '<|im_end|>' }}" + ASK,
    "roles sorted": looped(TURN, "messages|sort(attribute='role')"),
    "grouped by role": "{% for role, ms in messages|groupby('role') %}{% for m in ms %}"
    + TURN
    + "{% endfor %}{% endfor %}"
    + ASK,
    "unique texts": "{% for text in messages|map(attribute='content')|unique %}"
    "{{ '<|im_start|>' + ('user' if loop.index0 % 2 == 0 else 'assistant') + '\n' + text }}{{ '<|im_end|>\n' }}"
    "{% endfor %}" + ASK,
    "a turn cut in two by the next": NAMESPACE
    + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content[:4] + '<|im_end|>\n' }}"
    "{% set ns.out = ns.out + m.content[4:] %}{% endfor %}{{ ns.out }}{{ '<|im_end|>' }}" + ASK,
    "hashed away": looped("{{ '<|im_start|>' + m.role + '\n' ~ m.content|length ~ '<|im_end|>\n' }}"),
    "url": content("m.content|urlencode"),
    "pretty": content("m.content|pprint"),
}


@pytest.mark.parametrize("kind", ["many turns", "markers"])
@pytest.mark.parametrize("name", MIXED)
def test_mixed_turns_train_no_others_word_or_say_why(pairs: Any, name: str, kind: str) -> None:
    pair, chat = pairs(MIXED[name]), conversation(HOME, kind)
    try:
        encoded = pair.ours.encode(chat)
    except RowError as error:
        assert "chat template" in str(error)  # noqa: PT017 (the other way is right too)
        return
    assert encoded.tokens.tolist() == reference(pair, chat.messages, chat.tools)[1]
    assert encoded.loss_weights[0] == 0
    trained = trained_words(pair, encoded)
    own = {"qasst1x", "qasst3x", "qasst5x", "qasst1bx", "qasst3bx"}
    assert trained <= own
    if name != "the answer quoted by the user":
        assert trained == own & words_in(encoded.text)


SMUGGLED = (
    "u",
    "u|e",
    "u|upper",
    "u|title",
    "u|trim",
    "u|tojson",
    "[u]|string",
    "[u]",
    "{'k': u}",
    "{u: 1}",
    "{'k': u}|dictsort",
    "{'k': u}|xmlattr",
    "u|urlencode",
    "u|pprint",
    "u|wordwrap(3)",
    "u|center(60)",
    "u|list",
    "u|list|join",
    "u|reverse",
    "u|replace('x', 'X')",
    "'a'|replace('a', u)",
    "'a,b'.replace(',', u)",
    "u.join(['a', 'b', 'c'])",
    "['a', 'b']|join(u)",
    "'%s' % u",
    "'%s'|format(u)",
    "'{}'.format(u)",
    "'{k}'.format(k=u)",
    "'{0[k]}'.format({'k': u})",
    "'a\nb'|indent(u)",
    "('a' * 30)|truncate(10, true, u, 0)",
    "''|default(u, true)",
    "u * 2",
    "u ~ 1",
    "joiner(u)",
    "cycler(u).next()",
    "[u, '']|max",
    "[u]|first",
    "dict(k=u).k",
    "namespace(k=u).k",
    "u.encode('utf-8').decode('utf-8')",
    "u.encode('utf-8')",
    "u.split('x')|join('x')",
    "u.partition('x')|join",
    "u|striptags",
    "u|safe|upper",
    "u|forceescape",
    "('a' ~ u)[1:]",
    "u.swapcase()",
    "u.casefold()",
    "u.zfill(40)",
    "u.expandtabs()",
    "u.rjust(40, '.')",
    "'a'.center(41, u[0])",
    "u.translate({})",
    "u|map('upper')|join",
    "[u]|map('upper')|list",
    "[m, messages[0]]|map(attribute='content')|list|last",
    "messages|map(attribute='content')|first",
    "messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|join('+')",
    "(messages[0].items()|list)[1][1]",
    "messages[0].values()|list",
    "messages[0].values()",
    "messages[0].items()|string",
    "'%s' % messages[0].values()",
    "namespace(a=u)",
    "'a'.ljust(9, u[0]) ~ u",
    "'a'.rjust(9, u[0]) ~ u",
    "'X'.translate({88: u})",
    "'{:>{w}}'.format(u, w=12)",
    "{'k': [u]}.k",
    "messages[0]|tojson(indent=1)",
    "messages[0]",
    "u|urlize",
    "u|string|e|string",
    "u|filesizeformat if false else u",
)


@pytest.mark.parametrize("expression", SMUGGLED)
def test_an_others_text_in_a_turn_is_not_trained_however_it_came_there(pairs: Any, expression: str) -> None:
    pair = pairs(
        "{% set u = messages[0].content %}"
        + looped(
            "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% if m.role == 'assistant' %}{{ ' ' }}{{ "
            + expression
            + " }}{{ ' ' }}{% endif %}{{ '<|im_end|>\n' }}"
        )
    )
    chat = Conversation((Message("user", "quser0x"), Message("assistant", "qasst1x")))
    expected = reference(pair, chat.messages, None)[1]
    try:
        encoded = pair.ours.encode(chat)
    except RowError as error:
        assert "cannot be sure" in str(error)  # noqa: PT017 (the other way is right too)
        return
    assert encoded.tokens.tolist() == expected
    trained = "".join(trained_texts(pair, encoded)).lower()
    assert "qasst1x" in trained
    assert not any(piece in trained for piece in ("quser", "user0", "ser0x", "x0resu", "'q'", "us\n"))


# --- what the words do not show ---

SAME = Conversation(tuple(Message(role, "same") for role in ("user", "assistant") * 3))


@pytest.mark.parametrize(
    "name",
    [
        "a loop",
        "indices",
        "no loop",
        "namespace string",
        "namespace list",
        "copied messages",
        "contents by map",
        "trim",
    ],
)
def test_equal_texts_are_told_apart(pairs: Any, name: str) -> None:
    pair = pairs(TEMPLATES[name])
    encoded = pair.ours.encode(SAME)
    assert encoded.tokens.tolist() == reference(pair, SAME.messages, None)[1]
    assert trained_texts(pair, encoded) == ["same<|im_end|>"] * 3
    assert [span.message for span in encoded.spans if span.origin == "assistant:content"] == [1, 3, 5]
    assert [span.message for span in encoded.spans if span.origin == "user:content"] == [0, 2, 4]


def test_words_that_begin_as_the_prompt_goes_on_are_the_turns_own(pairs: Any) -> None:
    pair = pairs(LOOP + ASK.replace("assistant\\n'", "assistant\\n<thinking>'"))
    chat = Conversation((Message("user", "a"), Message("assistant", "<thinker> he is")))
    assert trained_texts(pair, pair.ours.encode(chat)) == ["<thinker> he is<|im_end|>"]


def test_an_assistants_text_that_is_the_prompts_own_is_header(pairs: Any) -> None:
    pair = pairs(LOOP + ASK.replace("assistant\\n'", "assistant\\n<think>'"))
    chat = Conversation((Message("user", "a"), Message("assistant", "<think>b</think>c")))
    assert trained_texts(pair, pair.ours.encode(chat)) == ["b</think>c<|im_end|>"]


BLOCKS = {
    "generation": False,
    "generation without the end": True,
    "generation with a line break": False,
    "generation around the header": True,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_generation_blocks_that_differ_are_noticed(pairs: Any, name: str) -> None:
    encoded = pairs(TEMPLATES[name]).ours.encode(conversation(HOME, "many turns"))
    kinds = [notice.kind for notice in encoded.notices]
    if BLOCKS[name]:
        assert "generation_block" in kinds
    elif name == "generation":
        assert not kinds


def test_tokens_across_a_boundary_are_counted(pairs: Any) -> None:
    pair = pairs(TEMPLATES["a loop"])
    plain = Conversation((Message("user", "a"), Message("assistant", "b")))
    assert not pair.ours.encode(plain).notices
    spaced = Conversation((Message("user", "a"), Message("assistant", "\n\nb")))
    encoded = pair.ours.encode(spaced)
    seam = encoded.text.index("assistant\n") + len("assistant\n")
    if any(a < seam < b for a, b in encoded.offsets.tolist()):
        assert any(notice.kind == "straddling" for notice in encoded.notices)
    assert trained_texts(pair, encoded)[0].lstrip("\n") == "b<|im_end|>"


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content|trim + '<|im_end|>\n' }}"
        "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}" + looped(TURN, "rest"),
        "{% set ns = namespace(system='be kind') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = m.content %}{% endif %}{% endfor %}{{ ns.system + '\n' }}"
        + looped("{% if m.role != 'system' %}" + TURN + "{% endif %}"),
        "{% set system = messages|selectattr('role', 'equalto', 'system')|map(attribute='content')|join('\n') %}"
        "{{ system|upper }}" + looped(TURN, "messages|rejectattr('role', 'equalto', 'system')"),
        "{% macro head(ms) %}{{ ms[0].content ~ '!' }}{% endmacro %}{{ head(messages)|indent }}"
        + looped("{% if not loop.first %}" + TURN + "{% endif %}"),
    ],
)
@pytest.mark.parametrize("kind", ["system", "markers in system and tool"])
def test_a_system_turn_written_outside_is_the_systems(pairs: Any, template: str, kind: str) -> None:
    pair, chat = pairs(template), conversation(HOME, kind)
    ids, turns, mask = turns_and_mask(pair, HOME, chat)
    encoded = pair.ours.encode(chat)
    assert encoded.tokens.tolist() == ids
    assert shown(pair, ids, encoded.loss_weights) == shown(pair, ids, mask)
    check_words(pair, chat, encoded)
    check_spans(pair, chat, encoded, turns)


CALLS = (
    "{% if m.tool_calls %}{% for c in m.tool_calls %}",
    "{{ '<tool_call>' + {'name': c.function.name, 'arguments': c.function.arguments}|tojson + '</tool_call>' }}",
    "{% endfor %}{% endif %}",
)


@pytest.mark.parametrize(
    "calls",
    [
        "".join(CALLS),
        "{% if m.tool_calls %}{{ m.tool_calls|tojson }}{% endif %}",
        "{% if m.tool_calls %}{% for c in m.tool_calls %}{% for k, v in c.function.arguments.items() %}"
        "{{ '<' + k + '=' + v + '>' }}{% endfor %}{% endfor %}{% endif %}",
        "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.arguments|dictsort }}{% endfor %}{% endif %}",
        "{% if m.tool_calls %}{{ m.tool_calls|map(attribute='function')|map('tojson')|join(',') }}{% endif %}",
        "{% set x %}" + "".join(CALLS) + "{% endset %}{{ x|replace('tool_call', 'call') }}",
        "{% if m.tool_calls %}{{ (m.tool_calls[0].function|tojson)[:-1] + '}' }}"
        "{{ m.tool_calls[1:]|tojson }}{% endif %}",
    ],
)
@pytest.mark.parametrize("kind", ["tools", "parallel calls", "reasoning and tools"])
def test_calls_are_the_turns_and_schemas_are_no_ones(pairs: Any, calls: str, kind: str) -> None:
    pair = pairs(
        "{% if tools %}{{ '<|im_start|>system\n' + tools|tojson + '<|im_end|>\n' }}{% endif %}"
        + looped(
            "{{ '<|im_start|>' + m.role + '\n' }}"
            "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}"
            "{% endif %}{{ m.content }}" + calls + "{{ '<|im_end|>\n' }}"
        )
    )
    chat = conversation(HOME, kind)
    ids, turns, mask = turns_and_mask(pair, HOME, chat)
    encoded = pair.ours.encode(chat)
    assert encoded.tokens.tolist() == ids
    assert shown(pair, ids, encoded.loss_weights) == shown(pair, ids, mask)
    check_words(pair, chat, encoded)
    check_spans(pair, chat, encoded, turns)
    without = pair.ours.encode(chat, Selection(reasoning=False, tool_calls=False))
    assert not {w for w in trained_words(pair, without) if w.startswith(("qkey", "qval", "qthink"))}
    assert trained_words(pair, without) == {w for w in words_in(encoded.text) if w.startswith("qasst")}


# --- turns that only the next header ends ---

HEADERS_ONLY = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize("stops", [("<|user|>",), ()])
def test_the_next_header_is_the_stop_where_it_is_declared_one(vocabulary: str, stops: tuple[str, ...]) -> None:
    pair = make_pair(vocabulary, HEADERS_ONLY + "{# <|user|> <|assistant|> #}", eos="<|endoftext|>", stops=stops)
    chat = Chat().user().answer().user().answer().answer().done()
    encoded = pair.ours.encode(chat)
    assert encoded.tokens.tolist() == reference(pair, chat.messages, None)[1]
    assert trained_texts(pair, encoded) == ["qasst1x" + "".join(stops), "qasst3x", "qasst4x"]
    assert any(notice.kind == "open_turn" for notice in encoded.notices)
    with pytest.raises(RowError, match="open_turns"):
        pair.ours.encode(chat, Selection(open_turns="error"))


def test_a_turn_left_open_is_closed_as_the_template_ends_others(vocabulary: str) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% if not loop.last %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}" + ASK
    )
    pair = make_pair(vocabulary, template, eos=END)
    chat = Chat().user().answer().user().answer().done()
    ids = reference(pair, chat.messages, None)[1]
    left = pair.ours.encode(chat)
    assert left.tokens.tolist() == ids
    assert trained_texts(pair, left) == ["qasst1x<|im_end|>", "qasst3x"]
    assert [notice.kind for notice in left.notices] == ["open_turn"]
    closed = pair.ours.encode(chat, Selection(open_turns="close"))
    assert closed.tokens.tolist() == [*ids, pair.backend.token_to_id(END)]
    assert trained_texts(pair, closed) == ["qasst1x<|im_end|>", "qasst3x<|im_end|>"]
    assert not closed.notices


def test_one_character_may_be_several_tokens(pairs: Any) -> None:
    pair = pairs(TEMPLATES["a loop"])
    chat = Conversation((Message("user", "🜲"), Message("assistant", "🜳🜲")))
    encoded = pair.ours.encode(chat)
    assert trained_texts(pair, encoded) == ["🜳🜲<|im_end|>"]
    own = encoded.text.index("🜳")
    assert sum(tuple(offset) == (own, own + 1) for offset in np.asarray(encoded.offsets).tolist()) > 1

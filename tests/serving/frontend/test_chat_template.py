"""Chat templates: what transformers' templates may use, and what a hostile one cannot do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from penstock.core.errors import InvalidRequestError, ModelFormatError
from penstock.serving.frontend.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hi é 🙂"}]

MakeTemplate = Callable[..., ChatTemplate]


@pytest.fixture
def make_template() -> Iterator[MakeTemplate]:
    made: list[ChatTemplate] = []

    def make(source: str, *, timeout_s: float = 1.0, max_output_chars: int = 100_000) -> ChatTemplate:
        template = ChatTemplate(source, {"bos_token": "<s>"}, timeout_s=timeout_s, max_output_chars=max_output_chars)
        made.append(template)
        return template

    yield make
    for template in made:
        template.close()


def test_what_templates_use(make_template: MakeTemplate) -> None:
    template = make_template(
        "{{ bos_token }}{% for message in messages %}\n"
        "    {% if loop.first %}[{{ message['content'] | trim }}]{% endif %}\n"
        "    {% if not loop.last %}{% continue %}{% endif %}\n"
        "    {% generation %}{{ message | tojson }}{% endgeneration %}\n"
        "{% endfor %}\n"
        "{% set ns = namespace(seen=1) %}{{ ns.seen }}{{ tools is none }}{{ strftime_now('%Y') | length }}"
        "{{ add_generation_prompt }}"
    )
    text = template.render(MESSAGES, add_generation_prompt=False)
    assert text == '<s>[hi é 🙂]{"role": "user", "content": "hi é 🙂"}1True4False'


def test_a_template_may_refuse_messages_and_work_again(make_template: MakeTemplate) -> None:
    template = make_template(
        "{% if messages | length > 1 %}{{ raise_exception('only one message') }}{% endif %}{{ messages[0].content }}"
    )
    with pytest.raises(InvalidRequestError, match="only one message") as caught:
        template.render(MESSAGES * 2)
    assert caught.value.param == "messages"
    assert template.render(MESSAGES) == "hi é 🙂"


def test_a_failure_on_these_messages_is_the_clients(make_template: MakeTemplate) -> None:
    template = make_template("{{ messages[0].missing.field }}")
    with pytest.raises(InvalidRequestError) as caught:
        template.render(MESSAGES)
    assert caught.value.param == "messages"


def test_a_broken_template_is_the_models_fault(make_template: MakeTemplate) -> None:
    with pytest.raises(ModelFormatError, match="does not compile"):
        make_template("{% if x %}").check()


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.os }}",
        "{% include '/etc/passwd' %}",
        "{{ cycler.__init__.__globals__.os.environ }}",
    ],
)
def test_the_sandbox_keeps_python_away(make_template: MakeTemplate, source: str) -> None:
    with pytest.raises(InvalidRequestError):
        make_template(source).render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ messages[0].content * 10**10 }}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{{ messages[0].content.center(10**10) }}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ 7 ** (7 ** (7 ** 7)) }}",
    ],
)
def test_a_hostile_template_is_stopped(make_template: MakeTemplate, source: str) -> None:
    template = make_template(source, timeout_s=0.3)
    begin = time.monotonic()
    # Some of it is folded and therefore caught while the template is compiled.
    with pytest.raises((InvalidRequestError, ModelFormatError)):
        template.render(MESSAGES)
    assert time.monotonic() - begin < 15


def test_output_is_bounded(make_template: MakeTemplate) -> None:
    template = make_template("{% for i in range(9999) %}{{ messages[0].content }}{% endfor %}", max_output_chars=1000)
    with pytest.raises(InvalidRequestError, match="1000 characters"):
        template.render(MESSAGES)


def test_after_a_stop_the_next_rendering_works(make_template: MakeTemplate) -> None:
    template = make_template(
        "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
        "{% endfor %}{% endif %}{{ messages[0].content }}",
        timeout_s=0.3,
    )
    assert template.render([{"content": "a"}]) == "a"
    with pytest.raises(InvalidRequestError, match="too much time"):
        template.render([{"content": "loop"}])
    assert template.render([{"content": "b"}]) == "b"


def test_a_large_conversation_passes(make_template: MakeTemplate) -> None:
    template = make_template("{% for m in messages %}{{ m.content }}{% endfor %}", max_output_chars=10**7)
    text = "wörld " * 100_000
    assert template.render([{"content": text}, {"content": "end"}]) == text + "end"


def test_data_that_is_not_text_is_refused(make_template: MakeTemplate) -> None:
    with pytest.raises(InvalidRequestError):
        make_template("x").render([{"content": "\ud800"}])
    with pytest.raises(InvalidRequestError):
        make_template("x").render([{"content": object()}])

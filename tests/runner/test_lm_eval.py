"""lm-eval both ways: its tasks under our runner, and our engine under its evaluator, give the same answers."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import harness
from harness.engine.engine import Engine
from harness.engine.generation import Work
from harness.engine.method import Method
from harness.engine.step import Step
from harness.errors import InputError
from harness.models.load import LoadedModel, load
from harness.runner.catalog import build_tasks
from harness.runner.loglikelihood import encode_pair, loglikelihoods, rate_choices
from tasks.base import LogLikelihood, Sample, Task, TaskContext
from tasks.lm_eval import cut_at, new_tokens, stop_texts
from tests.checkpoint import save_checkpoint
from tests.command import run
from tests.tiny import build, generate, random_ids, tiny_engine, tiny_model

pytestmark = pytest.mark.slow

lm_eval = pytest.importorskip("lm_eval")

SLIM = "slim:layers=2/3/4:budgets=0.5/0.25/0.125:block=8"
KEEPERS = {"Torvald": "417", "Marit": "862", "Osric": "295"}
COMMON = """
task: {name}
output_type: {kind}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{passage}}}}\\n\\nThe number of books that {{{{who}}}} owns is"
metadata:
  version: 1
"""
GENERATE = """
doc_to_target: "{{number}}"
generation_kwargs:
  until: ["\\n", "."]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
filter_list:
  - name: number
    filter:
      - function: regex
        regex_pattern: "([0-9]+)"
      - function: take_first
"""
CHOOSE = """
doc_to_target: gold
doc_to_choice: "{{choices}}"
"""
ONE = """
doc_to_target: " {{number}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
TASKS = {
    "tiny_gen": ("generate_until", GENERATE),
    "tiny_mc": ("multiple_choice", CHOOSE),
    "tiny_ll": ("loglikelihood", ONE),
    "tiny_ppl": ("loglikelihood_rolling", 'doc_to_target: "{{passage}}"'),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files of lm-eval with three documents, on this disk alone."""
    folder = tmp_path_factory.mktemp("lm_eval")
    around = "A ferry crosses the river twice a day, and sheep graze on both banks. " * 3
    rows = [
        {
            "passage": f"{around}The keeper {who} owns {number} books. {around}", "who": who, "number": number,
            "choices": list(KEEPERS.values()), "gold": gold,
        }
        for gold, (who, number) in enumerate(KEEPERS.items())
    ]  # fmt: skip
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, (kind, rest) in TASKS.items():
        text = COMMON.format(name=name, kind=kind, data=folder / "data.jsonl") + rest
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def nobody_asks_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lm-eval tells of the machine takes it seconds to find out."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model: str) -> LoadedModel:
    return load(model, "cpu", "float32")


def ours(folder: Path, name: str, options: str = "", limit: int | None = None) -> Task:
    (task,) = build_tasks(f"lm_eval/{name}:include={folder}{options}", TaskContext(limit=limit))
    return task


def theirs(folder: Path, name: str, model: Any, limit: int | None = None, keep: Path | None = None) -> list[Any]:
    """lm-eval's records of its samples."""
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=str(folder), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=model, tasks=[name], task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True,
        use_cache=keep and str(keep),
    )  # fmt: skip
    return list(results["samples"][name])


def harness_model(**arguments: Any) -> Any:
    return importlib.import_module("harness.runner.lm_eval").HarnessLM(**arguments)


def test_a_generation_task_gives_the_same_from_both_sides(folder: Path, model: str, tmp_path: Path) -> None:
    asked = ["--methods", f"full,{SLIM}", "--tasks", f"lm_eval/tiny_gen:include={folder}", "--model", model]
    assert run("run", *asked, "--device", "cpu", "--output", str(tmp_path / "r")) == 0
    records = harness.load(tmp_path / "r")
    assert set(records.metric) == {"exact_match,number"} and len(records) == 6
    for method in ("full", SLIM):
        mine = records[records.method == method].sort_values("sample")
        other = theirs(folder, "tiny_gen", harness_model(model=model, method=method, device="cpu"))
        assert [cut_at(text, ["\n", "."]) for text in mine.prediction] == [one["resps"][0][0] for one in other]
        assert list(mine.score) == [one["exact_match"] for one in other]
    assert len(set(records.prediction)) > 3  # methods and samples differ


def test_choices_are_rated_the_same_from_both_sides(folder: Path, model: str, loaded: LoadedModel) -> None:
    engine, task = Engine(loaded.model, loaded.shape), ours(folder, "tiny_mc")
    assert task.metric == "acc"
    totals = {}
    for name in ("full", SLIM):
        method = build(name, engine)
        samples = list(task.samples(loaded.tokenizer))
        found = [rate_choices(engine, method, sample, loaded.tokenizer) for sample in samples]
        other = theirs(folder, "tiny_mc", harness_model(model=model, method=name, device="cpu"))
        assert [[tuple(one) for one in rated] for rated in found] == [
            [tuple(response) for response in one["filtered_resps"]] for one in other
        ]
        scores = [task.score_choices(sample, rated) for sample, rated in zip(samples, found, strict=True)]
        assert scores == [one["acc"] for one in other]
        totals[name] = [one.total for one in found[0]]
    assert samples[0].choices == (" 417", " 862", " 295") and samples[0].answers == ("417",)
    assert totals["full"] != totals[SLIM]


def test_choices_run_through_the_runner_give_lm_evals_scores(folder: Path, model: str, tmp_path: Path) -> None:
    asked = ["--methods", SLIM, "--tasks", f"lm_eval/tiny_mc:include={folder}", "--model", model, "--device", "cpu"]
    assert run("run", *asked, "--output", str(tmp_path / "r")) == 0
    records = harness.load(tmp_path / "r").sort_values("sample")
    other = theirs(folder, "tiny_mc", harness_model(model=model, method=SLIM, device="cpu"))
    assert list(records.score) == [one["acc"] for one in other]
    for prediction, one in zip(records.prediction, other, strict=True):
        best = max(range(3), key=lambda index: one["filtered_resps"][index][0])
        assert prediction.strip() == list(KEEPERS.values())[best]


def stock_lm(loaded: LoadedModel) -> Any:
    """The stock model behind lm-eval's own base class, which encodes and divides."""

    class Stock(importlib.import_module("lm_eval.api.model").TemplateLM):  # type: ignore[misc]
        tokenizer = loaded.tokenizer
        eot_token_id = loaded.tokenizer.eos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool = True, **kwargs: Any) -> list[int]:
            ids: list[int] = loaded.tokenizer.encode(string, add_special_tokens=add_special_tokens)
            return ids

        @torch.inference_mode()
        def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            return [self._rate(prompt, ids) for _, prompt, ids in requests]

        def _rate(self, prompt: list[int], ids: list[int]) -> tuple[float, bool]:
            logits = loaded.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            total = logits.log_softmax(-1)[range(len(ids)), ids].sum()
            return float(total), logits.argmax(-1).tolist() == ids

        loglikelihood_rolling = generate_until = None

    Stock.__abstractmethods__ = frozenset()
    return Stock()


@pytest.mark.parametrize("name", ["tiny_ll", "tiny_mc"])
def test_full_attention_agrees_with_the_stock_model_under_lm_eval(
    folder: Path, model: str, loaded: LoadedModel, name: str
) -> None:
    expected = theirs(folder, name, stock_lm(loaded))
    found = theirs(folder, name, harness_model(model=model, device="cpu"))
    for one, other in zip(expected, found, strict=True):
        for response, mine in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            assert float(mine[0]) == pytest.approx(float(response[0]), abs=1e-3) and mine[1] == response[1]
        assert one["acc"] == other["acc"]


def test_the_first_metric_that_is_a_mean_is_the_score(folder: Path) -> None:
    assert ours(folder, "tiny_ll").metric == "acc"
    assert ours(folder, "tiny_mc", ":metric=acc_norm").metric == "acc_norm"
    with pytest.raises(InputError, match="perplexity"):
        ours(folder, "tiny_ll", ":metric=perplexity")


def test_examples_are_drawn_as_lm_eval_draws_them(folder: Path, loaded: LoadedModel) -> None:
    (sample,) = ours(folder, "tiny_gen", ":shots=1", limit=1).samples(loaded.tokenizer)
    assert sample.prompt.count("The number of books") == 2 and sample.prompt.endswith("Torvald owns is")
    assert sample.stop == ("\n", ".") and sample.max_new_tokens == 8


def test_a_chat_template_is_written_once(folder: Path, loaded: LoadedModel) -> None:
    (sample,) = ours(folder, "tiny_gen", ":chat=true", limit=1).samples(loaded.tokenizer)
    assert sample.prompt.count("<|im_start|>user") == 1 and not sample.chat


BAD = [
    ("lm_eval", "name of a task"),
    ("lm_eval/tiny_ppl:include={}", "nothing to prune"),
    ("lm_eval/tiny_gen:include={}/no", "no folder"),
    ("lm_eval/tiny_gen:include={}:filter=numbr", "did you mean 'number'"),
    ("lm_eval/tiny_gen:include={}:metric=acc", "exact_match"),
    ("lm_eval/tiny_gen:shots=-1", "shots"),
]


@pytest.mark.parametrize(("text", "words"), BAD, ids=[text for text, _ in BAD])
def test_bad_input_is_refused(folder: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        build_tasks(text.format(folder), TaskContext())


def test_data_that_lm_eval_cannot_load_is_one_line(tmp_path: Path) -> None:
    text = COMMON.format(name="broken", kind="generate_until", data=tmp_path / "missing.jsonl") + GENERATE
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(InputError, match="lm_eval/broken: lm-eval fails with") as error:
        ours(tmp_path, "broken")
    assert "\n" not in str(error.value)


def test_a_missing_lm_eval_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"pip install 'harness\[longbench\]'"):
        build_tasks("lm_eval/some_other_name", TaskContext())
    assert run("lm-eval", "ls") == 2
    assert "harness[longbench]" in capsys.readouterr().err


def test_lm_evals_command_line_gets_our_model_unless_another_is_named() -> None:
    with_model = importlib.import_module("harness.runner.lm_eval")._with_model
    assert with_model(["--tasks", "a"]) == ["run", "--model", "harness", "--tasks", "a"]
    assert with_model(["run", "--tasks", "a"]) == ["run", "--model", "harness", "--tasks", "a"]
    for untouched in (["ls", "tasks"], ["--model", "hf", "--tasks", "a"], ["run", "--help"], []):
        assert with_model(untouched) == untouched


def test_lm_evals_help_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("lm-eval", "--help") == 0
    assert "lm-eval" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"methd": "slim"}, "method"), ({"method": "slim,full"}, "one method"), ({"device": "tpu"}, "tpu")],
)
def test_bad_model_arguments_are_refused(arguments: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        harness_model(**arguments)


def test_kept_answers_are_those_of_one_model_method_and_setting(
    folder: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, same = tmp_path / "kept", {"model": model, "device": "cpu"}
    first = theirs(folder, "tiny_mc", harness_model(**same), keep=kept)
    for other in ({"method": SLIM}, {"dtype": "bfloat16"}, {"max_length": 64}):
        with pytest.raises(InputError, match="--use_cache: the file holds answers of another"):
            theirs(folder, "tiny_mc", harness_model(**same | other), keep=kept)
    monkeypatch.setattr("harness.runner.lm_eval.rate_choices", None)  # nothing is asked again
    again = theirs(folder, "tiny_mc", harness_model(**same), keep=kept)
    assert [one["filtered_resps"] for one in again] == [one["filtered_resps"] for one in first]


def test_a_method_that_fails_under_lm_eval_is_one_line(
    folder: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(self: Method, layer: int, *rest: Any) -> None:
        raise ValueError("my own bug")

    monkeypatch.setattr("methods.slim.Slim.attend", attend)
    for name in ("tiny_mc", "tiny_gen"):
        with pytest.raises(
            InputError, match=r"failed: attend, layer 0: ValueError: my own bug \(test_lm_eval.py:\d+\)"
        ):
            theirs(folder, name, harness_model(model=model, method=SLIM, device="cpu"))


def test_perplexity_is_refused(model: str) -> None:
    with pytest.raises(InputError, match="no prompt to prune"):
        harness_model(model=model, device="cpu").loglikelihood_rolling([])


# --- log-likelihoods ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_the_loglikelihood_under_full_attention_is_the_stock_models() -> None:
    engine, prompt = tiny_engine(), random_ids(40)
    continuations = [random_ids(length, seed=length).tolist() for length in (1, 5, 1, 3)]
    found = loglikelihoods(engine, build("full", engine), prompt, continuations)
    for ids, one in zip(continuations, found, strict=True):
        logits = tiny_model()(torch.cat([prompt, torch.tensor(ids)])[None]).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(ids)), ids].sum()
        assert one.total == pytest.approx(float(expected), abs=1e-3)
        assert one.greedy == (logits.argmax(-1).tolist() == ids)


def test_what_generation_writes_is_greedy_under_every_method() -> None:
    engine, prompt = tiny_engine(), random_ids(200)
    for text in ("full", "slim:layers=2/3/4:block=8", "lazyllm:layers=2/3/4", "streaming:window=32"):
        written = generate(text, engine, prompt, 6)
        (found,) = loglikelihoods(engine, build(text, engine), prompt, [written])
        assert found.greedy and found.total < 0


def test_single_tokens_share_a_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, prompt = tiny_engine(), random_ids(40)
    calls: list[str] = []
    forward = Engine.forward

    def counted(self: Engine, method: Method, ids: torch.Tensor, step: Step, work: Work | None = None) -> torch.Tensor:
        calls.append(step.phase)
        return forward(self, method, ids, step, work)

    monkeypatch.setattr(Engine, "forward", counted)
    apart = [loglikelihoods(engine, build("full", engine), prompt, [ids])[0] for ids in ([3], [4, 5], [6])]
    calls.clear()
    together = loglikelihoods(engine, build("full", engine), prompt, [[3], [4, 5], [6]])
    assert together == apart and calls == ["prefill", "decode"]


def test_prompt_and_continuation_are_divided_as_lm_eval_divides_them(loaded: LoadedModel) -> None:
    stock = stock_lm(loaded)
    for prompt, continuation in [
        ("One two", " three"),
        ("One two ", "three"),
        ("One\n\n", "two three"),
        ("Zy", "gomorphic"),
    ]:
        pair = encode_pair(Sample("1", prompt, (), 1), continuation, loaded.tokenizer, None, 4096)
        assert pair == stock._encode_pair(prompt, continuation)
    first, rest = encode_pair(Sample("1", "", (), 1), "three", loaded.tokenizer, None, 4096)
    assert first == [loaded.tokenizer.bos_token_id] and rest == loaded.tokenizer.encode("three")


def test_choices_that_cannot_be_rated_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(InputError, match="no tokens"):
        encode_pair(Sample("1", "One", (), 1), "", loaded.tokenizer, None, 4096)
    with pytest.raises(InputError, match="exceed"):
        encode_pair(Sample("1", "One", (), 1), " two" * 20, loaded.tokenizer, 16, 16)


def test_the_likeliest_choice_is_the_answer_of_a_plain_task() -> None:
    task = Task("label", Task.Options(), TaskContext())
    sample = Sample("1", "p", ("b",), 1, choices=("a", "b"))
    assert task.score_choices(sample, [LogLikelihood(-3.0, False), LogLikelihood(-2.0, False)]) == 1
    assert task.score_choices(sample, [LogLikelihood(-1.0, True), LogLikelihood(-2.0, False)]) == 0


def test_generation_arguments_are_read_as_lm_eval_reads_them() -> None:
    assert stop_texts({"until": "x"}) == ["x"] and stop_texts({"until": ["a", ""]}) == ["a"] and stop_texts({}) == []
    assert new_tokens({"max_gen_toks": 5, "max_new_tokens": 6}) == 5 and new_tokens({}) == 256
    assert cut_at("one. two\nthree", ["\n", "."]) == "one"
    with pytest.warns(UserWarning, match="greedily"):
        new_tokens({"do_sample": True})

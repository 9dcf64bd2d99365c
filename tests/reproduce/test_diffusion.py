"""`harness reproduce diffusion`: what the probe takes away, what its numbers say, the command as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import harness
from harness.engine.request import Request
from harness.reproduce.diffusion.plan import ARMS, probe_spec
from harness.reproduce.diffusion.probe import SINK, Places, Probe
from harness.reproduce.diffusion.sentences import verdict
from harness.reproduce.diffusion.task import DiffusionNeedle
from harness.reproduce.diffusion.verdict import Found
from harness.reproduce.diffusion.worker import PromptReader, rate
from harness.runner.catalog import METHODS
from tasks.base import TaskContext
from tests.command import run
from tests.test_cli import tiny
from tests.tiny import build, random_ids, tiny_engine

pytestmark = pytest.mark.slow

LAYERS, PROMPT = 6, 64
ANSWER = [5, 6, 7, 8]


def probe(options: str, positions: list[int]) -> Probe:
    method = probe_spec(f"probe:{options}").build(tiny_engine().context)
    assert isinstance(method, Probe)
    method.aim(positions)
    return method


def rated(method: Probe) -> float:
    engine = tiny_engine()
    return sum(rate(engine, method, *engine.read(method, Request(random_ids(PROMPT), len(ANSWER))), ANSWER)[0])


def test_it_is_no_method_of_the_command_line() -> None:
    assert "probe" not in METHODS.names()


def test_nothing_dropped_is_full_attention() -> None:
    engine, ids = tiny_engine(), random_ids(PROMPT)
    full = build("full", engine)
    expected = sum(rate(engine, full, *engine.read(full, Request(ids, len(ANSWER))), ANSWER)[0])
    assert rated(probe("drop=needle:layer=3:hide=true", [])) == pytest.approx(expected, abs=1e-6)


def test_rows_go_from_the_layer_on_and_stay_below() -> None:
    method = probe("drop=needle:layer=3", [10, 11])
    rated(method)
    assert method.tokens_kept() == method.tokens_requested() == [64, 64, 64, 62, 62, 62]
    assert {10, 11} <= set(method.cache[2].token_positions.tolist())
    assert not {10, 11} & set(method.cache[3].token_positions.tolist())


@pytest.mark.parametrize("layer", [1, 3, 5])
def test_hiding_is_as_if_the_caches_below_had_lost_them_after_the_prefill(layer: int) -> None:
    engine, dropped = tiny_engine(), [10, 11, 40]
    twin = probe(f"drop=needle:layer={layer}", dropped)
    logits, position = engine.read(twin, Request(random_ids(PROMPT), len(ANSWER)))
    with torch.inference_mode():
        for cache in twin.cache:
            left = [at for at, token in enumerate(cache.token_positions.tolist()) if token not in dropped]
            cache.keep(torch.tensor(left))
    expected = sum(rate(engine, twin, logits, position, ANSWER)[0])
    hidden = rated(probe(f"drop=needle:layer={layer}:hide=true", dropped))
    assert hidden == pytest.approx(expected, abs=1e-4)
    assert abs(hidden - rated(probe(f"drop=needle:layer={layer}", dropped))) > 1e-3


def test_a_prefill_that_is_shared_gives_what_one_of_its_own_gives() -> None:
    engine = tiny_engine()
    seen, hidden = (probe(f"drop=needle:layer=3:hide={hide}", [10, 11]) for hide in ("false", "true"))
    read = engine.read(seen, Request(random_ids(PROMPT), len(ANSWER)))
    rate(engine, seen, *read, ANSWER)
    assert hidden.reads_as(seen) and not probe("drop=needle:layer=4", [10, 11]).reads_as(seen)
    hidden.follow(seen)
    shared = sum(rate(engine, hidden, *read, ANSWER)[0])
    assert shared == pytest.approx(rated(probe("drop=needle:layer=3:hide=true", [10, 11])), abs=1e-5)


def test_roles_are_disjoint_where_they_should_be() -> None:
    places = Places(needle=(20, 23), sentence=(12, 24), question=10, length=60)
    assert places.rows("needle", "") == [20, 21, 22]
    assert places.rows("sentence", "") == list(range(12, 24))
    assert places.rows("question", "") == list(range(50, 59))
    assert places.rows("context", "") == list(range(SINK, 50))
    draws = [places.rows("random", str(seed)) for seed in range(50)]
    assert all(len(draw) == 3 for draw in draws) and len({tuple(draw) for draw in draws}) > 10
    assert not {at for draw in draws for at in draw} & {*range(SINK), *range(12, 24), *range(50, 60)}
    assert draws[7] == places.rows("random", "7")


def test_spans_are_of_the_number_and_of_its_sentence() -> None:
    from harness.models.random import ByteTokenizer

    options = DiffusionNeedle.Options.read("task", {"lengths": "600", "depths": "0/0.5/1", "repeats": "2"})
    tokenizer, task = ByteTokenizer(), DiffusionNeedle("diffusion", options, TaskContext(seed=3))
    samples = list(task.samples(tokenizer))
    assert len(samples) == 6
    for sample in samples:
        ids = tokenizer.encode(sample.prompt)
        number, sentence = sample.extra["number"], sample.extra["needles"][0]
        assert tokenizer.decode(ids[number[0] : number[1]]).strip() == sample.answers[0]
        text = tokenizer.decode(ids[sentence[0] : sentence[1]])
        assert text.strip().startswith("The secret number of") and text.endswith(f"{sample.answers[0]}.")
        assert abs(len(ids) - 600) <= 6


# --- the verdict ----------------------------------------------------------------------------------------------------


def found(change: Callable[[str, int], float], layers: tuple[int, ...] = (3, 9, 15, 21), right: float = 1.0) -> Found:
    """What would have been found if dropping an arm from a layer changed the log-probability by `change`."""
    rng = np.random.default_rng(0)
    rows = [{"arm": "", "layer": 0, "sample": n, "score": right, "whole": -0.1, "where": 0.5} for n in range(12)]
    for arm in ARMS:
        for layer in layers:
            noise = rng.normal(0, 0.05, 12)
            lost = [change(arm, layer) + float(noise[n]) for n in range(12)]
            rows += [
                {"arm": arm, "layer": layer, "sample": n, "score": float(lost[n] > -1), "whole": -0.1 + lost[n],
                 "where": 0.5}
                for n in range(12)
            ]  # fmt: skip
    frame = pd.DataFrame(rows)
    # Whatever decode sees, the first token is as likely.
    seen = ~frame["arm"].str.contains("hidden")
    return Found(1024, 30, frame.assign(first=frame["whole"].where(seen, -0.1)))


def spread_by(layer_needed: int) -> Callable[[str, int], float]:
    return lambda arm, layer: 0.0 if arm == "random" or layer >= layer_needed else -5.0


def test_information_that_has_spread_is_called_confirmed() -> None:
    one = found(spread_by(9))
    arm = "needle, hidden"
    assert (one.keeps_from(arm, "whole"), one.loses_until(arm, "whole"), one.middle) == (9, 3, 15)
    text = "\n".join(verdict(one))
    assert text.count("confirmed at layer 15 of 30") == 2 and "kept from layer 9 on, lost up to layer 3" in text


def test_what_decode_reads_below_is_told_from_diffusion() -> None:
    one = found(lambda arm, layer: -5.0 if "hidden" in arm and layer < 30 else spread_by(9)(arm, layer))
    text = "\n".join(verdict(one))
    assert "First token: **confirmed at layer 15" in text and "Whole answer: **refuted at layer 15" in text
    assert "the needle's keys and values below" in text and "shown for layers 9, 15, 21" in text


def test_a_control_that_hurts_leaves_the_claim_open() -> None:
    text = "\n".join(verdict(found(lambda arm, layer: -5.0 if arm == "random" else 0.0)))
    assert text.count("open at layer 15") == 2 and "random" in text


def test_arms_that_lose_or_keep_everywhere_are_said_to() -> None:
    text = "\n".join(verdict(found(lambda arm, layer: -5.0 if "sentence" in arm else 0.0)))
    assert "Whole answer, dropping the rows of the whole sentence: lost wherever they are dropped" in text
    assert "Whole answer, dropping the number's rows: kept wherever they are dropped" in text


def test_noise_is_undecided() -> None:
    one = found(spread_by(9))
    rng = np.random.default_rng(1)
    one.frame["whole"] += rng.normal(0, 20, len(one.frame))
    assert one.points["needle, hidden", 15].word("whole") == "undecided"
    assert "Whole answer: **open at layer 15" in "\n".join(verdict(one))


def test_layers_count_from_the_end_only_as_far_as_they_hang_together() -> None:
    one = found(lambda arm, layer: -5.0 if layer == 15 else 0.0)
    assert one.keeps_from("needle", "whole") == 21 and one.loses_until("needle", "whole") is None


def test_a_model_that_cannot_do_it_says_nothing() -> None:
    assert "too seldom" in "\n".join(verdict(found(spread_by(9), right=0.0)))


# --- the command ----------------------------------------------------------------------------------------------------


def test_a_tiny_model_is_probed_recorded_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    command = ["--model", tiny(tmp_path), "--lengths", "400/500", "--depths", "0.2/0.8", "--repeats", "1"]
    command += ["--layers", "2/4", "--arms", "needle/random", "--device", "cpu", "--output", str(folder)]
    assert run("reproduce", "diffusion", *command) == 0
    records = harness.load(folder)
    assert len(records) == 2 * 2 * (1 + 2 * 3) and records["ttft_s"].isna().all()
    assert all(sum(extra["answer_logprobs"]) < 0 for extra in records["extra"])
    assert "Random weights" in capsys.readouterr().out
    page = (folder / "diffusion.md").read_text()
    assert "too seldom" in page or "Full attention writes" in page
    assert (folder / "diffusion-500.png").read_bytes().startswith(b"\x89PNG")
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text("".join(lines[:-3]))
    assert run("reproduce", "diffusion", *command) == 0
    kept = [without_clock(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert kept == [without_clock(line) for line in lines]
    assert run("reproduce", "diffusion", "--from", str(folder)) == 0 and (folder / "diffusion.md").read_text() == page


def without_clock(line: str) -> str:
    """The record, its log-probability rounded: the last one of a pair may have had its prefill to itself."""
    record = json.loads(line)
    record["extra"]["answer_logprobs"] = [round(value, 3) for value in record["extra"]["answer_logprobs"]]
    return json.dumps(record)


BAD = [
    (["--layers", "40"], "not below the model's 30 layers"),
    (["--layers", "x"], "--layers"),
    (["--arms", "nedle"], "did you mean 'needle'"),
    (["--depths", "2"], "depths"),
    (["--lengths", "9000"], "context of 8192"),
    (["--model", "no/such/model"], "no/such/model"),
    (["--from", "nowhere"], "not a run"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("reproduce", "diffusion", "--output", str(tmp_path / "run"), *arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_one_prompt_at_a_time_is_held_and_probes_that_differ_in_decode_alone_share_it() -> None:
    reader, request = PromptReader(tiny_engine()), Request(random_ids(PROMPT), len(ANSWER))
    seen, hidden = (probe(f"drop=needle:layer=3:hide={hide}", [10, 11]) for hide in ("false", "true"))
    later = probe("drop=needle:layer=4", [10, 11])
    with torch.inference_mode():
        first = reader.read(seen, request)
        assert reader.read(hidden, request) is first and hidden.cache is seen.cache
        assert reader.read(later, request) is not first
    assert seen.cache == hidden.cache == [] and len(later.cache) == LAYERS

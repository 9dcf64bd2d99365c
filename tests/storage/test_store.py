from __future__ import annotations

import errno
import gzip
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import harness
from harness.errors import InputError
from harness.storage.record import Record
from harness.storage.store import Manifest, RunStore, Spent, load, load_manifest
from tests.recorded import invented


def record(sample: str = "0", **changes: Any) -> Record:
    values: dict[str, Any] = {
        "cell": "c", "method": "full", "task": "needle", "sample": sample,
        "prediction": "42\n\u2028ü", "ttft_s": 0.5, "e2e_s": 0.75, "kv_bytes": 1000, "kv_bytes_host": 0,
        "extra_bytes": 0, "tokens_requested": [100, 50], "tokens_kept": [100, 50],
    }  # fmt: skip
    return invented(**(values | changes))


def manifest(run_hash: str = "h", **changes: Any) -> Manifest:
    values: dict[str, Any] = {"model": "smollm2", "device": "cpu", "methods": ["full"], "tasks": ["needle"]}
    return Manifest(run_hash=run_hash, **(values | changes))


def write(folder: Path, *samples: str) -> None:
    with RunStore(folder, manifest()) as store:
        for sample in samples:
            store.append(record(sample))
        store.finish()


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path / "a" / "run", "0", "1")
    frame = harness.load(tmp_path / "a" / "run")
    assert list(frame["sample"]) == ["0", "1"]
    assert list(frame["kept_fraction"]) == [0.75, 0.75]
    assert frame["prediction"][0] == "42\n\u2028ü"
    assert frame["tpot_s"].isna().all() and frame["peak_memory_bytes"].isna().all()
    assert frame["kv_bytes"].dtype == "Int64" and frame["score"].dtype == "float64"


def test_an_empty_run_loads_with_all_columns(tmp_path: Path) -> None:
    write(tmp_path)
    frame = load(tmp_path)
    assert frame.empty
    assert list(frame.columns) == [*Record.model_fields, "kept_fraction", "tpot_mean_s", "energy_per_token_j"]


def test_a_record_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    with RunStore(tmp_path, manifest()) as store:
        store.append(record("0"))
        assert len(load(tmp_path)) == 1
        assert load_manifest(tmp_path).status == "running"


def test_the_same_run_resumes(tmp_path: Path) -> None:
    write(tmp_path, "0")
    before = load_manifest(tmp_path)
    with RunStore(tmp_path, manifest()) as store:
        assert store.done == {("c", "0")}
        assert store.manifest.started == before.started
        with pytest.raises(ValueError, match="recorded already"):
            store.append(record("0"))
        store.append(record("1"))
        assert store.manifest.status == "running"
        store.finish()
    assert len(load(tmp_path)) == 2
    assert load_manifest(tmp_path).status == "complete"


def test_a_different_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    write(tmp_path, "0")
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="holds a different run; choose another --output or delete"):
        RunStore(tmp_path, manifest("other"))
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_a_folder_without_records_is_another_runs_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model"), RunStore(tmp_path, manifest("first")) as store:
        store.describe(weights="abc")
        raise InputError("no model")
    with RunStore(tmp_path, manifest("second")) as store:
        store.describe(weights="xyz")
        store.append(record("0"))
    assert load_manifest(tmp_path).run_hash == "second" and load_manifest(tmp_path).facts == {"weights": "xyz"}


@pytest.mark.parametrize("kept", [False, True])
def test_what_is_refused_before_it_has_a_record_leaves_no_run(tmp_path: Path, kept: bool) -> None:
    folder = tmp_path / "run"
    with pytest.raises(InputError, match="bad data"), RunStore(folder, manifest()) as store:
        store.describe(weights="abc")
        if kept:
            store.append(record("0"))
        raise InputError("bad data")
    assert folder.exists() is kept
    assert not kept or load_manifest(folder).status == "incomplete"


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_refused_leaves_a_complete_run_as_it_was(tmp_path: Path, packed: bool) -> None:
    write(tmp_path, "0")
    if packed:
        (tmp_path / "samples.jsonl.gz").write_bytes(gzip.compress((tmp_path / "samples.jsonl").read_bytes()))
        (tmp_path / "samples.jsonl").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with (
        pytest.raises(InputError, match="bad data"),
        RunStore(tmp_path, manifest(spec={"limit": 9}), {"python": "3.12"}) as store,
    ):
        store.describe()
        raise InputError("bad data")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def failed(sample: str, cell: str = "c") -> Record:
    return record(sample, cell=cell, extra={"failed": "attend, layer 3: ValueError"})


def test_a_request_that_failed_is_asked_again_and_its_last_try_counts(tmp_path: Path) -> None:
    for last in (failed("1", "old"), failed("1"), record("1")):
        with RunStore(tmp_path, manifest()) as store:
            store.describe(method_sources={"full": last.cell}, weights="abc")
            assert ("c", "1") not in store.done
            store.append(last)
        assert load(tmp_path)["extra"].tolist() == [last.extra]
    with RunStore(tmp_path, manifest()) as store, pytest.raises(InputError, match="method_sources is not what"):
        store.describe(method_sources={"full": "edited"})


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds files but no run"):
        RunStore(tmp_path, manifest())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(InputError, match="cannot write"):
        RunStore(tmp_path / "run", manifest())


def test_what_a_killed_start_leaves_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "manifest.json.tmp").write_text("{")
    write(tmp_path, "0")
    assert not (tmp_path / "manifest.json.tmp").exists()


@pytest.mark.parametrize("kept", [0, 2])
def test_a_line_torn_at_any_byte_is_dropped(tmp_path: Path, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)
    names = [str(number) for number in range(kept + 1)]
    store = RunStore(tmp_path, manifest())
    for name in names:
        store.append(record(name))
    store.close()  # as a killed process leaves it
    samples = tmp_path / "samples.jsonl"
    lines = samples.read_bytes().splitlines(keepends=True)
    whole, torn = b"".join(lines[:-1]), lines[-1]
    for cut in range(kept // 2, len(torn), 2):  # of every two bytes one behind nothing, and one behind two records
        samples.write_bytes(whole + torn[:cut])
        # Every cut is repaired; reading, which takes most of the time, meets one in nine.
        assert cut % 9 or len(load(tmp_path)) == kept
        store = RunStore(tmp_path, manifest())
        assert store.repaired == cut
        assert store.done == {("c", name) for name in names[:kept]}
        store.close()
        assert samples.read_bytes() == whole


@settings(max_examples=60, deadline=None)
@given(junk=st.binary(max_size=40).filter(lambda junk: b"\n" not in junk), at=st.integers(0, 2))
def test_a_corrupt_line_is_refused_with_its_number(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    write(folder, "0", "1")
    samples = folder / "samples.jsonl"
    lines = samples.read_bytes().splitlines()
    lines.insert(at, junk)
    damaged = b"\n".join([*lines, b""])
    samples.write_bytes(damaged)
    for opened in (lambda: RunStore(folder, manifest()), lambda: load(folder)):
        with pytest.raises(InputError, match=rf"samples\.jsonl line {at + 1} is corrupt") as caught:
            opened()
        assert "\n" not in str(caught.value)
    assert samples.read_bytes() == damaged


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda lines: lines[:2], "holds 2 whole records, and the run ended with 3"),
        (lambda lines: [*lines[:2], lines[2][:-9]], "holds 2 whole records and a torn one, and the run ended with 3"),
        (lambda lines: [], "holds 0 whole records, and the run ended with 3"),
    ],
    ids=["cut", "torn", "empty"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_records_that_went_missing_after_the_end_are_told_and_asked_again(
    tmp_path: Path, damage: Callable[[list[bytes]], list[bytes]], found: str, packed: bool
) -> None:
    write(tmp_path, "0", "1", "2")
    plain = tmp_path / "samples.jsonl"
    damaged = b"".join(damage(plain.read_bytes().splitlines(keepends=True)))
    plain.write_bytes(damaged)
    if packed:
        (tmp_path / "samples.jsonl.gz").write_bytes(gzip.compress(damaged))
        plain.unlink()
    with pytest.raises(InputError, match=f"{found}; 'harness resume .*' asks those that are missing again"):
        load(tmp_path)
    with RunStore(tmp_path, manifest()) as store:
        for sample in {"0", "1", "2"} - {sample for _, sample in store.done}:
            store.append(record(sample))
        store.finish()
    assert sorted(load(tmp_path)["sample"]) == ["0", "1", "2"]


def test_records_without_their_file_are_missing(tmp_path: Path) -> None:
    write(tmp_path, "0")
    (tmp_path / "samples.jsonl").unlink()
    with pytest.raises(InputError, match="holds 0 whole records, and the run ended with 1"):
        load(tmp_path)


def test_records_that_were_changed_or_added_after_the_end_are_refused_by_readers_and_writers(tmp_path: Path) -> None:
    write(tmp_path, "0", "1")
    samples = tmp_path / "samples.jsonl"
    before = samples.read_text(encoding="utf-8")
    better = before.replace('"score":1.0', '"score":0.5', 1)
    more = before + record("2").model_dump_json() + "\n"
    for content in (better, more):
        samples.write_text(content, encoding="utf-8")
        for opened in (lambda: load(tmp_path), lambda: RunStore(tmp_path, manifest())):
            with pytest.raises(InputError, match="changed or added since"):
                opened()
        assert samples.read_text(encoding="utf-8") == content


def test_runs_of_older_versions_have_no_seal_and_are_read(tmp_path: Path) -> None:
    write(tmp_path, "0", "1")
    path = tmp_path / "manifest.json"
    values = json.loads(path.read_text())
    assert values.pop("records")["count"] == 2
    path.write_text(json.dumps(values))
    samples = tmp_path / "samples.jsonl"
    samples.write_bytes(samples.read_bytes().splitlines(keepends=True)[0])
    assert len(load(tmp_path)) == 1


IMPOSSIBLE = [
    ({"version": 2}, "version"),
    ({"ttft_s": math.nan}, "ttft_s"),
    ({"ttft_s": math.inf}, "ttft_s"),
    ({"e2e_s": -1.0}, "e2e_s"),
    ({"tpot_s": -0.1}, "tpot_s"),
    ({"token_s": [0.1, math.nan]}, "token_s.1"),
    ({"parts_s": {"score": -1.0}}, "parts_s.score"),
    ({"decode_floor_s": math.inf}, "decode_floor_s"),
    ({"score": 1.5}, "score"),
    ({"score": math.nan}, "score"),
    ({"kv_bytes": 10**40}, "kv_bytes"),
    ({"prefill_flops": 10**40}, "prefill_flops"),
    ({"prompt_tokens": 10**40}, "prompt_tokens"),
    ({"new_tokens": -1}, "new_tokens"),
    ({"context_tokens": 0}, "context_tokens"),
    ({"context_tokens": 101}, "context_tokens are none, or exceed prompt_tokens"),
    ({"tokens_kept": []}, "tokens_kept"),
    ({"tokens_kept": [100, math.nan]}, "tokens_kept"),
    ({"tokens_kept": [101, 50]}, "tokens_kept exceed prompt_tokens"),
    ({"tokens_requested": [100]}, "another number of layers"),
    ({"extra": {"depth": math.inf}}, "depth is inf"),
    ({"extra": {"needles": [[1, 2, 3]]}}, "needles"),
    ({"extra": {"kept_spans": [None]}}, "the first layer"),
    ({"extra": {"kept_shares": [[2.0]]}}, "kept_shares"),
    ({"method": "slim"}, "the run has no method 'slim'"),
    ({"task": "other"}, "the run has no task 'other'"),
    ({"tokens_kept": [100], "tokens_requested": [100]}, "1 layers where other lines have 2"),
]


@pytest.mark.parametrize(("changes", "named"), IMPOSSIBLE, ids=[str(changes)[:40] for changes, _ in IMPOSSIBLE])
def test_what_cannot_be_is_refused_with_its_line(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    write(tmp_path)
    lines = [record("0").model_dump(), record("1").model_dump() | changes]
    RunStore(tmp_path, manifest()).close()  # a run that goes on has no seal
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for opened in (lambda: load(tmp_path), lambda: RunStore(tmp_path, manifest())):
        with pytest.raises(InputError, match=r"samples\.jsonl line 2 is corrupt") as caught:
            opened()
        assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_packed_run_is_read_as_it_is_and_unpacked_when_it_goes_on(tmp_path: Path) -> None:
    write(tmp_path, "0", "1")
    plain, packed = tmp_path / "samples.jsonl", tmp_path / "samples.jsonl.gz"
    content, frame = plain.read_bytes(), load(tmp_path)
    packed.write_bytes(gzip.compress(content))
    plain.unlink()
    pd.testing.assert_frame_equal(load(tmp_path), frame)
    write(tmp_path, "2")
    assert not packed.exists() and plain.read_bytes().startswith(content) and len(load(tmp_path)) == 3


@pytest.mark.parametrize(
    "content", [b"", b"no gzip", gzip.compress(b"{}\n" * 99)[:-9]], ids=["empty", "not packed", "cut off"]
)
def test_a_packed_run_that_is_damaged_is_one_line(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, "0")
    (tmp_path / "samples.jsonl").unlink()
    (tmp_path / "samples.jsonl.gz").write_bytes(content)
    for opened in (lambda: load(tmp_path), lambda: RunStore(tmp_path, manifest())):
        with pytest.raises(InputError, match="gz is corrupt") as caught:
            opened()
        assert "\n" not in str(caught.value)
    assert (tmp_path / "samples.jsonl.gz").read_bytes() == content


def test_a_repeated_sample_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "0")
    samples = tmp_path / "samples.jsonl"
    samples.write_bytes(samples.read_bytes() * 2)
    with pytest.raises(InputError, match="line 2 repeats"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"version": 1}', '{"version": 99}', "\xff"])
def test_a_corrupt_manifest_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert "manifest.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=r"is not a run: it has no manifest\.json"):
            load(folder)


def test_two_writers_exclude_each_other(tmp_path: Path) -> None:
    with RunStore(tmp_path, manifest()), pytest.raises(InputError, match="being written by another process"):
        RunStore(tmp_path, manifest())
    RunStore(tmp_path, manifest()).close()


def test_a_refused_start_lets_go_of_the_lock(tmp_path: Path) -> None:
    write(tmp_path, "0")
    for _ in range(2):
        with pytest.raises(InputError, match="different run"):
            RunStore(tmp_path, manifest("other"))


@pytest.mark.parametrize(
    ("error", "reason"), [(KeyboardInterrupt(), "interrupted"), (RuntimeError("/home/me"), "stopped by RuntimeError")]
)
def test_what_ends_a_run_early_is_recorded(tmp_path: Path, error: BaseException, reason: str) -> None:
    with pytest.raises(type(error)), RunStore(tmp_path, manifest()) as store:
        store.append(record("0"))
        raise error
    assert load_manifest(tmp_path).status == "incomplete"
    assert load_manifest(tmp_path).reasons == [reason]
    assert len(load(tmp_path)) == 1


def test_leaving_without_finish_is_incomplete(tmp_path: Path) -> None:
    with RunStore(tmp_path, manifest()):
        pass
    assert load_manifest(tmp_path).reasons == ["stopped before the end"]


def test_finish_with_reasons_stays_incomplete_until_resumed(tmp_path: Path) -> None:
    with RunStore(tmp_path, manifest()) as store:
        store.finish(["2 samples did not fit"])
    assert load_manifest(tmp_path).reasons == ["2 samples did not fit"]
    write(tmp_path)
    assert load_manifest(tmp_path).reasons == []


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    real_write = os.write
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def short_then_full(file: int, content: bytes) -> int:
        if len(content) < 100:
            raise full
        return real_write(file, content[:-50])

    def sync(file: int) -> None:
        raise full

    with RunStore(tmp_path, manifest()) as store:
        store.append(record("0"))
        before = (tmp_path / "samples.jsonl").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, failing, short_then_full if failing == "write" else sync)
            with pytest.raises(InputError, match="No space left on device"):
                store.append(record("1"))
        assert (tmp_path / "samples.jsonl").read_bytes() == before
        assert store.done == {("c", "0")}
        store.append(record("1"))
    assert len(load(tmp_path)) == 2


def test_a_full_disk_keeps_the_old_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunStore(tmp_path, manifest()) as store:
        monkeypatch.setattr(os, "fsync", sync)
        with pytest.raises(InputError, match="No space left on device"):
            store.finish()
        monkeypatch.undo()
        assert load_manifest(tmp_path).status == "running"
        assert not (tmp_path / "manifest.json.tmp").exists()


def test_facts_are_added_and_may_not_change(tmp_path: Path) -> None:
    with RunStore(tmp_path, manifest()) as store:
        store.describe(weights="abc", layers=(1, 2))
        store.describe(data="r1")
        store.append(record("0"))
    assert load_manifest(tmp_path).facts == {"weights": "abc", "layers": [1, 2], "data": "r1"}
    with RunStore(tmp_path, manifest()) as store:
        store.describe(weights="abc", layers=(1, 2))
        with pytest.raises(InputError, match="weights is not what this run was started with"):
            store.describe(weights="xyz")


def test_answers_of_two_cells_do_not_mix_under_one_label(tmp_path: Path) -> None:
    write(tmp_path, "0")
    with RunStore(tmp_path, manifest()) as store:
        with pytest.raises(InputError, match="code or versions changed"):
            store.append(record("1", cell="other"))
        store.append(record("1", cell="other", method="slim"))


def test_a_run_may_be_extended(tmp_path: Path) -> None:
    write(tmp_path, "0")
    with RunStore(tmp_path, manifest(tasks=["needle", "more"], spec={"limit": 2})) as store:
        store.finish()
    assert load_manifest(tmp_path).tasks == ["needle", "more"]
    assert load_manifest(tmp_path).spec == {"limit": 2}


def test_a_changed_environment_is_added(tmp_path: Path) -> None:
    for sample, python in enumerate(("3.11", "3.11", "3.12")):
        with RunStore(tmp_path, manifest(), {"python": python}) as store:
            store.append(record(str(sample)))
            store.finish()
    assert load_manifest(tmp_path).environments == [{"python": "3.11"}, {"python": "3.12"}]


def test_kill_9_loses_only_the_sample_in_flight(tmp_path: Path) -> None:
    script = f"""
        import itertools
        from harness.storage.record import Record
        from harness.storage.store import Manifest, RunStore
        record = Record.model_validate_json({record().model_dump_json()!r})
        manifest = Manifest.model_validate_json({manifest().model_dump_json()!r})
        with RunStore({str(tmp_path / "run")!r}, manifest) as store:
            for number in itertools.count():
                store.append(record.model_copy(update={{"sample": str(number)}}))
                print(number, flush=True)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for _ in range(5):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        seen = 5 + len(child.stdout.readlines())
    with RunStore(tmp_path / "run", manifest()) as store:
        assert seen <= len(store.done) <= seen + 1


def test_other_attributes_of_the_package_are_unknown() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        harness.lode  # noqa: B018


def test_samples_are_plain_json_lines(tmp_path: Path) -> None:
    write(tmp_path, "0")
    (line,) = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(line)["tpot_s"] is None
    assert pd.read_json(tmp_path / "samples.jsonl", lines=True).shape[0] == 1


def test_what_sessions_took_is_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 100.0, 105.0, 200.0, 900.0])  # opened and finished, three times
    monkeypatch.setattr("harness.storage.store.time.monotonic", lambda: next(clock))
    for samples in (("0", "1"), ("2",), ()):
        write(tmp_path, *samples)
    assert load_manifest(tmp_path).spent == Spent(seconds=15, requests=3), "the last one answered nothing"

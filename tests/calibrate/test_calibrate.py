"""Gates in training: what they stand for, where they go, and the file that comes out."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.calibrate import train
from harness.calibrate.distill import Distillation, Lesson
from harness.calibrate.gates import Inheriting, Streaming, Training
from harness.calibrate.passkeys import Passkeys, passkeys
from harness.calibrate.train import Settings, Trainer
from harness.engine.engine import Engine
from harness.engine.step import Step
from harness.models.load import LoadedModel
from harness.models.smollm2 import find, tokenizer
from harness.runner.catalog import parse_methods
from tests.command import run
from tests.test_cli import random_model
from tests.tiny import FAMILIES, HEADS, LAYERS, build, random_ids, tiny_engine, tiny_model, tiny_shape

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
CONTEXT, BEHIND = 60, 12


def loaded(family: str = "llama", heads: str = "GQA") -> LoadedModel:
    model = copy.deepcopy(tiny_model(family, heads))
    return LoadedModel("tiny", model, None, tiny_shape(heads), False, frozenset(), "0" * 64)


def lesson_of(model: LoadedModel) -> tuple[Distillation, Lesson, Tensor]:
    distillation, ids = Distillation(model), random_ids(CONTEXT + BEHIND)
    text = Passkeys(ids, CONTEXT, torch.arange(BEHIND) % 3 > 0)
    return distillation, distillation.lesson(text), ids


def gate_rows(path: Path, gates: Tensor) -> Path:
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in gates.tolist()))
    return path


def decoded(text: str, engine: Engine, ids: Tensor) -> list[Tensor]:
    """Logits behind every token that follows the context."""
    method = build(text, engine)
    method.begin(CONTEXT, BEHIND)
    engine.forward(method, ids[:CONTEXT], Step("prefill", 0, CONTEXT))
    places = range(CONTEXT, CONTEXT + BEHIND)
    return [engine.forward(method, ids[place : place + 1], Step("decode", place, 1)) for place in places]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["duo", "lychee"])
@torch.no_grad()
@pytest.mark.slow
def test_gates_of_0_and_1_are_the_method_itself(name: str, family: str, heads: str, tmp_path: Path) -> None:
    model, engine = loaded(family, heads), tiny_engine(family, heads)
    distillation, lesson, ids = lesson_of(model)
    drawn = torch.rand(LAYERS, model.shape.kv_heads, generator=torch.Generator().manual_seed(1))
    file = gate_rows(tmp_path / "gates.tsv", drawn)
    training: Training
    if name == "duo":
        text = f"duo:sinks=3:recent=9:sparsity=0.5:heads={file}"
        training = Streaming(model.shape, CPU, 3, 9, 0.1, 0.5)
        training._gates.copy_(drawn)
    else:
        training = Inheriting(model.shape, CPU, 10, 0.4)
        training._a.copy_(drawn * 4 - 2)
        text = f"lychee:budget=10:heads={gate_rows(file, training.values())}"
    hidden = distillation.hidden(lesson, training.roles(), training.sparse)
    logits = hidden @ model.model.lm_head.weight.T
    torch.testing.assert_close(list(logits), decoded(text, engine, ids), atol=1e-3, rtol=1e-3)
    assert float(distillation.error_of(lesson, hidden)) > 1e-4


@torch.no_grad()
@pytest.mark.slow
def test_the_teacher_is_full_attention_and_gates_of_1_are_the_teacher() -> None:
    model = loaded()
    distillation, lesson, ids = lesson_of(model)
    whole = model.model(ids.unsqueeze(0), output_hidden_states=True).hidden_states[-1][0, CONTEXT:]
    torch.testing.assert_close(lesson.hidden, whole, atol=1e-4, rtol=1e-4)
    for training in (Streaming(model.shape, CPU, 3, 9, 0.1, 0.5), Inheriting(model.shape, CPU, 10, 0.4)):
        ones = torch.ones(LAYERS, model.shape.kv_heads)
        assert float(distillation.error_of(lesson, distillation.hidden(lesson, ones, training.sparse))) < 1e-9


def test_accuracy_counts_the_answers_tokens_that_come_next() -> None:
    distillation, lesson, ids = lesson_of(loaded())
    said = (lesson.hidden @ distillation._head.weight.T).argmax(1)
    right = [said[at - 1] == ids[CONTEXT + at] for at in range(1, BEHIND) if at % 3 > 0]
    assert distillation.accuracy(lesson, lesson.hidden) == pytest.approx(sum(map(float, right)) / len(right))


@pytest.mark.parametrize("kind", ["duo", "lychee"])
@pytest.mark.slow
def test_gates_of_heads_that_add_nothing_go_first(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded()
    idle = {(layer, layer % 2) for layer in range(1, LAYERS)}
    for layer, head in idle:  # two query heads of 16 channels each read a KV head
        model.model.model.layers[layer].self_attn.o_proj.weight[:, head * 32 : head * 32 + 32] = 0
    texts = [Passkeys(random_ids(CONTEXT + BEHIND, seed), CONTEXT, torch.ones(BEHIND) > 0) for seed in range(4)]
    monkeypatch.setattr(train, "passkeys", lambda tokenizer, length, seed: texts[int(seed.split()[1]) % 4])
    streaming, inheriting = Streaming(model.shape, CPU, 1, 4, 0.003, 0.5), Inheriting(model.shape, CPU, 4, 0.3)
    training: Training = streaming if kind == "duo" else inheriting
    trainer = Trainer(model, training, Settings(kind, 72, 4, 80, 0.05, 0, 0.5))
    trainer.run(tmp_path / "state", lambda step, losses: None)
    values = training.values()
    idle_values = [float(values[place]) for place in idle]
    others = [
        float(values[layer, head]) for layer in range(1, LAYERS) for head in range(2) if (layer, head) not in idle
    ]
    assert max(idle_values) < 0.1 and np.mean(others) > 2 * np.mean(idle_values) + 0.05
    assert len(trainer.losses) == 80


@torch.no_grad()
def test_hardkuma_draws_follow_its_closed_forms() -> None:
    training = Inheriting(tiny_shape(), CPU, 4, 0.3)
    training._a[:], training._b[:] = 0.5, -0.4
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([training.draw(generator) for _ in range(3000)])[:, 1:]
    assert (training.draw(generator)[0] == 1).all() and float(drawn.min()) == 0 and float(drawn.max()) == 1
    assert float((drawn > 0.5).float().mean()) == pytest.approx(float(training.values()[1, 0]), abs=0.01)
    training._price.fill_(2)
    expected = (2 + 10 * float((drawn > 0).float().mean())) / 12
    assert float(training.penalty()) == pytest.approx(2 * (expected - 0.3), abs=0.03)


def test_passkeys_are_asked_for_behind_the_text_that_has_them() -> None:
    path = find()
    if path is None:
        pytest.skip("the embedded model is not installed")
    words = tokenizer(path)
    text = passkeys(words, 512, "0 3")
    assert abs(len(text.ids) - 512) <= 8 and len(text.answers) == len(text.ids) - text.context
    before, behind = (words.decode(part) for part in (text.ids[: text.context], text.ids[text.context :]))
    keys = dict(re.findall(r"The (\w+) passkey is ((?:[a-z]+ \d{3} ?){2})\.", before))
    asked = re.findall(r"What is the (\w+) passkey\? The (\w+) passkey is ((?:[a-z]+ \d{3} ?){2})\.", behind)
    assert len(keys) == len(asked) == 6 and all(one == other and keys[one] == key for one, other, key in asked)
    answered = words.decode(text.ids[text.context :][text.answers])
    assert answered == "".join(f" {key}." for _, _, key in asked)
    assert torch.equal(passkeys(words, 512, "0 3").ids, text.ids)
    assert not torch.equal(passkeys(words, 512, "0 4").ids[:300], text.ids[:300])


def small(folder: Path, name: str, *more: object) -> list[object]:
    model = random_model(folder)
    size = ["--length", 256, "--texts", 2, "--steps", 3, "--device", "cpu"]
    return ["calibrate", name, "--model", model, *size, *more]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["duo", "lychee"])
def test_the_command_writes_gates_that_the_method_reads(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / f"{name}.tsv"
    assert run(*small(tmp_path, name, "--out", out)) == 0
    told = capsys.readouterr()
    assert "step 3/3: error" in told.err and "held-out answers:" in told.out and f"wrote {out}" in told.out
    gates = np.loadtxt(out, delimiter="\t")
    assert gates.shape == (6, 2) and ((gates >= 0) & (gates <= 1)).all() and (gates != gates[1, 0]).any()
    (spec,) = parse_methods(f"{name}:heads={out}")
    spec.check(tiny_shape())
    assert np.allclose(spec.options.heads.rows, gates)  # type: ignore[attr-defined]
    ahead = [line for line in out.read_text().splitlines() if line.startswith("#")]
    assert any("weights: " in line for line in ahead) and any("--steps 3 --rate" in line for line in ahead)
    assert str(tmp_path) not in "".join(ahead)
    report = np.genfromtxt(f"{out}.losses.csv", delimiter=",", names=True)
    assert len(report) == 3 and list(tmp_path.glob("new/*.state")) == []


def test_a_calibration_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_SAVED_EVERY", 1)
    straight, stopped = tmp_path / "a.tsv", tmp_path / "b.tsv"
    assert run(*small(tmp_path, "lychee", "--out", straight)) == 0
    step, left = Trainer._step, iter(range(2))

    def failing(self: Trainer, number: int) -> train.Losses:
        if next(left, None) is None:
            raise RuntimeError("the power went")
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", failing)
        with pytest.raises(RuntimeError):
            run(*small(tmp_path, "lychee", "--out", stopped))
    state = tmp_path / "b.tsv.state"
    assert state.exists() and not stopped.exists()
    assert run(*small(tmp_path, "lychee", "--out", stopped, "--topk", 30)) == 2  # other settings
    assert run(*small(tmp_path, "lychee", "--out", stopped)) == 0
    assert stopped.read_text() == straight.read_text() and not state.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--length", 200], "--length 200: want at least 256 tokens"),
        (["--length", 4096], "the model has a context of 2048 tokens"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(
    more: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*small(tmp_path, "duo", "--out", tmp_path / "x.tsv", *more)) == 2
    assert message in capsys.readouterr().err


def test_a_folder_is_no_file_of_gates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*small(tmp_path, "duo", "--out", tmp_path)) == 2
    assert "it is a folder" in capsys.readouterr().err

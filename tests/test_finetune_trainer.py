"""The training loop: the original's steps, going on after a stop, thawing, parts of a batch."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt.config import MossConfig
from moss_jt.errors import CheckpointError, ConfigError
from moss_jt.finetune import batches, checkpoint
from moss_jt.finetune.data import Samples, join
from moss_jt.finetune.encoding import Sample
from moss_jt.finetune.optimizer import AdamW, is_decayed
from moss_jt.finetune.parameters import Parameters
from moss_jt.finetune.schedule import rate_factor
from moss_jt.finetune.settings import TrainSettings
from moss_jt.finetune.start import from_nothing
from moss_jt.finetune.trainer import Job, Trainer
from moss_jt.model import Moss
from moss_jt.ops_grad import LossOps

TINY = MossConfig(vocab_size=64, n_positions=64, n_embd=32, n_layer=3, n_head=4, rotary_dim=4)


def random_samples(count: int, seed: int = 0) -> Samples:
    """Samples of random tokens, of which some are not learned."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = rng.integers(0, TINY.vocab_size, rng.integers(4, 30)).astype(np.int32)
        made.append(Sample(ids, ((0, int(rng.integers(1, 4))),)))
    return join(made)


def trainer(
    settings: TrainSettings, folder: Path | None = None, samples: Samples | None = None, config: MossConfig = TINY
) -> Trainer:
    """A trainer of a tiny new model."""
    whole = from_nothing(config, seed=1)
    data = random_samples(22) if samples is None else samples

    def make_ops(variables: dict[str, Any]) -> LossOps:
        return LossOps(config, variables, recompute=settings.recompute)

    return Trainer(Job(Moss(config), make_ops, whole.parameters, data, None, folder), settings)


SETTINGS = TrainSettings(epochs=3, batch_size=4, learning_rate=1e-2, save_step=0, eval_step=0)


def test_four_steps_of_the_original(golden: Path, jittor: Any) -> None:
    folder = golden / "finetune"
    told = json.loads((folder / "train_steps.json").read_text("utf-8"))
    encoded = json.loads((folder / "expected.json").read_text("utf-8"))[0]["samples"]
    arrays = np.load(folder / "train_steps.npz")
    config = MossConfig.from_dict(told["config"])
    names = [key[5:] for key in arrays.files if key.startswith("init.")]
    parameters = Parameters({name: arrays[f"init.{name}"].shape for name in names})
    for name in names:
        parameters.array(name)[...] = arrays[f"init.{name}"]
    cut = [(np.array(s["input_ids"][:1024], np.int32), np.array(s["labels"][:1024], np.int32)) for s in encoded]
    ends = np.cumsum([len(ids) for ids, _ in cut])
    data = Samples(np.concatenate([ids for ids, _ in cut]), np.concatenate([labels for _, labels in cut]), ends)
    settings = TrainSettings(
        batch_size=2, learning_rate=told["lr"], weight_decay=told["weight_decay"], decay_norms=True, clip=0, warmup=0.25
    )
    job = Job(Moss(config), lambda variables: LossOps(config, variables), parameters, data)
    run = Trainer(job, settings)
    run.total = len(told["steps"])
    run.order.step = lambda number: np.array(told["steps"][number]["samples"])  # type: ignore[method-assign]
    for want in told["steps"]:
        figures = run.step()
        assert figures["lr"] == pytest.approx(want["lr"], abs=1e-9)
        assert figures["loss"] == pytest.approx(want["loss"], abs=1e-4)
        assert figures["acc"] == pytest.approx(want["right"] / want["total"])
        assert figures["grad_norm"] == pytest.approx(want["grad_norm_total"], rel=1e-4)
    for name in names:
        difference = np.abs(parameters.array(name) - arrays[f"final.{name}"]).max()
        assert difference < 1e-5, f"{name}: off by {difference:.2e}"


def test_only_matrices_decay_by_default() -> None:
    names = ("transformer.wte.weight", "transformer.h.0.ln_1.weight", "transformer.ln_f.bias", "lm_head.bias")
    assert [is_decayed(name, decay_norms=False) for name in names] == [True, False, False, False]
    assert [is_decayed(name, decay_norms=True) for name in names] == [True, True, False, False]


def test_the_rate_rises_and_falls() -> None:
    factors = [rate_factor(step, warmup_steps=4, total_steps=20) for step in range(21)]
    assert factors[:5] == [0, 0.25, 0.5, 0.75, 1]
    assert factors[12] == pytest.approx(0.5) and factors[20] == pytest.approx(0)
    assert rate_factor(0, warmup_steps=0, total_steps=3) == 1


def test_stopping_and_going_on_changes_no_bit(tmp_path: Path, jittor: Any) -> None:
    settings = replace(SETTINGS, save_step=5, keep=1)
    whole = trainer(settings, tmp_path / "whole")
    whole.run()
    first = trainer(settings, tmp_path / "cut")
    first.run(until=7)  # two steps past its checkpoint: these are lost, as if it had been killed
    second = trainer(settings, tmp_path / "cut")
    assert second.resume() and second.done == 5
    second.run()
    assert second.done == whole.done == whole.total == 18
    assert np.array_equal(second.job.parameters.values, whole.job.parameters.values)
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "cut")] == ["step-00000018"]


@pytest.mark.parametrize("part", ["gradients", "optimizer", "save"])
def test_an_interrupt_loses_no_whole_step(
    part: str, tmp_path: Path, jittor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps since the last checkpoint were lost, of which there may be 2000."""
    settings = replace(SETTINGS, save_step=5)
    whole, run = trainer(settings), trainer(settings, tmp_path)
    whole.run(until=9)
    run.run(until=8)

    def interrupted(*_: Any, **__: Any) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    where: dict[str, tuple[object, str]] = {
        "gradients": (run, "_pass"),
        "optimizer": (run._optimizer, "step"),
        "save": (checkpoint, "_write"),
    }
    owner, name = where[part]
    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    steps = {"gradients": 8, "optimizer": 5, "save": 10}  # the optimizer may have changed half of the values
    assert checkpoint.checkpoints(tmp_path)[-1].name == f"step-{steps[part]:08d}"
    assert not list(tmp_path.glob(".step-*"))
    again = trainer(settings, tmp_path)
    assert again.resume() and again.done == steps[part]
    if part != "save":
        again.run(until=9)
        assert np.array_equal(again.job.parameters.values, whole.job.parameters.values)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_values_change_waits(
    number: signal.Signals, tmp_path: Path, jittor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lost all steps since the last checkpoint; and SIGTERM, of mpirun and of supervisors, always did."""
    run = trainer(replace(SETTINGS, save_step=5), tmp_path)
    run.run(until=8)
    change = run._optimizer.step

    def struck(*given: Any, **more: Any) -> None:
        monkeypatch.undo()
        signal.raise_signal(number)
        change(*given, **more)

    monkeypatch.setattr(run._optimizer, "step", struck)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert checkpoint.checkpoints(tmp_path)[-1].name == "step-00000009"
    assert run.done == 9


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gradients_that_are_not_numbers_change_nothing(
    value: float, jittor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They became the values, and soon those of all checkpoints."""
    run = trainer(SETTINGS)
    run.run(until=2)
    before = run.job.parameters.values.copy()

    def spoilt(*_: Any) -> None:
        run.job.parameters.gradients[3] = value

    monkeypatch.setattr(run, "_pass", spoilt)
    with pytest.raises(ConfigError, match=r"gradients of step 3 are not numbers .* smaller --learning_rate"):
        run.run()
    assert run.done == 2 and np.array_equal(run.job.parameters.values, before)


def test_going_on_with_other_settings_is_refused(tmp_path: Path, jittor: Any) -> None:
    done = trainer(replace(SETTINGS, save_step=1), tmp_path)
    done.run(until=1)
    other = trainer(replace(SETTINGS, learning_rate=1e-3), tmp_path)
    with pytest.raises(ConfigError, match=r"was made with learning_rate 0\.01; now it is 0\.001"):
        other.resume()
    with pytest.raises(ConfigError, match="was made with data"):
        trainer(SETTINGS, tmp_path, samples=random_samples(22, seed=5)).resume()
    (checkpoint.checkpoints(tmp_path)[-1] / "weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="Remove it, and an earlier one is taken"):
        trainer(SETTINGS, tmp_path).resume()


def test_a_checkpoint_with_other_tensors_is_refused(tmp_path: Path, jittor: Any) -> None:
    """What a checkpoint had too much was left out in silence."""
    done = trainer(replace(SETTINGS, save_step=1), tmp_path)
    done.run(until=1)
    with pytest.raises(CheckpointError, match=r"holds transformer\.h\.2\.attn.*not trained here\. Is it of another"):
        trainer(SETTINGS, tmp_path, config=replace(TINY, n_layer=2)).resume()
    with pytest.raises(CheckpointError, match=r"has no transformer\.h\.3\..* of shape .*Is it of another model"):
        trainer(SETTINGS, tmp_path, config=replace(TINY, n_layer=4)).resume()


@pytest.mark.parametrize("changes", [{"pass_tokens": 20}, {"recompute": True}, {"batch_size": 2, "accumulation": 2}])
def test_cutting_a_step_up_changes_only_the_rounding(changes: dict[str, Any], jittor: Any) -> None:
    plain, cut = trainer(SETTINGS), trainer(replace(SETTINGS, **changes))
    for _ in range(4):
        want, got = plain.step(), cut.step()
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


def test_a_shared_beginning_changes_only_the_rounding(jittor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    head = rng.integers(0, TINY.vocab_size, 20)
    tails = [rng.integers(0, TINY.vocab_size, rng.integers(3, 30)) for _ in range(22)]
    data = join([Sample(np.append(head, tail).astype(np.int32), ((0, 20),)) for tail in tails])
    once, each = trainer(SETTINGS, samples=data), trainer(SETTINGS, samples=data)
    for _ in range(4):
        got = once.step()
        with monkeypatch.context() as patched:
            patched.setattr(batches, "common", lambda *_: 0)
            want = each.step()
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


def test_layers_stay_as_they_are_until_they_thaw(jittor: Any) -> None:
    run = trainer(replace(SETTINGS, unfreeze_every=2, warmup=0.0))
    before = {name: values.copy() for name, values in run.job.parameters.arrays().items()}
    thawed_at: dict[str, int] = {}
    for step in range(9):
        run.step()
        for name, values in run.job.parameters.arrays().items():
            if not np.array_equal(values, before[name]):
                thawed_at.setdefault(name, step)
    for name, step in thawed_at.items():
        layer = int(name.split(".")[2]) if ".h." in name else 3
        assert step == 2 * (3 - layer), name
    assert thawed_at.keys() == before.keys()


def test_it_learns(jittor: Any) -> None:
    run = trainer(replace(SETTINGS, epochs=20))
    assert run.step()["loss"] == pytest.approx(np.log(TINY.vocab_size), abs=0.3)
    assert run.run()["loss"] < 1.5


def test_gradient_norm_and_clipping(jittor: Any) -> None:
    parameters = Parameters({"a": (3, 40), "b": (7,)})
    parameters.gradients[:] = np.random.default_rng(0).normal(size=parameters.gradients.shape)
    chosen = [slot.of(parameters.gradients).ravel() for slot in parameters.slots.values()]
    want = np.sqrt(sum(float((part.astype(np.float64) ** 2).sum()) for part in chosen))
    assert AdamW(parameters, SETTINGS).gradient_norm(parameters.slots) == pytest.approx(want, rel=1e-12)


def test_steps_leave_nothing_behind(jittor: Any) -> None:
    """The optimizer's calls once left a node each in Jittor's graph, 45 KB a step."""
    run = trainer(SETTINGS)
    for _ in range(2):
        run.step()
    before = jittor.liveness_info()
    for _ in range(5):
        run.step()
    assert jittor.liveness_info() == before

"""The figures of /stats: measured beside predicted, and where the weights are."""

from __future__ import annotations

from moss_jt.chat import ReplyStats
from moss_jt.cli.chat_figures import figures
from moss_jt.config import MossConfig, Quantization
from moss_jt.memory import GIB, MIB
from moss_jt.plan import make_plan, matrix_sizes, needs_of
from moss_jt.predict import KernelRate, Predictor, Rates

INT4 = MossConfig(n_embd=6144, n_head=24, n_layer=34, quantization=Quantization(4, 128))
TALK = {"turns": 1, "dropped_turns": 0, "context_tokens": 40, "context_size": 2048}
LAST = ReplyStats(prompt_tokens=128, reused_tokens=0, new_tokens=9, prefill_s=4.0, decode_s=2.0)


def predictor() -> Predictor:
    sizes = matrix_sizes(INT4)
    kernels = {"int4": KernelRate(40e9, 1e12), "float16": KernelRate(45e9, 4e11)}
    rates = Rates(2e9, 2e9, 0.0, 2, kernels, attention=30e9, layer_s=0.0002, token_s=0.001)
    needs = needs_of(INT4, sizes, base=330 * MIB, kv="float16")
    return Predictor(INT4, sizes, make_plan(sizes, needs, memory=4 * GIB), rates)


def test_predicted_stands_beside_measured() -> None:
    expected = predictor()
    rows = dict(figures(TALK, LAST, expected))
    assert rows["first token"] == f"after 4.00 s (predicted: {expected.prefill(128).seconds:.2f} s)"
    assert rows["last answer"] == f"9 tokens, 4.0 tokens/s (predicted: {expected.decoding(132).tokens_per_s:.1f})"


def test_nothing_is_predicted_of_a_machine_that_was_not_measured() -> None:
    rows = dict(figures(TALK, LAST))
    assert (rows["first token"], rows["last answer"]) == ("after 4.00 s", "9 tokens, 4.0 tokens/s")


def test_a_prompt_that_was_half_known_has_no_prediction() -> None:
    known = ReplyStats(prompt_tokens=128, reused_tokens=100, new_tokens=9, prefill_s=1.0, decode_s=2.0)
    rows = dict(figures(TALK, known, predictor()))
    assert rows["first token"] == "after 1.00 s"
    assert "predicted" in rows["last answer"]


def test_where_the_weights_are() -> None:
    assert "weights" not in dict(figures(TALK, None))
    whole = dict(figures({**TALK, "resident_bytes": 9_240_000_000, "streamed_bytes": 0}, None))
    assert whole["weights"] == "9.24 GB, all in memory"
    part = dict(figures({**TALK, "resident_bytes": 2_000_000_000, "streamed_bytes": 7_240_000_000}, None))
    assert part["weights"] == "2.00 GB in memory, 7.24 GB read for each token"


def test_what_the_processor_multiplies_beside_a_device() -> None:
    tiers = {
        "device_bytes": 5_000_000_000,
        "link_bytes_per_pass": 3_500_000_000,
        "streamed_bytes": 0,
        "host_share": 0.0,
    }
    stats = {**TALK, "resident_bytes": 3_600_000_000, **tiers}
    assert "processor" not in dict(figures(stats, None))
    found = dict(figures({**stats, "host_share": 0.625}, None))
    assert found["processor"] == "multiplies 62 % of the feed-forward weights that would be copied"

"""Speed of a model in memory against the machine's limits and against llama.cpp, all in one run.

    python benchmarks/decode.py --bits 4                  8 layers, both in memory, interleaved
    python benchmarks/decode.py --bits 4 --layers 34      each in processes of its own that alternate
    … --pairs-file FILE                                   and goes on where an earlier run with this file broke off

A pair is: the read bandwidth of memory, our run, the read bandwidth again, llama-bench's run. Ratios are
those of a pair; what counts is their median. int4 is compared with Q4_0, int8 with Q8_0, fp16 with F16;
--peer-head q6_k gives llama.cpp the output layer that its own quantisation would. Needs
`python benchmarks/peers/llamacpp.py --build`; without --peer only the limits. One JSON line comes last;
exit code 1 where a median misses what issue "Memory" asks for: 0.9 of the read bandwidth, 1.05 of
llama.cpp's decoding, 2 of its prefill.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from peers.environment import folder_of
from peers.gguf_model import Kind
from peers.llamacpp import PEER, Peer, peer_of

from moss_jt.bench import Bench, Settings, parse_synthetic, pass_bytes, ratios, synthetic_model
from moss_jt.limits import Limits
from moss_jt.memory import peak_memory
from moss_jt.record import commit, keep, spread

KINDS: dict[int, Kind] = {4: "q4_0", 8: "q8_0", 16: "f16"}
NAMES = {4: "int4", 8: "int8", 16: "fp16"}
ASKED = {"of_memory": 0.9, "decode_ratio": 1.05, "prefill_ratio": 2.0}
CONTEXT = 64  # tokens cached at the end of a timed answer


@dataclass
class Found:
    """Rates of both sides, run by run; limits enclose ours."""

    decode: list[float] = field(default_factory=list)
    peer_decode: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    of_memory: list[float] = field(default_factory=list)
    prefill: dict[int, list[float]] = field(default_factory=dict)
    peer_prefill: dict[int, list[float]] = field(default_factory=dict)
    cpu_s_per_token: list[float] = field(default_factory=list)
    peak_memory: list[int] = field(default_factory=list)


def interleaved(bits: int, layers: int, peer: Peer | None, settings: Settings) -> Found:
    """Both sides with their weights in memory; ours in this process."""
    found = Found()
    model = synthetic_model(parse_synthetic(f"moss-moon-003-{NAMES[bits]}", layers=layers), max_tokens=settings.longest)
    with Limits() as limits:
        ours = Bench(model, settings, limits)
        ours.warm_up()
        for count in settings.prompt_tokens:
            for _ in range(settings.pairs):
                found.prefill.setdefault(count, []).append(1 / ours.time_prefill(count).each_s)
                if peer is not None:
                    found.peer_prefill.setdefault(count, []).extend(peer.tokens_per_s(prompt=count)[0])
        prompt = [ours.prompt(CONTEXT - settings.new_tokens)]
        ours.time_answers(prompt, CONTEXT, 1)
        moved = pass_bytes(ours.sizes) + ours.kv_bytes(CONTEXT)
        for _ in range(settings.pairs):
            before = limits.memory().per_second
            run = ours.time_answers(prompt, CONTEXT, settings.new_tokens)
            after = limits.memory().per_second
            found.decode.append(1 / run.each_s)
            found.cpu_s_per_token.append(run.cpu_seconds / run.count)
            found.memory += [before, after]
            found.of_memory += ratios([moved / run.each_s], [before, after])
            if peer is not None:
                found.peer_decode += peer.tokens_per_s(new=settings.new_tokens)[0]
        found.peak_memory.append(peak_memory())
    return found


def separate(bits: int, layers: int, peer: Peer | None, settings: Settings, kept: Path | None = None) -> Found:
    """Processes of their own that alternate, so that each has the memory for itself.

    Args:
        kept: file in which each pair is kept as soon as it is measured, since all of them take an hour; pairs of the same
            kind that it has already count.
    """
    kind = [bits, layers, *settings.prompt_tokens, settings.new_tokens, peer is not None]
    pairs = read_pairs(kept, kind)
    while len(pairs) < settings.pairs:
        pairs.append(_pair(bits, layers, peer, settings))
        if kept is not None:
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "commit": commit(), "found": asdict(pairs[-1])}) + "\n")
    return joined(pairs)


def read_pairs(kept: Path | None, kind: list[Any]) -> list[Found]:
    """The pairs of a kind that a file has.

    Raises:
        SystemExit: it was written at another commit.
    """
    if kept is None or not kept.exists():
        return []
    lines = [json.loads(line) for line in kept.read_text("utf-8").splitlines()]
    mine = [line for line in lines if line["kind"] == kind]
    if any(line["commit"] != commit() for line in mine):
        raise SystemExit(f"{kept} has pairs of commit {mine[0]['commit']}, and this is {commit()}; take another file.")
    return [Found(**_with_numbers(line["found"])) for line in mine]


def _with_numbers(found: dict[str, Any]) -> dict[str, Any]:
    """JSON has texts as keys; lengths of prompts are numbers."""
    prefills = {
        name: {int(count): rates for count, rates in found[name].items()} for name in ("prefill", "peer_prefill")
    }
    return {**found, **prefills}


def joined(pairs: list[Found]) -> Found:
    """All runs in their order."""
    whole = Found()
    for pair in pairs:
        for each in fields(Found):
            mine, more = getattr(whole, each.name), getattr(pair, each.name)
            if isinstance(mine, dict):
                for count, rates in more.items():
                    mine.setdefault(count, []).extend(rates)
            else:
                mine.extend(more)
    return whole


def _pair(bits: int, layers: int, peer: Peer | None, settings: Settings) -> Found:
    """Our run and the peer's, one after the other."""
    report = _own_process(bits, layers, settings)
    (decode,) = report["decode"]
    found = Found(
        decode=[decode["tokens_per_s"]["median"]],
        cpu_s_per_token=[decode["cpu_s_per_pass"]["median"]],
        memory=[decode["limit"]["gb_per_s"]["median"] * 1e9],
        of_memory=[decode["of_limit"]["median"]],
        peak_memory=[report["peak_memory_bytes"]],
        prefill={run["tokens"]: [run["tokens_per_s"]["median"]] for run in report["prefill"]},
    )
    if peer is not None:
        found.peer_decode = list(peer.tokens_per_s(new=settings.new_tokens)[0])
        found.peer_prefill = {count: list(peer.tokens_per_s(prompt=count)[0]) for count in settings.prompt_tokens}
    return found


def _own_process(bits: int, layers: int, settings: Settings) -> dict[str, Any]:
    """The results of `moss-jt bench` in a process of its own, one pair of limit and run for each length."""
    prompts = ",".join(map(str, settings.prompt_tokens))
    command = [sys.executable, "-m", "moss_jt.cli", "bench", "--synthetic", f"moss-moon-003-{NAMES[bits]}", "--json"]
    command += ["--layers", str(layers), "--prompt-tokens", prompts, "--context", str(CONTEXT), "--pairs", "1"]
    command += ["--new-tokens", str(settings.new_tokens)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["results"]
    return results


def summary(found: Found) -> dict[str, Any]:
    """The line: spreads of rates and of ratios by pair."""

    def divided(ours: list[float], theirs: list[float]) -> dict[str, float | int] | None:
        return spread([a / b for a, b in zip(ours, theirs, strict=True)]) if theirs else None

    return {
        "decode_tokens_per_s": spread(found.decode),
        "memory_gb_per_s": spread([rate / 1e9 for rate in found.memory]),
        "of_memory": spread(found.of_memory),
        "cpu_s_per_token": spread(found.cpu_s_per_token),
        "prefill_tokens_per_s": {str(count): spread(rates) for count, rates in found.prefill.items()},
        "peer_decode_tokens_per_s": spread(found.peer_decode) if found.peer_decode else None,
        "peer_prefill_tokens_per_s": {str(count): spread(rates) for count, rates in found.peer_prefill.items()},
        "decode_ratio": divided(found.decode, found.peer_decode),
        "prefill_ratio": {
            str(count): divided(rates, found.peer_prefill.get(count, [])) for count, rates in found.prefill.items()
        },
        "peak_memory_bytes": max(found.peak_memory),
    }


def missed(line: dict[str, Any]) -> list[str]:
    """What is below what was asked, in words."""
    medians: list[tuple[str, dict[str, float] | None, float]] = [
        ("of_memory", line["of_memory"], ASKED["of_memory"]),
        ("decode_ratio", line["decode_ratio"], ASKED["decode_ratio"]),
    ]
    medians += [(f"prefill_ratio of {n}", found, ASKED["prefill_ratio"]) for n, found in line["prefill_ratio"].items()]
    return [
        f"{name} is {found['median']:.3f}, {asked} was asked"
        for name, found, asked in medians
        if found is not None and found["median"] < asked
    ]


def main() -> int:
    """Measure, then print the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=int, choices=list(KINDS), default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--separate", action="store_true", help="also with fewer layers than 16")
    parser.add_argument("--peer", choices=["llamacpp", "none"], default="llamacpp")
    parser.add_argument("--peer-head", help="kind of llama.cpp's output layer; else that of its other matrices")
    parser.add_argument("--peers-folder", type=Path, help="where peers were built; else MOSS_JT_HOME/peers")
    parser.add_argument("--prompt-tokens", default="128,512")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--pairs-file", type=Path, help="where pairs in processes of their own are kept as they come")
    parser.add_argument("--save", action="store_true", help="keep the line under benchmarks/results/")
    chosen = parser.parse_args()
    prompts = tuple(int(word) for word in chosen.prompt_tokens.split(",") if word)
    settings = Settings(prompts, (CONTEXT,), chosen.new_tokens, pairs=chosen.pairs)
    peer = None
    if chosen.peer == "llamacpp":
        kind = KINDS[chosen.bits]
        config = parse_synthetic("moss-moon-003-fp16", layers=chosen.layers)
        peer = peer_of(folder_of(PEER, chosen.peers_folder), config, kind, chosen.peer_head or kind)
    apart = chosen.separate or chosen.layers > 16
    measure: Callable[[int, int, Peer | None, Settings], Found] = (
        partial(separate, kept=chosen.pairs_file) if apart else interleaved
    )
    line = summary(measure(chosen.bits, chosen.layers, peer, settings))
    described = {
        "bits": chosen.bits,
        "layers": chosen.layers,
        "separate_processes": apart,
        "peer": None if peer is None else f"llama.cpp {KINDS[chosen.bits]}",
        "peer_pass_bytes": None if peer is None else peer.pass_bytes,
    }
    failures = missed(line)
    print(keep("decode", {**described, **line, "missed": failures}, save=chosen.save))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())

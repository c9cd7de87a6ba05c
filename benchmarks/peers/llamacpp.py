"""llama.cpp on a random model of MOSS's shape: tokens/s of prefill and decoding, by its own llama-bench.

    python benchmarks/peers/llamacpp.py --build
    python benchmarks/peers/llamacpp.py --kind q4_0 --layers 8 [--prompt-tokens 128,512] [--new-tokens 16]

The source is that of the PyPI package llama-cpp-python, compiled for this machine. Models are written
to the peer's folder when they are first asked for (q4_0 with all 34 layers: 9.4 GB) and stay there.
Runs alternate with the read bandwidth of memory. One JSON line comes last.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers.environment import Ended, add_options, built, folder_of, make_environment, pip, run
from peers.gguf_model import Kind, pass_bytes, write_model

from moss_jt.bench import parse_synthetic, ratios
from moss_jt.config import MossConfig
from moss_jt.limits import Limits
from moss_jt.record import keep, spread
from moss_jt.startup.machine import logical_cores

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
PEER = "llamacpp"
CMAKE = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_COMMON": "ON",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
}


@dataclass(frozen=True)
class Peer:
    """llama-bench and a model for it.

    Attributes:
        program: llama-bench.
        file: the model.
        pass_bytes: of the matrices that a token is multiplied with.
    """

    program: Path
    file: Path
    pass_bytes: int

    def tokens_per_s(
        self, *, prompt: int = 0, new: int = 0, repetitions: int = 1, options: Sequence[str] = ()
    ) -> tuple[list[float], Ended]:
        """Rates of prefill (`prompt`) or of decoding (`new`) in a process of its own, and how that ended."""
        assert (prompt > 0) != (new > 0), "one test at a time"
        counts = ["-p", str(prompt), "-n", str(new), "-r", str(repetitions), "-t", str(logical_cores())]
        ended = run([str(self.program), "-m", str(self.file), "-o", "jsonl", *counts, *options])
        return rates_of(ended.output), ended


def rates_of(output: str) -> list[float]:
    """Tokens per second of each repetition, from llama-bench's JSON lines."""
    (line,) = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [float(rate) for rate in line["samples_ts"]]


def build(folder: Path) -> None:
    """Fetch the source and compile llama-bench, on all cores."""
    folder.mkdir(parents=True, exist_ok=True)
    make_environment(folder, ["cmake", "ninja", "setuptools", "scikit-build-core"])
    pip(folder, "download", "--quiet", "--no-deps", "--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}", "-d", "source")
    (archive,) = (folder / "source").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "source", filter="data")
    source = archive.with_suffix("").with_suffix("") / "vendor" / "llama.cpp"
    tools = folder / "env" / "bin"
    settings = [f"-D{name}={value}" for name, value in CMAKE.items()]
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    for command in (
        ["cmake", "-S", str(source), "-B", str(folder / "build"), "-G", "Ninja", *settings],
        ["ninja", "-C", str(folder / "build"), "llama-bench"],
    ):
        subprocess.run([str(tools / command[0]), *command[1:]], check=True, env=environment)


def peer_of(folder: Path, config: MossConfig, kind: Kind, head: Kind) -> Peer:
    """The program and a model, which is written if it is not there."""
    program = built(folder / "build" / "bin" / "llama-bench", PEER)
    file = folder / f"{kind}-{head}-{config.n_embd}x{config.n_layer}.gguf"
    if not file.is_file():
        write_model(config, file, kind, head)
    return Peer(program, file, pass_bytes(config, kind, head))


def measure(peer: Peer, prompts: Sequence[int], new_tokens: int, pairs: int) -> dict[str, object]:
    """Rates beside the read bandwidth of memory."""
    with Limits() as limits:
        memory = [limits.memory().per_second]
        decode: list[float] = []
        for _ in range(pairs):
            decode += peer.tokens_per_s(new=new_tokens)[0]
            memory.append(limits.memory().per_second)
    prefill = {str(count): spread([peer.tokens_per_s(prompt=count)[0][0] for _ in range(pairs)]) for count in prompts}
    return {
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": spread(decode),
        "decode_gb_per_s": spread([rate * peer.pass_bytes / 1e9 for rate in decode]),
        "memory_gb_per_s": spread([rate / 1e9 for rate in memory]),
        "of_memory": spread(ratios([rate * peer.pass_bytes for rate in decode], memory)),
    }


def main() -> None:
    """Build, or measure and print the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.add_argument("--kind", choices=get_args(Kind), default="q4_0")
    parser.add_argument("--head", choices=get_args(Kind), help="of the output layer; else as --kind")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt-tokens", default="128,512")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=8)
    chosen = parser.parse_args()
    folder = folder_of(PEER, chosen.folder)
    if chosen.build:
        build(folder)
        return
    config = parse_synthetic("moss-moon-003-fp16", layers=chosen.layers)
    peer = peer_of(folder, config, chosen.kind, chosen.head or chosen.kind)
    prompts = [int(word) for word in chosen.prompt_tokens.split(",") if word]
    found = {
        "peer": f"{PACKAGE} {VERSION}",
        "kind": chosen.kind,
        "head": chosen.head or chosen.kind,
        "layers": chosen.layers,
        "pass_bytes": peer.pass_bytes,
        **measure(peer, prompts, chosen.new_tokens, chosen.pairs),
    }
    print(keep("peer_llamacpp", found, save=chosen.save))


if __name__ == "__main__":
    main()

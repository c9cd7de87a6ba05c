"""Parts of gpu.py about others that compute a model which the device does not hold, under the caps that we are under.

offload   transformers' CodeGen, which has MOSS's shape, divided by accelerate between the device and main memory
swap      Jittor's own swap, over a stack of the same matrices

Both know no int4, so both sides have fp16, with the same layers and the same bytes to multiply with. Under each cap
ours runs first and theirs then, in a process of its own that may take as much of the device as ours did; where the
device holds everything there is nothing to compare. What they keep on the device is theirs to choose: accelerate puts
the embedding there too, which we read on the host.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gpu_model import NEW, PROMPT, Stage, answer, loaded, prompts_for
from gpu_rows import Rows

from moss_jt.config import MossConfig
from moss_jt.memory import GIB
from moss_jt.paths import jittor_home
from moss_jt.plan import matrix_sizes
from moss_jt.record import spread
from moss_jt.startup.plan import cuda_state
from moss_jt.synthetic import layouts_of

Results = dict[str, Any]
Settings = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"
SETTLING = 2  # first tokens that are not timed
START_S = 240  # for starting, compiling and filling memory
KIND = "fp16"


@dataclass(frozen=True)
class Peer:
    """Somebody else.

    Attributes:
        name: of it.
        script: that runs it and ends with a JSON object.
        needs: modules that its Python must have, and `install`: how they get there.
        aim: times faster that we want to be.
        settings: what the script is told of a model, beside limit and time.
    """

    name: str
    script: Path
    needs: tuple[str, ...]
    install: str
    aim: float
    settings: Callable[[MossConfig], Settings]


def accelerate_settings(config: MossConfig) -> Settings:
    """The model of transformers that has this shape."""
    shape = {"layers": config.n_layer, "width": config.n_embd, "heads": config.n_head}
    return {**shape, "vocabulary": config.vocab_size, "rotary_dim": config.rotary_dim, "prompt": PROMPT}


def swap_settings(config: MossConfig) -> Settings:
    """The stack of matrices that this shape has."""
    shapes = [(size.rows, size.inputs) for size in matrix_sizes(config, layouts_of(config))]
    return {"shapes": shapes, "dtype": "float16", "rebuild": True}


ACCELERATE = Peer(
    "accelerate",
    PEERS / "offload_child.py",
    ("torch", "transformers", "accelerate"),
    "python benchmarks/peers/torch_offload.py --build, and --peer-python with its env/bin/python",
    2.5,
    accelerate_settings,
)
SWAP = Peer(
    "Jittor's swap",
    PEERS / "swap_child.py",
    ("jittor",),
    "pip install moss-jt",
    2.0,
    swap_settings,
)


@dataclass(frozen=True)
class Limits:
    """How the others are run.

    Attributes:
        python: with their packages.
        seconds: for the tokens of each cap.
        tier: the device by the name that the script takes.
        bus: its PCI bus id; None where there is none.
        more: settings beside those.
    """

    python: Path = field(default_factory=lambda: Path(sys.executable))
    seconds: float = 60.0
    tier: str = "cuda:0"
    bus: str | None = None
    more: Settings = field(default_factory=dict)


def missing(python: Path, modules: Sequence[str]) -> list[str]:
    """Those of these modules that a Python does not have; all of them where there is no such Python."""
    code = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"
    try:
        done = subprocess.run(
            [str(python), "-c", code, *modules], capture_output=True, text=True, timeout=120, check=False
        )
    except OSError:
        return list(modules)
    return done.stdout.split() if done.returncode == 0 else list(modules)


def run(peer: Peer, settings: Settings, limits: Limits) -> Results:
    """What the script tells, or why it does not."""
    line = [str(limits.python), str(peer.script), json.dumps(settings)]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(
            line, capture_output=True, text=True, env=variables, timeout=START_S + limits.seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"{peer.name} was not through within {START_S + limits.seconds:.0f} s"}
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode != 0 or not said:
        return {"failed": f"{peer.name} ended with {done.returncode}: {said[-1] if said else 'no word'}"}
    return dict(json.loads(said[-1]))


def compare(stage: Stage, peer: Peer, limits: Limits, runner: Callable[..., Results] = run) -> Results:
    """Seconds of a token under each cap, ours and theirs, and how many times faster ours is."""
    absent = missing(limits.python, peer.needs)
    if absent:
        return {"not_measured": f"{limits.python} has no {', '.join(absent)}: {peer.install}"}
    config = stage.config(KIND)
    results: Results = Rows(layers=config.n_layer)
    for cap in sorted(stage.caps):
        name = f"{cap / GIB:g}GiB"
        ours = ours_under(stage, cap)
        if ours is None:
            results[name] = {"not_measured": "the device holds everything"}
            continue
        told = {"limit": cap, "own": ours["own_bytes"], "seconds": limits.seconds, "steps": NEW - 1 + SETTLING}
        where = {"tier": limits.tier, "device": limits.tier.partition(":")[0], "bus": limits.bus}
        theirs = runner(peer, {**peer.settings(config), **told, **where, **limits.more}, limits)
        results[name] = row_of(ours, theirs, peer.aim, cap)
    return results


def ours_under(stage: Stage, cap: int) -> Results | None:
    """Seconds of our tokens within a cap; None where nothing is streamed."""
    with loaded(stage, KIND, limit=cap) as model:
        assert model.placed is not None
        if not model.placed.plans.device.ring_slots:
            return None
        found = answer(model, prompts_for(model, 1, PROMPT), NEW)
        weights = model.placed.space.weights
        return {
            "steps_s": found.steps_s[SETTLING:],
            "own_bytes": model.placed.space.device.own_bytes,
            "weight_bytes": weights.resident_bytes + weights.streamed_bytes,
            "streamed_bytes": weights.streamed_bytes,
        }


def row_of(ours: Results, theirs: Results, aim: float, cap: int) -> Results:
    """What is told of a cap."""
    row: Results = {
        "ours_s": spread(ours["steps_s"], 4),
        "weight_bytes": ours["weight_bytes"],
        "streamed_bytes": ours["streamed_bytes"],
    }
    if "failed" in theirs:
        return {**row, "failed": theirs["failed"]}
    taken = theirs["steps_s"][SETTLING:] or theirs["steps_s"]
    row |= {f"their_{key}": theirs[key] for key in ("bytes", "start_s", "versions") if key in theirs}
    row |= {"theirs_s": spread(taken, 4)}
    row["times"] = round(row["theirs_s"]["median"] / row["ours_s"]["median"], 2)
    row |= {"aim": aim, "reached": row["times"] >= aim}
    if theirs["used_bytes"]:
        row |= {"their_used_bytes": theirs["used_bytes"], "within_cap": theirs["used_bytes"] <= cap}
    if "swapped_bytes" in theirs:
        row["swapped_bytes"] = spread(theirs["swapped_bytes"], 0)
    return row


def offload(stage: Stage, limits: Limits) -> Results:
    """transformers and accelerate."""
    return compare(stage, ACCELERATE, limits)


def swap(stage: Stage, limits: Limits) -> Results:
    """Jittor's swap, which is run by this Python."""
    problem, cuda = cuda_state(jittor_home())
    if cuda is None:
        return {"not_measured": f"Jittor cannot use CUDA here: {problem}"}
    return compare(stage, SWAP, replace(limits, python=Path(sys.executable)))

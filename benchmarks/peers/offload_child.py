"""transformers with accelerate on a device that does not hold the model: the part of gpu_offload.py that runs in theirs.

    python benchmarks/peers/offload_child.py '{"tier": "cuda:0", "limit": 8589934592, "own": 500000000, "layers": 34, …}'

A CodeGen model of random float16 weights. accelerate divides its modules between the device, up to the limit, and main
memory, and its hooks copy what is not on the device in every pass. With the tier "cpu" it divides between main memory
and disk instead, which needs no device. One JSON object comes last.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers.torch_child import empty_model, random_tensor

ACTIVATIONS = 384 << 20  # beside weights: libraries' work space, logits of a prompt, cached keys and values, masks
LEAST_STEPS, TRIES, SMALLER = 4, 4, 0.9


def fill(model: Any, dtype: torch.dtype) -> None:
    """Give every parameter memory of its own; tensors of one shape get the same random numbers."""
    from accelerate.utils import set_module_tensor_to_device

    known: dict[tuple[int, ...], Any] = {}
    for name, parameter in list(model.named_parameters()):
        shape = tuple(parameter.shape)
        if shape not in known:
            known[shape] = random_tensor(name, parameter.shape, dtype)
        same = known[shape] if len(shape) == 2 else random_tensor(name, parameter.shape, dtype)
        set_module_tensor_to_device(model, name, "cpu", value=same.clone(), dtype=dtype)


def divided(settings: dict[str, Any], room: int, folder: str) -> tuple[Any, dict[str, int]]:
    """The model, `room` bytes of its weights on the tier, and bytes by where they are."""
    from accelerate import dispatch_model, infer_auto_device_map

    dtype = torch.float16 if settings["tier"] != "cpu" else torch.float32
    model = empty_model(settings, dtype)
    fill(model, dtype)
    on_device = settings["tier"] != "cpu"
    tiers: dict[int | str, int] = {0: room, "cpu": 1 << 50} if on_device else {"cpu": room}
    places = infer_auto_device_map(model, max_memory=tiers, no_split_module_classes=["CodeGenBlock"], dtype=dtype)
    bytes_of: dict[str, int] = {}
    for module, place in places.items():
        found = model.get_submodule(module) if module else model
        nbytes = sum(tensor.nbytes for tensor in found.parameters())
        bytes_of[str(place)] = bytes_of.get(str(place), 0) + nbytes
    main = settings["tier"] if on_device else "cpu"
    if len(set(places.values())) > 1:
        model = dispatch_model(model, places, main_device=main, offload_dir=folder)
    elif on_device and set(places.values()) == {0}:
        model = model.to(main)
    return model, bytes_of


def finished(tier: str) -> None:
    """Wait for the device."""
    if tier != "cpu":
        torch.cuda.synchronize()


def steps_of(model: Any, settings: dict[str, Any]) -> list[float]:
    """Seconds of each token after a prompt: as many as wanted, or as the time lasts."""
    tier, vocabulary = settings["tier"], model.config.vocab_size
    ids = torch.randint(0, vocabulary, (1, settings["prompt"]), device=tier)
    out = model(ids, use_cache=True, logits_to_keep=1)
    taken: list[float] = []
    while len(taken) < settings["steps"] and (len(taken) < LEAST_STEPS or sum(taken) < settings["seconds"]):
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        finished(tier)
        began = time.perf_counter()
        out = model(token, past_key_values=cache, use_cache=True)
        finished(tier)
        taken.append(time.perf_counter() - began)
    assert bool(torch.isfinite(out.logits).all()), "not finite"
    return taken


def within(settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """Measure; where the memory is not enough, with fewer weights on the device."""
    tier, room = settings["tier"], settings["limit"] - settings["own"] - ACTIVATIONS
    if tier != "cpu":
        total = torch.cuda.get_device_properties(tier).total_memory
        torch.cuda.set_per_process_memory_fraction((settings["limit"] - settings["own"]) / total, tier)
    for left in reversed(range(TRIES)):
        try:
            model, bytes_of = divided(settings, max(0, room), folder)
            taken = steps_of(model, settings)
        except torch.cuda.OutOfMemoryError:
            if not left:
                raise
            model, room = None, int(room * SMALLER)
            torch.cuda.empty_cache()
            continue
        peak = 0 if tier == "cpu" else torch.cuda.max_memory_reserved(tier) + settings["own"]
        return {"steps_s": taken, "bytes": bytes_of, "used_bytes": peak}
    raise AssertionError("the last try returns or raises")


def main() -> None:
    """Settings from the command line, results to stdout."""
    import accelerate

    settings = json.loads(sys.argv[1])
    torch.manual_seed(0)
    versions = {each.__name__: each.__version__ for each in (torch, transformers, accelerate)}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"versions": versions, **within(settings, folder)}))


if __name__ == "__main__":
    main()

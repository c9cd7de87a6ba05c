"""The part of torch_offload.py that runs in the peer's environment; one JSON object of settings in, one out.

It imports nothing of moss_jt: that environment does not have it.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CodeGenConfig, CodeGenForCausalLM

WIDTH, INNER, VOCABULARY = 6144, 24576, 107008
SPREAD = 0.02


def cpu_seconds() -> float:
    """Of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def empty_model(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    """The network without weights; its tables are real. What `settings` does not say is as in the 16B model."""
    width = settings.get("width", WIDTH)
    config = CodeGenConfig(
        vocab_size=settings.get("vocabulary", VOCABULARY),
        n_positions=2048,
        n_ctx=2048,
        n_embd=width,
        n_inner=4 * width,
        n_layer=settings["layers"],
        n_head=settings.get("heads", 24),
        rotary_dim=settings.get("rotary_dim", 64),
        activation_function="gelu_new",
        tie_word_embeddings=False,
    )
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = CodeGenForCausalLM(config)
    return model.to(dtype).eval()


def random_tensor(name: str, shape: torch.Size, dtype: torch.dtype) -> Any:
    """Weights that keep activations finite."""
    if len(shape) == 1:
        return torch.full(shape, float(name.endswith("weight")), dtype=dtype)
    return torch.empty(shape, dtype=dtype).uniform_(-SPREAD, SPREAD)


def fill(model: Any, dtype: torch.dtype) -> None:
    """Give every parameter memory and random numbers."""
    from accelerate.utils import set_module_tensor_to_device

    for name, parameter in list(model.named_parameters()):
        set_module_tensor_to_device(model, name, "cpu", value=random_tensor(name, parameter.shape, dtype), dtype=dtype)


def write_offload(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write accelerate's folder, unless it is there; tensors of one shape get the same numbers."""
    from accelerate.utils import offload_weight, save_offload_index

    if (folder / "index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {}
    known: dict[tuple[int, ...], Any] = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if shape not in known:
            known[shape] = random_tensor(name, parameter.shape, dtype)
        index = offload_weight(known[shape], name, str(folder), index)
    save_offload_index(index, str(folder))


def open_model(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    """The model in the mode asked for."""
    model = empty_model(settings, dtype)
    if settings["mode"] == "disk":
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook
        from accelerate.utils import OffloadedWeightsLoader

        folder = Path(settings["offload"])
        write_offload(model, folder, dtype)
        weights = OffloadedWeightsLoader(save_folder=str(folder))
        add_hook_to_module(model, AlignDevicesHook(io_same_device=True), append=True)
        attach_align_device_hook(model, execution_device=torch.device("cpu"), offload=True, weights_map=weights)
        return model
    fill(model, dtype)
    if settings["mode"] == "cpu":
        from accelerate import cpu_offload

        return cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call gives, its seconds, and its processor seconds."""
    began, cpu = time.perf_counter(), cpu_seconds()
    found = call()
    return found, time.perf_counter() - began, cpu_seconds() - cpu


def measure(model: Any, settings: dict[str, Any]) -> dict[str, list[float]]:
    """Tokens per second, and processor seconds a token, of each run."""
    found: dict[str, list[float]] = {"prefill": [], "decode": [], "prefill_cpu_s": [], "decode_cpu_s": []}
    count, new = settings["prompt_tokens"], settings["new_tokens"]
    for _ in range(settings["runs"]):
        ids = torch.randint(0, VOCABULARY, (1, count))
        out, seconds, cpu = timed(lambda ids=ids: model(ids, use_cache=True, logits_to_keep=1))  # type: ignore[misc]
        found["prefill"].append(count / seconds)
        found["prefill_cpu_s"].append(cpu / count)
        total = total_cpu = 0.0
        for _ in range(new):
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
            out, seconds, cpu = timed(
                lambda token=token, cache=cache: model(token, past_key_values=cache, use_cache=True)  # type: ignore[misc]
            )
            total, total_cpu = total + seconds, total_cpu + cpu
        found["decode"].append(new / total)
        found["decode_cpu_s"].append(total_cpu / new)
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest, largest, and how many."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def main() -> None:
    """Settings from the command line, results to stdout."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    dtype = getattr(torch, settings["dtype"])
    with torch.inference_mode():
        model, seconds, _ = timed(lambda: open_model(settings, dtype))
        rates = measure(model, settings)
    weights = settings["layers"] * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER) + VOCABULARY * WIDTH
    result = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "load_s": round(seconds, 1),
        "pass_bytes": weights * dtype.itemsize,
        "prefill_tokens_per_s": spread(rates["prefill"]),
        "decode_tokens_per_s": spread(rates["decode"]),
        "prefill_cpu_s_per_token": spread(rates["prefill_cpu_s"]),
        "decode_cpu_s_per_token": spread(rates["decode_cpu_s"]),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

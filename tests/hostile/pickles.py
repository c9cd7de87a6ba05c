"""Bad checkpoints whose description of the tensors is what is wrong: pickles that run or exhaust, tensors that cannot be."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_torch import Code, call, code, legacy_file, named, pickled, storage, tensor, zip_file

from hostile.base import BIG, DATA, GOOD, Hostile, Write, put

HALF = "torch.HalfStorage"


def state(value: Any) -> Write:
    """A zip .bin with this value as its description and one storage."""
    return put(zip_file(pickled(value), {"0": DATA}))


def pickle_bytes(data: bytes) -> Write:
    """A zip .bin with these bytes as its description."""
    return put(zip_file(data, {"0": DATA}))


def runs(make: Callable[[str], bytes], wrap: Callable[[bytes], bytes] | None = None) -> Write:
    """A .bin whose pickle runs a shell command; `make` is given the command that leaves RAN."""

    def write(folder: Path) -> None:
        payload = make(f"touch '{folder / 'RAN'}'")
        data = wrap(payload) if wrap else zip_file(payload, {"0": DATA})
        (folder / "pytorch_model.bin").write_bytes(data)

    return write


def calls(function: str, *args: Any) -> Write:
    """A .bin whose pickle calls a function on its way to a good state dict."""
    return runs(lambda command: pickled({"x": call(function, *(args or (command,))), "lm_head.bias": tensor((4,))}))


def laughs() -> bytes:
    """Lists of ten of the list before, 40 deep: tiny until somebody walks through it."""
    text = b"\x80\x02}X\x01\x00\x00\x00a](X\x02\x00\x00\x00haeq\x00"
    return text + b"".join(b"0" + b"](" + b"h\x00" * 10 + b"eq\x00" for _ in range(40)) + b"s."


def laughing_lists() -> bytes:
    """As `laughs`, without an instruction that torch would not write."""
    inner = code("ha")
    parts = [b"\x80\x02}X\x01\x00\x00\x00a](" + inner + b"q\x00"]
    for _ in range(40):
        parts.append(b"](" + b"h\x00" * 10 + b"eq\x00")
    return b"".join(parts) + b"es."


def many_dicts() -> bytes:
    """One list of 50,000 pairs, made into an OrderedDict 50,000 times."""
    pairs = b"](" + b"".join(code((i, i)) for i in range(50_000)) + b"eq\x00"
    again = named("collections.OrderedDict") + b"h\x00\x85R"
    return b"\x80\x02(" + pairs + again * 50_000 + b"t."


def text_payload(command: str) -> bytes:
    """A pickle of protocol 0, as Python 1 wrote them."""
    return f"cos\nsystem\n(S{command!r}\ntR.".encode()


def instance_payload(command: str) -> bytes:
    """A call through INST."""
    return b"\x80\x02(" + code(command) + b"ios\nsystem\n."


def object_payload(command: str) -> bytes:
    """A call through OBJ."""
    return b"\x80\x02(" + named("os.system") + code(command) + b"o."


def stack_payload(command: str) -> bytes:
    """A call whose name comes from the stack (protocol 4)."""
    raw = command.encode()
    return b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c" + bytes([len(raw)]) + raw + b"\x85R."


def old_format(payload: bytes) -> bytes:
    """The payload as the description in a file of the old format."""
    return legacy_file(payload, {"0": DATA})


def os_system(command: str) -> bytes:
    """The plainest payload."""
    return pickled(call("os.system", command))


RUNNING = [
    Hostile("runs-os-system", 'asks to run "os.system"', calls("os.system")),
    Hostile("runs-posix-system-protocol-4", 'asks to run "posix.system"', runs(stack_payload)),
    Hostile("runs-through-inst", 'asks to run "os.system"', runs(instance_payload)),
    Hostile("runs-through-obj", 'asks to run "os.system"', runs(object_payload)),
    Hostile("runs-protocol-0", 'asks to run "os.system"', runs(text_payload)),
    Hostile("runs-as-plain-pickle", 'asks to run "os.system"', runs(os_system, lambda payload: payload)),
    Hostile("runs-as-plain-text-pickle", 'asks to run "os.system"', runs(text_payload, lambda payload: payload)),
    Hostile("runs-in-old-format", 'asks to run "os.system"', runs(os_system, old_format)),
    Hostile("runs-eval", 'asks to run "builtins.eval"', calls("builtins.eval")),
    Hostile("runs-exec", 'asks to run "builtins.exec"', calls("builtins.exec")),
    Hostile("runs-getattr", 'asks to run "builtins.getattr"', calls("builtins.getattr", named(HALF), "mro")),
    Hostile("runs-popen", 'asks to run "subprocess.Popen"', calls("subprocess.Popen")),
    Hostile(
        "runs-numpy", 'asks to run "numpy.core.multiarray._reconstruct"', calls("numpy.core.multiarray._reconstruct")
    ),
    Hostile("runs-numpy-loader", 'asks to run "numpy.load"', calls("numpy.load")),
    Hostile("runs-torch-load", 'asks to run "torch.load"', calls("torch.load")),
    Hostile("runs-torch-hub", 'asks to run "torch.hub.load"', calls("torch.hub.load")),
    Hostile(
        "runs-load-from-bytes", 'asks to run "torch.storage._load_from_bytes"', calls("torch.storage._load_from_bytes")
    ),
    Hostile(
        "runs-a-module",
        'asks to run "torch.nn.modules.linear.Linear"',
        state({"a": named("torch.nn.modules.linear.Linear")}),
    ),
    Hostile(
        "runs-a-name-with-line-feeds",
        'asks to run "os.\\nsystem"',
        pickle_bytes(b"\x80\x04\x8c\x02os\x8c\x07\nsystem\x93."),
    ),
    Hostile("runs-partial-by-extension", "the instruction EXT1", pickle_bytes(b"\x80\x02\x82\x01.")),
]

PICKLES = [
    Hostile("pickle-calls-a-type", "is used in a way that torch.save never writes", calls(HALF, 4)),
    Hostile("pickle-calls-a-tensor", "calls something that is not a function", state(Code(tensor((4,)) + b")R"))),
    Hostile("pickle-builds-a-tensor", "fills a dict where there is none", state({"a": Code(tensor((4,)) + b"}b")})),
    Hostile(
        "pickle-ordered-dict-of-junk", "an OrderedDict is not made from a list", calls("collections.OrderedDict", 7)
    ),
    Hostile(
        "pickle-ordered-dict-of-lone-values",
        "an OrderedDict is not made from pairs",
        calls("collections.OrderedDict", [7]),
    ),
    Hostile("pickle-many-dicts", "instructions; no checkpoint of MOSS needs so many", pickle_bytes(many_dicts())),
    Hostile(
        "pickle-million-laughs",
        "which of its parts is the dict of tensors: it holds none",
        pickle_bytes(laughing_lists()),
    ),
    Hostile("pickle-laughs-with-pop", "the instruction POP", pickle_bytes(laughs())),
    Hostile("pickle-tuple-as-key", "has a tuple as a key", state({("a", "b"): tensor((4,))})),
    Hostile(
        "pickle-text-of-2-60-bytes",
        "the instruction BINUNICODE8",
        pickle_bytes(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"a."),
    ),
    Hostile(
        "pickle-bytes-of-2-60-bytes",
        "the instruction BINBYTES8",
        pickle_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"a."),
    ),
    Hostile("pickle-text-of-4-gb", "it ends in the middle", pickle_bytes(b"\x80\x02X\xff\xff\xff\xffa.")),
    Hostile("pickle-number-of-2-gb", "the instruction LONG4", pickle_bytes(b"\x80\x02\x8b\xff\xff\xff\x7f\x01.")),
    Hostile("pickle-number-in-digits", "the instruction LONG", pickle_bytes(b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.")),
    Hostile("pickle-nested-tuples", "holds a tuple where", pickle_bytes(b"\x80\x02N" + b"\x85" * 400_000 + b".")),
    Hostile("pickle-nested-marks", "values are left over", pickle_bytes(b"\x80\x02" + b"(" * 400_000 + b"N.")),
    Hostile(
        "pickle-million-instructions",
        "no checkpoint of MOSS needs so many",
        pickle_bytes(b"\x80\x02" + b"N" * 1_000_000 + b"."),
    ),
    Hostile(
        "pickle-of-17-mb",
        "at most 16777216 make sense",
        pickle_bytes(b"\x80\x02X" + struct.pack("<I", 17 << 20) + b"a" * (17 << 20) + b"."),
    ),
    Hostile("pickle-without-end", "it ends in the middle", pickle_bytes(b"\x80\x02}")),
    Hostile("pickle-goes-on", "goes on after its end", pickle_bytes(pickled(GOOD) + b"N.")),
    Hostile("pickle-of-nothing", "takes a value where there is none", pickle_bytes(b"\x80\x02.")),
    Hostile("pickle-recalls-nothing", "recalls a value that it did not remember", pickle_bytes(b"\x80\x02h\x07.")),
    Hostile("pickle-odd-dict", "a key has no value", pickle_bytes(b"\x80\x02}(" + code("a") + b"u.")),
    Hostile("pickle-refers-to-text", "refers to something that is not a storage", state({"a": Code(code("a") + b"Q")})),
    Hostile("pickle-refers-by-line", "the instruction PERSID", pickle_bytes(b"\x80\x02P0\n.")),
    Hostile(
        "pickle-storage-of-negative-size",
        "a storage is described wrongly",
        state({"a": storage("HalfStorage", "0", -1)}),
    ),
    Hostile(
        "pickle-storage-of-unknown-type",
        'asks to run "torch.ComplexStorage"',
        state({"a": storage("ComplexStorage", "0", 4)}),
    ),
    Hostile(
        "pickle-storage-of-two-sizes", "a storage has two sizes", state({"a": tensor((4,)), "b": tensor((2,), count=2)})
    ),
    Hostile("pickle-name-with-escape", "unusable name", state({"a\x1b[2J": tensor((4,))})),
    Hostile("pickle-name-with-lone-surrogate", "unusable name", state({"a\ud800": tensor((4,))})),
    Hostile("pickle-number-among-tensors", "holds steps, a number, among its tensors", state({**GOOD, "steps": 3})),
    Hostile("pickle-two-state-dicts", "candidates are state_dict, module", state({"state_dict": GOOD, "module": GOOD})),
    Hostile("pickle-lone-tensor", "holds a lone tensor where a dict", state(tensor((4,)))),
]

TENSORS = [
    Hostile("tensor-past-its-storage", "reaches past its storage of 4 elements", state({"a": tensor((5,))})),
    Hostile("tensor-offset-past-its-storage", "reaches past its storage", state({"a": tensor((2,), offset=3)})),
    Hostile("tensor-empty-far-away", "reaches past its storage", state({"a": tensor((0,), offset=BIG)})),
    Hostile("tensor-negative-offset", "impossible shape, offset or stride", state({"a": tensor((2,), offset=-1)})),
    Hostile("tensor-negative-size", "impossible shape, offset or stride", state({"a": tensor((-4, -1))})),
    Hostile(
        "tensor-negative-stride",
        "impossible shape, offset or stride",
        state({"a": tensor((4,), stride=(-1,), offset=3)}),
    ),
    Hostile(
        "tensor-huge-product", "reaches past its storage", state({"a": tensor((BIG, BIG, BIG), stride=(BIG, BIG, 1))})
    ),
    Hostile("tensor-number-past-64-bits", "impossible shape, offset or stride", state({"a": tensor((1 << 2000,))})),
    Hostile("tensor-of-100-dimensions", "impossible shape, offset or stride", state({"a": tensor((1,) * 100)})),
    Hostile(
        "tensor-expanded-to-petabytes", "the file stores only 8 of them", state({"a": tensor((1 << 50,), stride=(0,))})
    ),
    Hostile("tensor-overlapping-itself", "overlaps itself", state({"a": tensor((2, 2), stride=(1, 1))})),
    Hostile("tensor-of-bool-size", "impossible shape, offset or stride", state({"a": tensor((True,), stride=(1,))})),
    Hostile("storage-missing", 'the data "1" of a tensor is missing', state({"a": tensor((4,), key="1")})),
    Hostile("storage-outside-the-zip", "of a tensor is missing", state({"a": tensor((4,), key="../../config.json")})),
    Hostile("storage-of-another-size", "has 8 bytes where 16 were expected", state({"a": tensor((8,), count=8)})),
    Hostile("storage-of-exabytes", "has 8 bytes where", state({"a": tensor((4,), count=BIG)})),
]


OLD = [
    Hostile("old-cut", "is cut short", put(old_format(pickled(GOOD))[:-3])),
    Hostile("old-cut-in-the-pickle", "has a damaged pickle", put(old_format(pickled(GOOD))[:200])),
    Hostile("old-with-more", "goes on after its last storage", put(old_format(pickled(GOOD)) + b"x")),
    Hostile(
        "old-big-endian", "on a big-endian machine", put(legacy_file(pickled(GOOD), {"0": DATA}, little_endian=False))
    ),
    Hostile(
        "old-wrong-magic",
        "is a pickle, but not one of torch.save",
        put(legacy_file(pickled(GOOD), {"0": DATA}, magic=7)),
    ),
    Hostile(
        "old-unknown-version",
        "unknown version of torch's old format",
        put(legacy_file(pickled(GOOD), {"0": DATA}, version=1002)),
    ),
    Hostile(
        "old-storage-of-another-size",
        "of 4 elements says that it has 2",
        put(legacy_file(pickled(GOOD), {"0": DATA}, item_bytes=4)),
    ),
    Hostile("old-without-storage", "list of storages is not that of its tensors", put(legacy_file(pickled(GOOD), {}))),
]

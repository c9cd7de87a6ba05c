"""The pickles inside torch's .bin files, read without running anything.

A pickle is a program for a small stack machine, and Python's own machine imports and calls whatever
the program names. The machine here knows only the instructions that torch.save writes, imports
nothing and calls nothing: a function that rebuilds a tensor becomes a `PickledTensor`, a plain note
of where the numbers lie. Any other name is refused when it is read, before any later instruction.

Bounds: instructions, items and bytes are counted, nesting costs no Python recursion, and nothing is
ever compared, hashed or printed but texts and numbers.

Source: CPython's Lib/pickletools.py describes the instructions.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pickletools import opcodes
from typing import Any

from moss_jt.checked_file import printable
from moss_jt.converters.torch_types import DTYPES, STORAGE_TYPES, PickledTensor, Storage
from moss_jt.errors import CheckpointError
from moss_jt.safetensors_file import MAX_DIMENSIONS

MAX_PICKLE_BYTES = 16 << 20  # 800 tensors of a 16B model take 0.1 MB
_MAX_STEPS = 500_000  # a tensor takes about 60
_MAX_GLOBAL = 256
_MAX_NUMBER = 1 << 63

_ORDERED_DICT = "collections.OrderedDict"
_SIZE = "torch.Size"
_REBUILD_TENSORS = (
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
)
_REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
_ALLOWED = frozenset((*STORAGE_TYPES, *DTYPES, _ORDERED_DICT, _SIZE, *_REBUILD_TENSORS, _REBUILD_PARAMETER))


@dataclass(frozen=True)
class _Global:
    """A name that the pickle refers to; it stays a name."""

    name: str


class NotAPickleError(CheckpointError):
    """The bytes are not a pickle that torch.save could have written."""


@dataclass(frozen=True)
class Pickle:
    """What a pickle holds.

    Attributes:
        value: None, numbers, texts, tuples, lists, dicts, `PickledTensor`, `Storage`, and names.
        end: where the first byte after the pickle lies.
        storages: all that it refers to, by key.
    """

    value: Any
    end: int
    storages: dict[str, Storage]


def read_pickle(data: bytes | bytearray, start: int, where: str) -> Pickle:
    """Read one pickle from `data[start:]`; `where` names the file in messages.

    Raises:
        NotAPickleError: the bytes are no pickle, or one that uses what torch.save never writes.
        CheckpointError: the pickle asks to run something, or describes a tensor that cannot be.
    """
    return _Machine(data, start, where).run()


class _Machine:
    """The stack machine; one object reads one pickle."""

    def __init__(self, data: bytes | bytearray, start: int, where: str) -> None:
        self.data = data
        self.at = start
        self.where = where
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # stacks below the open marks
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.steps = 0

    def run(self) -> Pickle:
        """Carry out instructions until STOP."""
        while True:
            self._count(1)
            code = self._bytes(1)[0]
            if code == _STOP:
                value = self._pop()
                if self.stack or self.outer:
                    raise self._broken("values are left over at its end")
                return Pickle(value, self.at, self.storages)
            action = _ACTIONS.get(code)
            if action is None:
                raise self._unknown(code)
            action(self)

    # Reading

    def _bytes(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise self._broken("it ends in the middle")
        piece = bytes(self.data[self.at : end])
        self.at = end
        return piece

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _text(self, count: int) -> str:
        try:
            return self._bytes(count).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise self._broken("a text is not UTF-8") from None

    def _line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + _MAX_GLOBAL)
        if end < 0:
            raise self._broken("a name does not end")
        text = self._bytes(end - self.at).decode("utf-8", "backslashreplace")
        self.at += 1
        return text

    # The stack

    def _pop(self) -> Any:
        if not self.stack:
            raise self._broken("it takes a value where there is none")
        return self.stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        if not self.outer:
            raise self._broken("it closes a list that it did not open")
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise self._broken(f"it fills a {kind.__name__} where there is none")
        return self.stack[-1]

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    # Instructions

    def mark(self) -> None:
        """MARK: begin a run of values."""
        self.outer.append(self.stack)
        self.stack = []

    def take_tuple(self, count: int | None = None) -> None:
        """TUPLE, TUPLE1, TUPLE2, TUPLE3."""
        if count is None:
            self.push(tuple(self._pop_to_mark()))
        else:
            items = [self._pop() for _ in range(count)]
            self.push(tuple(reversed(items)))

    def set_items(self, items: list[Any]) -> None:
        """SETITEM, SETITEMS: keys and values by turns into the dict on top."""
        if len(items) % 2:
            raise self._broken("a key has no value")
        self._fill(self._top(dict), list(zip(items[::2], items[1::2], strict=True)))

    def _fill(self, target: dict[Any, Any], pairs: list[tuple[Any, Any]]) -> None:
        for key, value in pairs:
            if not isinstance(key, str | int | None):
                raise self._broken(f"a dict has a {type(key).__name__} as a key")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        """APPEND, APPENDS: onto the list on top."""
        self._top(list).extend(items)

    def put(self, index: int) -> None:
        """BINPUT, LONG_BINPUT, MEMOIZE: remember the value on top."""
        if not self.stack:
            raise self._broken("it remembers a value where there is none")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        """BINGET, LONG_BINGET: bring a remembered value."""
        if index not in self.memo:
            raise self._broken("it recalls a value that it did not remember")
        self.push(self.memo[index])

    def protocol(self) -> None:
        """PROTO: check the protocol's number."""
        number = self._number("<B")
        if not 2 <= number <= 5:
            raise self._broken(f"its protocol is {number}")

    def frame(self) -> None:
        """FRAME: only a hint for buffering."""
        self._bytes(8)

    def long(self) -> None:
        """LONG1: a whole number of up to 255 bytes."""
        self.push(int.from_bytes(self._bytes(self._number("<B")), "little", signed=True))

    def global_name(self, name: str) -> None:
        """GLOBAL, STACK_GLOBAL, INST: a name, refused unless it is one that describes tensors."""
        if name not in _ALLOWED:
            raise CheckpointError(
                f'{self.where} asks to run "{printable(name, 120)}" while loading; '
                f"a checkpoint holds only tensors. Do not use this file."
            )
        self.push(_Global(name))

    def stack_global(self) -> None:
        """STACK_GLOBAL: module and name come from the stack."""
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise self._broken("a name is not a text")
        self.global_name(f"{module}.{name}")

    def instance(self) -> None:
        """INST: names a class to be called; torch.save never writes it, but the name makes the better message."""
        self.global_name(f"{self._line()}.{self._line()}")
        raise self._unknown(ord("i"))

    def persistent(self) -> None:
        """BINPERSID: a storage, given as ("storage", type, key, device, count) and in old files None."""
        given = self._pop()
        if (
            not isinstance(given, tuple)
            or not 5 <= len(given) <= 6
            or given[0] != "storage"
            or given[5:] not in ((), (None,))
        ):
            raise self._broken("it refers to something that is not a storage")
        _, kind, key, device, count = given[:5]
        if not isinstance(kind, _Global) or kind.name not in STORAGE_TYPES:
            raise self._broken("a storage has no type")
        if not isinstance(key, str) or not isinstance(device, str) or not _is_size(count):
            raise self._broken("a storage is described wrongly")
        storage = Storage(key, *STORAGE_TYPES[kind.name], count)
        if self.storages.setdefault(key, storage).nbytes != storage.nbytes:
            raise self._broken("a storage has two sizes")
        self.push(storage)

    def build(self) -> None:
        """BUILD: attributes of an OrderedDict (the versions of modules), which are of no use here."""
        state = self._pop()
        self._top(dict)
        if not isinstance(state, dict):
            raise self._broken("the attributes of a dict are not a dict")

    def reduce(self) -> None:
        """REDUCE: what would call a function notes here what it would have made."""
        args, function = self._pop(), self._pop()
        if not isinstance(function, _Global) or not isinstance(args, tuple):
            raise self._broken("it calls something that is not a function")
        if function.name in _REBUILD_TENSORS:
            self.push(self._tensor(function.name, args))
        elif function.name == _REBUILD_PARAMETER and len(args) == 3 and isinstance(args[0], PickledTensor):
            self.push(args[0])
        elif function.name == _ORDERED_DICT and len(args) <= 1:
            self.push(self._ordered_dict(args))
        elif function.name == _SIZE and len(args) == 1 and _is_sizes(args[0]):
            self.push(args[0])
        else:
            raise self._broken(f"{function.name} is used in a way that torch.save never writes")

    def _ordered_dict(self, args: tuple[Any, ...]) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        pairs = args[0] if args else []
        if not isinstance(pairs, list):
            raise self._broken("an OrderedDict is not made from a list")
        self._count(len(pairs))  # the same long list could be used again and again
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise self._broken("an OrderedDict is not made from pairs")
        self._fill(result, [(pair[0], pair[1]) for pair in pairs])
        return result

    def _tensor(self, function: str, args: tuple[Any, ...]) -> PickledTensor:
        counts = {_REBUILD_TENSORS[0]: (4, 4), _REBUILD_TENSORS[1]: (6, 7), _REBUILD_TENSORS[2]: (7, 8)}
        least, most = counts[function]
        if not least <= len(args) <= most or not isinstance(args[0], Storage):
            raise self._broken("a tensor is described wrongly")
        storage, offset, shape, stride = args[:4]
        self._count(len(shape) if isinstance(shape, tuple) else 1)
        if not _is_size(offset) or not _is_sizes(shape) or not _is_sizes(stride) or len(shape) != len(stride):
            raise self._broken("a tensor has an impossible shape, offset or stride")
        dtype, itemsize = storage.dtype, storage.itemsize
        if function == _REBUILD_TENSORS[2]:
            if not isinstance(args[6], _Global) or args[6].name not in DTYPES:
                raise self._broken("a tensor has no dtype")
            dtype, itemsize = DTYPES[args[6].name]
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        end = last + 1 if prod(shape) else offset
        if end * itemsize > storage.nbytes:
            raise CheckpointError(
                f"{self.where} is damaged: a tensor {shape} with stride {stride} at offset {offset} reaches "
                f"past its storage of {storage.nbytes // itemsize} elements. Fetch it again."
            )
        return PickledTensor(storage, dtype, itemsize, offset, shape, stride)

    # Refusals

    def _count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > _MAX_STEPS:
            raise CheckpointError(
                f"{self.where} has a pickle of over {_MAX_STEPS} instructions; no checkpoint of MOSS needs so many. Do not use this file."
            )

    def _broken(self, fault: str) -> NotAPickleError:
        return NotAPickleError(f"{self.where} has a damaged pickle: {fault} (at byte {self.at}). Fetch it again.")

    def _unknown(self, code: int) -> NotAPickleError:
        name = _OPCODE_NAMES.get(chr(code))
        if name is None:
            return self._broken(f"0x{code:02x} is no instruction")
        return NotAPickleError(
            f"{self.where} has a pickle with the instruction {name}, which torch.save never writes "
            f"(at byte {self.at - 1}). Do not use this file."
        )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_NUMBER


def _is_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= MAX_DIMENSIONS and all(_is_size(size) for size in value)


_STOP = ord(".")
_OPCODE_NAMES = {op.code: op.name for op in opcodes}
_Action = Callable[[_Machine], None]
_ACTIONS: dict[int, _Action] = {
    0x80: _Machine.protocol,
    0x95: _Machine.frame,
    ord("("): _Machine.mark,
    ord(")"): lambda m: m.push(()),
    ord("]"): lambda m: m.push([]),
    ord("}"): lambda m: m.push({}),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(m._number("<i")),
    ord("K"): lambda m: m.push(m._number("<B")),
    ord("M"): lambda m: m.push(m._number("<H")),
    ord("G"): lambda m: m.push(m._number(">d")),
    0x8A: _Machine.long,
    ord("X"): lambda m: m.push(m._text(m._number("<I"))),
    0x8C: lambda m: m.push(m._text(m._number("<B"))),
    ord("t"): _Machine.take_tuple,
    0x85: lambda m: m.take_tuple(1),
    0x86: lambda m: m.take_tuple(2),
    0x87: lambda m: m.take_tuple(3),
    ord("s"): lambda m: m.set_items([m._pop(), m._pop()][::-1]),
    ord("u"): lambda m: m.set_items(m._pop_to_mark()),
    ord("a"): lambda m: m.append([m._pop()]),
    ord("e"): lambda m: m.append(m._pop_to_mark()),
    ord("q"): lambda m: m.put(m._number("<B")),
    ord("r"): lambda m: m.put(m._number("<I")),
    0x94: lambda m: m.put(len(m.memo)),
    ord("h"): lambda m: m.get(m._number("<B")),
    ord("j"): lambda m: m.get(m._number("<I")),
    ord("c"): lambda m: m.global_name(f"{m._line()}.{m._line()}"),
    0x93: _Machine.stack_global,
    ord("i"): _Machine.instance,
    ord("Q"): _Machine.persistent,
    ord("b"): _Machine.build,
    ord("R"): _Machine.reduce,
}

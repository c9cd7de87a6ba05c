"""The making of a native folder from another one, streaming, and able to go on after a kill.

Three moves: look the source over (`survey`), plan every byte of the result (`native_plan`), then make
each tensor from its source tensors (`native_tensors`) and hand it to the writer (`output`). Tensors
lie in the result in the order of the model and are made in the order of the source's files, so that
a file of the source is used up early. `hf2jittor` and `quantize` are the two uses.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_jt.checkpoint import Checkpoint
from moss_jt.config import FloatType, MossConfig
from moss_jt.converters.holes import is_marked
from moss_jt.converters.journal import Note, Workplace, copy_small_files
from moss_jt.converters.native_plan import Options, made_from, make_plan
from moss_jt.converters.native_tensors import NativeMaker
from moss_jt.converters.output import TensorWriter, check_room, finish, verify_done
from moss_jt.converters.plan import Plan, PlannedTensor
from moss_jt.converters.rounding import Quantizer
from moss_jt.converters.shelf import INDEX_FILES, Arrive, Shelf, check_deletable
from moss_jt.converters.survey import problems_of, wanted_tensors
from moss_jt.converters.using_up import UsingUp, check_no_hole, delete_holed, delete_rest, most_bytes, read_note
from moss_jt.errors import CheckpointError, ConfigError
from moss_jt.layout import Layout, PlainLayout, TileLayout, layout_from_dict
from moss_jt.progress import Progress, Quiet
from moss_jt.tokenizer import TOKENIZER_FILES

_FLOATS: dict[str, FloatType] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        path: the native folder.
        config: of the model.
        nbytes: of its weight files.
        dropped: tensors of the source that a model does not need.
        dropped_bytes: what they took.
        resumed: tensors that an earlier run had finished.
        deleted_bytes: of source files, where that was asked.
    """

    path: Path
    config: MossConfig
    nbytes: int
    dropped: int = 0
    dropped_bytes: int = 0
    resumed: int = 0
    deleted_bytes: int = 0


@dataclass(frozen=True)
class Task:
    """What is to be made of what.

    Attributes:
        kind: CONVERT or QUANTIZE.
        source: folder, or one file of weights.
        target: folder to make.
        options: what changes the bytes.
        native: the source is a native folder.
        title: of the progress.
        way_out: what else the caller's user can do where there is no room, after "Free 1 GB".
    """

    kind: str
    source: Path
    target: Path
    options: Options
    native: bool
    title: str
    way_out: str = ""


def convert(
    task: Task,
    *,
    quantizer: Quantizer,
    resume: bool,
    delete_source: bool = False,
    arrive: Arrive | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Make a native folder.

    Args:
        task: what to make.
        quantizer: for matrices that become int4 or int8.
        resume: go on with an interrupted run, to the same bytes.
        delete_source: delete each weight file of the source as soon as it has been used up. Where the
            interrupted run was asked for that and this one is not, only the files go that have holes by then.
        arrive: brings a weight file that the source's index names and that is not there yet.
        progress: told the bytes written.

    Raises:
        ConfigError: the destination is taken, the options are not those of the interrupted run, or what
            is asked for cannot be made of the source.
        CheckpointError: the source is broken or not a MOSS checkpoint.
        DiskError: not enough room, or the disk fails; the run can be resumed.
    """
    report = progress or Quiet()
    source, target = task.source, task.target
    with Workplace(target, task.kind, resume=resume) as workplace:
        if workplace.whole:
            opened = Checkpoint.open(target)
            _check_finished(target, opened.config, task.options)
            return Conversion(target, opened.config, _weight_bytes(opened), resumed=len(opened.entries))
        done: dict[str, str] = {}
        if workplace.plan is not None:
            _check_options(workplace, task.options)
            done = verify_done(workplace, report)
            if arrive is not None:
                _bring_lost(workplace.plan, source, done, arrive)
        resumed, holed = len(done), read_note(workplace)
        deleted: dict[str, int] = {}
        if workplace.plan is None or len(done) < len(workplace.plan.places()):
            with Shelf(source, native=task.native, arrive=arrive, partial=workplace.plan is not None) as shelf:
                if delete_source:
                    check_deletable(source, shelf.source)
                if workplace.plan is None:
                    _begin(workplace, shelf, task, delete_source=delete_source)
                else:
                    _check_source(workplace, shelf, done)
                    _check_room(workplace, shelf, task, workplace.plan, done, delete_source=delete_source)
                maker, freed = NativeMaker(quantizer), deleted if delete_source else None
                _write(workplace, shelf, done, maker, freed, title=task.title, progress=report)
        plan = workplace.plan
        assert plan is not None, "the run has a plan"
        finish(workplace, done, manifest=True)
    if delete_source:
        delete_rest(plan, source, deleted)
    else:
        delete_holed(source, holed, deleted)
    config = MossConfig.from_file(target / "config.json")
    dropped = plan.inputs["dropped"]
    return Conversion(target, config, plan.nbytes, dropped["count"], dropped["nbytes"], resumed, sum(deleted.values()))


def _bring_lost(plan: Plan, source: Path, done: Collection[str], arrive: Arrive) -> None:
    """Let files arrive that are gone and still needed, where no index tells of them: without any, nothing is a model."""
    if not any((source / name).exists() for name in INDEX_FILES.values()):
        needed = {file for name, files in plan.inputs["needs"].items() if name not in done for file in files}
        for file in sorted(file for file in needed if not (source / file).exists()):
            arrive(source / file)


def _begin(workplace: Workplace, shelf: Shelf, task: Task, *, delete_source: bool) -> None:
    """Plan, see that there is room, copy the tokenizer, and write the plan down."""
    plan = make_plan(task.kind, shelf, task.options)
    _check_room(workplace, shelf, task, plan, (), delete_source=delete_source)
    folder = shelf.source.path if shelf.source.path.is_dir() else shelf.source.path.parent
    copy_small_files(folder, TOKENIZER_FILES, workplace.out)
    workplace.start(plan)


def _check_finished(target: Path, config: MossConfig, options: Options) -> None:
    """See that what lies at the destination is what is asked for, as far as its config.json tells."""
    head = "floats" if config.head_quantization is None else "int8"
    there_and_asked = {
        "name": (config.name, options.name),
        "quantization": (config.quantization, options.quantization or config.quantization),
        "head": (head, head if options.head is None else "int8" if options.head == "int8" else "floats"),
        "dtype": (config.dtype, options.dtype or config.dtype),
    }
    differing = [f"{key} {there}, not {asked}" for key, (there, asked) in there_and_asked.items() if there != asked]
    if differing:
        raise ConfigError(
            f"{target} is finished already, and something else: {'; '.join(differing)}. "
            "Name another destination, or delete that folder."
        )


def _check_options(workplace: Workplace, options: Options) -> None:
    """See that the interrupted run was asked for the same."""
    assert workplace.plan is not None, "there is an interrupted run"
    begun: dict[str, Any] = workplace.plan.inputs["options"]
    differing = [
        f"{key} {begun.get(key)!r}, now {value!r}"
        for key, value in options.to_dict().items()
        if begun.get(key) != value
    ]
    if differing:
        raise ConfigError(
            f"the unfinished conversion in {workplace.path} was begun with {'; '.join(differing)}. "
            "Go on with the same options, or delete that folder."
        )


def _check_source(workplace: Workplace, shelf: Shelf, done: dict[str, str]) -> None:
    """See that what is left of the source is what the plan was made from."""
    plan = workplace.plan
    assert plan is not None, "there is an interrupted run"
    changed = [
        name for name, print_ in shelf.fingerprints().items() if plan.inputs["files"].get(name, print_) != print_
    ]
    if shelf.source.config != plan.inputs["config"]:
        changed.append("config.json")
    if changed:
        raise ConfigError(
            f"{', '.join(changed)} in {shelf.source.path} changed since the conversion began. "
            f"Delete {workplace.path} and start again."
        )
    if not shelf.arriving:
        there = {file.name for file in shelf.source.files}
        lost = {file for name, files in plan.inputs["needs"].items() if name not in done for file in files} - there
        if lost:
            raise CheckpointError(
                f"{shelf.source.path} lacks {', '.join(sorted(lost))}, not all of which has been converted. Fetch it again."
            )


def _write(
    workplace: Workplace,
    shelf: Shelf,
    done: dict[str, str],
    maker: NativeMaker,
    deleted: dict[str, int] | None,
    *,
    title: str,
    progress: Progress,
) -> None:
    """Make and write every tensor that is not done, using up the source where `deleted` counts that."""
    plan = workplace.plan
    assert plan is not None, "the run has a plan"
    places = plan.places()
    pending = [name for name in _working_order(plan) if name not in done]
    using_up = UsingUp(workplace, shelf, pending, deleted) if deleted is not None else None
    noted = read_note(workplace)
    progress.begin(title, sum(places[name][1].nbytes for name in pending), "B")
    try:
        with TensorWriter(workplace, plan, done, progress) as writer:
            if using_up:
                using_up.before_start(writer)
            for name, after in zip(pending, [*pending[1:], None], strict=True):
                layout = layout_of(places[name][1])
                _bring(shelf, plan, name, layout)
                check_no_hole(shelf, noted, made_from(plan, name))
                if after is not None:
                    _expect(shelf, made_from(plan, after))
                note: Note = {}
                writer.put(name, maker.make(shelf.source, name, layout, note), note)
                if using_up:
                    using_up.after(name, writer)
    except CheckpointError:
        if _is_complete(shelf, plan) and not any(is_marked(file) for file in shelf.source.files):
            workplace.discard()  # the source is bad and all there: going on could not help
        raise
    finally:
        progress.end()


def _expect(shelf: Shelf, names: list[str]) -> None:
    """Let the system read source tensors ahead, as far as they are there."""
    for name in names:
        if name in shelf.source.tensors:
            shelf.source.expect(name)


def _is_complete(shelf: Shelf, plan: Plan) -> bool:
    """Whether every file that the plan was made from, or waits for, lies in the source now."""
    needed = {file for files in plan.inputs["needs"].values() for file in files}
    return needed <= {file.name for file in shelf.source.files if file.exists()}


def layout_of(tensor: PlannedTensor) -> Layout:
    """The layout of a planned native tensor."""
    return layout_from_dict(tensor.layout) if tensor.layout else PlainLayout(tensor.shape, _FLOATS[tensor.code])


def _bring(shelf: Shelf, plan: Plan, name: str, layout: Layout) -> None:
    """See that the source tensors of one of ours are there; what has just arrived is looked over."""
    if not shelf.fetch(made_from(plan, name)):
        return
    config = MossConfig.from_dict(plan.inputs["config"])
    cast = plan.inputs["options"]["dtype"] is not None
    wanted = wanted_tensors(config)
    problems = [
        problem
        for n, shape in wanted.items()
        if n in shelf.source.tensors
        for problem in problems_of(shelf.source.tensors[n], shape, any_float=cast)
    ]
    found = shelf.source.tensors[name].dtype
    if not problems and not cast and not isinstance(layout, TileLayout) and found != layout.dtype:
        problems = [f"{name} is {found}, but {layout.dtype} was expected from the files before"]
    if problems:
        raise CheckpointError(f"{shelf.source.path} does not fit its config.json: {'; '.join(problems)}.")


def _working_order(plan: Plan) -> list[str]:
    """Tensors by the last source file that each needs, else in the order of the model."""
    needs = plan.inputs["needs"]
    return sorted(needs, key=lambda name: max(needs[name]))


def _check_room(
    workplace: Workplace, shelf: Shelf, task: Task, plan: Plan, done: Collection[str], *, delete_source: bool
) -> None:
    """See that the result fits on the disk; what the source gives back on the way counts."""
    if delete_source:
        check_room(workplace, most_bytes(shelf, plan, _working_order(plan), done, read_note(workplace)))
    else:
        check_room(workplace, plan.nbytes, task.way_out)


def _weight_bytes(checkpoint: Checkpoint) -> int:
    return sum(file.stat().st_size for file in {entry.file for entry in checkpoint.entries.values()})

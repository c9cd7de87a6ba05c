"""One call from options to a trained model: what `moss-jt finetune` does."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from moss_jt import startup
from moss_jt.accelerator import check_device_name
from moss_jt.adapter import AdapterShape
from moss_jt.checkpoint import Checkpoint
from moss_jt.config import FloatType, MossConfig
from moss_jt.device import Device
from moss_jt.errors import ConfigError, DeviceMemoryError, DiskError
from moss_jt.finetune.checkpoint import checkpoints
from moss_jt.finetune.data import Samples, load_samples
from moss_jt.finetune.export import check_destination
from moss_jt.finetune.log import RunLog
from moss_jt.finetune.lora import over_folder
from moss_jt.finetune.records import files_of
from moss_jt.finetune.settings import DataSettings, TrainSettings
from moss_jt.finetune.start import Student, Whole, from_folder, from_nothing, read_shape
from moss_jt.finetune.trainer import Alone, Job, Log, NoLog, Scalars, Team, Trainer
from moss_jt.finetune.vocabulary import extend_tokenizer, new_ids, read_tokens, with_rows
from moss_jt.load import DeviceName, close_device, native_folder, open_checked
from moss_jt.progress import Progress, Quiet
from moss_jt.tokenizer import Tokenizer, load_tokenizer

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        data_dir: folder of the data (`moss_jt.finetune.records`).
        output_dir: folder of checkpoints, logs and the trained model.
        model: folder to start from, native or Hugging Face; None with `init`.
        init: config.json of a new model.
        tokenizer: folder of the tokenizer; None for the model's.
        new_tokens: file with a token a line, for which the model gets rows; only where everything is trained.
        data, train: how.
        adapter: train low-rank terms of this shape and leave the model as it is; None trains everything.
        memory: of the whole process, in bytes, where an adapter is trained; None holds all weights.
        device: multiplies by the matrices of the model, where an adapter is trained.
        vram: of the process on that device, in bytes; None for what is free there.
        dtype: of the exported weights.
        resume: go on from the newest checkpoint.
        log_dir: folder of the logs; None for `output_dir/log`.
        tensorboard: write event files; None if it can be done.
    """

    data_dir: Path
    output_dir: Path
    model: Path | None = None
    init: Path | None = None
    tokenizer: Path | None = None
    new_tokens: Path | None = None
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    adapter: AdapterShape | None = None
    memory: int | None = None
    device: DeviceName = "cpu"
    vram: int | None = None
    dtype: FloatType = "float16"
    resume: bool = False
    log_dir: Path | None = None
    tensorboard: bool | None = None


@dataclass(frozen=True)
class Trained:
    """What came of it.

    Attributes:
        path: the trained model's folder, or the adapter's.
        steps: that were made in all.
        figures: the last ones.
        samples, dropped: training samples, and records that gave none.
    """

    path: Path
    steps: int
    figures: Scalars
    samples: int
    dropped: int


def finetune(request: Request, *, team: Team | None = None, progress: Progress | None = None) -> Trained:
    """Train, and write the result to `output_dir/model` or, of an adapter, `output_dir/adapter`.

    Raises:
        ConfigError: options or data that cannot work.
        CheckpointError: the model or a checkpoint is broken.
        DiskError: the disk is full or fails.
        DeviceMemoryError: the memory is not enough.
        KernelError: the device that was asked for cannot be used.
    """
    team, progress = team or Alone(), progress or Quiet()
    if team.rank:
        team.add_up(np.zeros(2, np.float32))  # the first process converts and encodes what the others then find
    _refuse_to_mix(request)
    _check_device(request)
    model_dir, tokenizer_dir = _places(request, progress)
    tokenizer, new = load_tokenizer(tokenizer_dir), dict[str, int]()
    if request.new_tokens is not None:
        larger = request.output_dir / "tokenizer"
        new = new_ids(tokenizer_dir, read_tokens(request.new_tokens))
        if not team.rank:  # the others wait until it is written
            extend_tokenizer(tokenizer_dir, new, larger)
        tokenizer_dir = larger
    training, validation = _data(request, tokenizer_dir, progress)
    if not team.rank:
        team.add_up(np.zeros(2, np.float32))
    target = request.output_dir / ("model" if request.adapter is None else "adapter")
    check_destination(target)
    startup.import_jittor(device="cpu", progress=progress)
    with _device(request, progress) as device:
        student = _student(request, model_dir, training, device, progress)
        if new:
            assert isinstance(student, Whole), "checked with the places"
            student = with_rows(student, tokenizer, new)
        for samples in (training, validation):
            _check_fits(student.config, tokenizer, samples)
        job = Job(
            student.network(),
            student.make_ops,
            student.parameters,
            training,
            validation,
            folder=request.output_dir,
            identity=student.identity,
        )
        trainer = Trainer(job, request.train, team=team, progress=progress)
        if request.resume:
            trainer.resume()
        with _log(request, team, begun=trainer.done) as trainer.log:
            figures = trainer.run()
    if not team.rank:
        name = request.output_dir.name
        try:
            student.write(target, tokenizer=tokenizer_dir, dtype=request.dtype, name=name, progress=progress)
        except DiskError as error:
            raise DiskError(f"{error} The checkpoints are kept: the same command with --resume writes it.") from error
    return Trained(target, trainer.done, figures, len(training), training.dropped)


def _refuse_to_mix(request: Request) -> None:
    """See that no other run has left checkpoints, before anything is read or written.

    Raises:
        ConfigError: there are some, and nobody asked to go on.
    """
    found = checkpoints(request.output_dir)
    if found and not request.resume:
        raise ConfigError(
            f"{found[-1]} is the checkpoint of an earlier run. Add --resume to go on, or take another --output_dir."
        )


def _places(request: Request, progress: Progress) -> tuple[Path | None, Path]:
    """The native folder to start from, if any, and that of the tokenizer."""
    if (request.model is None) == (request.init is None):
        raise ConfigError(
            "give --model_name_or_path to start from a model, or --init with a config.json for a new one."
        )
    if request.new_tokens is not None and request.adapter is not None:
        raise ConfigError(
            "--new_tokens needs new rows in the model, and --lora_rank leaves it as it is. Give one of them."
        )
    if request.init is not None and request.adapter is not None:
        raise ConfigError(
            "--lora_rank adds to a model that has learned, and --init begins with none. Give one of them."
        )
    if request.model is None:
        if request.tokenizer is None:
            raise ConfigError("a new model (--init) needs --tokenizer, the folder of its tokenizer.")
        return None, request.tokenizer
    folder = native_folder(request.model, progress)
    return folder, request.tokenizer or folder


def _data(request: Request, tokenizer_dir: Path, progress: Progress) -> tuple[Samples, Samples | None]:
    cache = request.output_dir / "data"
    training = load_samples(request.data_dir, "train", tokenizer_dir, request.data, cache_dir=cache, progress=progress)
    if not files_of(request.data_dir, "val"):
        return training, None
    found = load_samples(request.data_dir, "val", tokenizer_dir, request.data, cache_dir=cache, progress=progress)
    return training, found


def _check_device(request: Request) -> None:
    """See that a device has something to do, before anything is read or written.

    Raises:
        ConfigError: everything is trained, or the device has no such name.
    """
    check_device_name(request.device)
    if request.adapter is None and (request.device != "cpu" or request.vram is not None):
        raise ConfigError(
            "a device multiplies by weights that stay as they are: give --lora_rank, or leave --device out."
        )


@contextmanager
def _device(request: Request, progress: Progress) -> Iterator[Device | None]:
    """The device that multiplies, open for as long as training takes; None for the host's processor.

    Raises:
        ConfigError: there is a limit, and no device.
        KernelError: what was asked for is not there, or computes wrong.
    """
    device = open_checked(request.device, request.vram, progress)
    if device is None and request.vram is not None:
        raise ConfigError("--vram was given, and no device is used. Leave it out, or see `moss-jt doctor`.")
    try:
        yield device
    finally:
        if device is not None:
            close_device(device)


def _student(
    request: Request, model_dir: Path | None, training: Samples, device: Device | None, progress: Progress
) -> Student:
    """What is trained."""
    settings = request.train
    if model_dir is None:
        assert request.init is not None, "one of both was given"
        return from_nothing(read_shape(request.init), seed=settings.seed, recompute=settings.recompute)
    checkpoint = Checkpoint.open(model_dir)
    if request.adapter is None:
        return from_folder(checkpoint, recompute=settings.recompute)
    longest = int(training.lengths.max(initial=0))
    begin = partial(
        over_folder, checkpoint, request.adapter, settings, longest=longest, memory=request.memory, progress=progress
    )
    try:
        return begin(device=device)
    except (ConfigError, DeviceMemoryError) as error:
        if device is None or request.device != "auto" or request.vram is not None:
            raise
        _logger.warning("%s The CPU computes.", error)
        device.close()
        return begin()


@contextmanager
def _log(request: Request, team: Team, *, begun: int) -> Iterator[Log]:
    """Where figures go: the first process writes them, after those of the steps that are done."""
    if team.rank:
        yield NoLog()
        return
    log = RunLog(request.log_dir or request.output_dir / "log", begun=begun, tensorboard=request.tensorboard)
    try:
        yield log
    finally:
        log.close()


def _check_fits(config: MossConfig, tokenizer: Tokenizer, samples: Samples | None) -> None:
    """See that every token of the data has a row in the model, and every sample a place.

    Raises:
        ConfigError: one has not.
    """
    if samples is None:
        return
    largest = int(samples.ids.max(initial=0))
    if largest >= config.vocab_size:
        raise ConfigError(
            f"the data has token {largest}, and the model's vocab_size is {config.vocab_size}. "
            f"Is {tokenizer.folder} the tokenizer of another model?"
        )
    longest = int(samples.lengths.max(initial=0))
    if longest > config.n_positions:
        raise ConfigError(
            f"a sample has {longest} tokens, and the model's n_positions is {config.n_positions}. "
            f"Give --max_length {config.n_positions} or less."
        )

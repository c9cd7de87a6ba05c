"""`moss-jt` with a model that speaks a script: for tests of what is on the screen, not of the network.

Run as a program it takes a JSON file {"answers": […], "blocks": [[request, token], …]} and the
arguments of moss-jt; at a block the engine waits until Ctrl-C comes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fake_engine import FakeEngine

from moss_jt.config import MossConfig
from moss_jt.messages import Event
from moss_jt.tokenizer import load_tokenizer

TOKENIZER = Path(__file__).parent / "golden" / "tokenizer" / "c-addedtoken-specials"
WAITS = "(the engine waits)"  # said at a block: the terminal then obeys Ctrl-C again


class BlockingEngine(FakeEngine):
    """Waits for a signal before certain tokens, as a model that takes long would."""

    blocks: frozenset[tuple[int, int]] = frozenset()

    def step(self) -> list[Event]:
        """Give the next token, or wait for ever."""
        made = len(self._tokens) - len(self.requests[-1].ids) if self._tokens is not None else -1
        if (len(self.requests) - 1, made) in self.blocks:
            sys.stderr.write(WAITS)
            sys.stderr.flush()
            while True:
                signal.pause()
        return super().step()


def make_model(folder: Path) -> SimpleNamespace:
    """What the commands ask of a Model."""
    return SimpleNamespace(
        path=folder,
        config=MossConfig(
            vocab_size=1043, n_positions=2048, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, dtype="float16"
        ),
        tokenizer=load_tokenizer(TOKENIZER),
        has_tokenizer=True,
        device="cpu",
        compute="fast",
        max_tokens=2048,
        budget=None,
        store=SimpleNamespace(streamed_bytes=0),
        placed=None,
    )


def make_engine(answers: Iterable[str | list[int]], *, context_size: int = 2048) -> BlockingEngine:
    """An engine that gives these answers."""
    tokenizer = load_tokenizer(TOKENIZER)
    end = tokenizer.marker("<eom>")
    scripts = [[*tokenizer.encode(" " + a), end] if isinstance(a, str) else a for a in answers]
    return BlockingEngine(scripts, context_size=context_size, last=end)


def install(engine: FakeEngine, replace: Callable[[Any, str, Any], None]) -> list[dict[str, Any]]:
    """Put the scripted model in place of loading; gives the list of what load_model was asked."""
    import moss_jt.engine
    import moss_jt.load

    asked: list[dict[str, Any]] = []

    def load_model(path: Path, **options: Any) -> SimpleNamespace:
        asked.append({"path": path, **options})
        return make_model(path)

    replace(moss_jt.load, "load_model", load_model)
    replace(moss_jt.engine, "Engine", lambda model: engine)
    return asked


def strike_background_task() -> None:
    """Have SIGTERM come while a background task of the line editor runs, once a prompt is shown."""
    from prompt_toolkit.application import Application

    async def poll(app: Application[Any]) -> None:
        await asyncio.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)

    Application._poll_output_size = poll  # type: ignore[method-assign, assignment]


def main() -> None:
    """Run moss-jt with the script named by the first argument."""
    if os.environ.get("SIGTERM_IN_BACKGROUND"):
        strike_background_task()
    from moss_jt.cli.main import main as moss_jt_main

    script = json.loads(Path(sys.argv.pop(1)).read_text("utf-8"))
    engine = make_engine(script["answers"])
    engine.blocks = frozenset((request, token) for request, token in script.get("blocks", []))
    install(engine, setattr)
    moss_jt_main()


if __name__ == "__main__":
    main()

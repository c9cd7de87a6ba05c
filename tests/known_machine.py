"""A machine whose rates are known, for tests of what is predicted."""

from __future__ import annotations

from pathlib import Path

import pytest

from moss_jt.calibrate import Calibration, DiskRate, KernelFound, Wanted, disk_of
from moss_jt.predict import Spread
from moss_jt.progress import Progress


def same(value: float) -> Spread:
    """A measurement without noise."""
    return Spread(value, value, value)


def known(folder: Path) -> Calibration:
    """45 GB/s of memory, a disk of 2 GB/s, and every kernel of 16B models measured."""
    return Calibration(
        when="2026-01-01T00:00Z",
        memory=same(45e9),
        fp32=same(5e11),
        int8=same(2e12),
        disks={disk_of(folder): DiskRate(same(2e9), same(2e9), 1e-10)},
        kernels={
            "int4 fast": KernelFound(same(40e9), same(1e12)),
            "int8 fast": KernelFound(same(42e9), same(1e12)),
            "float16": KernelFound(same(44e9), same(4e11)),
        },
        attention={"float16": same(30e9)},
        layer_s=0.0003,
        token_s=0.001,
    )


def install(monkeypatch: pytest.MonkeyPatch, *, free: int) -> list[Wanted]:
    """Let `fit` find that machine, with so much memory free; returns what will be asked of the calibration."""
    asked: list[Wanted] = []

    def calibrate(wanted: Wanted, *, again: bool, progress: Progress | None) -> Calibration:
        asked.append(wanted)
        return known(wanted.folder)

    monkeypatch.setattr("moss_jt.fit.calibrate", calibrate)
    monkeypatch.setattr("moss_jt.fit.automatic_memory", lambda: free)
    return asked

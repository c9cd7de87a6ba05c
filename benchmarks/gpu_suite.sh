#!/bin/sh
# Everything that only a CUDA device can tell, each result kept under benchmarks/results/ when it is measured.
#
#   sh benchmarks/gpu_suite.sh [--wheels DIR] [--only PART,PART] [--layers N] [--caps GIB,GIB]
#
# Parts: bandwidth kernels golden products attention resident batch context caps share peers offload swap jittor
#
# Without a device it says "not measured" and exits with 0. --wheels names a folder of wheels for a machine without
# network; what Python has already is used in any case. PYTHON names another Python.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
WHEELS=
if [ "${1:-}" = --wheels ]; then
    WHEELS=$2
    shift 2
fi
if [ -n "$WHEELS" ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
fi
PYTHONPATH=. exec "$PYTHON" benchmarks/gpu.py --save "$@"

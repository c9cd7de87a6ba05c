#!/bin/sh
# Everything that only a CUDA device can tell, each result kept under benchmarks/results/ when it is measured.
#
#   sh benchmarks/gpu_suite.sh [--wheels DIR] [--only PART,PART] [--layers N] [--caps GIB,GIB]
#
# Parts: bandwidth kernels golden products attention resident batch context caps share train peers offload swap jittor
#
# Without a device it says "not measured" and exits with 0. --wheels names a folder of wheels for a machine without
# network: jittor and astunparse where they are not installed; what Python has already is used in any case. PYTHON names
# another Python. In a copy without .git MOSS_JT_COMMIT=$(git rev-parse --short=12 HEAD) tells results which commit it is.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
WHEELS=
for word; do # of the command line, once round: what is not ours stays
    shift
    case ${expects:-} in
    wheels) WHEELS=$word expects= ;;
    *) case $word in
        --wheels) expects=wheels ;;
        --wheels=*) WHEELS=${word#*=} ;;
        *) set -- "$@" "$word" ;;
        esac ;;
    esac
done
if [ -n "$WHEELS" ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
fi
PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} exec "$PYTHON" benchmarks/gpu.py --save "$@"

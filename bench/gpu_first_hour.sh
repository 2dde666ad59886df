#!/usr/bin/env bash
# Tests and measures this library on a machine with a GPU, and packs the outcome into one file to send back.
#   bench/gpu_first_hour.sh [FOLDER]    writes FOLDER (gpu-first-hour by default) and FOLDER.tar.gz, within an hour
# Before: git clone, then pip install -e ".[dev]" with a torch for the GPU. If installed, FlashAttention, the peers of
# the benchmarks (pip install ".[peers]") and compute-sanitizer (CUDA toolkit) take part. No network is used.
# A part that fails does not stop the others. Ctrl-C stops: what is there is packed. A second call with the same FOLDER
# runs the parts that have not passed, all of them if the commit has changed. FOLDER/summary.md says what happened.
# The packed file holds logs, tables and figures, no weights and no text; versions of the machine's packages and data of
# its GPUs and processors. Environment variables are left out, and names of home folder and machine are replaced.
#   PYTHON=python3    the interpreter with torch
#   MINUTES=60        for all parts; the limit of each is scaled
#   PARTS="a b"       only these: facts tests operators sanitizer tune benchmarks report training several_gpus corpus
#                     experiment
#   NAME_ARGS=...     options appended to the commands of the part NAME, such as BENCHMARKS_ARGS="--scale small"
#   CORPUS=FILE       the experiment's text (see experiment_gpu.sh); else text files of the installed Python packages
# The exit status is 0 if no part failed, 1 if one did, 130 after Ctrl-C.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$checkout${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m bench.gpu_first_hour "${1:-gpu-first-hour}"

#!/usr/bin/env bash
# Runs the experiment on one GPU, without network: A, B and C with three seeds at 42M parameters, then one seed at 124M.
#   bench/experiment_gpu.sh CORPUS FOLDER [options of `patchkernels experiment`]
# CORPUS is a file made by `patchkernels corpus` or bench/linux_corpus.sh (330 MB of kernel source have 110M tokens). A
# call ends within $MINUTES + 1 minutes (9 by default). Exit code 75 means that more is left to do: call it again with
# the same arguments.
# FOLDER/42m and FOLDER/124m hold report.md, results.jsonl and figures.
set -euo pipefail

corpus=${1:?usage: bench/experiment_gpu.sh CORPUS FOLDER [options]}
folder=${2:?usage: bench/experiment_gpu.sh CORPUS FOLDER [options]}
shift 2
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$checkout${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 PYTHONUNBUFFERED=1

# Runs an experiment in the minutes that are left of this call. If none are left, the next call begins with it.
experiment() {
	left=$(awk -v all="${MINUTES:-8}" -v spent="$SECONDS" 'BEGIN { print all - spent / 60 }')
	awk -v left="$left" 'BEGIN { exit (left > 0) }' && exit 75
	"${PYTHON:-python3}" -m patchkernels experiment --budget gpu --minutes "$left" \
		--data.path "$corpus" --data.cache-dir "$folder/cache" "$@"
}

experiment --out "$folder/42m" "$@"
# The learning rate is a usual one for this size. Tuning it here would cost more than the runs themselves.
experiment --out "$folder/124m" --model 124m --seeds 1 --no-tune --lr 6e-4 "$@"

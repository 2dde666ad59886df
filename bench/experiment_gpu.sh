#!/usr/bin/env bash
# The experiment on one GPU, also without network: three seeds of A, B, C at 42M parameters, then one seed at 124M.
#   bench/experiment_gpu.sh CORPUS FOLDER [options of `patchkernels experiment`]
# CORPUS is a file that `patchkernels corpus` or bench/linux_corpus.sh made (330 MB of kernel source: 110M tokens). A call
# ends within 9 minutes ($MINUTES + 1), with exit code 75 as long as there is more to do: call it again with the same words.
# FOLDER/42m and FOLDER/124m hold report.md, results.jsonl and figures.
set -euo pipefail

corpus=${1:?usage: bench/experiment_gpu.sh CORPUS FOLDER [options]}
folder=${2:?usage: bench/experiment_gpu.sh CORPUS FOLDER [options]}
shift 2
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$checkout${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 PYTHONUNBUFFERED=1

# The minutes that are left of this call are given to what is run next; with none left, the next call begins with it.
experiment() {
	left=$(awk -v all="${MINUTES:-8}" -v spent="$SECONDS" 'BEGIN { print all - spent / 60 }')
	awk -v left="$left" 'BEGIN { exit (left > 0) }' && exit 75
	"${PYTHON:-python3}" -m patchkernels experiment --budget gpu --minutes "$left" \
		--data.path "$corpus" --data.cache-dir "$folder/cache" "$@"
}

experiment --out "$folder/42m" "$@"
# at a customary rate: tuning it here would cost more than the runs
experiment --out "$folder/124m" --model 124m --seeds 1 --no-tune --lr 6e-4 "$@"

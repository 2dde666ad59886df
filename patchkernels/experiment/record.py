"""The files that an experiment writes into its folder besides the report.

    experiment.json          the settings, the corpus and the provenance of one experiment
    runs/NAME/result.json    the final values and the evaluations of a finished run
    results.jsonl            all of this, one JSON object per line, for other programs

The report is written from the same data: the record of the experiment and the results of its runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from patchkernels.data.corpus import Corpus
from patchkernels.experiment.comparison import SLOT_LOSSES, TOKEN_LOSS, Result
from patchkernels.experiment.config import ExperimentConfig
from patchkernels.experiment.provenance import provenance
from patchkernels.files import replace_file
from patchkernels.model.cost import count_parameters
from patchkernels.training.processes import choose_device

FINAL_VALUES = ("raw_tokens", "flops", "seconds", "compile_seconds", TOKEN_LOSS, "validation_bits_per_byte")
EVALUATION_VALUES = ("step", "phase", "patch_size", *FINAL_VALUES, SLOT_LOSSES)


def experiment_record(
    config: ExperimentConfig, corpus: Corpus, tokens: int, piece_tokens: int, jobs: int
) -> dict[str, Any]:
    """The content of ``experiment.json``. A reads ``tokens`` raw tokens, cut into pieces of ``piece_tokens``."""
    budget = config.effective_budget
    base = budget.base
    return {
        "tokens": tokens,
        "piece_tokens": piece_tokens,
        "phases": config.phases,
        "parameters": count_parameters(base.model.architecture(vocab_size=corpus.vocab_size)),
        "accumulation": base.run.accumulation,
        "tune": config.tune,
        "jobs": jobs,
        "warmup": base.optimizer.warmup,
        "decay": base.optimizer.decay,
        "budget": {
            "model": base.model.preset,
            "tokens": base.schedule.tokens,
            "vocab_size": base.data.vocab_size,
            "batch_size": base.schedule.batch_size,
            "context": base.schedule.context,
            "lr": base.optimizer.lr,
            "seeds": budget.seeds,
            "minutes": budget.minutes,
            "bf16": base.run.bf16,
            "compile": base.run.compile,
            "eval_every": base.log.eval_every,
            "eval_rows": base.log.eval_rows,
        },
        "arms": {name: arm.record() for name, arm in config.known_arms.items()},
        "corpus": {
            "origin": corpus.origin,
            "digest": corpus.digest,
            "documents": corpus.documents,
            "tokens": {"train": len(corpus.train), "validation": len(corpus.validation)},
            "bytes_per_token": corpus.bytes_per_token,
            "vocab_size": corpus.vocab_size,
        },
        **provenance(choose_device(base.run.device)),
    }


def piece_tokens_of(out: Path, whole_rows: int) -> int:
    """The pieces of the experiment in ``out`` if they are multiples of ``whole_rows`` tokens; else ``whole_rows``."""
    file = out / "experiment.json"
    there = int(read_json(file, {"piece_tokens"})["piece_tokens"]) if file.exists() else whole_rows
    return whole_rows if there % whole_rows else there


def claim_folder(out: Path, record: dict[str, Any]) -> None:
    """Writes ``experiment.json`` into ``out``, unless that is the folder of another experiment.

    It is still the same experiment with more arms, seeds or learning rates, other ``minutes`` or ``jobs``, another
    commit, or the same text under another name. ``record["commit"]`` then lists all commits that the folder's runs were
    made with, and ``record["arms"]`` all arms.

    Raises:
        ValueError: the folder's experiment has other settings, or its ``experiment.json`` is damaged.
    """
    file = out / "experiment.json"
    if file.exists():
        old = read_json(file, {"budget", "corpus", "commit", "arms"})
        commits = [*(old["commit"] or "").split(", "), record["commit"] or ""]
        new = json.loads(json.dumps(record))  # as it would be read back from a file, with lists in place of tuples
        for settings in (old, new):
            for part, key in (("budget", "seeds"), ("budget", "lr"), ("budget", "minutes"), ("corpus", "origin")):
                settings[part].pop(key, None)
        record["arms"] = {**old["arms"], **record["arms"]}
        for name in set(old["arms"]) ^ set(new["arms"]):
            old["arms"].pop(name, None), new["arms"].pop(name, None)
        differing = [key for key in new if key not in ("commit", "date", "jobs", "tune") and new[key] != old.get(key)]
        if differing:
            changes = "; ".join(f"{key}: {old.get(key)} there, {new[key]} here" for key in differing)
            raise ValueError(f"{out} holds another experiment ({changes}); choose another --out")
        record["commit"] = ", ".join(dict.fromkeys(filter(None, commits))) or None
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, record)


def run_result(arm: str, phases: str, seed: int, lr: float, log: list[dict[str, Any]]) -> Result:
    """The result of a run, with everything from its log that the report needs.

    Training losses are left out: in a patch phase they are not comparable with the validation losses that arms are
    compared by.
    """
    curve = [{key: line[key] for key in EVALUATION_VALUES if key in line} for line in log if TOKEN_LOSS in line]
    last = curve[-1]
    return {
        "arm": arm,
        "seed": seed,
        "lr": lr,
        "phases": phases,
        **{key: last[key] for key in FINAL_VALUES},
        "steps": last["step"],
        "raw_tokens_per_second": last["raw_tokens"] / last["seconds"],
        **{key: log[0][key] for key in ("initial_losses", "initial_slot_losses")},
        "curve": curve,
    }


def write_results(out: Path, record: dict[str, Any], results: Iterable[Result], finished: bool) -> None:
    """Writes ``results.jsonl``: a line of kind "experiment", then for each run a "run" and its "evaluation" lines."""
    lines: list[dict[str, Any]] = [{"kind": "experiment", "finished": finished, **record}]
    for result in results:
        identity = {key: result[key] for key in ("arm", "seed", "lr")}
        lines.append({"kind": "run", **{key: value for key, value in result.items() if key != "curve"}})
        lines += [{"kind": "evaluation", **identity, **point} for point in result.get("curve", [])]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    replace_file(out / "results.jsonl", lambda path: path.write_text(text))


def write_json(file: Path, value: dict[str, Any]) -> None:
    replace_file(file, lambda path: path.write_text(json.dumps(value, indent=1)))


def read_json(file: Path, keys: set[str]) -> dict[str, Any]:
    """The JSON object in a file. ``ValueError``, with the file's name, if there is none or it lacks one of ``keys``."""
    try:
        value: dict[str, Any] = json.loads(file.read_text())
        if not (isinstance(value, dict) and keys <= value.keys()):
            raise ValueError(f"without {', '.join(sorted(keys))}")
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): remove it, and what it held is made again") from error
    return value

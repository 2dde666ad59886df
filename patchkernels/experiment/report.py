"""The experiment's report: one Markdown file and its figures, from the results of the runs.

Arms are compared by token-level validation loss alone. A patch phase's own loss is the mean over K tokens, each of them
predicted from what precedes the whole patch. This is another quantity and has a figure of its own.

Every function that yields or returns text here writes one part of the report, in Markdown, from ``experiment.json``
(``record``) and the results of the runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from patchkernels.experiment.comparison import (
    CONFIDENCE,
    TOKEN_LOSS,
    Groups,
    Result,
    compared_runs,
    differences,
    evaluation_at_switch,
    is_token_level,
    mean_of,
    recovered_share,
    rho,
    runs_at_best_rates,
    same_compute,
    token_level_at_equal_compute,
)
from patchkernels.experiment.config import MAIN_ARMS
from patchkernels.experiment.figures import draw_cost, draw_loss, draw_slots, has_slot_losses
from patchkernels.files import replace_file
from patchkernels.training.config import OptimizerConfig

RECOVERY_ROWS = 12  # at most, of a table of evaluations since the switch, besides those at powers of two


def write_report(out: Path, record: dict[str, Any], results: list[Result], lr: float | None, finished: bool) -> None:
    """Writes ``report.md`` and its figures; ``lr`` is the rate at which all arms are compared."""
    groups = compared_runs(results, lr)
    figures = []
    if groups:
        draw_loss(out / "loss.png", groups)
        figures.append("![Validation loss](loss.png)")
    if len(groups) > len(MAIN_ARMS) and "A" in groups:
        draw_cost(out / "cost.png", groups)
        figures.append("![Loss at the end against compute](cost.png)")
    if has_slot_losses(groups):
        draw_slots(out / "slots.png", groups)
        figures.append("![Loss of each slot in the patch phase](slots.png)")
    parts = [
        "# Patch-level training against token-level training",
        _provenance(record, results, finished),
        "## Outcome",
        *_outcome(record, groups),
        _diverged_runs(results, lr),
        *figures,
        *_recovery(groups),
        "## Settings",
        *_settings(record, groups, lr),
        "## Learning rate",
        *_learning_rates(results, lr),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    replace_file(out / "report.md", lambda path: path.write_text(text))


def mean_and_range(values: Sequence[float], form: str = ".3f") -> str:
    """The mean, and in brackets the lowest and the highest value unless they print the same."""
    mean, low, high = (f"{value:{form}}" for value in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def table(columns: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns), *rows])


def _provenance(record: dict[str, Any], results: list[Result], finished: bool) -> str:
    """Date, device, versions and commit; whether the experiment is finished; and how its losses are measured."""
    commit = f", commit {record['commit']}" if record["commit"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    state = f"{len(results)} runs" + ("." if finished else " so far: **unfinished**, the same command goes on.")
    return (
        f"{record['date']}; {record['device']}; {versions}{commit}. {state}\n\n"
        "Losses are per token, in nats, on the same held-out text and context for all arms and in all phases. Where "
        "there are several seeds a figure is their mean (lowest to highest)."
    )


def _outcome(record: dict[str, Any], groups: Groups) -> Iterator[str]:
    """The table of the arms. Once A, B and C are there, also ρ, B's distance from A and C, and the losses by seed."""
    if not groups:
        yield "No arm is finished at the chosen learning rate yet."
        return
    yield table(
        ["arm", "", "steps", "raw tokens", "FLOPs", "of A's", "seconds", "of A's", "compiling, s", "raw tokens/s",
         "loss at the switch", "loss at the end", "bits per byte"],
        [_outcome_row(arm, record["arms"][arm]["title"], runs, groups.get("A", [])) for arm, runs in groups.items()],
    )  # fmt: skip
    if set(MAIN_ARMS) <= set(groups):
        for arm, runs in groups.items():
            if arm not in ("A", "C") and same_compute(runs[0], groups["C"][0]):
                yield from _rho_of(arm, groups)
        yield (
            "ρ = 1: as good as token-level training on all data, at B's share of its compute. ρ = 0: no better than "
            "token-level training at that compute. Below 0: worse than that."
        )
        if gaps := _gaps_of_b(groups):
            yield gaps
        if len(groups) > len(MAIN_ARMS):
            yield "All arms are at A's best learning rate; of the others only B and C were tuned."
            yield _at_equal_compute(groups)
        yield _losses_by_seed(groups)


def _outcome_row(arm: str, title: str, runs: list[Result], runs_of_a: list[Result]) -> list[str]:
    """An arm's row in the table of the outcome. Its seconds are compared with those of A's run of the same seed."""
    first = runs[0]
    flops_ratio = f"{first['flops'] / runs_of_a[0]['flops']:.3f}" if runs_of_a else ""
    time_ratios = [run["seconds"] / a["seconds"] for run in runs for a in runs_of_a if a["seed"] == run["seed"]]
    at_switch = [point[TOKEN_LOSS] for run in runs if (point := evaluation_at_switch(run))]
    return [
        arm,
        title,
        f"{first['steps']:,}",
        f"{first['raw_tokens']:,}",
        f"{first['flops']:.3e}",
        flops_ratio,
        mean_and_range([run["seconds"] for run in runs], ".0f"),
        mean_and_range(time_ratios, ".2f") if time_ratios else "",
        mean_and_range([run["compile_seconds"] for run in runs], ".1f"),
        mean_and_range([run["raw_tokens_per_second"] for run in runs], ",.0f"),
        mean_and_range(at_switch) if at_switch else "",
        mean_and_range([run[TOKEN_LOSS] for run in runs]),
        mean_and_range([run["validation_bits_per_byte"] for run in runs]),
    ]


def _rho_of(arm: str, groups: Groups) -> Iterator[str]:
    """ρ of one arm: its mean over the seeds, and its value for each seed."""
    by_seed = rho(groups, arm)
    defined = [value for value in by_seed.values() if value is not None]
    mean = mean_and_range(defined) if defined else "undefined"
    each = ", ".join("undefined" if value is None else f"{value:.3f}" for value in by_seed.values())
    yield f"**ρ of {arm} = (L_C - L_{arm}) / (L_C - L_A) = {mean}**; by seed: {each or 'none'}."
    if len(defined) < len(by_seed):
        yield "ρ is undefined where A is no better than C: more compute brought nothing there."


def _gaps_of_b(groups: Groups) -> str:
    """A sentence on how far B ended from C and from A on average, with an interval, and whether all seeds agree."""
    phrases = []
    for other, what in (("C", "at equal compute (C)"), ("A", "at equal data (A)")):
        gaps = differences(groups["B"], groups[other])
        if not gaps:
            continue
        mean = sum(gaps) / len(gaps)
        same_sign = all((gap > 0) == (mean > 0) for gap in gaps)
        word = "worse" if mean > 0 else "better"
        phrases.append(
            f"{abs(mean):.3f} {word} {what}{_interval(gaps)}{'' if same_sign else ', but not in every seed'}"
        )
    return f"Patch training (B) ended {'; '.join(phrases)}." if phrases else ""


def _interval(gaps: list[float]) -> str:
    """The interval of a mean of differences of losses, and the p value of a paired t test. Empty for one seed."""
    mean = mean_of(gaps)
    if mean is None:
        return ""
    return f" (difference {mean.low:+.3f} to {mean.high:+.3f} with {CONFIDENCE:.0%} confidence, p = {mean.p_value:.2g})"


def _at_equal_compute(groups: Groups) -> str:
    """The table of the arms with patches, in the order of their compute, each against token-level training with it."""
    rows = []
    for arm, runs in sorted(groups.items(), key=lambda item: float(item[1][0]["flops"])):
        if is_token_level(runs):
            continue
        cost = f"{runs[0]['flops'] / groups['A'][0]['flops']:.3f}"
        other = token_level_at_equal_compute(arm, groups)
        gaps = differences(runs, groups[other]) if other else []
        difference = f"{sum(gaps) / len(gaps):+.4f}" if gaps else ""
        if mean := mean_of(gaps):
            difference += f" ({mean.low:+.4f} to {mean.high:+.4f})"
        against = f"{other}: {_mean_loss(groups[other])}" if other else ""
        rows.append([arm, cost, _mean_loss(runs), against, difference, f"{mean.p_value:.2g}" if mean else ""])
    interval = f"({CONFIDENCE:.0%} interval)"
    return table(
        ["arm", "of A's compute", f"loss at the end {interval}", "token-level", f"difference {interval}", "p"], rows
    )


def _losses_by_seed(groups: Groups) -> str:
    """The table of the losses at the end: one row per arm, one column for each of A's seeds."""
    seeds = sorted({run["seed"] for run in groups["A"]})
    rows = []
    for arm, runs in groups.items():
        of_seed = {run["seed"]: f"{run[TOKEN_LOSS]:.4f}" for run in runs}
        rows.append([arm, *(of_seed.get(seed, "") for seed in seeds)])
    return table(["loss at the end", *(f"seed {seed}" for seed in seeds)], rows)


def _diverged_runs(results: list[Result], lr: float | None) -> str:
    """The runs that are left out of the comparison because they diverged at the chosen rate."""
    diverged = [f"{run['arm']} of seed {run['seed']}" for run in results if run["lr"] == lr and "diverged" in run]
    return f"Diverged, and left out above: {', '.join(diverged)}." if diverged else ""


def _recovery(groups: Groups) -> Iterator[str]:
    """For every arm with patches, the validation losses by the number of steps since its last switch."""
    for arm, runs in groups.items():
        switch = evaluation_at_switch(runs[0])
        if switch is None:
            continue
        rows = []
        for point in _evaluations_to_show(runs[0], switch["step"]):
            of_seeds = [other for run in runs for other in run["curve"] if other["step"] == point["step"]]
            rows.append([
                f"{point['step'] - switch['step']:,}",
                f"{point['raw_tokens']:,}",
                f"{point['flops']:.3e}",
                mean_and_range([other["seconds"] for other in of_seeds], ".0f"),
                mean_and_range([other[TOKEN_LOSS] for other in of_seeds]),
                mean_and_range([other["validation_bits_per_byte"] for other in of_seeds]),
            ])  # fmt: skip
        yield f"### Recovery of {arm}"
        yield table(
            ["steps since the switch", "raw tokens", "FLOPs", "seconds", "validation loss", "bits per byte"], rows
        )


def _evaluations_to_show(run: Result, switch: int) -> list[dict[str, Any]]:
    """The evaluations from this step on: those 0, 1, 2, 4, 8, ... steps after it, the last, and some in between."""
    after = [point for point in run["curve"] if point["step"] >= switch]
    shown = {point["step"]: point for point in after if (point["step"] - switch).bit_count() <= 1}
    others = [point for point in after[::-1] if point["step"] not in shown]
    shown |= {point["step"]: point for point in others[:: -(-len(others) // RECOVERY_ROWS) or 1]}
    return [shown[step] for step in sorted(shown)]


def _settings(record: dict[str, Any], groups: Groups, lr: float | None) -> Iterator[str]:
    """The corpus, the model, the optimizer, the division of the text, and the differences between the arms."""
    yield _corpus(record["corpus"])
    yield _model_and_optimizer(record)
    yield (
        f"The text is cut into pieces of {record['piece_tokens']:,} tokens, which the seed permutes. A and B read "
        f"{record['tokens']:,} raw tokens, the same pieces and no token twice, and C the first of these pieces; "
        "within a phase their rows are shuffled. C's schedule, with its decay, ends where its compute does."
    )
    if groups and lr is not None:
        rows = []
        for arm, runs in groups.items():
            phases, changes = record["arms"][arm]["phases"], record["arms"][arm]["changes"]
            otherwise = ", ".join(f"{name} = {value}" for name, value in changes.items())
            scope = "anew in each phase, in all " if "lr_scope" in changes else ""
            rows.append([arm, phases, otherwise, f"{runs[0]['steps']:,}", f"{scope}{_warmup_steps(record)}"])
        yield table(["arm", "phases (K:share)", "otherwise", "steps", "of them warmup"], rows)


def _corpus(corpus: dict[str, Any]) -> str:
    return (
        f"Corpus: {corpus['origin']}; {corpus['documents']['train']:,} documents and {corpus['tokens']['train']:,} "
        f"tokens to train on, {corpus['documents']['validation']:,} and {corpus['tokens']['validation']:,} held out, "
        "split by file name (or content where there are no files), duplicates dropped; vocabulary "
        f"{corpus['vocab_size']:,}, {corpus['bytes_per_token']:.3f} bytes a token on the held-out text; digest "
        f"{corpus['digest']}."
    )


def _model_and_optimizer(record: dict[str, Any]) -> str:
    budget, held_out_tokens = record["budget"], record["corpus"]["tokens"]["validation"]
    optimizer = OptimizerConfig()  # an experiment leaves these settings as they are
    return (
        f"Model: {budget['model']}, {record['parameters']:,} parameters, the same code in all arms; A reads "
        f"{record['tokens'] / record['parameters']:.3g} tokens a parameter. "
        f"A step is {budget['batch_size']} rows of {budget['context']} positions in every phase: a patch step has the "
        "FLOPs of a token-level step and reads K times the raw tokens. Validation: "
        f"{min(budget['eval_rows'], held_out_tokens // budget['context'])} rows of {budget['context']} "
        f"tokens. AdamW {optimizer.betas}, weight decay {optimizer.weight_decay}, clip {optimizer.clip}; warmup over "
        f"{_warmup_steps(record)} steps ({record['warmup']:.0%} of A's) in every arm, constant, then linear to 0 over "
        f"the last {record['decay']:.0%} of a run's steps (WSD); "
        f"{'bf16 autocast' if budget['bf16'] else 'fp32'}{', compiled' if budget['compile'] else ''}. "
        "Seconds are those of training steps; compiling, evaluation and saving are left out."
        f"{f' {jobs} runs were made at the same time.' if (jobs := record.get('jobs', 1)) > 1 else ''}"
    )


def _warmup_steps(record: dict[str, Any]) -> int:
    """The number of steps over which the learning rate rises, the same in every arm."""
    steps: float = record["tokens"] / (record["budget"]["batch_size"] * record["budget"]["context"])
    return round(float(record["warmup"]) * steps)


def _learning_rates(results: list[Result], lr: float | None) -> Iterator[str]:
    """The rates that A, B and C were tried at with the first seed, and ρ with each arm at its own best rate."""
    seed = min((result["seed"] for result in results), default=0)
    rows = []
    best = runs_at_best_rates(results)
    edges = []  # arms whose best rate is the lowest or the highest that was tried
    for arm in MAIN_ARMS:
        tried = sorted((r for r in results if r["arm"] == arm and r["seed"] == seed), key=lambda r: float(r["lr"]))
        if arm in best and best[arm][0]["lr"] in (tried[0]["lr"], tried[-1]["lr"]):
            edges.append(arm)
        for run in tried:
            loss = "diverged" if "diverged" in run else f"{run[TOKEN_LOSS]:.4f}"
            rows.append([arm, f"{run['lr']:.3g}{' (used)' if run['lr'] == lr else ''}", loss])
    yield table(["arm", "learning rate", f"loss at the end, seed {seed}"], rows)
    if edges:
        yield f"The best rate of {' and '.join(edges)} is the lowest or highest that was tried."
    if len(rows) > 3 and set(MAIN_ARMS) <= set(best):
        yield "Each arm at the best of its own rates, tuned with the first seed:"
        yield table(
            ["arm", "learning rate", "seeds", f"mean loss at the end ({CONFIDENCE:.0%} interval)"],
            [[arm, f"{runs[0]['lr']:.3g}", str(len(runs)), _mean_loss(runs)] for arm, runs in best.items()],
        )
        a, b, c = (best[arm][0][TOKEN_LOSS] for arm in "ABC")
        share = recovered_share(a, b, c)
        yield f"With the first seed ρ is {'undefined' if share is None else f'{share:.3f}'} there. {_gaps_of_b(best)}"


def _mean_loss(runs: list[Result]) -> str:
    """The mean of the losses at the end, with its interval if there are several."""
    losses = [float(run[TOKEN_LOSS]) for run in runs]
    mean = mean_of(losses)
    return f"{losses[0]:.4f}" if mean is None else f"{mean.value:.4f} ({mean.low:.4f} to {mean.high:.4f})"

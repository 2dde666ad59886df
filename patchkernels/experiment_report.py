"""The experiment's report: one Markdown file and its figures, from the results of the runs.

Arms are compared by token-level validation loss alone. A patch phase's own loss is the mean over K tokens given what
precedes the whole patch: another quantity, which has a figure of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from patchkernels.pretrained import replace_file

Result = dict[str, Any]
COMPARED = "validation_loss"  # token-level in every phase
AXES = (("raw_tokens", "raw tokens"), ("flops", "FLOPs (counted)"), ("seconds", "training seconds"))
SAME_COST = 0.01  # arms whose FLOPs differ by less, relatively, are at equal compute


def write_report(out: Path, settings: dict[str, Any], results: list[Result], lr: float | None, finished: bool) -> None:
    """``report.md``, ``loss.png`` and ``slots.png`` in ``out``; ``lr`` is the rate that all arms are compared at."""
    groups = compared(results, lr)
    figures = []
    if groups:
        _draw_loss(out / "loss.png", groups)
        figures.append("![Validation loss](loss.png)")
    if any(_slots(runs) for runs in groups.values()):
        _draw_slots(out / "slots.png", groups)
        figures.append("![Loss of each slot in the patch phase](slots.png)")
    parts = [
        "# Patch-level training against token-level training",
        _said(settings, results, finished),
        "## Outcome",
        *_outcome(settings, groups),
        _diverged(results, lr),
        *figures,
        *_recovery(groups),
        "## Settings",
        *_settings(settings, groups, lr),
        "## Learning rate",
        *_rates(results, lr),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    replace_file(out / "report.md", lambda path: path.write_text(text))


def compared(results: list[Result], lr: float | None) -> dict[str, list[Result]]:
    """The runs at the rate that was chosen, by arm, in order of their seeds; those that diverged are left out."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result["lr"] == lr and "diverged" not in result:
            groups.setdefault(result["arm"], []).append(result)
    return {arm: sorted(runs, key=lambda run: run["seed"]) for arm, runs in groups.items()}


def rho(groups: dict[str, list[Result]], arm: str) -> dict[int, float | None]:
    """``(L_C - L_arm) / (L_C - L_A)`` by seed, where all three are; None where A is no better than C.

    Raises:
        ValueError: the arm does not have C's compute.
    """
    runs = [{run["seed"]: run for run in groups.get(name, [])} for name in ("A", "C", arm)]
    found = {}
    for seed in sorted(set(runs[0]) & set(runs[1]) & set(runs[2])):
        a, c, b = (by_seed[seed] for by_seed in runs)
        if abs(b["flops"] / c["flops"] - 1) > SAME_COST:
            raise ValueError(f"ρ is defined at equal compute: {arm} took {b['flops']:.3e} FLOPs, C {c['flops']:.3e}")
        found[seed] = recovered(a[COMPARED], b[COMPARED], c[COMPARED])
    return found


def recovered(a: float, b: float, c: float) -> float | None:
    """ρ: the share of what A's compute would bring beyond C's."""
    return (c - b) / (c - a) if c > a else None


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """The mean, and from where to where."""
    mean, low, high = (f"{value:{form}}" for value in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def table(columns: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns), *rows])


def _said(settings: dict[str, Any], results: list[Result], finished: bool) -> str:
    commit = f", commit {settings['commit']}" if settings["commit"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    state = f"{len(results)} runs" + ("." if finished else " so far: **unfinished**, the same command goes on.")
    return (
        f"{settings['date']}; {settings['device']}; {versions}{commit}. {state}\n\n"
        "Losses are per token, in nats, on the same held-out text and context for all arms and in all phases. Where "
        "there are several seeds a figure is their mean (lowest to highest)."
    )


def _outcome(settings: dict[str, Any], groups: dict[str, list[Result]]) -> Iterable[str]:
    if not groups:
        yield "No arm is finished at the chosen learning rate yet."
        return
    base = groups.get("A", [])
    rows = []
    for arm, runs in groups.items():
        first = runs[0]
        against = [run["flops"] / base[0]["flops"] for run in runs[:1]] if base else []
        time = [run["seconds"] / a["seconds"] for run in runs for a in base if a["seed"] == run["seed"]]
        switch = [point[COMPARED] for run in runs if (point := at_switch(run))]
        rows.append([
            arm, settings["arms"][arm]["title"], f"{first['steps']:,}", f"{first['raw_tokens']:,}",
            f"{first['flops']:.3e}", spread(against) if against else "",
            spread([run["seconds"] for run in runs], ".0f"),
            spread(time, ".2f") if time else "", spread([run["compile_seconds"] for run in runs], ".1f"),
            spread([run["raw_tokens_per_second"] for run in runs], ",.0f"), spread(switch) if switch else "",
            spread([run[COMPARED] for run in runs]), spread([run["validation_bits_per_byte"] for run in runs]),
        ])  # fmt: skip
    yield table(
        ["arm", "", "steps", "raw tokens", "FLOPs", "of A's", "seconds", "of A's", "compiling, s", "raw tokens/s",
         "loss at the switch", "loss at the end", "bits per byte"], rows,
    )  # fmt: skip
    if {"A", "B", "C"} <= set(groups):
        equal = [arm for arm in groups if arm not in ("A", "C")
                 and abs(groups[arm][0]["flops"] / groups["C"][0]["flops"] - 1) <= SAME_COST]  # fmt: skip
        for arm in equal:
            by_seed = rho(groups, arm)
            values = [value for value in by_seed.values() if value is not None]
            each = ", ".join("undefined" if value is None else f"{value:.3f}" for value in by_seed.values())
            mean = spread(values) if values else "undefined"
            yield f"**ρ of {arm} = (L_C - L_{arm}) / (L_C - L_A) = {mean}**; by seed: {each or 'none'}."
            if len(values) < len(by_seed):
                yield "ρ is undefined where A is no better than C: more compute brought nothing there."
        yield (
            "ρ = 1: as good as token-level training on all data, at B's share of its compute. ρ = 0: no better than "
            "token-level training at that compute. Below 0: worse than that."
        )
        if verdict := _verdict(groups):
            yield verdict
        seeds = sorted({run["seed"] for run in groups["A"]})
        yield table(
            ["loss at the end", *(f"seed {seed}" for seed in seeds)],
            [[arm, *(next((f"{r[COMPARED]:.4f}" for r in runs if r["seed"] == s), "") for s in seeds)]
             for arm, runs in groups.items()],
        )  # fmt: skip


def _diverged(results: list[Result], lr: float | None) -> str:
    lost = [f"{r['arm']} of seed {r['seed']}" for r in results if r["lr"] == lr and "diverged" in r]
    return f"Diverged, and left out above: {', '.join(lost)}." if lost else ""


def _verdict(groups: dict[str, list[Result]]) -> str:
    """B against the others, in words; by the mean, with whether every seed agrees."""
    ends = {arm: {run["seed"]: run[COMPARED] for run in groups[arm]} for arm in ("A", "B", "C")}
    said = []
    for other, what in (("C", "at equal compute (C)"), ("A", "at equal data (A)")):
        gaps = [ends["B"][seed] - ends[other][seed] for seed in ends["B"] if seed in ends[other]]
        if not gaps:
            continue
        mean = sum(gaps) / len(gaps)
        alike = all((gap > 0) == (mean > 0) for gap in gaps)
        word = "worse" if mean > 0 else "better"
        said.append(f"{abs(mean):.3f} {word} {what}{'' if alike else ', but not in every seed'}")
    return f"Patch training (B) ended {'; '.join(said)}." if said else ""


def at_switch(run: Result) -> dict[str, Any] | None:
    """The evaluation at the end of the last patch phase, before any token-level step."""
    patches = [point for point in run["curve"] if point["patch_size"] > 1 and point["step"] > 0]
    return patches[-1] if patches else None


def _recovery(groups: dict[str, list[Result]]) -> Iterable[str]:
    """Validation loss after the last switch, by steps since."""
    for arm, runs in groups.items():
        switch = at_switch(runs[0])
        if switch is None:
            continue
        points = [p for p in runs[0]["curve"] if p["step"] >= switch["step"]]
        rows = []
        for point in points:
            same = [p for run in runs for p in run["curve"] if p["step"] == point["step"]]
            rows.append([
                f"{point['step'] - switch['step']:,}", f"{point['raw_tokens']:,}", f"{point['flops']:.3e}",
                spread([p["seconds"] for p in same], ".0f"), spread([p[COMPARED] for p in same]),
                spread([p["validation_bits_per_byte"] for p in same]),
            ])  # fmt: skip
        yield f"### Recovery of {arm}"
        yield table(
            ["steps since the switch", "raw tokens", "FLOPs", "seconds", "validation loss", "bits per byte"], rows
        )


def _settings(settings: dict[str, Any], groups: dict[str, list[Result]], lr: float | None) -> Iterable[str]:
    budget, corpus = settings["budget"], settings["corpus"]
    yield (
        f"Corpus: {corpus['origin']}; {corpus['documents']['train']:,} documents and {corpus['tokens']['train']:,} "
        f"tokens to train on, {corpus['documents']['validation']:,} and {corpus['tokens']['validation']:,} held out, "
        "split by file name (or content where there are no files), duplicates dropped; vocabulary "
        f"{corpus['vocab_size']:,}, {corpus['bytes_per_token']:.3f} bytes a token on the held-out text; digest "
        f"{corpus['digest']}."
    )
    yield (
        f"Model: {budget['model']}, {settings['parameters']:,} parameters, the same code in all arms. "
        f"A step is {budget['batch_size']} rows of {budget['context']} positions in every phase: a patch step has the "
        "FLOPs of a token-level step and reads K times the raw tokens. Validation: "
        f"{min(budget['eval_rows'], corpus['tokens']['validation'] // budget['context'])} rows of {budget['context']} "
        "tokens. AdamW (0.9, 0.95), weight decay 0.1, clip 1.0; "
        f"warmup over {_warmup(settings)} steps ({settings['warmup']:.0%} of A's) in every arm, constant, then linear "
        f"to 0 over the last {settings['decay']:.0%} of a run's steps (WSD); "
        f"{'bf16 autocast' if budget['bf16'] else 'fp32'}{', compiled' if budget['compile'] else ''}. "
        "Seconds are those of training steps; compiling, evaluation and saving are left out."
    )
    yield (
        f"The text is cut into pieces of {settings['piece_tokens']:,} tokens, which the seed permutes. A and B read "
        f"{settings['tokens']:,} raw tokens, the same pieces and no token twice, and C the first of these pieces; "
        "within a phase their rows are shuffled. C's schedule, with its decay, ends where its compute does."
    )
    if groups and lr is not None:
        rows = []
        for arm, runs in groups.items():
            what, steps = settings["arms"][arm], runs[0]["steps"]
            changes = what["changes"]
            others = ", ".join(f"{k} = {v}" for k, v in changes.items())
            share = "anew in each phase, in all " if "lr_scope" in changes else ""
            rows.append([arm, what["phases"], others, f"{steps:,}", f"{share}{_warmup(settings)}"])
        yield table(["arm", "phases (K:share)", "otherwise", "steps", "of them warmup"], rows)


def _warmup(settings: dict[str, Any]) -> int:
    """Steps."""
    steps: float = settings["tokens"] / (settings["budget"]["batch_size"] * settings["budget"]["context"])
    return round(float(settings["warmup"]) * steps)


def _rates(results: list[Result], lr: float | None) -> Iterable[str]:
    seed = min((result["seed"] for result in results), default=0)
    rows = []
    best: dict[str, Result] = {}
    edges: list[str] = []  # arms whose best rate is the lowest or highest of theirs
    for arm in ("A", "B", "C"):
        tried = sorted((r for r in results if r["arm"] == arm and r["seed"] == seed), key=lambda r: float(r["lr"]))
        ended = [run for run in tried if "diverged" not in run]
        if ended:
            best[arm] = min(ended, key=lambda run: float(run[COMPARED]))
            edges += [arm] if best[arm] in (tried[0], tried[-1]) else []
        for run in tried:
            loss = "diverged" if "diverged" in run else f"{run[COMPARED]:.4f}"
            rows.append([arm, f"{run['lr']:.3g}{' (used)' if run['lr'] == lr else ''}", loss])
    yield table(["arm", "learning rate", f"loss at the end, seed {seed}"], rows)
    if len(rows) > 3 and {"A", "B", "C"} <= set(best):
        a, b, c = (best[arm][COMPARED] for arm in "ABC")
        ratio = recovered(a, b, c)
        yield (
            f"The rate was tuned on A. With each arm at the best of its own rates (seed {seed}) the losses are "
            f"A {a:.4f}, B {b:.4f}, C {c:.4f}, and ρ = {'undefined' if ratio is None else f'{ratio:.3f}'}."
            + (f" The best of {' and '.join(edges)} is the lowest or highest that was tried." if edges else "")
        )


def _axes(columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, sharey=True, squeeze=False)[0]


def _name(axis: Any, label: str) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set_xlabel(label)
    axis.xaxis.set_major_formatter(EngFormatter())
    axis.grid(alpha=0.3)


def _save(figure: Any, file: Path) -> None:
    replace_file(file, lambda path: figure.savefig(path, dpi=110, format="png"))


def _draw_loss(file: Path, groups: dict[str, list[Result]]) -> None:
    """Mean over seeds as a line, lowest to highest as a band; a dot at the switch."""
    figure, axes = _axes(3, 14, 4.2)
    longest = max(run["flops"] for runs in groups.values() for run in runs)
    shown = []
    for axis, (key, label) in zip(axes, AXES):
        for number, (arm, runs) in enumerate(groups.items()):
            points = list(zip(*([p for p in run["curve"] if p["step"] > 0] for run in runs)))
            x = [sum(p[key] for p in same) / len(same) for same in points]
            losses = [[p[COMPARED] for p in same] for same in points]
            mean = [sum(values) / len(values) for values in losses]
            color = f"C{number}"
            axis.plot(x, mean, color=color, label=arm, linewidth=1.5)
            axis.fill_between(
                x, [min(v) for v in losses], [max(v) for v in losses], color=color, alpha=0.25, linewidth=0
            )
            switch = at_switch(runs[0])
            for place, same in enumerate(points):
                if switch and same[0]["step"] == switch["step"]:
                    axis.plot([x[place]], [mean[place]], "o", color=color, markersize=5)
            shown += [value for value, same in zip(mean, points) if same[0]["flops"] > 0.08 * longest]
        _name(axis, label)
    low, high = min(shown), max(shown)
    margin = 0.05 * (high - low) or 0.05
    axes[0].set_ylim(low - margin, high + margin)
    axes[0].set_ylabel("token-level validation loss")
    axes[0].legend()
    _save(figure, file)


def _slots(runs: list[Result]) -> list[list[dict[str, Any]]]:
    """The evaluations with slot losses, seeds side by side."""
    return [list(same) for same in zip(*([p for p in r["curve"] if "validation_slot_losses" in p] for r in runs))]


def _draw_slots(file: Path, groups: dict[str, list[Result]]) -> None:
    patched = {arm: points for arm, runs in groups.items() if (points := _slots(runs))}
    figure, axes = _axes(len(patched), 5 * len(patched) + 1, 4)
    for axis, (arm, points) in zip(axes, patched.items()):
        points = [same for same in points if same[0]["step"] > 0]
        for number, size in enumerate(dict.fromkeys(len(same[0]["validation_slot_losses"]) for same in points)):
            of_size = [same for same in points if len(same[0]["validation_slot_losses"]) == size]
            for slot in range(size):
                values = [sum(p["validation_slot_losses"][slot] for p in same) / len(same) for same in of_size]
                axis.plot(
                    [same[0]["raw_tokens"] for same in of_size], values, color=f"C{number}", marker=".",
                    alpha=1 - 0.8 * slot / size, label=f"K = {size}, slot {slot + 1}",
                )  # fmt: skip
        axis.set_title(f"{arm}: patch-level losses", fontsize="medium")
        _name(axis, "raw tokens")
        axis.legend(fontsize="small")
    axes[0].set_ylabel("validation loss of the slot\n(not comparable with token-level loss)")
    _save(figure, file)

"""Tables and figures of benchmark results: ``python -m bench.report FILE...``.

It prints Markdown tables and draws figures beside each file: the contenders' times with the floor as a line, a
roofline, the parts of a training step, and the cost of a run over K.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from bench import OURS

SHARE = 2 / 3  # lambda: the share of its data that the run in the cost tables reads in patches
DATA_SHEET = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}  # dense bf16 TFLOP/s, from the vendor
Case = dict[str, Any]  # the values that Comparison.info returns for a contender


def load(file: Path) -> tuple[dict[str, Any], dict[str, list[Case]]]:
    """The machine of a file's results, and the cases of each comparison. ``ValueError`` if it holds no results."""
    try:
        content = json.loads(file.read_text())
        content["machine_info"]["peak"]
        machine = content["machine_info"] | {"commit": content["commit_info"]["id"], "date": content["datetime"]}
        groups: dict[str, list[Case]] = {}
        for benchmark in content["benchmarks"]:
            groups.setdefault(benchmark["group"], []).append(benchmark["extra_info"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no result of `pytest bench/ --benchmark-json`: {error!r}") from error
    return machine, groups


def comparisons_of(groups: dict[str, list[Case]], operator: str) -> list[list[Case]]:
    """The comparisons of an operator, each the list of its cases."""
    return [cases for cases in groups.values() if cases[0]["operator"] == operator]


def header(machine: dict[str, Any]) -> str:
    """Device, versions, commit, date and measured peaks in one line."""
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v != "not installed")
    absent = ", ".join(name for name, v in machine["versions"].items() if v == "not installed")
    on_gpu = machine["device_type"] == "cuda"
    more = f"CUDA {machine['cuda']}" if on_gpu else f"{machine['threads']} threads"
    peak = machine["peak"]
    return (
        f"{machine['device']}, {more}; {versions}; not installed: {absent or 'none'}. "
        f"Commit {machine['commit'][:10]}, {machine['date'][:10]}. "
        f"Measured peaks: {peak['tflops_per_second']:.4g} TFLOP/s, {peak['gigabytes_per_second']:.4g} GB/s."
    )


def table(columns: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(case: Case) -> str:
    """The median time, and half the interquartile range in percent of the median."""
    return f"{case['median_seconds'] * 1e3:.4g} ± {case['spread'] * 50:.0f} %"


def comparison_table(groups: list[list[Case]]) -> str:
    """One row per contender: time, ratio to ours, rate, share of the floor, memory beyond results, largest error."""
    rows = []
    for cases in groups:
        first = cases[0]
        shape = " ".join(f"{key}={value}" for key, value in first["shape"].items())
        for index, case in enumerate(sorted(cases, key=lambda c: c["median_seconds"])):
            extra = (case["peak_extra_bytes"] - case["result_bytes"]) / 2**20 if "peak_extra_bytes" in case else None
            rows.append([
                f"{first['case']}, {shape}, {first['dtype']}" if index == 0 else "",
                case["contender"],
                milliseconds(case),
                f"{1.0 if case['contender'] == OURS else case['ratio_to'][OURS]:.2f}",
                rate(case),
                f"{case['share_of_floor']:.0%}" if "share_of_floor" in case else "",
                "" if extra is None else f"{extra:.1f}",
                f"{max(case['relative_errors']):.1e}" if "relative_errors" in case else "",
            ])  # fmt: skip
        for name, reason in first["missing"].items():
            rows.append(["", name, f"missing: {reason}", "", "", "", "", ""])
    columns = ["case", "contender", "ms", "time / ours", "rate", "share of floor", "MiB beyond results", "error"]
    return table(columns, rows)


def rate(case: Case) -> str:
    """FLOPs per second if they are counted, else bytes per second, else nothing."""
    if "tflops_per_second" in case:
        return f"{case['tflops_per_second']:.3g} TFLOP/s"
    if "gigabytes_per_second" in case:
        return f"{case['gigabytes_per_second']:.3g} GB/s"
    return ""


def steps(groups: dict[str, list[Case]]) -> list[tuple[dict[str, Any], dict[str, Case]]]:
    """The comparisons of training steps: their shape, and their cases by contender."""
    return [
        (cases[0]["shape"], {c["contender"]: c for c in cases}) for cases in comparisons_of(groups, "training step")
    ]


def peak_tflops(machine: dict[str, Any]) -> tuple[float, str]:
    """The TFLOP/s that count as full utilisation, and their source: the data sheet or the measured matrix product."""
    for name, value in DATA_SHEET.items():
        if name in machine["device"]:
            return value, "data sheet"
    return machine["peak"]["tflops_per_second"], "measured product"


def step_table(machine: dict[str, Any], groups: dict[str, list[Case]]) -> str:
    """One row per training step: time, raw tokens per second, their ratio to K = 1, FLOP utilisation, memory."""
    peak, source = peak_tflops(machine)
    rows = []
    for shape, cases in steps(groups):
        base = cases["PatchLM, K=1"]
        for name, case in cases.items():
            rows.append([
                f"{shape['preset']}, {shape['rows']} x {shape['positions']}", name, milliseconds(case),
                f"{case['raw_tokens'] / case['median_seconds']:,.0f}",
                f"{speed_up(base, case):.2f}", f"{case['tflops_per_second'] / peak:.1%}",
                f"{case['peak_extra_bytes'] / 2**20:,.0f}",
            ])  # fmt: skip
        for name, reason in base["missing"].items():
            rows.append(["", name, f"missing: {reason}", "", "", "", ""])
    utilisation = f"FLOP utilisation ({source})"
    columns = ["model", "step", "ms", "raw tokens/s", "against K=1", utilisation, "MiB beyond state"]
    return table(columns, rows)


def speed_up(base: Case, case: Case) -> float:
    """The raw tokens per second of a step, divided by those of the step ``base``."""
    ratio = 1.0 if case is base else case["ratio_to"][base["contender"]]
    return float(case["raw_tokens"] / base["raw_tokens"] / ratio)


def costs(cases: dict[str, Case], share: float = SHARE) -> dict[int, tuple[float, float]]:
    """The cost, by K, of a run with ``share`` of its data in patches of K, against a run without patches.

    The pair is the cost in seconds and the cost in counted FLOPs.
    """
    base = cases["PatchLM, K=1"]
    found = {}
    for case in cases.values():
        if "flops_per_raw_token" in case:
            patch_size = case["raw_tokens"] // base["raw_tokens"]
            flops = case["flops_per_raw_token"] / base["flops_per_raw_token"]
            found[patch_size] = (share / speed_up(base, case) + 1 - share, share * flops + 1 - share)
    return found


def cost_table(groups: dict[str, list[Case]]) -> str:
    """One row per model and K: the cost of a run as measured, as counted, and by the formula."""
    rows = [
        [shape["preset"], str(k), f"{seconds:.3f}", f"{flops:.3f}", f"{SHARE / k + 1 - SHARE:.3f}"]
        for shape, cases in steps(groups)
        for k, (seconds, flops) in costs(cases).items()
    ]
    return table(["model", "K", "cost in seconds", "cost in counted FLOPs", "λ/K + 1 - λ"], rows)


def loop_table(groups: list[list[Case]]) -> str:
    """One row per training loop: time of a step, steps per second, and the time over the plain loop's of its kind."""
    rows = []
    for cases in groups:
        shape = cases[0]["shape"]
        model = f"{shape['model']}, V={shape['V']}, {shape['rows']} x {shape['positions']}"
        for case in cases:
            plain = case["contender"].replace(OURS, "plain loop")
            rows.append([
                model, case["contender"], f"{case['median_seconds'] / case['steps'] * 1e3:.2f}",
                f"± {case['spread'] * 50:.0f} %", f"{case['steps'] / case['median_seconds']:.1f}",
                "" if plain == case["contender"] else f"{case['ratio_to'][plain]:.2f}",
            ])  # fmt: skip
            model = ""
    return table(["model", "loop", "ms a step", "", "steps/s", "time / plain loop"], rows)


def report(file: Path) -> str:
    """The results in ``file`` as Markdown."""
    machine, groups = load(file)
    titles = {
        "patch_embedding": "Patch embedding",
        "patch_cross_entropy": "Cross entropy of given logits",
        "linear_patch_cross_entropy": "Fused linear cross entropy",
    }
    sections = [header(machine)]
    for operator, title in titles.items():
        if found := comparisons_of(groups, operator):
            sections += [f"### {title}", comparison_table(found)]
    if steps(groups):
        sections += ["### Training step", step_table(machine, groups)]
        sections += ["### Cost of a run with 2/3 of its data in patches", cost_table(groups)]
    if loops := comparisons_of(groups, "training loop"):
        sections += ["### Training loop", loop_table(loops)]
    return "\n\n".join(sections)


def draw(file: Path) -> list[Path]:
    """Draws the figures that the results in ``file`` allow, as PNGs beside it, and returns their paths."""
    from patchkernels.files import replace_file  # imported here because it imports torch, which the tables do not need

    machine, groups = load(file)
    drawn = []
    for name, function in FIGURES.items():
        figure = function(machine, groups)
        if figure is not None:
            figure.suptitle(f"{machine['device']}, {machine['date'][:10]}", fontsize=9)
            drawn.append(file.with_name(f"{file.stem}-{name}.png"))
            replace_file(drawn[-1], partial(figure.savefig, dpi=110, format="png"))
    return drawn


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def bars(machine: dict[str, Any], groups: dict[str, list[Case]], operator: str) -> Any:
    """One plot per comparison: the contenders' times as bars and the floor as a dashed line. None without comparisons.

    Bars are cut off at five times our own time, so that a slow peer does not hide the differences between the others.
    """
    found = comparisons_of(groups, operator)
    if not found:
        return None
    columns = min(len(found), 4)
    rows = -(-len(found) // columns)
    figure = _figure(4.2 * columns, 2.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, cases in zip(axes, found):
        _draw_bars(axis, cases)
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    return figure


def _draw_bars(axis: Any, cases: list[Case]) -> None:
    floor = cases[0].get("floor")
    shown = sorted((c for c in cases if c["contender"] != floor), key=lambda c: -c["median_seconds"])
    colors = ["tab:blue" if c["contender"].startswith(OURS) else "0.7" for c in shown]
    axis.barh([c["contender"] for c in shown], [c["median_seconds"] * 1e3 for c in shown], color=colors)
    ours = next(c["median_seconds"] for c in cases if c["contender"] == OURS) * 1e3
    right = min(max(c["median_seconds"] for c in shown) * 1e3, 5 * ours)
    axis.set_xlim(0, 1.15 * right)
    for height, case in enumerate(shown):
        value = case["median_seconds"] * 1e3
        axis.text(min(value, right), height, f" {value:.3g}", va="center", fontsize=6)
    for case in cases:
        if case["contender"] == floor:
            axis.axvline(case["median_seconds"] * 1e3, color="tab:red", linestyle="--", linewidth=1)
    shape = " ".join(f"{key}={value}" for key, value in cases[0]["shape"].items())
    axis.set_title(f"{cases[0]['case']}\n{shape}", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.set_xlabel("ms", fontsize=7)


def roofline(machine: dict[str, Any], groups: dict[str, list[Case]]) -> Any:
    """Our operators below the measured peaks of the device: FLOP/s over FLOPs per byte.

    The bytes are the fewest that a case can move. Returns None without any case.
    """
    flops, bandwidth = machine["peak"]["tflops_per_second"], machine["peak"]["gigabytes_per_second"] / 1e3
    markers = {"patch_embedding": "o", "patch_cross_entropy": "s", "linear_patch_cross_entropy": "^"}
    points = []
    for operator in markers:
        for case in (c for cases in comparisons_of(groups, operator) for c in cases if c["contender"] == OURS):
            work, moved = work_of(case)
            points.append((operator, work / moved, work / case["median_seconds"] / 1e12))
    if not points:
        return None
    figure = _figure(6, 4)
    axis = figure.subplots()
    lowest, highest = min(x for _, x, _ in points) / 2, max(*(x for _, x, _ in points), flops / bandwidth) * 4
    axis.plot([lowest, flops / bandwidth, highest], [lowest * bandwidth, flops, flops], color="tab:red", linewidth=1)
    for operator, marker in markers.items():
        found = [(x, y) for name, x, y in points if name == operator]
        if found:
            axis.scatter(*zip(*found), marker=marker, label=operator, s=18)
    axis.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    return figure


def work_of(case: Case) -> tuple[float, float]:
    """The FLOPs of a case, and the fewest bytes that it moves.

    The patch embedding adds once for each element that it moves. The cross entropy takes about 8 FLOPs a logit, which
    it reads and writes, so 4 for each element that it moves. The fused loss reads input and head and writes their
    gradients.
    """
    shape, size = case["shape"], 2 if case["dtype"] == "bfloat16" else 4
    if case["operator"] == "linear_patch_cross_entropy":
        return case["flops"], 2 * size * (shape["N"] + shape["V"]) * shape["D"]
    flops_per_element = 1 if case["operator"] == "patch_embedding" else 4
    return flops_per_element * case["bytes"] / size, case["bytes"]


def parts(machine: dict[str, Any], groups: dict[str, list[Case]]) -> Any:
    """The parts of a step's time as stacked bars, at K = 1 and 4. None without any step."""
    found = comparisons_of(groups, "parts of a step")
    if not found:
        return None
    figure = _figure(3.2 * len(found), 3.6)
    for axis, cases in zip(figure.subplots(1, len(found), squeeze=False)[0], found):
        below = {1: 0.0, 4: 0.0}
        for index, name in enumerate(dict.fromkeys(c["contender"].split(", K=")[0] for c in cases)):
            for k in below:
                case = next(c for c in cases if c["contender"] == f"{name}, K={k}")
                height = case["median_seconds"] * 1e3
                label = name if k == 1 else None
                axis.bar(f"K = {k}", height, bottom=below[k], color=f"C{index}", label=label, width=0.6)
                below[k] += height
        axis.set_title(cases[0]["shape"]["preset"], fontsize=9)
        axis.set_ylabel("ms")
    figure.legend(*axis.get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=2)
    return figure


def cost(machine: dict[str, Any], groups: dict[str, list[Case]]) -> Any:
    """The cost of a run over K, measured in seconds, beside the formula λ/K + 1 - λ. None without any step."""
    found = steps(groups)
    if not found:
        return None
    figure = _figure(5, 3.6)
    axis = figure.subplots()
    for shape, cases in found:
        measured = costs(cases)
        axis.plot(list(measured), [seconds for seconds, _ in measured.values()], marker="o", label=shape["preset"])
    sizes = sorted({k for _, cases in found for k in costs(cases)})
    axis.plot(sizes, [SHARE / k + 1 - SHARE for k in sizes], color="0.5", linestyle="--", label="λ/K + 1 - λ")
    axis.set(xlabel="K", ylabel="seconds against token-level training", xticks=sizes, ylim=(0, 1.05))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure


FIGURES: dict[str, Any] = {
    "embedding": lambda machine, groups: bars(machine, groups, "patch_embedding"),
    "cross-entropy": lambda machine, groups: bars(machine, groups, "patch_cross_entropy"),
    "linear": lambda machine, groups: bars(machine, groups, "linear_patch_cross_entropy"),
    "roofline": roofline,
    "parts": parts,
    "cost": cost,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    for file in parser.parse_args().files:
        try:
            print(report(file), end="\n\n")
            print("\n".join(f"drawn: {path}" for path in draw(file)))
        except (OSError, ValueError) as error:
            parser.exit(1, f"bench.report: {error}\n")


if __name__ == "__main__":
    main()

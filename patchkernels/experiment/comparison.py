"""The comparison of an experiment's runs: which runs enter it, by which loss they are compared, and ρ.

    ρ = (L_C - L_B) / (L_C - L_A)

``L`` is an arm's token-level validation loss at the end of its run. A reads all of the data token by token. B reads all
of it too, a share of it in patches. C reads token by token, as much as B's compute allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

Result = dict[str, Any]  # a run, as its result.json holds it
Groups = dict[str, list[Result]]  # the compared runs by arm, in the order of their seeds

TOKEN_LOSS = "validation_loss"
"""The key of the loss that arms are compared by. It is token-level in every phase, also in a patch phase."""
SLOT_LOSSES = "validation_slot_losses"
"""The key of a patch phase's losses, one for each of the K slots. They are not token-level losses."""
CONFIDENCE = 0.95
"""Of the intervals that means over seeds are given with."""
SAME_COST = 0.01
"""Two runs are at equal compute if the counted FLOPs of one differ from the other's by at most this share."""


def compared_runs(results: list[Result], lr: float | None) -> Groups:
    """The runs at the learning rate ``lr``, by arm. Runs that diverged are left out.

    Several rates may have been tried for an arm; only one rate, the same for all arms, enters the comparison.
    """
    groups: Groups = {}
    for result in results:
        if result["lr"] == lr and "diverged" not in result:
            groups.setdefault(result["arm"], []).append(result)
    return {arm: sorted(runs, key=lambda run: run["seed"]) for arm, runs in groups.items()}


class Mean(NamedTuple):
    """A mean over seeds, with the interval that holds the mean over all seeds with ``CONFIDENCE``, by Student's t."""

    value: float
    low: float
    high: float
    p_value: float  # the probability of a mean this far from 0, if that over all seeds is 0

    @property
    def half_width(self) -> float:
        """Half of the interval, for an error bar."""
        return (self.high - self.low) / 2


def mean_of(values: Sequence[float]) -> Mean | None:
    """The mean of at least two values, None for fewer."""
    if len(values) < 2:
        return None
    from scipy.stats import ttest_1samp  # here, because it takes a second to import

    test = ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(CONFIDENCE)
    return Mean(sum(values) / len(values), float(low), float(high), float(test.pvalue))


def differences(runs: list[Result], others: list[Result]) -> list[float]:
    """The losses of the runs minus those of the others, for each seed that both have."""
    of_seed = {run["seed"]: float(run[TOKEN_LOSS]) for run in others}
    return [float(run[TOKEN_LOSS]) - of_seed[run["seed"]] for run in runs if run["seed"] in of_seed]


def best_rates(results: list[Result]) -> dict[str, float]:
    """For every arm the rate at which its run of the first seed ended with the lowest loss."""
    first = min((result["seed"] for result in results), default=0)
    best: dict[str, Result] = {}
    for run in results:
        if run["seed"] == first and "diverged" not in run:
            arm = run["arm"]
            best[arm] = min(best.get(arm, run), run, key=lambda run: float(run[TOKEN_LOSS]))
    return {arm: float(run["lr"]) for arm, run in best.items()}


def runs_at_best_rates(results: list[Result]) -> Groups:
    """The runs of every arm at its own best rate, in the order of their seeds."""
    return {arm: compared_runs(results, lr)[arm] for arm, lr in best_rates(results).items()}


def same_compute(run: Result, other: Result) -> bool:
    """Whether two runs are at equal compute."""
    return bool(abs(run["flops"] / other["flops"] - 1) <= SAME_COST)


def is_token_level(runs: list[Result]) -> bool:
    """Whether the runs of an arm have no patch phase."""
    return all(point["patch_size"] == 1 for point in runs[0]["curve"])


def token_level_at_equal_compute(arm: str, groups: Groups) -> str | None:
    """The name of the token-level arm that has the compute of this arm; None if there is none."""
    run = groups[arm][0]
    names = [name for name, runs in groups.items() if is_token_level(runs) and same_compute(run, runs[0])]
    return min(names, key=lambda name: abs(float(groups[name][0]["flops"] - run["flops"])), default=None)


def rho(groups: Groups, arm: str) -> dict[int, float | None]:
    """``(L_C - L_arm) / (L_C - L_A)`` for every seed for which A, C and the arm are finished.

    The value is None for a seed at which A is no better than C: there is no difference to recover.

    Raises:
        ValueError: the arm does not have C's compute.
    """
    runs_a, runs_c, runs_arm = ({run["seed"]: run for run in groups.get(name, [])} for name in ("A", "C", arm))
    by_seed = {}
    for seed in sorted(runs_a.keys() & runs_c.keys() & runs_arm.keys()):
        a, c, run = runs_a[seed], runs_c[seed], runs_arm[seed]
        if not same_compute(run, c):
            raise ValueError(f"ρ is defined at equal compute: {arm} took {run['flops']:.3e} FLOPs, C {c['flops']:.3e}")
        by_seed[seed] = recovered_share(a[TOKEN_LOSS], run[TOKEN_LOSS], c[TOKEN_LOSS])
    return by_seed


def recovered_share(loss_a: float, loss_b: float, loss_c: float) -> float | None:
    """ρ of three losses: the share of A's advantage over C that B reaches. None if A has no advantage."""
    return (loss_c - loss_b) / (loss_c - loss_a) if loss_c > loss_a else None


def evaluation_at_switch(run: Result) -> dict[str, Any] | None:
    """The evaluation at the end of the last patch phase, before any token-level step. None without a patch phase."""
    in_patches = [point for point in run["curve"] if point["patch_size"] > 1 and point["step"] > 0]
    return in_patches[-1] if in_patches else None


def evaluations_side_by_side(runs: list[Result], key: str = TOKEN_LOSS) -> list[list[dict[str, Any]]]:
    """The evaluations that hold ``key``: an entry for each step, with one evaluation for each of the runs.

    The runs are those of one arm, which are all evaluated at the same steps.
    """
    curves = ([point for point in run["curve"] if key in point] for run in runs)
    return [list(points) for points in zip(*curves)]

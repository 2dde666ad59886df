"""Where patches have been seen to win, to tie and to lose against token-level training at equal compute.

What decides is not fully known. Tokens a parameter are the best measure that we have: with few of them the patch phase
ends before the model has learned much, and with many the text that patches read is worth more than token-level steps.
"""

from __future__ import annotations

from typing import NamedTuple


class Observation(NamedTuple):
    """``L_C - L_B`` in nats: token-level training with a patch run's compute (C) against that run (B).

    The interval is that of the mean over seeds, with 95 % confidence.
    """

    parameters: int
    tokens_per_parameter: float  # of all raw tokens that B reads
    low: float
    high: float

    @property
    def outcome(self) -> str:
        """Of patches: "win" or "lose" if the interval does not hold 0, else "tie"."""
        return "win" if self.low > 0 else "lose" if self.high < 0 else "tie"


# K = 4 on two thirds of the text, three seeds, every arm at its own best learning rate: the table in
# bench/results/amd-epyc/law/law.md, with three digits.
OBSERVATIONS = (
    Observation(41_632, 16.5, -0.261, -0.035),
    Observation(41_632, 49.6, -0.129, -0.026),
    Observation(41_632, 99.8, -0.076, 0.011),
)


def outcome_at(tokens_per_parameter: float) -> str:
    """ "lose" up to where patches have been seen to lose, "win" from where they have been seen to win, else "tie"."""
    lost = [seen.tokens_per_parameter for seen in OBSERVATIONS if seen.outcome == "lose"]
    won = [seen.tokens_per_parameter for seen in OBSERVATIONS if seen.outcome == "win"]
    if lost and tokens_per_parameter <= max(lost):
        return "lose"
    return "win" if won and tokens_per_parameter >= min(won) else "tie"


def statement(tokens_per_parameter: float) -> str:
    """A sentence about a run with patches that reads this many tokens a parameter."""
    measured = {
        outcome: ", ".join(f"{seen.tokens_per_parameter:.0f}" for seen in OBSERVATIONS if seen.outcome == outcome)
        for outcome in ("lose", "tie", "win")
    }
    seen = "; ".join(f"they {outcome} at {places}" for outcome, places in measured.items() if places)
    verdict = {
        "lose": "There patches have been seen to lose against token-level training of equal compute.",
        "tie": "There no difference to token-level training of equal compute has been seen.",
        "win": "There patches have been seen to win against token-level training of equal compute.",
    }[outcome_at(tokens_per_parameter)]
    sizes = [seen.parameters for seen in OBSERVATIONS]
    return (
        f"The run reads {tokens_per_parameter:.3g} tokens a parameter. {verdict} Measured with {min(sizes):,} to "
        f"{max(sizes):,} parameters and K = 4: {seen}. TST reports that they win with 270M parameters and more."
    )

"""How certain a measured number is: standard errors over documents, their paired differences, intervals of shares.

Tokens of one document are alike, so documents, not tokens, are what was sampled: every standard error here is clustered
by document. A loss per token, L_d summed over the n_d tokens of document d, is the ratio of two sums over documents,

    r = Σ L_d / Σ n_d,    Var(r) ≈ D/(D-1) · Σ e_d²,    e_d = (L_d - r·n_d) / Σ n_d

(Cochran 1977, Sampling Techniques, 3rd edition, section 6.4: the ratio estimator, linearised). Where all documents have
as many tokens, that is the standard deviation of their means over √D. It is to first order in 1/D, and too
small where few documents hold most of the tokens: of 24 to 15,920 tokens each, evenly on a log scale, 16 documents give
0.82 of the true error, 64 give 0.94 and 400 give 0.99 (the simulation of tests/evaluation/test_uncertainty.py).

D documents; S any further axes.
"""

import dataclasses
import math
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Shaped


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number computed from documents, and what it owes to each of them.

    The difference `a - b` of two estimates over the same documents, in the same order, is paired: what makes a document
    hard for both cancels, so that its standard error may be far below those of a and b.
    """

    value: Float[np.ndarray, "*S"]
    effects: Float[np.ndarray, "D *S"]
    """e_d: to first order, by how much a document moves the value away from what it would be on infinitely many."""
    counted: Bool[np.ndarray, "D *S"]
    """Which documents have anything to say about the value."""

    @property
    def documents(self) -> Shaped[np.ndarray, "*S"]:
        """So many have."""
        return np.asarray(self.counted.sum(0))

    @property
    def stderr(self) -> Float[np.ndarray, "*S"]:
        """Standard error of the value, √(D/(D-1) · Σ e_d²); NaN where fewer than two documents count."""
        count = self.documents
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            return np.where(count > 1, np.sqrt(count / (count - 1) * (self.effects**2).sum(0)), np.nan)

    def __getitem__(self, index: int) -> "Estimate":
        """One of S values."""
        return Estimate(np.asarray(self.value[index]), self.effects[:, index], self.counted[:, index])

    def __sub__(self, other: "Estimate") -> "Estimate":
        if len(self.effects) != len(other.effects):
            counts = f"{len(self.effects)} and {len(other.effects)}"
            raise ValueError(f"only estimates over the same documents have a paired difference, not over {counts}")
        counted = self.counted | other.counted
        with np.errstate(invalid="ignore"):
            return Estimate(np.asarray(self.value - other.value), self.effects - other.effects, counted)

    def exp(self) -> "Estimate":
        """exp of the value, infinite where that overflows; its error by the delta method."""
        with np.errstate(over="ignore", invalid="ignore"):
            value = np.asarray(np.exp(self.value))
            return Estimate(value, value * self.effects, self.counted)


def ratio(parts: Shaped[np.ndarray, "D *S"], wholes: Shaped[np.ndarray, "D *S"]) -> Estimate:
    """Estimates Σ parts / Σ wholes over documents, NaN where the wholes are all 0.

    Args:
        parts: of each document, such as its loss.
        wholes: as much of what the parts are divided by, such as its tokens; a document without either does not count.
    """
    wholes = np.asarray(wholes, np.float64)
    value, total = divide(parts.sum(0), wholes.sum(0)), wholes.sum(0)
    with np.errstate(invalid="ignore"):
        residuals = parts - value * wholes
    counted = (wholes != 0) | (parts != 0)
    return Estimate(value, divide(residuals, np.broadcast_to(total, residuals.shape)), counted)


def mean(values: Shaped[np.ndarray, "D *S"]) -> Estimate:
    """Estimates the mean of one number per document."""
    values = np.asarray(values, np.float64)
    return ratio(values, np.ones_like(values))


def divide(part: np.ndarray | np.generic, whole: np.ndarray | np.generic) -> np.ndarray:
    """part / whole, NaN where there is nothing."""
    whole = np.asarray(whole)
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval for the probability of a success (Wilson 1927, JASA 22:209): from 0 to 1 whatever the counts.

    Unlike a share plus and minus its standard error, it has a width where all or no trials succeed, and about the
    promised coverage for few trials (Newcombe 1998, Statistics in Medicine 17:857, method 3).

    Args:
        successes: how many trials succeeded.
        trials: independent trials; with 0 of them the interval is all of [0, 1].
        confidence: the probability that such an interval covers the truth.

    Raises:
        ValueError: more successes than trials, or fewer than 0.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be from 0 to the {trials} trials, not {successes}")
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, shrink = successes / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / shrink
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2)) / shrink
    # At the ends they are exactly 0 and 1, which rounding may miss.
    low = 0.0 if successes == 0 else middle - half
    return low, 1.0 if successes == trials else middle + half


def plus_minus(value: str, stderr: float, digits: int) -> str:
    """A number as it is written, with its standard error to as many digits after the point, or one that is not 0."""
    if not math.isfinite(stderr):
        return value
    error = f"{stderr:.{digits}f}"
    if stderr and not float(error):
        error = f"{stderr:.0e}" if stderr < 1e-6 else f"{stderr:.{-math.floor(math.log10(stderr))}f}"
    return f"{value} ± {error}"

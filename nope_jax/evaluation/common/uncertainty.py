"""Uncertainty of measured numbers: standard errors over documents, paired differences, and intervals of proportions.

The tokens of a document are correlated, so the sampling unit is the document, not the token: every standard error here
is clustered by document. A loss per token, with L_d summed over the n_d tokens of document d, is the ratio of two sums
over documents,

    r = Σ L_d / Σ n_d,    Var(r) ≈ D/(D-1) · Σ e_d²,    e_d = (L_d - r·n_d) / Σ n_d

(Cochran 1977, Sampling Techniques, 3rd edition, section 6.4: the linearized ratio estimator). If all documents have the
same number of tokens, this is the standard deviation of their means over √D. It is accurate to first order in 1/D, and
too small if few documents hold most of the tokens: for documents of 24 to 15,920 tokens, evenly spaced on a log scale,
16 documents give 0.82 of the true error, 64 give 0.94 and 400 give 0.99 (simulated in
tests/evaluation/test_uncertainty.py).

Shapes: D documents; S any further axes.
"""

import dataclasses
import math
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Shaped


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number computed from documents, with the contribution of each document.

    The difference `a - b` of two estimates over the same documents, in the same order, is paired: the common difficulty
    of a document cancels, so its standard error can be far below those of a and b.
    """

    value: Float[np.ndarray, "*S"]
    effects: Float[np.ndarray, "D *S"]
    """e_d: to first order, how far a document moves the value from its limit for infinitely many documents."""
    counted: Bool[np.ndarray, "D *S"]
    """Which documents contribute to the value."""

    @property
    def documents(self) -> Shaped[np.ndarray, "*S"]:
        """Number of documents that contribute."""
        return np.asarray(self.counted.sum(0))

    @property
    def stderr(self) -> Float[np.ndarray, "*S"]:
        """Standard error of the value, √(D/(D-1) · Σ e_d²); NaN if fewer than two documents contribute."""
        count = self.documents
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            return np.where(count > 1, np.sqrt(count / (count - 1) * (self.effects**2).sum(0)), np.nan)

    def __getitem__(self, index: int) -> "Estimate":
        """One entry of the first axis of S."""
        return Estimate(np.asarray(self.value[index]), self.effects[:, index], self.counted[:, index])

    def __sub__(self, other: "Estimate") -> "Estimate":
        if len(self.effects) != len(other.effects):
            counts = f"{len(self.effects)} and {len(other.effects)}"
            raise ValueError(f"only estimates over the same documents have a paired difference, not over {counts}")
        counted = self.counted | other.counted
        with np.errstate(invalid="ignore"):
            return Estimate(np.asarray(self.value - other.value), self.effects - other.effects, counted)

    def exp(self) -> "Estimate":
        """exp of the value, infinite on overflow, with its error by the delta method."""
        with np.errstate(over="ignore", invalid="ignore"):
            value = np.asarray(np.exp(self.value))
            return Estimate(value, value * self.effects, self.counted)


def ratio(parts: Shaped[np.ndarray, "D *S"], wholes: Shaped[np.ndarray, "D *S"]) -> Estimate:
    """Estimates Σ parts / Σ wholes over documents; NaN where all wholes are 0.

    Args:
        parts: numerator of each document, such as its loss.
        wholes: denominator of each document, such as its tokens. A document with neither does not count.
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
    """part / whole; NaN where whole is not positive."""
    whole = np.asarray(whole)
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a success probability (Wilson 1927, JASA 22:209), always within [0, 1].

    Unlike a proportion plus and minus its standard error, it has a positive width if all or no trials succeed, and
    close to nominal coverage for few trials (Newcombe 1998, Statistics in Medicine 17:857, method 3).

    Args:
        successes: number of successful trials; or the sum of scores from 0 to 1, which vary less than successes of the
            same mean, so that the interval is wide enough.
        trials: number of independent trials; with 0 trials the interval is [0, 1].
        confidence: coverage probability of the interval.

    Raises:
        ValueError: `successes` is negative or greater than `trials`.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be from 0 to the {trials} trials, not {successes}")
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, shrink = successes / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / shrink
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2)) / shrink
    # With no or only successes the ends are exactly 0 and 1, which rounding may miss.
    low = 0.0 if successes == 0 else middle - half
    return low, 1.0 if successes == trials else middle + half


def plus_minus(value: str, stderr: float, digits: int) -> str:
    """A formatted number with its standard error, to `digits` decimals or as many as show its first nonzero digit."""
    if not math.isfinite(stderr):
        return value
    error = f"{stderr:.{digits}f}"
    if stderr and not float(error):
        error = f"{stderr:.0e}" if stderr < 1e-6 else f"{stderr:.{-math.floor(math.log10(stderr))}f}"
    return f"{value} ± {error}"

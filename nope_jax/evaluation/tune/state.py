"""What eval.py tune has found so far: the file that it goes on from.

Shapes: L layers, N query heads. Losses in nats per token.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nope_jax.evaluation.common.files import replace_file
from nope_jax.evaluation.common.uncertainty import Estimate, mean


@dataclasses.dataclass
class Outcome:
    """What was found at one length; None where it has not been computed or the method has no such thing."""

    length: int
    documents: int
    loss_before: float | None = None
    tried: dict[float, float] = dataclasses.field(default_factory=dict)
    """The loss at each factor for all layers and heads that was tried; of ssmax in units of 1 / ln L."""
    factor: float | None = None
    """The best of them."""
    loss_at_factor: float | None = None
    loss_after: float | None = None
    """Of the run that is written."""
    of_documents: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """The loss of each document `before`, `after`, and at each factor in `tried`, under its decimal digits."""

    def keep(self, when: str, losses: Float[np.ndarray, "documents"]) -> float:
        """Takes in the losses of all documents, and returns their mean."""
        self.of_documents[when] = losses.tolist()
        return float(losses.mean())

    def estimate(self, when: str) -> Estimate | None:
        """The mean of what was kept under a name, with its error over documents; None where nothing was."""
        losses = self.of_documents.get(when)
        return mean(np.array(losses, np.float64)) if losses else None

    def gain(self, when: str = "after") -> Estimate | None:
        """By how much the loss of the same documents is lower than before."""
        before, then = self.estimate("before"), self.estimate(when)
        return before - then if before and then else None

    @property
    def at_edge(self) -> bool:
        """Whether the best factor is the least or the greatest that was tried."""
        return self.factor is not None and self.factor in (min(self.tried), max(self.tried))


@dataclasses.dataclass(frozen=True)
class Learned:
    """Where the learning of factors stands."""

    updates: int
    """So many have been made."""
    factors: list[list[float]]
    """[L, N]."""
    optimizer: list[Any] | None
    """The leaves of its state; None once all updates have been made."""


@dataclasses.dataclass
class Tuning:
    """A tuning as far as it has come. tune.json holds it; what is None has not been computed."""

    method: str
    source: str
    """The workdir of the run."""
    data: str
    train_length: int
    settings: dict[str, Any]
    content: str
    """A digest of the run's checkpoint, of the code that was run, and of the documents."""
    lengths: list[Outcome]
    """Ascending."""
    command: str
    step: int
    """Of the run's checkpoint."""
    factor: float | None = None
    """For all layers and heads, of the method uniform."""
    start: float | None = None
    """Where learned factors began."""
    learned: Learned | None = None
    encoding: str | None = None
    """Of the run that is written."""

    def keep(self, out: Path) -> None:
        """Writes tune.json."""
        text = json.dumps(_finite(dataclasses.asdict(self)), indent=2)
        with replace_file(out / "tune.json") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def or_continued(self, out: Path) -> "Tuning":
        """Itself; or where `out` holds what the same tuning has found before it was interrupted, that.

        Raises:
            ValueError: `out` holds another one that was interrupted.
        """
        path = out / "tune.json"
        if not path.exists():
            return self
        otherwise = "choose another --out, or remove that one"
        try:
            kept = self._load(path)
            unlike = {name: value for name, value in self._asked().items() if kept._asked().get(name) != value}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not what an interrupted tune leaves; {otherwise}") from error
        for name, value in unlike.items():
            theirs = kept._asked().get(name)
            raise ValueError(
                f"{name}: --out {out} holds a tuning that was interrupted, with {theirs}, not {value}; to go on give "
                f"that, otherwise {otherwise}"
            )
        if kept.content != self.content:
            raise ValueError(
                f"--out {out} holds a tuning that was interrupted, of another checkpoint of {self.source}, of "
                f"other documents or by other code; {otherwise}"
            )
        if kept.learned is not None and len(read_updates(out)) < kept.learned.updates:
            raise ValueError(f"{out}/tune.jsonl lacks some of the updates that tune.json tells of; {otherwise}")
        return dataclasses.replace(kept, command=self.command)

    def _asked(self) -> dict[str, Any]:
        """What was asked for, by the option that says it."""
        return {
            "--workdirs": str(Path(self.source).resolve()),
            "--method": self.method,
            "--lengths": " ".join(str(outcome.length) for outcome in self.lengths),
            "--data.source": self.data,
            **{f"--tune.{name}": value for name, value in self.settings.items()},
        }

    def _load(self, path: Path) -> "Tuning":
        fields = json.loads(path.read_text(encoding="utf-8"))
        for outcome in fields["lengths"]:
            # JSON has no infinity, which is what a loss counts as that is not finite.
            outcome["tried"] = {float(k): math.inf if v is None else v for k, v in outcome["tried"].items()}
        learned = None if fields["learned"] is None else Learned(**fields["learned"])
        return type(self)(**fields | {"lengths": [Outcome(**o) for o in fields["lengths"]], "learned": learned})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_updates(out: Path) -> list[dict[str, Any]]:
    """The updates in tune.jsonl, a last line that was cut off left out."""
    path = out / "tune.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]

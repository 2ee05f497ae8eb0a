"""State of eval.py tune: the results so far, stored in the file it resumes from.

Shapes: L layers, N query heads. Losses are in nats per token.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nope_jax.evaluation.common.files import replace_file, writes
from nope_jax.evaluation.common.uncertainty import Estimate, mean


@dataclasses.dataclass
class Outcome:
    """Results at one length; None if not yet computed or not part of the method."""

    length: int
    documents: int
    loss_before: float | None = None
    tried: dict[float, float] = dataclasses.field(default_factory=dict)
    """The loss at each uniform factor tried; for ssmax, factors are in units of 1 / ln L."""
    factor: float | None = None
    """The best factor tried."""
    loss_at_factor: float | None = None
    loss_after: float | None = None
    """The loss of the tuned run."""
    of_documents: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """The loss of each document `before`, `after`, and at each factor in `tried`, keyed by its decimal string."""

    def keep(self, when: str, losses: Float[np.ndarray, "documents"]) -> float:
        """Stores the losses of all documents, and returns their mean."""
        self.of_documents[when] = losses.tolist()
        return float(losses.mean())

    def estimate(self, when: str) -> Estimate | None:
        """The mean of the losses stored under a name, with its error over documents; None if there are none."""
        losses = self.of_documents.get(when)
        return mean(np.array(losses, np.float64)) if losses else None

    def gain(self, when: str = "after") -> Estimate | None:
        """Reduction of the loss relative to before, paired by document."""
        before, then = self.estimate("before"), self.estimate(when)
        return before - then if before and then else None

    @property
    def at_edge(self) -> bool:
        """Whether the best factor is the smallest or the largest tried."""
        return self.factor is not None and self.factor in (min(self.tried), max(self.tried))


@dataclasses.dataclass(frozen=True)
class Learned:
    """Progress of the learned factors."""

    updates: int
    """Number of updates made."""
    factors: list[list[float]]
    """Shape [L, N]."""
    optimizer: list[Any] | None
    """The leaves of the optimizer state; None after the last update."""


@dataclasses.dataclass
class Tuning:
    """A tuning in progress, as stored in tune.json; None stands for values not yet computed."""

    method: str
    source: str
    """Workdir of the run."""
    data: str
    train_length: int
    settings: dict[str, Any]
    content: str
    """A digest of the run's checkpoint, the code and the documents."""
    lengths: list[Outcome]
    """Ascending."""
    command: str
    step: int
    """Step of the run's checkpoint."""
    factor: float | None = None
    """The factor of the uniform method."""
    start: float | None = None
    """Initial value of the learned factors."""
    learned: Learned | None = None
    encoding: str | None = None
    """Encoding of the tuned run."""

    def keep(self, out: Path) -> None:
        """Writes tune.json."""
        if not writes():
            return
        text = json.dumps(_finite(dataclasses.asdict(self)), indent=2)
        with replace_file(out / "tune.json") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def or_continued(self, out: Path) -> "Tuning":
        """Returns the interrupted state of the same tuning in `out`, or this one if there is none.

        Raises:
            ValueError: `out` holds another interrupted tuning.
        """
        path = out / "tune.json"
        if not path.exists():
            return self
        otherwise = "choose another --out, or remove that one"
        try:
            kept = self._load(path)
            unlike = {name: value for name, value in self._asked().items() if kept._asked().get(name) != value}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not the state of an interrupted tune; {otherwise}") from error
        for name, value in unlike.items():
            theirs = kept._asked().get(name)
            raise ValueError(
                f"{name}: --out {out} holds an interrupted tuning with {theirs}, not {value}; to resume it, give that "
                f"value, otherwise {otherwise}"
            )
        if kept.content != self.content:
            raise ValueError(
                f"--out {out} holds an interrupted tuning of another checkpoint of {self.source}, of "
                f"other documents or by other code; {otherwise}"
            )
        if kept.learned is not None and len(read_updates(out)) < kept.learned.updates:
            raise ValueError(f"{out}/tune.jsonl lacks updates that tune.json records; {otherwise}")
        return dataclasses.replace(kept, command=self.command)

    def _asked(self) -> dict[str, Any]:
        """The requested settings, by option."""
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
            # JSON has no infinity, the value of a loss that is not finite.
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
    """The updates in tune.jsonl, without a truncated last line."""
    path = out / "tune.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]

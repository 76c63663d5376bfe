"""Exact accuracy over a split: each sample once, on any number of ranks."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_tools.errors import UserError
from pipeline.data.loader import Batch
from pipeline.data.order import rank_slots
from pipeline.data.source import BadSample, SampleSource
from pipeline.parallel.world import World

MAX_CONFUSION = 2_000  # classes: beyond, a matrix of all pairs is larger than anybody looks at


@dataclass(frozen=True)
class EvalResult:
    """top1 and top5 as shares of `samples`; `bad` samples could not be read and count in neither."""

    top1: float
    top5: float
    loss: float
    samples: int
    bad: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def evaluate(
    predict: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    world: World,
    on_batch: Callable[[], None] = lambda: None,
    on_logits: Callable[[Batch, Tensor], None] = lambda batch, logits: None,
) -> EvalResult:
    """Runs `predict` (logits [m, K]) over this rank's batches and sums over ranks. Collective.

    Raises:
        UserError: on every rank, where one of them could not read its data.
    """
    failure: UserError | None = None
    total = torch.zeros(5, dtype=torch.float64, device=world.device)  # top1, top5, loss, samples, bad
    for batch in batches:
        failure = failure or batch.failure  # the other ranks need this one's part of the collectives to the end
        logits = predict(batch)
        on_logits(batch, logits)
        labels = batch.labels.to(logits.device)
        weights = batch.weights.to(logits.device, torch.float64)
        # The rank of the true class counts the classes that are not behind it: exact top-k without sorting. Ties with
        # lower indices go first, as argmax has it; NaN is behind nothing and nothing is behind it
        truth = logits.gather(1, labels[:, None])
        behind = (logits < truth).sum(1) + ((logits == truth) & (_columns(logits) >= labels[:, None])).sum(1)
        ahead = logits.shape[1] - behind
        total += torch.stack(
            [
                ((ahead < 1) * weights).sum(),
                ((ahead < 5) * weights).sum(),
                (loss_fn(logits, labels).double() * weights).sum(),
                weights.sum(),
                torch.tensor(float(len(batch.errors)), dtype=torch.float64, device=world.device),
            ]
        )
        on_batch()
    raise_together(failure, world)
    top1, top5, loss, samples, bad = world.sum(total.tolist())
    count = max(samples, 1.0)
    return EvalResult(top1 / count, top5 / count, loss / count, int(samples), int(bad))


def raise_together(failure: UserError | None, world: World) -> None:
    """Raises on every rank what kept data away from one of them. Collective."""
    failure = next((f for f in world.gather(failure) if f), None)
    if failure:
        raise failure


def _columns(logits: Tensor) -> Tensor:
    return torch.arange(logits.shape[1], device=logits.device)[None, :]


class RealLabels:
    """The labels that people found right for an image, several or none ("Are we done with ImageNet?", Beyer et al.).

    A JSON file: an object {file name: [classes]}, or a list in the order of the numbers that end the file names
    (`real.json`: entry 0 is ILSVRC2012_val_00000001).
    """

    def __init__(self, labels: dict[str, list[int]] | list[list[int]]):
        self._by_name = {Path(n).stem: v for n, v in labels.items()} if isinstance(labels, dict) else None
        self._in_order = labels if isinstance(labels, list) else []

    @staticmethod
    def load(path: Path) -> RealLabels:
        """Raises UserError where it is not such a file."""
        try:
            raw = json.loads(path.read_text())
            entries = list(raw.values() if isinstance(raw, dict) else raw)
            if not entries or not all(isinstance(e, list) and all(isinstance(k, int) for k in e) for e in entries):
                raise ValueError("expected a list of classes for every image")
        except (OSError, ValueError, AttributeError, TypeError) as e:
            raise UserError(f"{path} is no file of labels: {e}") from e
        return RealLabels(raw)

    def of(self, file_name: str) -> list[int]:
        """Raises UserError for an image that the file does not know."""
        stem = Path(file_name).stem
        number = re.search(r"(\d+)$", stem)
        if self._by_name is not None and stem in self._by_name:
            return self._by_name[stem]
        if self._by_name is None and number and 0 < int(number[1]) <= len(self._in_order):
            return self._in_order[int(number[1]) - 1]
        raise UserError(f"the file of labels says nothing of {file_name}")

    def of_samples(self, source: SampleSource, world: World) -> dict[int, list[int]]:
        """The labels of this rank's samples, by id; looked up before the first is evaluated. Collective.

        Raises:
            UserError: on every rank, where the file does not know an image of one of them.
        """
        found: dict[int, list[int]] = {}
        failure: UserError | None = None
        try:
            for i in range(*rank_slots(world.rank, world.size, sum(source.shard_sizes))):
                with suppress(BadSample):  # unreadable: it will have no weight either
                    found[i] = self.of(source.sample_name(i))
        except UserError as e:
            failure = e
        raise_together(failure, world)
        return found


class Detail:
    """What goes beyond one figure: right and wrong class by class, which for which, and ReaL accuracy."""

    def __init__(self, num_classes: int, real: dict[int, list[int]] | None = None):
        """real: of this rank's samples, by id."""
        self.num_classes, self._real = num_classes, real
        # [true class, predicted class]; of very many classes only [true class, (wrong, right)]
        self._pairs = num_classes <= MAX_CONFUSION
        self.counts = torch.zeros(num_classes, num_classes if self._pairs else 2, dtype=torch.float64)
        self._real_counts = torch.zeros(2, dtype=torch.float64)  # right, samples

    def add(self, batch: Batch, logits: Tensor) -> None:
        used = batch.weights > 0
        truth, guess = batch.labels[used], logits.argmax(1).cpu()[used]
        column = guess if self._pairs else (guess == truth).long()
        self.counts.index_put_((truth, column), torch.ones(len(truth), dtype=torch.float64), accumulate=True)
        if self._real is not None:
            for sample_id, predicted in zip(batch.ids[used].tolist(), guess.tolist()):
                if right := self._real.get(sample_id):
                    self._real_counts += torch.tensor([float(predicted in right), 1.0])

    def reduce(self, world: World) -> None:
        """Sums over ranks. Collective."""
        self.counts, self._real_counts = world.sum_tensor(self.counts), world.sum_tensor(self._real_counts)

    @property
    def real_samples(self) -> int:
        return int(self._real_counts[1])

    @property
    def real_top1(self) -> float:
        return float(self._real_counts[0] / max(self.real_samples, 1))

    def per_class(self) -> list[tuple[int, int, float]]:
        """(class, samples, share that was right), of classes that have samples."""
        total = self.counts.sum(1)
        right = self.counts.diagonal() if self._pairs else self.counts[:, 1]
        return [(k, int(n), float(right[k] / n)) for k, n in enumerate(total.tolist()) if n]

    def hardest(self, names: list[str], count: int = 3) -> list[str]:
        rows = sorted(self.per_class(), key=lambda row: row[2])[:count]
        return [f"{_name(names, k)} {share:.0%}" for k, _, share in rows if share < 1]

    def write(self, path: Path, names: list[str]) -> list[Path]:
        """`path`-classes.csv, and `path`-confusion.png where there are not too many classes."""
        table = path.with_name(path.name + "-classes.csv")
        with open(table, "w", newline="", encoding="utf-8") as f:
            writer = csv.writer(f)
            writer.writerow(["class", "name", "samples", "top1", "most_often_taken_for", "share"])
            for k, samples, share in self.per_class():
                writer.writerow([k, _name(names, k), samples, f"{share:.4f}", *self._confused(k, names)])
        if not self._pairs:
            return [table]
        picture = path.with_name(path.name + "-confusion.png")
        from pipeline.pictures import confusion_picture

        confusion_picture(self.counts.numpy(), names).save(picture)
        return [table, picture]

    def _confused(self, k: int, names: list[str]) -> list[str]:
        """The wrong class that `k` is most often taken for, and how often."""
        if not self._pairs:
            return ["", ""]
        wrong = self.counts[k].clone()
        wrong[k] = 0
        other = int(wrong.argmax())
        return [_name(names, other), f"{float(wrong[other] / self.counts[k].sum()):.4f}"] if wrong[other] else ["", ""]


def _name(names: list[str], k: int) -> str:
    return names[k] if k < len(names) else str(k)

"""DTensors as operands: this rank's part of them, the group of the vocabulary, and what comes back.

At most one dimension of the mesh shards the vocabulary; others may shard rows, which need nobody
else's, or hold copies. DTensor's own rules for softmax and operators are never asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .labels import soft as is_soft
from .sharding import Group

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

    from .settings import Settings


def is_distributed(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")


class Layout(NamedTuple):
    """How the student's logits lie on the mesh."""

    student: DTensor
    vocabulary: int | None  # the mesh dimension that shards it
    rows: tuple[Placement, ...]  # of what there is one of per row: Replicate or Shard

    @staticmethod
    def of(student: DTensor) -> Layout:
        from torch.distributed.tensor import Replicate, Shard

        last, found, rows = student.dim() - 1, [], []
        for dim, placement in enumerate(student.placements):
            if type(placement) is not Shard and not placement.is_replicate():
                raise NotImplementedError(
                    f"student is a DTensor with the placement {placement}: redistribute it to "
                    "Shard or Replicate"
                )
            sharded = isinstance(placement, Shard) and placement.dim % student.dim() == last
            found += [dim] * sharded
            rows.append(Replicate() if sharded else placement)
        if len(found) > 1:
            raise NotImplementedError(
                f"student's vocabulary is sharded over {len(found)} dimensions of the mesh, "
                f"{student.placements}: redistribute it to one of them"
            )
        return Layout(student, found[0] if found else None, tuple(rows))

    @property
    def group(self) -> Group | None:
        """The ranks that hold columns of this rank's rows; they split as torch.chunk does."""
        if self.vocabulary is None:
            return None
        mesh, columns = self.student.device_mesh, self.student.size(-1)
        each = -(-columns // mesh.size(self.vocabulary))
        first = min(mesh.get_local_rank(self.vocabulary) * each, columns)
        return Group(mesh.get_group(self.vocabulary), first, columns)

    @property
    def shares_rows(self) -> bool:
        return any(not placement.is_replicate() for placement in self.rows)

    @property
    def sums(self) -> list[Placement]:
        """The placements of a sum over this rank's rows."""
        from torch.distributed.tensor import Partial, Replicate

        return [Replicate() if rows.is_replicate() else Partial() for rows in self.rows]

    def logits(self, name: str, value: Any) -> Any:
        """This rank's part of a side; of a teacher that all ranks hold, its columns are taken."""
        from torch.distributed.tensor import Partial

        if not is_distributed(value):
            self._whole(name, value)
            return value
        placements = list(value.placements)
        if tuple(placements) == tuple(self.student.placements) and self._same_mesh(value):
            return value.to_local(grad_placements=placements)
        if tuple(placements) != self.rows or not self._same_mesh(value):
            raise NotImplementedError(
                f"{name} has the placements {value.placements}, and the student "
                f"{self.student.placements}: redistribute it to these"
                + (f", or to {self.rows}" if self.vocabulary is not None else "")
            )
        assert self.vocabulary is not None
        placements[self.vocabulary] = Partial()  # each rank gives the gradient of its columns
        return value.to_local(grad_placements=placements)

    def per_row(self, name: str, value: Any) -> Any:
        """This rank's part of what there is one of per row, or one of in all."""
        if not is_distributed(value):
            if isinstance(value, Tensor) and value.dim():
                self._whole(name, value)
            return value
        if not value.dim():
            return self._one_of_all(name, value)
        if tuple(value.placements) != self.rows or not self._same_mesh(value):
            raise NotImplementedError(
                f"{name} has the placements {value.placements}: redistribute it to {self.rows}"
            )
        return value.to_local(grad_placements=self.rows)

    def _one_of_all(self, name: str, value: DTensor) -> Tensor:
        """A number, whose gradient is the sum of what the rows of all ranks give."""
        if not all(placement.is_replicate() for placement in value.placements):
            raise NotImplementedError(
                f"{name} has the placements {value.placements}: pass {name}.full_tensor()"
            )
        if self._same_mesh(value):
            return value.to_local(grad_placements=self.sums)
        if value.requires_grad and self.shares_rows:
            raise NotImplementedError(
                f"{name} requires a gradient, and lies on {value.device_mesh}, where the student's "
                f"rows are sharded over {self.student.device_mesh}: distribute it over this one"
            )
        return value.to_local()

    def _same_mesh(self, value: DTensor) -> bool:
        return value.device_mesh == self.student.device_mesh

    def _whole(self, name: str, value: Any) -> None:
        """Refuses a plain tensor where it is not known which rows it has."""
        if isinstance(value, Tensor) and self.shares_rows:
            raise ValueError(
                f"{name} is a plain tensor, and the student's rows are sharded, "
                f"{self.student.placements}: pass a DTensor with the placements {self.rows}, or "
                "student.to_local()"
            )

    def rows_of_all(self, local: Tensor) -> Tensor:
        """What there is one of per row, as a DTensor."""
        from torch.distributed.tensor import DTensor

        shape = self.student.shape[:-1]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, self.student.device_mesh, self.rows, run_check=False, shape=shape, stride=stride
        )

    def total(self, local: Tensor) -> Tensor:
        """A sum over this rank's rows, as a DTensor."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(local, self.student.device_mesh, self.sums, run_check=False)


def run(
    loss: Callable[..., Any],
    student: Any,
    teacher: Any,
    labels: Any,
    weight: Any,
    num_items: Any,
    given: Settings,
) -> Any:
    """distillation_loss of DTensors: its placements are those of loss_parallel's cross-entropy."""
    if not is_distributed(student):
        raise ValueError(
            "teacher is a DTensor, and student is not: pass student as one too, or "
            "teacher.full_tensor()"
        )
    if given.group is not None:
        raise ValueError("group= is for plain tensors, and a DTensor has its own: leave it out")
    if given.dim not in (-1, student.dim() - 1):
        raise ValueError(f"dim={given.dim} of a DTensor: move the classes last, by movedim")
    layout = Layout.of(student)
    several = given.sigmoids or is_soft(labels)  # labels for each class
    settings = given._asdict() | {"group": layout.group, "dim": -1}
    for name in given.temperatures:
        settings[name] = layout.per_row(name, settings[name])
    if layout.shares_rows and given.reduction == "batchmean":
        settings["reduction"], num_items = "mean", max(student.size(0), 1)
    elif layout.shares_rows and given.reduction == "mean" and num_items is None:
        raise NotImplementedError(
            "reduction='mean' of sharded rows needs the count of all ranks: pass num_items, or "
            "reduction='sum' and divide"
        )
    found = loss(
        layout.logits("student", student),
        layout.logits("teacher", teacher),
        layout.logits("labels", labels) if several else layout.per_row("labels", labels),
        weight=layout.per_row("weight", weight),
        num_items=layout.per_row("num_items", num_items),
        **settings,
    )
    outside = layout.rows_of_all if given.reduction == "none" else layout.total
    if not given.return_metrics:
        return outside(found)
    value, metrics = found
    figures = (None if figure is None else layout.rows_of_all(figure) for figure in metrics)
    return outside(value), metrics._make(figures)

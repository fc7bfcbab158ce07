"""Obstacles to a load: all of them are found before one error lists them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ucp_deepspeed.errors import ListingError, MismatchError, SpecError


@dataclass(frozen=True, slots=True)
class Obstacle:
    """A reason why a load is impossible; ``name`` is the parameter or group concerned, or None for the whole model."""

    name: str | None
    reason: str

    def __str__(self) -> str:
        return self.reason if self.name is None else f"{self.name}: {self.reason}"


class Obstacles:
    """The obstacles to one load, each once, in the order in which they were found.

    Attributes:
        remedies: hints beyond those in the obstacles themselves.
    """

    def __init__(self) -> None:
        self._found: dict[Obstacle, None] = {}
        self.remedies: list[str] = []

    def __iter__(self) -> Iterator[Obstacle]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def names(self) -> set[str | None]:
        """Return what has an obstacle; with None where one is of the whole model."""
        return {obstacle.name for obstacle in self}

    def add(self, name: str | None, reason: str) -> None:
        """Add an obstacle."""
        self._found[Obstacle(name, reason)] = None

    def add_line(self, line: str, reason: str = "") -> None:
        """Add an obstacle as an error lists it: a name, and the reason if it isn't the same for all of them."""
        name, _, own = line.partition(": ")
        self.add(name, own or reason)

    def add_error(self, error: ListingError) -> None:
        """Add what an error lists; a spec's error stays one."""
        if isinstance(error, SpecError):
            self.add(None, str(error))
            return
        if not error.problems:
            self.add(None, error.heading)
        for problem in error.problems:
            self.add_line(problem, error.heading)
        self.add_remedy(error.remedy)

    def add_remedy(self, remedy: str) -> None:
        """Add a hint, if there is one."""
        if remedy and remedy not in self.remedies:
            self.remedies.append(remedy)

    def check(self, source: object) -> None:
        """Refuse to go on with obstacles.

        Args:
            source: the checkpoint, for the message.

        Raises:
            MismatchError: lists them all.
        """
        lines, remedy = [str(obstacle) for obstacle in self], "\n".join(self.remedies)
        if self.names == {None} and len(self) == 1:
            raise MismatchError(lines[0], remedy=remedy)
        if lines:
            raise MismatchError(f"{source} doesn't fit the model", lines, remedy)

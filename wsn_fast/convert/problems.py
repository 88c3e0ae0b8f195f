"""Collects everything that is wrong, so that the user sees it at once and not one error after the other."""

from __future__ import annotations


class Problems:
    """What is wrong with the arguments of a call, in the order in which it was found."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def add(self, problem: str) -> None:
        """Note a problem. One that is there already is not noted again."""
        if problem not in self._found:
            self._found.append(problem)

    def check(self) -> None:
        """Raise ``ValueError``, which lists all problems, if there is one."""
        if len(self._found) == 1:
            raise ValueError(self._found[0])
        if self._found:
            listed = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(self._found, 1))
            raise ValueError(f"{len(self._found)} things keep this model from being converted:\n{listed}")

"""What a kind of request is: an action, its slots, and its wordings, known and held out."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Intent:
    """One kind of request.

    Attributes:
        action: The action's name in the answer.
        keys: The answer's slots, in order.
        known: Wordings, one a line.
        held_out: Wordings that only the test of new phrasings uses.
        constants: Fields of the answer that the wording alone decides.
    """

    action: str
    keys: tuple[str, ...]
    known: str
    held_out: str
    constants: dict[str, str] = field(default_factory=dict[str, str])

    def wordings(self, *, held_out: bool) -> list[str]:
        """The wordings of one side, without surrounding blanks."""
        return [line.strip() for line in (self.held_out if held_out else self.known).strip().split("\n")]

"""The study of personal forms as a test has it: ten made-up users, and few of everything."""

from __future__ import annotations

from benchmarks.personal_users import Person, Sizes
from soppu.data.examples import Example, Record

SIZES = Sizes(basis=3, tuned=2, reported=2, train=8, validation=2, heldout=3, max_tokens=20, least=8)


def people(users: int, *, group: int = 1) -> list[Person]:
    def records(user: int) -> tuple[Record, ...]:
        return tuple(Record(Example(f"def f{n}():\n", f"    return {user + n}\n")) for n in range(24))

    return [Person(f"u{user}", f"g{user // group}", records(user)) for user in range(users)]

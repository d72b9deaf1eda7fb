"""A run without work in it: the calls that stages make, one for each line of standard input.

    python -m tests.soppu.progress.a_run FOLDER

A line is JSON: ["begin", [stage, ...]], ["stage", name], [], or {"note": ..., "share": ...} for the stage
at work; ["end"] and ["fail", words] end the stage, or the run where there is none. Each is answered.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from soppu.errors import FederationError
from soppu.progress import telling


def fail(stack: ExitStack, words: str) -> None:
    try:
        with stack:
            raise FederationError(words)
    except FederationError:
        pass


def main(folder: Path) -> None:
    run, stage = ExitStack(), ExitStack()
    tell: Any = None
    for line in sys.stdin:
        order = json.loads(line)
        if isinstance(order, dict):
            tell(order)
        elif order[0] == "begin":
            telling.begin(folder, order[1], of=order[2] if len(order) > 2 else "")
            run.enter_context(telling.ending(folder))
        elif order[0] == "stage":
            tell = stage.enter_context(telling.stage(folder, order[1]))
        elif order[0] == "warn":
            logging.getLogger("soppu.stages.imagined").warning(order[1])
        else:
            stack, tell = (run, None) if tell is None else (stage, None)
            stack.close() if order[0] == "end" else fail(stack, order[1])
        sys.stdout.write("ok\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

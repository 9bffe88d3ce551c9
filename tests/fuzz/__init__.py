"""Damages files of every kind that the library reads, and checks what it makes of them.

    python -m tests.fuzz --seed 0 --count 10000

Every damaged folder must be refused in one line, or give the result of the undamaged one, in bounded time and memory.
`folders` makes the undamaged folders, `damage` damages copies of them, `cases` runs the library on them, and
`campaign` does so many times in worker processes.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for `helpers`, which is a top-level module in the tests

"""Run by Python at the start of every process of `make test`, which puts this folder on `PYTHONPATH`.

Importing torch and diffusers creates a million objects that stay. The garbage collector would go through them again and
again, which takes a fifth of the time of the import; hundreds of processes import them.
"""

import gc

gc.set_threshold(100_000, 50, 100)

"""The task suite, its training and plots, and the command line. `import seqcells` does not import it.

Each task is a module with its data, model, recipes and success criterion: NAME, SHOWS, CASES (base.Case by name) and
start(case, cell, recipe, seed, backend=, device=, dtype=), which returns a training.Run.
"""

from . import count_ones, count_ones_regression, echo, memorize, temporal_order

TASKS = {task.NAME: task for task in (count_ones_regression, count_ones, memorize, temporal_order, echo)}

"""The task suite: data, model, recipes and success criterion, one file a task.

A task is a module with NAME, SHOWS, CASES (base.Case by name) and start(case, cell, recipe, seed, backend=, device=,
dtype=), which gives a training.Run.
"""

from . import count_ones, count_ones_regression, echo, memorize, temporal_order

TASKS = {task.NAME: task for task in (count_ones_regression, count_ones, memorize, temporal_order, echo)}

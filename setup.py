"""The layout of the packages; everything else is in pyproject.toml.

kernels/ stands beside seqcells/ in the repository and is imported as seqcells.kernels. The link seqcells/kernels is for
editors, type checkers and running without installing; the mapping here puts each file into a wheel once.
"""

from setuptools import setup

setup(
    packages=[
        "seqcells",
        "seqcells.tasks",
        "seqcells.loop",
        "seqcells.integrations",
        "seqcells.kernels",
        "seqcells.kernels.cells",
    ],
    package_dir={"seqcells": "seqcells", "seqcells.kernels": "kernels"},
)

"""The layout of the packages and the long description; everything else is in pyproject.toml.

kernels/ stands beside seqcells/ in the repository and is imported as seqcells.kernels. The link seqcells/kernels is for
editors, type checkers and running without installing; the mapping here puts each file into a wheel once.

A package index shows README.md without the repository's files, so in the long description there are no pictures of
those, and no links to them.
"""

import re
from pathlib import Path

from setuptools import setup

readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
elsewhere = r"\((?!https?://|#)[^)]*\)"
readme = re.sub(r"!\[[^\]]*\]" + elsewhere + r"\n*", "", readme)
readme = re.sub(r"(?<![\w\])])\[([^\]]*)\]" + elsewhere, r"\1", readme)

setup(
    long_description=readme,
    long_description_content_type="text/markdown",
    packages=[
        "seqcells",
        "seqcells.cells",
        "seqcells.derive",
        "seqcells.tasks",
        "seqcells.engines",
        "seqcells.engines.loop",
        "seqcells.integrations",
        "seqcells.kernels",
    ],
    package_data={"seqcells": ["py.typed"]},
    package_dir={"seqcells": "seqcells", "seqcells.kernels": "kernels"},
)

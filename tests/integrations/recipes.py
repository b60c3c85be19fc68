"""The blocks of docs/frameworks.md, by heading."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"


def blocks():
    """{heading: [code, ...]}"""
    found = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        heading, text = section.split("\n", 1)
        found[heading] = re.findall(r"```python\n(.*?)```", text, re.S)
    return found


def run(heading, only=None, **names):
    """The names that are left when a heading's blocks ran as they stand, one after another; only: that one alone."""
    for number, code in enumerate(blocks()[heading]):
        if only in (None, number):
            exec(compile(code, f"{PAGE.name}, {heading}", "exec"), names)
    return names

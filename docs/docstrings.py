"""Lay out the docstrings for the page of the API: sections as headings, arguments as lists.

A docstring of this package has a sentence, a formula that is indented, and sections such as
`Args:` with items `name (shape): meaning`. Several names may share an item, which no parser of
docstrings takes, so they become Markdown here.
"""

import inspect
import re

import griffe

SECTIONS = "Args|Returns|Raises|Notes|Raises, notes|Attributes|Shapes|Example|Source"
HEAD = re.compile(rf"^({SECTIONS}):[ ]*(.*)$")
ITEM = re.compile(r"^(\S[^:]*?): (.*)$")


def markdown(docstring: str) -> str:
    """Return a docstring as Markdown."""
    lines, section = [], None
    for line in inspect.cleandoc(docstring).splitlines():
        if head := HEAD.match(line):
            section = head[1]
            lines += ["", f"**{section}** {head[2]}", ""]
        elif section is None:
            lines.append(line)
        elif section == "Example":
            lines.append(line)  # indented, so a block of code
        elif section in ("Args", "Attributes", "Raises") and line.startswith("    "):
            inner = line[4:]
            if (item := ITEM.match(inner)) and not inner.startswith(" "):
                lines.append(f"- `{item[1]}`: {item[2]}")
            else:
                lines.append(f"  {inner.strip()}")
        else:
            lines.append(line.strip())
    return "\n".join(lines)


class Layout(griffe.Extension):
    """Replaces the text of every docstring by `markdown` of it."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)

"""For mkdocs: what it does not know of the pages and docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<code>)")  # of Sphinx, in docstrings
OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of this folder, to files of the repository, become their names.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def name(link: re.Match[str]) -> str:
        text, path = link.groups()
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{path}, linked as {text!r}")
        return text if text.endswith(Path(path).name) else f"{text} (`{path}`)"

    return OUTSIDE.sub(name, markdown)


def on_page_content(html: str, **_: Any) -> str:
    return ROLE.sub("", html).replace("::</p>", ":</p>")

"""For mkdocs: what it does not know of the pages and docstrings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<code>)")  # of Sphinx, in docstrings
HELP = re.compile(r"^.*<!-- help of (\S+) -->$", re.MULTILINE)
OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Notebooks become pages, with the outputs that they hold."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        assert notebook.abs_src_path is not None  # it is no generated file
        text, resources = MarkdownExporter().from_filename(notebook.abs_src_path)
        page = notebook.src_uri.replace(".ipynb", ".md")
        text = text.replace("![png]", "![drawn by the cell above]")
        files.remove(notebook)
        for name, content in {page: text, **resources["outputs"]}.items():
            files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Commands are asked for their help; links to files outside of this folder become their names.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def show(command: re.Match[str]) -> str:
        call = [sys.executable, "-m", command[1], "--help"]
        env = os.environ | {"COLUMNS": "80"}
        done = subprocess.run(call, cwd=ROOT, env=env, check=True, text=True, capture_output=True)
        return f"```text\n{done.stdout}```"

    def name(link: re.Match[str]) -> str:
        text, path = link.groups()
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{path}, linked as {text!r}")
        return text if text.endswith(Path(path).name) else f"{text} (`{path}`)"

    markdown = markdown.replace("(notebook.ipynb)", "(notebook.md)")
    return HELP.sub(show, OUTSIDE.sub(name, markdown))


def on_page_content(html: str, **_: Any) -> str:
    return ROLE.sub("", html).replace("::</p>", ":</p>")

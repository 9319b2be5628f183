"""Pages of the documentation site that are made from the code and from files outside ``docs/``; a hook of ``mkdocs.yml``.

One page per command and per room with public names, so that a new command or name is documented without further steps.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from mammostream.cli import COMMANDS, LazyGroup, cli

ROOT = Path(__file__).parents[1]
# Page -> file outside docs/.
COPIED = {f"{name.lower()}.md": f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")} | {"guide.md": "README.md"}
ROOMS = ("preprocess", "shards", "dali_pipelines", "models")
TRAIN_ROOMS = ("run", "byol", "probe", "classify", "predict", "evaluate", "export", "report", "bench")
_LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>[^)#:]+)\)")
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|ref):(<code>)~?")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    pages = {page: for_site((ROOT / name).read_text(encoding="utf-8")) for page, name in COPIED.items()}
    pages |= {f"commands/{name}.md": command_page(name) for name in COMMANDS}
    pages |= {f"api/{room}.md": api_page(room) for room in ROOMS}
    pages["api/train.md"] = train_page()
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_config(config: Any) -> Any:
    """List the generated pages of commands and rooms in the navigation, and give each command the settings of its group."""
    generated = {
        "Commands": [{name: f"commands/{name}.md"} for name in COMMANDS],
        "Python": [{f"mammostream.{room}": f"api/{room}.md"} for room in (*ROOMS, "train")],
    }
    config.nav = [{title: generated.get(title, page) for title, page in entry.items()} for entry in config.nav]
    _share_settings(cli)
    return config


def on_page_content(html: str, **_: Any) -> str:
    """Show the references of docstrings as code: the site has no page for most of them."""
    return _ROLE.sub(r"\1", html)


def for_site(text: str) -> str:
    """Return a Markdown file of the repository's top folder with links as they are within the site."""
    pages = {name: page for page, name in COPIED.items()}

    def link(match: re.Match[str]) -> str:
        target = match["target"]
        if target in pages:
            return f"{match['text']}({pages[target]})"
        if target.startswith("docs/"):
            return f"{match['text']}({target.removeprefix('docs/')})"
        return f"`{target}`"  # a file that only the repository has

    return _LINK.sub(link, text)


def command_page(name: str) -> str:
    """Return the page of a command, its subcommands included."""
    module, attribute, _ = COMMANDS[name]
    module = f"mammostream{module}" if module.startswith(".") else module
    return (
        f"::: mkdocs-click\n    :module: {module}\n    :command: {attribute}\n    :prog_name: mammostream {name}\n"
        "    :list_subcommands: True\n"
    )


def api_page(room: str) -> str:
    """Return the page of a room: its docstring, then its public names."""
    stub = ast.parse((ROOT / room / "__init__.pyi").read_text(encoding="utf-8"))
    names = sorted(alias.asname or alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names)
    return _module(f"mammostream.{room}") + "".join(f"::: mammostream.{room}.{name}\n\n" for name in names)


def train_page() -> str:
    """Return the page of ``train``: the docstrings of its rooms."""
    return _module("mammostream.train") + "".join(_module(f"mammostream.train.{room}", level=2) for room in TRAIN_ROOMS)


def _module(name: str, level: int = 1) -> str:
    return f"::: {name}\n    options:\n      members: false\n      heading_level: {level}\n\n"


def _share_settings(group: LazyGroup) -> None:
    """Let commands show their defaults, at one width, although each page shows its command without the group."""
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        command.context_settings = group.context_settings | command.context_settings | {"terminal_width": 100}
        for option in command.params:
            if option.name == "num_workers":
                option.show_default = "one per core, at most 16"  # not the cores of the machine that builds the site
        if hasattr(command, "list_commands"):
            _share_settings(command)

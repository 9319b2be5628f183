"""The documentation: the site builds without a warning, knows every command and public name, and tables agree with the code."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_architecture import ROOMS, ROOT, TRAIN_ROOMS

import mammostream
from mammostream.cli import COMMANDS, cli


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    # In its own process: the site's hook changes the commands that it shows.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def article(page: Path) -> str:
    """The text of a page without its navigation, each run of white space one space."""
    text = page.read_text(encoding="utf-8")
    text = text[text.index("<article") : text.index("</article>")]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_page_with_its_subcommands_and_options(site, name):
    text = article(site / f"commands/{name}.html")
    command = cli.get_command(None, name)
    names = command.list_commands(None) if hasattr(command, "commands") else []
    subcommands = [command.get_command(None, sub) for sub in names]
    assert all(f"mammostream {name} {sub.name}" in text for sub in subcommands)
    for shown in subcommands or [command]:
        assert all(param.opts[0] in text for param in shown.params if param.param_type_name == "option")
    home = (site / "index.html").read_text(encoding="utf-8")
    assert f'href="commands/{name}.html"' in home


def test_a_command_page_shows_help_and_defaults(site):
    text = article(site / "commands/shards.html")
    assert "Edge length of a tile in stored pixels. [default: 512]" in text
    text = article(site / "commands/pretrain.html")
    assert "one per core, at most 16" in text


@pytest.mark.parametrize("room", ["preprocess", "shards", "dali_pipelines", "models"])
def test_an_api_page_has_every_public_name(site, room):
    page = (site / f"api/{room}.html").read_text(encoding="utf-8")
    names = getattr(mammostream, room).__all__
    assert len(names) > 3
    assert all(f'id="mammostream.{room}.{name}"' in page for name in names)
    assert ":func:" not in page


def test_an_api_page_shows_signatures_and_parameters(site):
    text = article(site / "api/models.html")
    assert 'weights: str | Path = "none"' in text
    assert "num_features" in text


def test_pages_from_outside_the_folder_keep_their_links(site):
    guide = (site / "guide.html").read_text(encoding="utf-8")
    assert 'href="bottlenecks.html"' in guide
    assert "docs/" not in re.findall(r'(?:href|src)="([^"]*)"', guide)
    assert "Unreleased" in article(site / "changelog.html")


def test_the_site_asks_the_network_for_no_fonts(site):
    assert "fonts.g" not in (site / "index.html").read_text(encoding="utf-8")


def test_the_tables_of_rooms_are_those_that_are_enforced():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| [^|]+ \| ([^|]+) \|$", text, flags=re.MULTILINE)
    tables = {name: set(re.findall(r"`(\w+)`", allowed)) for name, allowed in rows}
    # The last room may import all that stand above it.
    assert dict(rows)["mammostream.train"] == "all of the above"
    tables["mammostream.train"] = {*ROOMS} - {"train"}
    assert tables == {f"mammostream.{room}": allowed for room, allowed in ROOMS.items()} | TRAIN_ROOMS


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_between_files_lead_somewhere(name):
    targets = re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    assert all((ROOT / target).is_file() for target in targets), targets


def test_commit_hooks_run_the_linter_of_the_tests():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    (version,) = re.findall(r"ruff-pre-commit\n\s+rev: v([\d.]+)", hooks)
    for path in (ROOT / "constraints").iterdir():
        assert f"ruff=={version}\n" in path.read_text(encoding="utf-8")


def test_every_flag_is_explained():
    """Each flag that reading or tiling sets by name has a row in docs/flags.md."""
    page = (ROOT / "docs/flags.md").read_text(encoding="utf-8")
    named = re.compile(r"""(?:flags|remarks)\["(\w+)"\] =|_MISSING = "(\w+)"|\(\*flags, "(\w+)"\)""")
    found = {next(filter(None, m)) for path in ROOT.glob("preprocess/*.py") for m in named.findall(path.read_text("utf-8"))}
    assert len(found) > 15
    assert {flag for flag in found if f"`{flag}`" not in page} == set()

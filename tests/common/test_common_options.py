"""One spelling rule, lists, options from dataclasses, ``--config FILE``; errors of the real commands are one line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mammostream.common.errors import BadInput
from mammostream.common.options import (
    Group,
    ListOption,
    config_file_option,
    config_options,
    option,
    read_mapping,
    resolved,
    split_commas,
)


@dataclass(frozen=True)
class Config:
    tile_size: int = option(512, "Edge in pixels.")
    lr: float | None = option(None, "Rate.", name="--learning-rate")
    mode: str = option("a", "Which.", choices=("a", "b"))
    fast: bool = option(False, "Hurry.")
    internal: int = 7


@click.group(cls=Group)
def group():
    pass


@group.command()
@click.option("--class-names", "names", cls=ListOption, callback=split_commas, help="Names.")
@click.option("--csv-path", "csv_paths", cls=ListOption, type=click.Path(path_type=Path), help="Files.")
@config_options(Config)
@config_file_option
@click.argument("rest", nargs=-1)
@click.pass_context
def run(ctx, **_):
    click.echo(json.dumps(resolved(ctx)))


def call(*args):
    result = CliRunner().invoke(group, ["run", *map(str, args)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_defaults_come_from_the_dataclass():
    assert call() == {
        "class_names": [],
        "csv_path": [],
        "tile_size": 512,
        "learning_rate": None,
        "mode": "a",
        "fast": False,
        "rest": [],
    }


def test_hyphen_and_underscore_are_alike():
    for sign in "-_":
        got = call(f"--tile{sign}size", 8, f"--learning{sign}rate", "0.5", f"--class{sign}names", "a", "b", f"--no{sign}fast")
        assert (got["tile_size"], got["learning_rate"], got["class_names"], got["fast"]) == (8, 0.5, ["a", "b"], False)


@pytest.mark.parametrize(
    "args",
    [
        ["--class-names", "a", "b", "c_d"],
        ["--class-names", "a,b", "c_d"],
        ["--class-names=a,b", "--class-names", "c_d"],
        ["--class_names=a", "b", "c_d", "--fast"],
    ],
)
def test_lists_in_every_spelling(args):
    assert call(*args)["class_names"] == ["a", "b", "c_d"]


def test_a_list_ends_at_the_next_option():
    got = call("--csv-path", "x.csv", "y.csv", "--tile-size", 3, "z")
    assert (got["csv_path"], got["tile_size"], got["rest"]) == (["x.csv", "y.csv"], 3, ["z"])


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_config_file_gives_defaults_and_flags_win(tmp_path, kind):
    path = tmp_path / f"c.{kind}"
    values = {"tile_size": 64, "learning_rate": 0.25, "mode": "b", "fast": True, "class_names": ["p", "q"]}
    path.write_text(json.dumps({key.replace("_", "-"): value for key, value in values.items()}))  # JSON is YAML too
    got = call("--config", path, "--tile-size", 32)
    assert (got["tile_size"], got["learning_rate"], got["mode"], got["fast"], got["class_names"]) == (
        32,
        0.25,
        "b",
        True,
        ["p", "q"],
    )


@pytest.mark.parametrize("key", ["csv_path", "csv-path", "csv_paths"])
@pytest.mark.parametrize("value", ["one.csv", ["one.csv"]])
def test_config_file_takes_the_options_own_name_and_a_single_value(tmp_path, key, value):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({key: value}))
    assert call("--config", path)["csv_path"] == ["one.csv"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tile_sise: 3", "unknown key 'tile_sise' \\(did you mean 'tile_size'\\?\\)"),
        ("internal: 3", "unknown key 'internal'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("- a\n- b", "holds no mapping"),
        ("a: [", "neither YAML nor JSON"),
        ("", "holds no mapping"),
        ("{" * 3000, "neither YAML nor JSON"),
        ("tile_size: [1]", r"tile_size: '\[1\]' is no value for --tile-size"),
        ("tile_size: {a: 1}", "is no value for --tile-size"),
        ("tile_size: .inf", "'inf' is no value for --tile-size"),
        ("fast: 9223372036854775808", "is no value for --fast"),
        ("class_names: [a, [b]]", "is no value of several values for --class-names"),
        ("class_names: {a: b}", "is no value of several values for --class-names"),
    ],
)
def test_bad_config_file(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message) as caught:
        call("--config", path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tile-size", 2**31], "--tile-size 2147483648 has more than 32 bits"),
        (["--tile-size", -(10**30)], "has more than 32 bits"),
        (["--csv-path", "a/" + "x" * 256], "--csv-path 'a/xxx.* cannot be the name"),
        (["--csv-path", "ä" * 128], "cannot be the name"),
    ],
)
def test_what_no_machine_takes_is_refused_before_the_command_runs(args, message):
    with pytest.raises(BadInput, match=message):
        call(*args)
    assert call("--tile-size", 2**31 - 1, "--csv-path", "x" * 255)


def test_missing_config_file(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        read_mapping(tmp_path / "c.yaml")


def test_wrong_value_of_a_config_file_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("tile_size: big")
    result = CliRunner().invoke(group, ["run", "--config", str(tmp_path / "c.yaml")])
    assert result.exit_code == 2
    assert "--tile-size" in result.stderr


def test_an_empty_value_of_a_config_file_is_the_default(tmp_path):
    (tmp_path / "c.yaml").write_text("tile_size:\nclass_names: null\nmode: b\n")
    got, default = call("--config", tmp_path / "c.yaml"), call()
    assert got == default | {"mode": "b"}


def test_resolved_options_are_a_config_file_themselves(tmp_path):
    first = call("--tile-size", 7, "--learning-rate", 0.5, "--class-names", "a", "b", "--csv-path", "x.csv", "--fast")
    assert first.pop("rest") == []
    (tmp_path / "config.json").write_text(json.dumps(first))
    again = call("--config", tmp_path / "config.json")
    again.pop("rest")
    assert again == first

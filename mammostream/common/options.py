"""Command-line options: one spelling rule, lists, options made from config dataclasses, ``--config FILE``."""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mammostream.common.buckets import refuse_bucket
from mammostream.common.errors import BadInput, first_line, nearest
from mammostream.common.temporaries import new_command

_LONGEST_NAME = 255  # bytes, on Linux
_SHARDS = {"--shards", "SHARDS"}  # what names shards, which may lie in a bucket


class ListOption(click.Option):
    """An option that takes one or more values: ``--class-names mass calcification`` or ``mass,calcification``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"multiple": True}))


class Command(click.Command):
    """A command whose :class:`ListOption` values may follow each other and whose ``--config`` file gives defaults."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        names = {name for p in self.params if isinstance(p, ListOption) for name in p.opts}
        spread: list[str] = []
        current: str | None = None
        for arg in args:
            if arg.startswith("--"):
                name, _, value = arg.partition("=")
                normalised = name.replace("_", "-")
                current = normalised if normalised in names else None
                if current is None:
                    spread.append(arg)
                elif value:
                    spread += [current, value]
            elif current:
                spread += [current, arg]
            else:
                spread.append(arg)
        return super().parse_args(ctx, spread)

    def invoke(self, ctx: click.Context) -> Any:
        new_command()
        for param in self.params:
            value = ctx.params.get(param.name or "")
            flag = param.opts[0] if isinstance(param, click.Option) else param.human_readable_name
            for single in value if isinstance(value, tuple) else (value,):
                _refuse_what_no_machine_takes(single, flag)
                if isinstance(single, Path) and not _SHARDS & {*param.opts, param.metavar}:
                    refuse_bucket(single, flag)
        return super().invoke(ctx)


def _refuse_what_no_machine_takes(value: Any, flag: str) -> None:
    """Refuse paths that no file can have, and integers of more than 32 bits, which some library would trip over later."""
    if isinstance(value, Path) and ("\0" in str(value) or any(len(os.fsencode(part)) > _LONGEST_NAME for part in value.parts)):
        raise BadInput(f"{flag} {str(value)[:60]!r}… cannot be the name of a file or folder")
    if isinstance(value, int) and not -(2**31) <= value < 2**31:
        raise BadInput(f"{flag} {value} has more than 32 bits; give a smaller number")


class Group(click.Group):
    """A group whose commands are :class:`Command` and which takes ``-`` and ``_`` alike in options."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = {"token_normalize_func": lambda name: name.replace("_", "-"), "max_content_width": 110}
        kwargs["context_settings"] = settings | kwargs.get("context_settings", {}) | {"show_default": True}
        super().__init__(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # A bare group asks what there is.
        return super().parse_args(ctx, args or ["--help"])


Group.group_class = Group


def split_commas(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Click callback: flatten comma-separated values of a :class:`ListOption`."""
    return tuple(part.strip() for item in value for part in item.split(",") if part.strip())


def option(default: Any, help: str, *, choices: tuple[str, ...] | None = None, name: str | None = None) -> Any:
    """Declare a dataclass field that :func:`config_options` turns into a command-line option.

    Parameters
    ----------
    default
        The field's default.
    help
        The help text: what it does, its unit and its range.
    choices
        The only values allowed.
    name
        The option's name where it is not the field's (``tile_size`` gives ``--tile-size``).
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "name": name})


def config_options(config: type) -> Callable[[Callable], Callable]:
    """Decorate a command with one option per :func:`option` field of the dataclass `config`.

    A ``tuple[str, ...]`` becomes a :class:`ListOption`, a bool ``--name/--no-name``.
    """
    hints = typing.get_type_hints(config)

    def decorate(function: Callable) -> Callable:
        for field in reversed(dataclasses.fields(config)):
            if "help" not in field.metadata:
                continue
            flag = field.metadata["name"] or "--" + field.name.replace("_", "-")
            kind: Any = hints[field.name]
            if isinstance(kind, types.UnionType):
                kind = next(k for k in typing.get_args(kind) if k is not type(None))
            choices = field.metadata["choices"]
            extra: dict[str, Any] = {"type": click.Choice(choices) if choices else kind}
            if typing.get_origin(kind) is tuple:  # of strings, with spaces or commas between them
                extra = {"cls": ListOption, "callback": split_commas}
            if kind is bool:
                flag, extra = f"{flag}/--no-{flag[2:]}", {}
            function = click.option(flag, field.name, default=field.default, help=field.metadata["help"], **extra)(function)
        return function

    return decorate


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON mapping.

    Raises
    ------
    BadInput
        The file is missing or holds no mapping.
    """
    import yaml

    if not path.is_file():
        raise BadInput(f"config {path} does not exist; check --config")
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise BadInput(f"config {path} is neither YAML nor JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise BadInput(f"config {path} holds no mapping; write one 'option: value' a line")
    return value


def _load_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    if value is None:
        return
    options = [p for p in ctx.command.params if p is not param]
    names = {flag.lstrip("-").replace("-", "_"): p for p in options for flag in p.opts} | {p.name: p for p in options}
    mapping = {}
    for key, entry in read_mapping(value).items():
        if key == "chosen":  # what a run settled for on its machine stands next to its options
            continue
        key = str(key).replace("-", "_")
        if key not in names:
            raise BadInput(f"config {value} has the unknown key '{key}'{nearest(key, names)}; see --help for the options")
        if entry is None:  # nothing given: the default
            continue
        alone = isinstance(names[key], ListOption) and not isinstance(entry, list)
        mapping[names[key].name] = _of_its_type(ctx, names[key], [entry] if alone else entry, f"config {value}: {key}")
    ctx.default_map = mapping


def _of_its_type(ctx: click.Context, param: click.Parameter, entry: Any, what: str) -> Any:
    """Return an entry of a config file that the option's type can take; click expects texts, and trips over much else."""
    allowed = (list, tuple) if param.multiple or param.nargs != 1 else (str, bool, int, float)
    values = entry if isinstance(entry, (list, tuple)) else [entry]
    if isinstance(entry, allowed) and all(isinstance(value, (str, bool, int, float)) for value in values):
        try:
            param.type_cast_value(ctx, entry)
            return entry
        except click.UsageError:  # click says what is wrong when the command runs
            return entry
        except (TypeError, ValueError, OverflowError, AttributeError):
            pass
    kind = " of several values" if allowed == (list, tuple) else ""
    raise BadInput(f"{what}: {str(entry)[:60]!r} is no value{kind} for {param.opts[0]}; see --help")


config_file_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_load_config,
    help="YAML or JSON file with options by name (batch_size: 64); options on the command line win.",
)


def resolved(ctx: click.Context) -> dict[str, Any]:
    """Return the options by name with the values in force, as plain types for a ``config.yaml`` that --config reads."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    names = {p.name: p.opts[0].lstrip("-").replace("-", "_") for p in ctx.command.params}
    return {names[name]: plain(value) for name, value in ctx.params.items()}

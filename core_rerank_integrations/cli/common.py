"""Shared parts of the commands: options from pydantic models, errors, and tables."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from core_rerank_integrations.errors import CoReError
from core_rerank_integrations.settings import CheckedModel


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn a function into a command.

    A parameter whose type is a `CheckedModel` becomes one option per field, with the field's
    name, type, default and description. The function receives the validated model. Fields whose
    type cannot be written on a command line, such as mappings, have no option. A `CoReError` is
    printed without a traceback, and the exit code is 1.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters: dict[str, inspect.Parameter] = {}
    models: dict[str, type[CheckedModel]] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if isinstance(hints[name], type) and issubclass(hints[name], CheckedModel):
            models[name] = hints[name]
            parameters |= {option.name: option for option in _options(hints[name])}
        else:
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters[name] = parameter.replace(annotation=hints[name], kind=kind)

    @wraps(function)
    def run(**values: Any) -> None:
        arguments = {name: value for name, value in values.items() if name in hints}
        try:
            for name, model in models.items():
                fields = model.model_fields.keys() & values.keys()
                arguments[name] = model.checked(**{field: values[field] for field in fields})
            function(**arguments)
        except CoReError as error:
            typer.echo(f"{typer.style('error:', fg='red')} {error}", err=True)
            raise typer.Exit(1) from error

    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: option.annotation for name, option in parameters.items()}
    return run


def print_table(
    headers: Sequence[str], rows: Iterable[Sequence[str | Text]], title: str | None = None
) -> None:
    """Print a table to a terminal; to a file or a pipe, lines of cells separated by tabs.

    Text of users is never read as markup, and lines outside a terminal are never wrapped or cut.
    """
    if sys.stdout is not None and sys.stdout.isatty():
        table = Table(title=title, title_justify="left")
        for index, header in enumerate(headers):
            table.add_column(header, overflow="fold", no_wrap=index == 0)  # Names stay whole.
        for row in rows:
            table.add_row(*row)
        Console(markup=False, emoji=False, highlight=False).print(table)
        return
    if title is not None:
        print(title)
    for row in (headers, *rows):
        print("\t".join(" ".join(str(cell).split()) for cell in row))


def _options(model: type[CheckedModel]) -> Iterator[inspect.Parameter]:
    """Yield one parameter per field that can be written on a command line, base classes last."""
    for owner in model.__mro__:
        for name in inspect.get_annotations(owner):
            field = model.model_fields.get(name)
            types = list(_types(field.annotation)) if field else []
            if not field or not types:
                continue
            default = field.get_default(call_default_factory=True)
            flag = f"--{name.replace('_', '-')}"
            option = typer.Option(flag, help=field.description)
            yield inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.is_required() else default,
                annotation=Annotated[(types[0] if len(types) == 1 else str) | None, option],
            )


def _types(annotation: Any) -> Iterator[Any]:
    """Yield the members of a union that can be written on a command line."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _types(arguments[0])
    elif origin in (Union, UnionType):
        for argument in arguments:
            yield from _types(argument)
    elif origin is list:
        items = list(_types(arguments[0]))
        yield list[items[0] if len(items) == 1 else str]  # type: ignore[misc]
    elif origin is Literal or annotation in (bool, float, int, str, Path):
        yield annotation

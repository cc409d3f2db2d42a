"""The columns of a file that become the fields of a resource."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from velikiy.bulk.input_file import CannotImport, WrongColumns
from velikiy.resources.base import READ_ONLY, KnownExport, Resource, column_key

MAX_LISTED = 30
"""Names of columns in a message."""

Alternatives = tuple[tuple[str, ...], ...]
"""Columns of one field. The first alternative that is not empty is used; its columns are joined with blanks."""


class Reading(NamedTuple):
    """The options that decide how a file is read."""

    accept: Callable[[str], None]
    """Receives the description of a proposed mapping, and raises CannotImport if the operator does not accept it."""

    file_format: str | None = None
    """csv, ndjson or json; None recognises the format."""

    encoding: str | None = None
    maps: Sequence[str] = ()
    """Texts such as "First Name+Last Name=name"."""

    ignore_unknown: bool = False


class Columns(NamedTuple):
    """The columns of each field."""

    sources: Mapping[str, Alternatives]
    drops_others: bool
    """Other columns are left out. Otherwise they are errors."""

    value_separator: str = ""

    is_plain: bool = False
    """The columns have our names, so a row is read as it is."""

    def value(self, alternatives: Alternatives, get: Callable[[str], Any]) -> Any:
        """Return the value of a field. A value that is no text stays what it is, so that it is refused as such."""
        first: Any = None
        for names in alternatives:
            values = [get(name) for name in names]
            if len(values) > 1:
                values = [" ".join(str(value).strip() for value in values if value not in (None, ""))]
            value = values[0]
            if self.value_separator and isinstance(value, str):
                value = value.partition(self.value_separator)[0]
            if value not in (None, ""):
                return value
            first = value if first is None else first
        return first


def describe(columns: Columns) -> Iterator[str]:
    for field, alternatives in columns.sources.items():
        text = ", else ".join(" + ".join(names) for names in alternatives)
        yield f"  {field} ← {text}"


MAX_COLUMNS = 1000


def choose_columns(resource: Resource, names: Sequence[str], reading: Reading, line: int | None = None) -> Columns:
    """Return the columns of the fields, by the options, by their names, or by the names of well-known programs.

    Args:
        names: The columns of the file.
        line: The line that names them; None if each row names its own columns, and may have others.

    Raises:
        CannotImport
    """
    if len(names) > MAX_COLUMNS:
        raise CannotImport(f"the file names {len(names):,} columns, but may have at most {MAX_COLUMNS:,}")
    known = next((export for export in resource.known_exports if export.columns <= set(map(column_key, names))), None)
    sources = _given(resource, names, reading)
    _add_namesakes(resource, names, sources, reading, line)
    required = {name for name, field in resource.create_model.model_fields.items() if field.is_required()}
    missing = [name for name in resource.fields if name in required and name not in sources]
    unknown = [name for name in names if not _uses(sources, name) and name.casefold() not in READ_ONLY]
    separator = known.value_separator if known else ""
    proposal = None
    if not reading.maps and (missing or (unknown and known and not reading.ignore_unknown)):
        proposal = _proposal(resource, names, known, required)
    drops_others = bool(proposal) or reading.ignore_unknown
    is_plain = not (drops_others or reading.maps or _is_in_another_case(resource, names))
    chosen = proposal or {field: sources[field] for field in resource.fields if field in sources}
    columns = Columns(chosen, drops_others, separator, is_plain)
    _check_unique(columns, names, line)
    if proposal:
        reading.accept(_question(columns, names, known))
    elif missing and (unknown or line):
        raise WrongColumns(names, *_missing_sentence(resource, names, missing, line))
    elif unknown and not reading.ignore_unknown and (reading.maps or line):
        raise WrongColumns(names, *_unknown_sentence(resource, unknown, line))
    return columns


def _add_namesakes(
    resource: Resource, names: Sequence[str], sources: dict[str, Alternatives], reading: Reading, line: int | None
) -> None:
    """Add the columns that are named like a field, in any case."""
    given = set(sources)
    for name in names:
        field = name.casefold()
        if field not in resource.fields or _uses(sources, name):
            continue
        if field not in sources:
            sources[field] = ((name,),)
        elif field not in given:
            raise CannotImport(_twice_sentence(names, name, line))
        elif not reading.ignore_unknown:
            raise CannotImport(
                f"two columns are for {field}: {' + '.join(sources[field][0])} (--map) and {name}",
                f". --ignore-unknown leaves {name} out",
            )


def _given(resource: Resource, names: Sequence[str], reading: Reading) -> dict[str, Alternatives]:
    """Return the columns that --map names for fields."""
    sources: dict[str, Alternatives] = {}
    for text in reading.maps:
        given, _, field = (part.strip() for part in text.rpartition("="))
        field = field.casefold()
        if field not in resource.fields or not given:
            raise CannotImport(
                f"{text!r} must be COLUMN=FIELD, where the fields of {resource.name} are"
                f" {' and '.join(resource.fields)}",
                option="--map ",
            )
        if field in sources:
            raise CannotImport(
                f"two columns are for {field}: {' + '.join(sources[field][0])} and {given}",
                f'. To join them: --map "{"+".join(sources[field][0])}+{given}={field}"',
            )
        whole = _named(names, given)
        parts = [given] if whole else [part.strip() for part in given.split("+")]
        found = [_named(names, part) for part in parts]
        for part, name in zip(parts, found, strict=True):
            if name is None:
                raise CannotImport(
                    f"the file has no column {part!r}; its columns are {_list(names)}", option=f"--map {text!r}: "
                )
        sources[field] = (tuple(name for name in found if name is not None),)
    return sources


def _named(names: Sequence[str], given: str) -> str | None:
    if given in names:
        return given
    return next((name for name in names if name.casefold() == given.casefold()), None)


def _uses(sources: Mapping[str, Alternatives], name: str) -> bool:
    return any(name in columns for alternatives in sources.values() for columns in alternatives)


def _is_in_another_case(resource: Resource, names: Sequence[str]) -> bool:
    """Return True if a column has the name of a column of the resource in another case."""
    ours = {*resource.fields, *READ_ONLY}
    return any(name not in ours and name.casefold() in ours for name in names)


def _check_unique(columns: Columns, names: Sequence[str], line: int | None) -> None:
    folded = Counter(name.casefold() for name in names)
    for name in names:
        if folded[name.casefold()] > 1 and _uses(columns.sources, name):
            raise CannotImport(_twice_sentence(names, name, line))


def _twice_sentence(names: Sequence[str], name: str, line: int | None) -> str:
    """Return the sentence about columns whose names differ in case only. Without a line that names the columns, they
    may come from different objects."""
    if line:
        return f"line {line} names the column {name} twice"
    spellings = [other for other in names if other.casefold() == name.casefold()]
    return (
        f"the objects name the column {name.casefold()} in different ways: {_list(spellings)}. Rename it, so that all"
        " objects have one of these names"
    )


def _proposal(
    resource: Resource, names: Sequence[str], known: KnownExport | None, required: set[str]
) -> dict[str, Alternatives] | None:
    """Return the columns that other programs use for the fields, or None if a required field has none."""
    by_key: dict[str, str] = {}
    for name in names:
        by_key.setdefault(column_key(name), name)
    proposal: dict[str, Alternatives] = {}
    for field in resource.fields:
        synonyms = (*(known.synonyms.get(field, ()) if known else ()), *resource.column_synonyms.get(field, ()))
        alternatives: Alternatives = ()
        for keys in synonyms:
            columns = tuple(by_key[key] for key in keys if key in by_key)
            is_named = keys[0] in by_key or keys[-1] in by_key  # a middle name is no name
            if is_named and not any(set(columns) <= set(earlier) for earlier in alternatives):
                alternatives = (*alternatives, columns)
        if alternatives:
            proposal[field] = alternatives
        elif field in required:
            return None
    return proposal


def _question(columns: Columns, names: Sequence[str], known: KnownExport | None) -> str:
    title = f"the columns look like those of {known.program}:" if known else "the columns have other names here:"
    lines = [title, *describe(columns)]
    if ignored := [name for name in names if name and not _uses(columns.sources, name)]:
        lines.append(f"  ignored: {_list(ignored)}")
    if columns.value_separator:
        lines.append(f"  of several values in a cell ({columns.value_separator.strip()}), the first is used")
    return "\n".join(lines)


def _missing_sentence(
    resource: Resource, names: Sequence[str], missing: list[str], line: int | None
) -> tuple[str, str]:
    """Return what is wrong, and what to do at the command line."""
    at = f"line {line} must name the columns, and lacks" if line else "the objects lack"
    sentence = f"{at} {', '.join(missing)}"
    if line and any("@" in name for name in names):
        return f"{sentence}: it seems to be a row. Put a line above it: {','.join(resource.fields)}", ""
    field = missing[0]
    advice = f'. Choose: --map "COLUMN={field}", or --map "COLUMN+COLUMN={field}" to join columns'
    return f"{sentence}; the columns of the file are {_list(names)}", advice


def _unknown_sentence(resource: Resource, unknown: list[str], line: int | None) -> tuple[str, str]:
    """Return what is wrong, and what to do at the command line."""
    at = f"line {line} must name the columns, and " if line else ""
    if not unknown[0]:
        return f"{at}one of them has no name", ": --ignore-unknown leaves it out"
    return (
        f"{at}{resource.name} have no column {unknown[0]!r}; the columns are {', '.join(resource.fields)}"
        f" (and {', '.join(READ_ONLY)}, which are ignored)",
        ". --ignore-unknown leaves other columns out, and --map names columns for fields",
    )


def _list(names: Sequence[str]) -> str:
    named = [name for name in names if name]
    return ", ".join(named[:MAX_LISTED]) + (f" and {len(named) - MAX_LISTED} more" if len(named) > MAX_LISTED else "")

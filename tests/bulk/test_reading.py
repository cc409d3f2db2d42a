"""The forms that files have: each is read, or refused with a sentence that says what to do. No server is needed."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest

from velikiy.bulk.columns import Reading
from velikiy.bulk.input_file import CannotImport
from velikiy.bulk.readers import Row, read
from velikiy.bulk.unpack import open_input
from velikiy.resources.users import resource

ANN, BEN = ["Ann Lee", "ann@example.com"], ["Ben Oz", "ben@example.com"]
ROWS = [{"name": name, "email": email} for name, email in (ANN, BEN)]
CSV = b"name,email\nAnn Lee,ann@example.com\nBen Oz,ben@example.com\n"
RUSSIAN = "name;email\r\nЗоя Ли;zoya@example.com\r\nИван Цой;ivan@example.com\r\nBob Plain;bob@example.com\r\n"
JAPANESE = "name,email\n山田太郎,yamada@example.com\n鈴木花子,suzuki@example.com\nたなか,tanaka@example.com\n"


def _accept(columns: str) -> None:
    """Accept every proposal."""


def _refuse(columns: str) -> None:
    raise CannotImport(columns)


def rows_of(folder: Path, content: bytes, file: str = "a.csv", accept: Any = _accept, **options: Any) -> list[Row]:
    path = folder / file
    path.write_bytes(content)
    with open_input(str(path)) as (_, stream, beginning):
        reading = Reading(accept, **options)
        return list(read(resource, str(path), stream, beginning, reading).rows)


def values_of(folder: Path, content: bytes, file: str = "a.csv", **options: Any) -> list[list[Any]]:
    """Return the values of the rows, none of which is rejected."""
    rows = rows_of(folder, content, file, **options)
    assert not [row.errors for row in rows if row.errors]
    return [row.values for row in rows]


def refusal_of(folder: Path, content: bytes, file: str = "a.csv", **options: Any) -> str:
    with pytest.raises(CannotImport) as refusal:
        rows_of(folder, content, file, **options)
    return str(refusal.value)


def table(header: str, *rows: str) -> bytes:
    return "\n".join([header, *rows, ""]).encode()


def archive(**files: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in files.items():
            target.writestr(name.replace("__", "/"), content)
    return stream.getvalue()


# ---- CSV ----


@pytest.mark.parametrize(
    "content",
    [
        CSV,
        CSV.replace(b"name,email", b"Name,E-MAIL".replace(b"-", b"")),
        b"\xef\xbb\xbf" + CSV,
        CSV.replace(b"\n", b"\r\n"),
        CSV.replace(b"\n", b"\r"),
        CSV.replace(b",", b";"),
        CSV.replace(b",", b"\t"),
        CSV.replace(b",", b"|"),
        b"sep=;\r\n" + CSV.replace(b",", b";"),
        b'"sep=;"\n' + CSV.replace(b",", b";"),
        b"#TYPE Selected.Microsoft.ActiveDirectory.Management.ADUser\r\n" + CSV,
        b"version:v1.0\n" + CSV,
        b"List of users\n\n" + CSV,
        CSV.replace(b"\n", b",,,\n"),
        b"name,email\nAnn Lee,ann@example.com,\nBen Oz,ben@example.com,,\n",
        b"\n,\n  \n" + CSV.replace(b"\n", b"\n\n,\n   \n \t \n") + b",\n,\n",
        b"email            ,name    \nann@example.com  , Ann Lee  \nben@example.com,Ben Oz\n",
        b'"name", "email"\n"Ann Lee", "ann@example.com"\n"Ben Oz", "ben@example.com"\n',
        CSV.replace(b"Ann Lee", b"Ann Lee" + b" " * 200),
        b"id,name,email,created_at\n1,Ann Lee,ann@example.com,x\n2,Ben Oz,ben@example.com,x\n",
        b"ID,Name,Email,Version\n1,Ann Lee,ann@example.com,x\n2,Ben Oz,ben@example.com,x\n",
    ],
)
@pytest.mark.parametrize("file", ["a.csv", "a.ndjson", "a.txt"])
def test_table_is_read_whatever_program_wrote_it(tmp_path: Path, content: bytes, file: str) -> None:
    assert values_of(tmp_path, content, file) == [ANN, BEN]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"name,email,phone\nAnn,ann@example.com,123\n", "--ignore-unknown leaves other columns out"),
        (b",name,email\n0,Ann,ann@example.com\n", "one of them has no name: --ignore-unknown"),
        (b"Ann,ann@example.com\n", "it seems to be a row. Put a line above it: name,email"),
        (b"name,phone\nAnn,1\n", 'lacks email; the columns of the file are name, phone. Choose: --map "COLUMN=email"'),
        (b"name,Name,email\n", "line 1 names the column Name twice"),
        (
            b'[{"name": "Ann", "email": "a@example.com"}, {"Name": "Ben", "email": "b@example.com"}]',
            "the objects name the column name in different ways: name, Name. Rename it",
        ),
        (
            b'{"NAME": "Ann", "email": "a@example.com", "Name": "A"}\n',
            "the objects name the column name in different ways: NAME, Name. Rename it",
        ),
        (b"name,email,name\n", "line 1 names the column name twice"),
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (b"\xef\xbb\xbf", "the file is empty"),
        (b"title\nname,phone\n", "line 2 must name the columns, and lacks email"),
        (b"a title\n", "line 1 must name the columns, and lacks name, email"),
    ],
)
def test_table_without_the_columns_is_refused_by_name(tmp_path: Path, content: bytes, sentence: str) -> None:
    assert sentence in refusal_of(tmp_path, content)


def test_extra_columns_are_left_out_on_request(tmp_path: Path) -> None:
    content = b"phone,name,email,\n1,Ann Lee,ann@example.com,\n2,Ben Oz,ben@example.com,\n"
    assert values_of(tmp_path, content, ignore_unknown=True) == [ANN, BEN]
    assert values_of(tmp_path, b",name,email\n0,Ann Lee,ann@example.com\n", ignore_unknown=True) == [ANN]


def test_value_beyond_the_columns_rejects_its_row(tmp_path: Path) -> None:
    good, bad = rows_of(tmp_path, b"name,email\nAnn Lee,ann@example.com,\nBen Oz,ben@example.com,x\n")
    assert good.values == ANN
    assert bad.errors == [{"field": "", "detail": "has 3 values for 2 columns"}]


# ---- columns ----


def test_map_names_and_joins_columns(tmp_path: Path) -> None:
    content = table("First Name,Last Name,E-mail 1 - Value", "Ann,Lee,ann@example.com", "Ben Oz,,ben@example.com")
    maps = ["First Name+Last Name=name", "e-mail 1 - value=email"]
    assert values_of(tmp_path, content, maps=maps) == [ANN, BEN]
    content = table("a+b,mail=,x", "Ann Lee,ann@example.com,1")
    assert values_of(tmp_path, content, maps=["a+b=name", "mail==email"], ignore_unknown=True) == [ANN]
    lines = b'{"first": "Ann", "last": "Lee", "mail": "ann@example.com"}\n'
    assert values_of(tmp_path, lines, maps=["first+last=name", "mail=EMAIL"]) == [ANN]


@pytest.mark.parametrize(
    ("header", "maps", "sentence"),
    [
        ("who,email", ["Who=nme"], "'Who=nme' must be COLUMN=FIELD, where the fields of users are name and email"),
        ("who,email", ["who"], "'who' must be COLUMN=FIELD"),
        ("who,email", ["=name"], "'=name' must be COLUMN=FIELD"),
        ("who,email", ["id=id"], "where the fields of users are name and email"),
        ("who,email", ["hwo=name"], "the file has no column 'hwo'; its columns are who, email"),
        ("who,email", ["who+last=name"], "the file has no column 'last'"),
        ("a,b,c", ["a=name", "b=name"], 'two columns are for name: a and b. To join them: --map "a+b=name"'),
        ("who,mail,email", ["who=name", "mail=email"], "two columns are for email: mail (--map) and email"),
        ("a,A,email", ["a=name"], "line 1 names the column a twice"),
        ("a,b,email", ["a=name"], "users have no column 'b'"),
        ("a,b", ["a=name"], "lacks email"),
    ],
)
def test_wrong_map_is_refused_by_name(tmp_path: Path, header: str, maps: list[str], sentence: str) -> None:
    assert sentence in refusal_of(tmp_path, table(header), maps=maps)
    if "line 1" not in sentence and "email," not in header:
        members = json.dumps(dict.fromkeys(header.split(","), "x")).encode()
        assert sentence.removeprefix("lacks ") in refusal_of(tmp_path, members, maps=maps)


GOOGLE = "First Name,Middle Name,Last Name,Nickname,Notes,E-mail 1 - Label,E-mail 1 - Value,E-mail 2 - Label,E-mail 2 - Value"


@pytest.mark.parametrize(
    ("program", "header", "row"),
    [
        ("Google Contacts", GOOGLE, 'Ann,,Lee,,"Met at\nthe fair",* Work,ann@example.com ::: a@home.example.com,,'),
        ("Google Contacts", GOOGLE, "Ann,,Lee,,,,,Home,ann@example.com"),
        ("Google Contacts", "Name,Given Name,Family Name,E-mail 1 - Value", "Ann Lee,Ann,Lee,ann@example.com"),
        (
            "Google Workspace",
            "First Name [Required],Last Name [Required],Email Address [Required],Password [Required]",
            "Ann,Lee,ann@example.com,***",
        ),
        (
            "Outlook",
            "Title,First Name,Middle Name,Last Name,E-mail Address,E-mail Type,E-mail 2 Address",
            "Dr,Ann,,Lee,ann@example.com,SMTP,",
        ),
        ("Thunderbird", "First Name,Last Name,Display Name,Primary Email", "Ann,Lee,,ann@example.com"),
        (
            "Mailchimp",
            "Email Address,First Name,Last Name,MEMBER_RATING,OPTIN_TIME,LEID,TAGS",
            'ann@example.com,Ann,Lee,2,,1,"""vip"""',
        ),
        ("WordPress", "ID,user_login,display_name,user_email,roles", "1,ann,Ann Lee,ann@example.com,editor"),
        ("Moodle", "username,password,firstname,lastname,email", "ann,x,Ann,Lee,ann@example.com"),
        (
            "Microsoft 365",
            "version:v1.0\nName [displayName] Required,User name [userPrincipalName] Required,First name [givenName]",
            "Ann Lee,ann@example.com,Ann",
        ),
        (
            "Microsoft 365",
            "userPrincipalName,displayName,surname,mail,givenName",
            "u@x.y,Ann Lee,Lee,ann@example.com,Ann",
        ),
        (
            "Microsoft 365",
            "Username,First name,Last name,Display name,Alternate email address",
            "ann@example.com,Ann,Lee,Ann Lee,z@example.com",
        ),
        ("Active Directory", "GivenName,Name,SamAccountName,Surname,mail", "Ann,Ann Lee,ann,Lee,ann@example.com"),
        ("Okta", "login,firstName,lastName,email,mobilePhone", "ann,Ann,Lee,ann@example.com,1"),
        ("Auth0", "Id,Given Name,Family Name,Name,Email,Email Verified", "1,Ann,Lee,Ann Lee,ann@example.com,true"),
    ],
)
def test_known_export_is_recognised_and_shown_before_it_is_used(
    tmp_path: Path, program: str, header: str, row: str
) -> None:
    content = table(header, row)
    question = refusal_of(tmp_path, content, accept=_refuse)
    assert question.startswith(f"the columns look like those of {program}:\n  name ← ")
    assert "\n  email ← " in question
    assert values_of(tmp_path, content) == [ANN]


@pytest.mark.parametrize(
    ("program", "content"),
    [
        (
            "Keycloak",
            {
                "realm": "demo",
                "clients": [{"id": "x", "name": "account"}],
                "users": [
                    {
                        "username": "ann",
                        "firstName": "Ann",
                        "lastName": "Lee",
                        "email": "ann@example.com",
                        "emailVerified": True,
                        "attributes": {},
                    }
                ],
            },
        ),
        ("Auth0", [{"email": "ann@example.com", "email_verified": False, "name": "Ann Lee"}]),
        ("Auth0", {"user_id": "auth0|1", "email": "ann@example.com", "name": "Ann Lee", "email_verified": True}),
        (
            "Okta",
            [{"id": "1", "profile": {"firstName": "Ann", "lastName": "Lee", "email": "ann@example.com", "login": "a"}}],
        ),
        ("Firebase", {"users": [{"localId": "1", "email": "ann@example.com", "displayName": "Ann Lee"}]}),
        ("Microsoft 365", {"value": [{"displayName": "Ann Lee", "userPrincipalName": "ann@example.com"}]}),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_known_export_in_json_is_recognised(tmp_path: Path, program: str, content: Any, indent: int | None) -> None:
    text = json.dumps(content, indent=indent).encode()
    assert refusal_of(tmp_path, text, accept=_refuse).startswith(f"the columns look like those of {program}:")
    assert values_of(tmp_path, text) == [ANN]


def test_columns_in_russian_are_proposed(tmp_path: Path) -> None:
    content = "\ufeffИмя;Электронная почта\nAnn Lee;ann@example.com\n".encode()
    assert "email ← Электронная почта" in refusal_of(tmp_path, content, accept=_refuse)
    assert values_of(tmp_path, content) == [ANN]


def test_values_of_a_known_export_are_rejected_under_the_names_of_the_fields(tmp_path: Path) -> None:
    [row] = rows_of(tmp_path, table("Email Address,First Name,Last Name,MEMBER_RATING", ",Ann,Lee,2"))
    assert row.errors[0]["field"] == "email"
    assert row.given == {"name": "Ann Lee", "email": ""}


# ---- encodings ----


@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
@pytest.mark.parametrize("text", [RUSSIAN, JAPANESE, CSV.decode()])
def test_unicode_is_recognised_by_its_mark_or_its_zero_bytes(tmp_path: Path, encoding: str, text: str) -> None:
    expected = values_of(tmp_path, text.encode())
    assert values_of(tmp_path, text.encode(encoding)) == expected
    assert values_of(tmp_path, text.encode(encoding), encoding=encoding) == expected
    for mark, codec in ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        assert values_of(tmp_path, mark + text.encode(codec)) == expected
    lines = "".join(json.dumps(dict(zip(("name", "email"), row, strict=True))) + "\n" for row in expected)
    assert values_of(tmp_path, lines.encode(encoding), "a.ndjson") == expected


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("windows-1251", "Зоя Ли"),
        ("koi8-r", "Иван Цой"),
        ("cp866", "Зоя Ли"),
        ("mac-cyrillic", "Зоя Ли"),
        ("windows-1252", "Jürgen Müller"),
        ("windows-1250", "Łukasz Wójcik"),
        ("windows-1253", "Μαρία Ιωάννου"),
        ("windows-1256", "محمد علي"),
        ("cp932", "山田太郎"),
        ("gb18030", "王小明 李娜 张伟"),
        ("big5", "陳美玲"),
        ("iso-2022-jp", "山田太郎"),
        ("macintosh", "Renée García"),
        ("cp850", "Renée García"),
    ],
)
def test_other_encoding_is_refused_with_a_hint_and_read_with_the_option(
    tmp_path: Path, encoding: str, name: str
) -> None:
    content = f"name;email\r\n{name};a@example.com\r\nBob Plain;bob@example.com\r\n".encode(encoding)
    refusal = refusal_of(tmp_path, content)
    assert refusal.startswith("the file is not UTF-8")
    assert f"add --encoding {encoding}" in refusal
    expected = [[name, "a@example.com"], ["Bob Plain", "bob@example.com"]]
    assert values_of(tmp_path, content, encoding=encoding) == expected
    array = json.dumps([{"name": name, "email": "a@example.com"}], ensure_ascii=False).encode(encoding)
    assert refusal_of(tmp_path, array).startswith("the file is not UTF-8")
    assert values_of(tmp_path, array, encoding=encoding) == expected[:1]


def test_encoding_that_appears_late_is_refused_and_not_replaced(tmp_path: Path) -> None:
    lines = b"".join(b"Person %d,person%d@example.com\n" % (number, number) for number in range(60_000))
    refusal = refusal_of(tmp_path, b"name,email\n" + lines + "Зоя,zoya@example.com\n".encode("cp1251"))
    assert refusal.startswith("the file is not UTF-8 (line 60,002, byte 0xc7). It looks like windows-1251 ('Зоя')")


def test_damaged_line_of_utf8_rejects_only_its_row(tmp_path: Path) -> None:
    good, bad = rows_of(tmp_path, "name,email\nZoë,zoe@example.com\n".encode() + b"B\xf6b,bob@example.com\n")
    assert good.values == ["Zoë", "zoe@example.com"]
    assert bad.errors == [{"field": "", "detail": "line 3 is not UTF-8 (byte 0xf6)"}]


@pytest.mark.parametrize(
    ("content", "encoding", "sentence"),
    [
        (CSV, "klingon", "--encoding klingon: no encoding has this name"),
        (CSV, "hex", "--encoding hex: no encoding has this name"),
        (CSV, "unicode_escape", "no encoding has this name"),
        (RUSSIAN.encode(), "windows-1251", "the file is UTF-8, and not windows-1251: leave out --encoding"),
        (RUSSIAN.encode("utf-8-sig"), "cp1251", "byte order mark of UTF-8: leave out --encoding"),
        (RUSSIAN.encode("utf-16"), "cp1251", "byte order mark of UTF-16: leave out --encoding"),
        (RUSSIAN.encode("cp1251"), "utf-8", "It looks like windows-1251"),
        (JAPANESE.encode("cp932"), "ascii", "the file is not ascii"),
        (random.Random(1).randbytes(3000), None, "the file is not text"),
    ],
)
def test_wrong_encoding_is_refused(tmp_path: Path, content: bytes, encoding: str | None, sentence: str) -> None:
    assert sentence in refusal_of(tmp_path, content, encoding=encoding)


# ---- JSON ----


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(map(json.dumps, ROWS)),
        "\r\n".join(map(json.dumps, ROWS)),
        "\r".join(map(json.dumps, ROWS)),
        "\n\n".join(json.dumps(row, indent=2) for row in ROWS),
        "".join(map(json.dumps, ROWS)),
        ",\n".join(map(json.dumps, ROWS)),
        "".join(f"\x1e{json.dumps(row)}\n" for row in ROWS),
        json.dumps(ROWS),
        json.dumps(ROWS, indent="\t"),
        "\ufeff \n" + json.dumps(ROWS, indent=4) + "\n",
        "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
        "[\n" + "".join(json.dumps(row) + ",\n" for row in ROWS) + "]",
        "\n".join(json.dumps([row]) for row in ROWS),
        json.dumps({"users": ROWS}),
        json.dumps({"total": 2, "next": None, "users": ROWS, "roles": [{"name": "x"}]}, indent=1),
        json.dumps({"data": {"users": ROWS}}),
        json.dumps({"data": ROWS, "meta": {"data": [1]}}, indent=2),
        json.dumps({"people": ROWS}),
        json.dumps({"Resources": ROWS, "schemas": ["x"]}),
    ],
)
@pytest.mark.parametrize("file", ["a.json", "a.ndjson", "a.csv"])
def test_json_is_read_in_every_form_and_under_every_name(tmp_path: Path, content: str, file: str) -> None:
    assert values_of(tmp_path, content.encode(), file) == [ANN, BEN]
    assert values_of(tmp_path, content.encode(), file, file_format="json") == [ANN, BEN]


def test_read_only_members_are_ignored_in_any_case(tmp_path: Path) -> None:
    content = b'{"ID": 7, "name": "Ann Lee", "email": "ann@example.com", "Created_At": null}\n'
    assert values_of(tmp_path, content, "a.ndjson") == [ANN]


@pytest.mark.parametrize("content", [b"[]", b"[ ]\n", b'{"users": []}', b""])
def test_json_without_rows_has_none(tmp_path: Path, content: bytes) -> None:
    assert values_of(tmp_path, content, file_format="json") == []


def test_rows_of_json_have_the_lines_at_which_they_begin(tmp_path: Path) -> None:
    content = json.dumps([*ROWS, 7, {"name": "Z"}, {"name": "Y", "email": "y@example.com", "x": 1}], indent=2)
    rows = rows_of(tmp_path, content.encode())
    assert [row.line for row in rows] == [2, 6, 10, 11, 14]
    assert rows[2].errors == [{"field": "body", "detail": "must be a JSON object"}]
    assert rows[3].errors == [{"field": "email", "detail": "is required"}]
    assert rows[4].errors == [{"field": "x", "detail": "is not a known field"}]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (json.dumps(ROWS, indent=1).encode()[:-3], "the JSON is incomplete"),
        (json.dumps(ROWS, indent=1).encode()[:-20], "the JSON is incomplete"),
        (json.dumps(ROWS).encode()[:-1], "the JSON is incomplete: after object 2, the file ends too early"),
        (json.dumps(ROWS, indent=1).encode().replace(b'Oz",', b'Oz"'), "line 8 is not JSON: after object 1"),
        (b'[{"a":' * 100_000, "nested too deeply"),
        (b'[{"name": "' + b"x" * 3_000_000, "the object is longer than 1,048,576 characters"),
        (
            b'{"who": "Ann", "email": "ann@example.com"}',
            "the objects lack name; the columns of the file are who, email",
        ),
    ],
)
def test_json_that_cannot_be_read_is_refused_with_its_place(tmp_path: Path, content: bytes, sentence: str) -> None:
    assert sentence in refusal_of(tmp_path, content, file_format="json")


def test_large_array_is_read_as_a_stream(tmp_path: Path) -> None:
    rows = [{"name": f"Person {n} " + "я" * 50, "email": f"person{n}@example.com"} for n in range(20_000)]
    for text in (json.dumps(rows, ensure_ascii=False), json.dumps({"x": [rows[0]] * 900, "users": rows}, indent=1)):
        values = values_of(tmp_path, text.encode())
        assert values == [[row["name"], row["email"]] for row in rows]


def test_rows_that_begin_late_in_a_large_object_are_refused_with_advice(tmp_path: Path) -> None:
    content = json.dumps({"clients": [{"x": "y" * 500}] * 3000, "users": ROWS}, indent=1).encode()
    assert "Extract the rows: jq -c '.users[]' FILE" in refusal_of(tmp_path, content)


def test_members_that_users_do_not_have_are_left_out_on_request(tmp_path: Path) -> None:
    lines = b'{"name": "Ann Lee", "email": "ann@example.com", "n": 123456789012345678901234567890}\n'
    assert rows_of(tmp_path, lines)[0].errors == [{"field": "n", "detail": "is not a known field"}]
    assert values_of(tmp_path, lines, ignore_unknown=True) == [ANN]
    assert values_of(tmp_path, lines.replace(b"name", b"Name"), ignore_unknown=True) == [ANN]
    assert rows_of(tmp_path, b'{"name": 7, "email": null, "x": 1}', ignore_unknown=True)[0].errors == [
        {"field": "name", "detail": "must be a string"},
        {"field": "email", "detail": "must be a string"},
    ]


# ---- containers ----


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(CSV, mtime=0),
        bz2.compress(CSV),
        lzma.compress(CSV),
        gzip.compress(CSV[:20], mtime=0) + gzip.compress(CSV[20:], mtime=0),
        archive(**{"a.csv": CSV}),
        archive(**{"folder__a.csv": CSV, "__MACOSX__._a.csv": b"x", ".DS_Store": b"x"}),
        archive(**{"a.csv.gz": gzip.compress(CSV, mtime=0)}),
        gzip.compress(archive(**{"a.csv": CSV}), mtime=0),
    ],
)
@pytest.mark.parametrize("file", ["a.csv", "a.csv.gz", "a"])
def test_compression_is_recognised_by_content(tmp_path: Path, content: bytes, file: str) -> None:
    assert values_of(tmp_path, content, file) == [ANN, BEN]


def test_zip_archive_is_read_from_a_pipe(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    if os.fork() == 0:
        fifo.write_bytes(archive(**{"a.csv": CSV}))
        os._exit(0)
    with open_input(str(fifo)) as (_, stream, beginning):
        assert [row.values for row in read(resource, "-", stream, beginning, Reading(_accept)).rows] == [ANN, BEN]
    os.wait()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            archive(**{"[Content_Types].xml": b"<x/>", "xl__worksheets__sheet1.xml": b"<x/>"}),
            "is an Excel workbook: save",
        ),
        (archive(**{"[Content_Types].xml": b"<x/>", "word__document.xml": b"<x/>"}), "is an Office document"),
        (archive(mimetype=b"application/vnd.oasis.opendocument.spreadsheet", x=b""), "is an OpenDocument file: save"),
        (
            archive(**{"members.csv": CSV, "cleaned.csv": CSV}),
            "zip archive with 2 files: members.csv, cleaned.csv. Choose",
        ),
        (archive(), "zip archive without a file"),
        (archive(**{"a.csv": CSV})[:-30], "the compressed file is damaged or truncated"),
        (gzip.compress(CSV, mtime=0)[:-9], "the compressed file is damaged or truncated"),
        (lzma.compress(CSV)[:-20], "the compressed file is damaged or truncated"),
        (bz2.compress(CSV)[:-5], "the compressed file is damaged or truncated"),
        (bz2.compress(CSV)[:20] + b"x" * 30, "the compressed file is damaged or truncated"),
        (b"\x28\xb5\x2f\xfd\x04\x00", "compressed with zstd: unpack it first: zstd -d FILE"),
        (b"7z\xbc\xaf\x27\x1c\0\x04", "is a 7z archive"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "old or protected Excel workbook"),
        (b"%PDF-1.7\n", "is a PDF"),
        (b"SQLite format 3\0", "is an SQLite database"),
        (b"<!DOCTYPE html>\n<html>", "is a web page (HTML)"),
        (b'<?xml version="1.0"?><users/>', "is XML"),
        (b"BEGIN:VCARD\nVERSION:3.0\n", "is a vCard file: export the contacts as CSV"),
        (b"dn: uid=ann,dc=example\n", "is LDIF"),
        (b"a.csv".ljust(257, b"\0") + b"ustar", "is a tar archive"),
    ],
)
def test_other_kind_of_file_is_named_for_what_it_is(tmp_path: Path, content: bytes, sentence: str) -> None:
    assert sentence in refusal_of(tmp_path, content, "a.csv")

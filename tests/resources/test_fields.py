"""Validation of fields, without a server."""

import random

import email_validator
import pytest

from velikiy.resources.base import registry
from velikiy.resources.text import PLAIN

PARTS = (
    "a",
    "Z",
    "0",
    "9",
    "-",
    "_",
    "+",
    ".",
    "@",
    "--",
    "..",
    "xn--",
    "com",
    "example",
    "é",
    "ſ",
    "K",
    "'",
    '"',
    " ",
)


def addresses(count: int) -> list[str]:
    """Return random texts close to the limits of an email address: most are invalid, and thousands are valid."""
    chance = random.Random(7)

    def label(letters: str, longest: int) -> str:
        return "".join(chance.choices(letters, k=chance.choice((1, 2, 3, 8, longest - 1, longest, longest + 1))))

    def likely() -> str:
        local = ".".join(label("abzAZ09_+-", 30) for _ in range(chance.choice((1, 1, 2, 3))))
        domain = ".".join(label("abcyzAZ09-", chance.choice((10, 31, 63))) for _ in range(chance.choice((1, 1, 2, 5))))
        return f"{local}@{domain}.{label(chance.choice(('abcxyzCOM', 'ab9-')), chance.choice((3, 30, 63)))}"

    def unlikely() -> str:
        return "".join(chance.choices(PARTS, k=chance.randint(1, 12)))

    return [likely() if chance.random() < 0.8 else f"a{unlikely()}@{unlikely()}.com" for _ in range(count)]


def test_every_address_that_the_fast_check_accepts_is_valid_for_the_library() -> None:
    plain = [address for address in addresses(60_000) if len(address) <= 254 and PLAIN.fullmatch(address)]
    assert len(plain) > 5_000
    for address in plain:
        checked = email_validator.validate_email(address, check_deliverability=False, strict=True)
        assert checked.ascii_email is not None
        assert checked.normalized.lower() == address.lower()


@pytest.mark.parametrize(
    "address",
    ["alice@example.com", "a.b+c_d-e@mail.example.co.uk", "1@2.com", "A@B.Org", "user123@xn.museum", "x@a-b-c.de"],
)
def test_fast_check_accepts_usual_addresses(address: str) -> None:
    assert PLAIN.fullmatch(address)


@pytest.mark.parametrize(
    "address",
    [
        "a@b",
        "a@b.c",
        "a@-b.com",
        "a@b-.com",
        "a@b--c.com",
        "a@xn--bcher-kva.de",
        "a..b@c.com",
        ".a@c.com",
        "a.@c.com",
        "a@b.c1",
        "a@@b.com",
        "a@b..com",
        "é@b.com",
        "a@bé.com",
        "ſ@b.com",
        "K@b.com",
        "",
        "a@b.com\n",
        f"{'a' * 65}@b.com",
    ],
)
def test_fast_check_leaves_unusual_addresses_to_the_library(address: str) -> None:
    assert not PLAIN.fullmatch(address)


def test_seed_rows_are_valid_and_unique() -> None:
    for resource in registry().values():
        samples = [resource.seed_row(n) for n in range(1, 3000)]
        for sample in samples:
            assert resource.create_model.model_validate(sample).model_dump() == sample
        for field in resource.unique.values():
            assert len({sample[field].lower() for sample in samples}) == len(samples)

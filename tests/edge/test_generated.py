"""The edge's generated configuration agrees with the app."""

import pytest

from velikiy.http import edge_config


@pytest.mark.parametrize("name", edge_config.files())
def test_generated_file_is_what_the_app_generates_now(name: str) -> None:
    committed = (edge_config.EDGE / name).read_text()
    assert committed == edge_config.files()[name], "run ./run generate and commit the result"


def test_no_other_file_lies_among_the_generated_ones() -> None:
    generated = {str(file.relative_to(edge_config.EDGE)) for file in (edge_config.EDGE / "conf/generated").iterdir()}
    assert generated | {"lua/generated.lua"} == set(edge_config.files())

"""The check of wording finds what has a standard term, in comments and strings of code and in documents."""

from pathlib import Path

import pytest

from tests.prose import find_nonstandard, texts


@pytest.mark.parametrize(
    "text", ["is put back", "three failures in a row", "mirrored on wish", "the network over-fits"]
)
def test_a_word_that_has_a_standard_term_is_found(text: str) -> None:
    assert len(find_nonstandard(text)) == 1


@pytest.mark.parametrize("text", ["restored from quarantine", "rows in a row group", "history", "the network overfits"])
def test_plain_words_pass(text: str) -> None:
    assert not find_nonstandard(text)


def test_comments_and_strings_of_code_are_read_and_names_are_not(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""First\nsecond"""\nwhoever = 1  # third\n')
    found = [(place.line, place.text.strip('"# ')) for place in texts(module)]
    assert found == [(1, "First"), (2, "second"), (3, "third")]

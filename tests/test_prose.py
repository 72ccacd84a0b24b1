"""The check of wording finds texts that have a standard term, in comments and strings of code and in documents."""

from pathlib import Path

import pytest

from tests.prose import nonstandard_terms, texts


@pytest.mark.parametrize(
    "text", ["is put back", "three failures in a row", "mirrored on wish", "the network over-fits"]
)
def test_wording_that_has_a_standard_term_is_found(text: str) -> None:
    assert len(nonstandard_terms(text)) == 1


@pytest.mark.parametrize("text", ["restored from quarantine", "rows in a row group", "history", "the network overfits"])
def test_plain_words_pass(text: str) -> None:
    assert not nonstandard_terms(text)


def test_comments_and_strings_of_code_are_read_and_names_are_not(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""First\nsecond"""\nwhoever = 1  # third\n')
    lines = [(text.line, text.text.strip('"# ')) for text in texts(module)]
    assert lines == [(1, "First"), (2, "second"), (3, "third")]

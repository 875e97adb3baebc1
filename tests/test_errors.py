"""What an operating system says of a file becomes one sentence."""

import errno
import os

import pytest

from sukashi.core.errors import ResourceError, brief, writing


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EACCES, "Permission denied")],
)
def test_what_stands_in_the_way_of_writing_is_named(tmp_path, number, words):
    with pytest.raises(ResourceError, match=f"cannot write {tmp_path}: {words}; "), writing(tmp_path):
        raise OSError(number, os.strerror(number))


def test_other_errors_pass():
    with pytest.raises(KeyError), writing("x"):
        raise KeyError("x")


def test_colours_of_a_terminal_are_no_part_of_a_message():
    assert brief(ValueError("Failed. \x1b[96mStep 3\x1b[0m of it\nmore")) == "ValueError: Failed. Step 3 of it"

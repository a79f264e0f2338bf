"""A benchmark without a model says how to get one."""

import argparse
from pathlib import Path

import pytest

from benchmarks.model_directory import model_directory


def test_a_directory_without_a_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """What a newcomer sees who measures before `make run`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=model_directory, default=str(tmp_path / "none"))

    with pytest.raises(
        argparse.ArgumentTypeError, match=f"no model in {tmp_path}: `make model` fetches the default one"
    ):
        model_directory(str(tmp_path))
    with pytest.raises(SystemExit):  # the default is looked at too
        parser.parse_args([])


def test_a_directory_with_a_model_is_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    assert model_directory(str(tmp_path)) == tmp_path

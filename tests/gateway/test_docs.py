"""What a client may meet is on the page that describes it."""

from pathlib import Path

from gateway.errors import KINDS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "http-api.md").read_text()


def test_every_error_code_is_documented_with_its_status() -> None:
    rows = [row for row in PAGE.splitlines() if row.startswith("| ") and row[2].isdigit()]

    for code, kind in KINDS.items():
        assert any(f"`{code}`" in row and str(kind.status) in row.split("|")[1] for row in rows), code

"""Check that CITATION.cff agrees with pyproject.toml."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def values(path: Path, name: str) -> list[str]:
    """Return the values of `name` at the start of a line, without quotes."""
    return [value.strip().strip('"') for value in re.findall(rf"(?m)^{name}\s*[:=]\s*(.+)$", path.read_text())]


def test_citation():
    citation = ROOT / "CITATION.cff"
    assert values(citation, "type") == ["software"]
    for name, field in (("title", "name"), ("version", "version"), ("license", "license")):
        assert values(citation, name) == values(ROOT / "pyproject.toml", field)[:1], name
    assert "arXiv:2510.03273" in citation.read_text()

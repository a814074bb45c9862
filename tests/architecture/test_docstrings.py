"""The first line of a docstring is a sentence that makes sense alone; that of a function is an imperative."""

import ast
import re

import pytest

from helpers.sources import DOCUMENTED, PACKAGES, parse

NOT_VERBS = {"The", "A", "An", "All", "Each", "Every", "How", "It", "No", "Of", "One", "That", "This", "What", "Where", "Whether"}  # fmt: skip
VERBS_IN_S = {"Access", "Address", "Compress", "Cross", "Discuss", "Dismiss", "Express", "Focus", "Guess", "Pass", "Press", "Process"}  # fmt: skip


def is_imperative(sentence: str) -> bool:
    word = sentence.split()[0]
    if word in NOT_VERBS or word.endswith("ing"):
        return False
    return bool(re.fullmatch(r"[A-Z][a-z]+", word)) and (not word.endswith("s") or word in VERBS_IN_S)


@pytest.mark.parametrize("package", PACKAGES)
def test_first_lines(package):
    bad = []
    for path, tree in parse(package).items():
        for node in ast.walk(tree):
            if not isinstance(node, DOCUMENTED) or (text := ast.get_docstring(node)) is None:
                continue
            first = text.splitlines()[0]
            names_a_thing = not isinstance(node, ast.FunctionDef) or any(
                ast.unparse(decorator) in ("property", "functools.cached_property") for decorator in node.decorator_list
            )
            if not first.endswith(".") or not (names_a_thing or is_imperative(first)):
                bad.append(f"{path}:{getattr(node, 'lineno', 1)}: {first}")
    assert not bad, f"{len(bad)} docstrings:\n" + "\n".join(bad)

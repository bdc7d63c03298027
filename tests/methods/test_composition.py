"""What methods share stands once: no six statements in a row are those of another method's file, names apart."""

import ast
import io
import itertools
import keyword
import tokenize
from pathlib import Path

FILES = sorted((Path(__file__).parents[2] / "fewstep" / "methods").glob("*.py"))
RUN = 6


def statements(text: str) -> list[str]:
    """Lines in which names and constants are blotted out; without imports, docstrings, comments, declarations of
    fields and what a function or class is called with, which are alike because methods are."""
    tree, left_out = ast.parse(text), set()
    for node in ast.walk(tree):
        quoted = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if quoted or isinstance(node, ast.Import | ast.ImportFrom | ast.AnnAssign):
            left_out |= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, ast.Assign):
                    left_out |= set(range(child.lineno, child.end_lineno + 1))
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            left_out |= set(range(first, node.body[0].lineno))
    kept: dict[int, list[str]] = {}
    layout = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.start[0] not in left_out and token.type not in layout:
            plain = token.type == tokenize.OP or keyword.iskeyword(token.string)
            kept.setdefault(token.start[0], []).append(token.string if plain else "_")
    return [" ".join(words) for _, words in sorted(kept.items())]


def shared(a: list[str], b: list[str]) -> set[tuple[str, ...]]:
    """Runs of statements that stand in both."""
    runs = [{tuple(lines[i : i + RUN]) for i in range(len(lines) - RUN + 1)} for lines in (a, b)]
    return runs[0] & runs[1]


def test_no_two_files_of_methods_have_a_run_of_equal_statements():
    found = {file.name: statements(file.read_text(encoding="utf-8")) for file in FILES}
    again = {(a, b): shared(found[a], found[b]) for a, b in itertools.combinations(found, 2)}
    assert not {pair: runs for pair, runs in again.items() if runs}


def test_a_copied_block_is_seen_whatever_its_names():
    block = "\n".join(f"    {a} = draw({a}, {k}) + {a}.mean()" for k, a in enumerate("uvwxyz"))
    other = block.replace("draw", "noise").replace("u", "p")
    a, b = (
        f'def f(x):\n    """Doc {i}."""\n{text}\n    return {i}\n' for i, text in enumerate((block, other))
    )
    assert len(statements(a)) == 7 and shared(statements(a), statements(b))
    assert not shared(statements(a), statements(b.replace("mean()", "mean(1)")))

"""data/installed.py: the demo's text is nobody else's."""

import ast
import re

import pytest

from data import installed
from data.installed import MIN_BLOCK, MIN_LINE, base_documents, block_key, cut_all, demo_documents, many_documents, statements


def test_no_block_in_two_documents_and_no_line_in_the_base(monkeypatch):
    """Of a part of each kind of text, and the same the second time."""
    monkeypatch.setattr(installed, 'LIMIT', 200_000)
    monkeypatch.setattr(installed, 'BASE_LIMIT', 1_100_000)
    users = demo_documents()
    assert list(users) == ['python', 'cpp', 'prose', 'readme'] and demo_documents() == users
    assert all(sum(map(len, documents)) > 150_000 for documents in users.values())
    texts, seen = [text for documents in users.values() for text in documents], set()
    for text in texts:
        keys = {block_key(block) for block in re.split(r'\n\s*\n', text)}
        # the last block of a document may be cut short; a whole one is new
        assert not {key for key in keys if len(key) >= MIN_BLOCK} & seen
        seen |= keys
    lines = {line.strip() for text in texts for line in text.splitlines() if len(line.strip()) >= MIN_LINE}
    sources = base_documents(texts)
    assert sum(map(len, sources['cpp'])) > 1_000_000
    for documents in sources.values():
        assert not lines & {line.strip() for text in documents for line in text.splitlines()}


def test_cut_all():
    """Whole lines, up to the limit, nothing twice; a short rest and a line too long for a document are left out."""
    text = '\n'.join(f'line {i:04}' for i in range(1000))
    pieces = cut_all(text, 95)  # nine lines of 9 characters and 8 line ends are 89
    assert '\n'.join(pieces) == '\n'.join(text.split('\n')[:999]) and {len(piece) for piece in pieces} == {89}
    assert cut_all('a' * 30 + '\n' + 'b' * 200 + '\n' + 'c' * 30, 100) == ['a' * 30 + '\n' + 'c' * 30]
    assert cut_all('short', 100) == cut_all('', 100) == []


def test_many_documents(monkeypatch):
    """No piece repeats, none is longer than asked; mixed users get the kinds that have enough, and an error names the rest."""
    kinds = {
        name: [f'{name} {i} {"word " * 8}\n\nshared {"word " * 9}\n\n{name} {i} {"more " * 60}' for i in range(n)]
        for name, n in (('python', 40), ('cpp', 50), ('prose', 10), ('readme', 3))
    }
    monkeypatch.setattr(installed, 'demo_kinds', lambda: kinds)
    found = many_documents(2000, 500, mixed=False)
    assert list(found) == list(kinds) and all(len(text) <= 500 for texts in found.values() for text in texts)
    texts = [text for texts in found.values() for text in texts]
    assert len(texts) == len(set(texts)) == 103 and sum('shared' in text for text in texts) == 1
    held = {name: sum(map(len, texts)) for name, texts in found.items()}
    assert list(many_documents(int(held['prose'] * 3 / 1.5), 500, mixed=True)) == ['python', 'cpp', 'prose']
    assert list(many_documents(int(held['python'] * 2 / 1.5), 500, mixed=True)) == ['python', 'cpp']
    with pytest.raises(ValueError, match=f'ask for 90,000 characters.*python {held["python"]:,}, cpp'):
        many_documents(90_000, 500, mixed=True)


def test_statements_are_those_of_walk():
    tree = ast.parse(
        'class A:\n def f(): return [x for x in y]\ntry:\n def g(): 1\nexcept E:\n def h(): 2\n'
        'match x:\n case 1:\n  def i(): 3\nif (lambda: 4)():\n async def j(): pass\nelse:\n class B: pass\n'
    )

    def names(nodes):
        return [node.name for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]

    assert names(statements(tree)) == names(ast.walk(tree)) and len(names(ast.walk(tree))) == 7

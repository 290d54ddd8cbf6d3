"""data/installed.py: the demo's text is nobody else's."""
import re

from data.installed import MIN_BLOCK, MIN_LINE, base_documents, block_key, demo_documents


def test_no_block_in_two_documents_and_no_line_in_the_base():
    users = demo_documents()
    assert list(users) == ['python', 'cpp', 'prose', 'readme']
    assert all(sum(map(len, documents)) > 150_000 for documents in users.values())
    seen = set()
    for documents in users.values():
        for text in documents:
            keys = {block_key(block) for block in re.split(r'\n\s*\n', text)}
            # the last block of a document may be cut short; a whole one is new
            assert not {key for key in keys if len(key) >= MIN_BLOCK} & seen
            seen |= keys
    texts = [text for documents in users.values() for text in documents]
    lines = {line.strip() for text in texts for line in text.splitlines() if len(line.strip()) >= MIN_LINE}
    sources = base_documents(texts)
    assert sum(map(len, sources['cpp'])) > 1_000_000
    for documents in sources.values():
        assert not lines & {line.strip() for text in documents for line in text.splitlines()}
    assert demo_documents() == users

"""Real text that lies on every machine that can run this project: the files of Python and of the installed packages.

Four kinds, one per user of the demo, and other packages' code for the base model. Everything is read as text; no
package is imported. The result depends on the versions of Python and of requirements.txt's packages only: files are
visited in the order of their paths' hashes, which scatters over the packages whatever is taken first."""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

STDLIB = Path(sysconfig.get_path('stdlib'))
PACKAGES = Path(sysconfig.get_path('purelib'))
REQUIREMENTS = Path(__file__).parent.parent / 'requirements.txt'
DOCSTRINGS_OF = ('torch', 'numpy', 'matplotlib', 'networkx')  # the prose user reads these, the base must not
CODE_FOR_BASE = ('pandas', 'sympy', 'transformers', 'peft', 'fontTools', 'pip', 'aiohttp', 'fsspec', 'PIL', 'mpmath')
HEADERS_FOR_BASE = ('pyarrow/include', 'numpy/_core/include')
CAP, BASE_CAP = 8_000, 20_000  # characters of one document: no single file fills a user's text
LIMIT, BASE_LIMIT = 1_000_000, 12_000_000  # characters of one user, of one kind of code in the base's corpus
MIN_BLOCK = 40  # characters; shorter blocks ('else:', '}') may repeat
MIN_LINE = 30
WASTE = 1.5  # characters to have per character asked: what fills a split is cut, and its rest dropped


def demo_documents() -> dict[str, list[str]]:
    """{user name: documents}: Python sources, C++ headers, English reference prose, licences and READMEs.

    A block (text between blank lines) of MIN_BLOCK characters or more is kept only where it occurs first, over all four
    users together. So neither two users nor two splits of one user (which are made by document) share a licence header, a
    copied function or a repeated paragraph."""
    seen = set()
    return {name: collect(texts, seen, CAP, LIMIT) for name, texts in demo_kinds().items()}


def many_documents(chars: int, least: int, mixed: bool) -> dict[str, list[str]]:
    """{kind: documents} for users who ask for more than demo_documents has: `chars` characters together.

    The same kinds of text, all there is, every file in documents of up to `least` characters: as many as the smallest
    split has, so that little is cut off. No block repeats, but two users may hold different parts of one file. For `mixed`
    users a kind that is too small for an equal part is left out. Raises ValueError if less than two are large enough."""
    seen, size = set(), min(CAP, max(100, least))
    kinds = {
        name: [piece for text in texts for piece in cut_all(new_blocks(text, seen), size)]
        for name, texts in demo_kinds().items()
    }
    held = {name: sum(map(len, texts)) for name, texts in kinds.items()}
    there = ', '.join(f'{name} {n:,}' for name, n in held.items())
    while mixed and min(held.values()) * len(held) < WASTE * chars:
        held.pop(min(held, key=held.get))
        if len(held) < 2:
            why = f'the users ask for {chars:,} characters, too much for two kinds of installed text or more ({there})'
            raise ValueError(f'{why}: lower --users or the sizes of their splits')
    return {name: kinds[name] for name in held}


def demo_kinds() -> dict[str, Iterable[str]]:
    return {'python': python_sources(), 'cpp': cpp_headers(), 'prose': reference_prose(), 'readme': package_readmes()}


def base_documents(exclude: list[str]) -> dict[str, list[str]]:
    """{source: documents} of Python and C++ code for the base model, beside English prose.

    No line of MIN_LINE characters or more of `exclude` (the demo users' documents) occurs in them."""
    taken = {line.strip() for text in exclude for line in text.splitlines() if len(line.strip()) >= MIN_LINE}

    def untaken(path: Path) -> str:
        return '\n'.join(line for line in read(path).splitlines() if line.strip() not in taken)

    folders = [PACKAGES / folder for folder in HEADERS_FOR_BASE] + [Path(sysconfig.get_path('include'))]
    paths = {
        'python': [path for package in CODE_FOR_BASE for path in (PACKAGES / package).rglob('*.py')],
        'cpp': [path for folder in folders for path in folder.rglob('*.h')],
    }
    seen = set()
    return {name: collect(map(untaken, scattered(files)), seen, BASE_CAP, BASE_LIMIT) for name, files in paths.items()}


def collect(texts: Iterable[str], seen: set, cap: int, limit: int) -> list[str]:
    """Documents of 200 to `cap` characters, made of blocks not in `seen`, until there are `limit` characters."""
    documents, size = [], 0
    for text in texts:
        text = new_blocks(text, seen)
        if len(text) > cap:
            text = text[:cap].rpartition('\n')[0]  # whole lines
        if len(text) >= 200:
            documents.append(text)
            size += len(text)
        if size >= limit:
            break
    return documents


def new_blocks(text: str, seen: set) -> str:
    """The text without its blocks that are in `seen`, compared by block_key; adds the others to `seen`."""
    blocks = []
    for block in re.split(r'\n\s*\n', text):
        key = block_key(block)
        if len(key) < MIN_BLOCK or key not in seen:
            blocks.append(block.strip('\n').rstrip())
            seen.add(key)
    return '\n\n'.join(filter(None, blocks))


def block_key(block: str) -> str:
    """Letters and digits only: the same licence wrapped or commented otherwise is the same block."""
    return re.sub(r'\W+', '', block)


def cut_all(text: str, limit: int) -> list[str]:
    """All of the text in pieces of whole lines, over half of `limit` to `limit` characters; longer lines are data, not text."""
    pieces = ['']
    for line in text.split('\n'):
        if len(line) <= limit:
            if len(pieces[-1]) + 1 + len(line) > limit:
                pieces.append('')
            pieces[-1] += '\n' * bool(pieces[-1]) + line
    return [piece for piece in pieces if 2 * len(piece) > limit]


def read(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError):
        return ''  # a stray binary or Latin-1 file is no text of ours


def scattered(paths: Iterable[Path]) -> list[Path]:
    """Files in an order that depends on their names alone and mixes folders: by a hash of the path inside its root."""
    roots = (PACKAGES, STDLIB)

    def key(path: Path) -> str:
        root = next((root for root in roots if path.is_relative_to(root)), path.parent)
        return hashlib.md5(path.relative_to(root).as_posix().encode(), usedforsecurity=False).hexdigest()

    return sorted(paths, key=key)


def python_sources() -> Iterable[str]:
    """The standard library's modules, without its tests and without pydoc's topics (those are the prose user's)."""
    skip = {'test', 'tests', 'idlelib', 'lib2to3', 'pydoc_data', 'site-packages', 'turtledemo', 'encodings'}
    return map(read, scattered(path for path in STDLIB.rglob('*.py') if not skip & set(path.relative_to(STDLIB).parts)))


def cpp_headers() -> Iterable[str]:
    """Torch's hand-written C++ headers: c10, ATen and torch/csrc without the generated operator files."""
    include = PACKAGES / 'torch' / 'include'
    paths = (path for folder in ('c10', 'ATen', 'torch/csrc') for path in (include / folder).rglob('*.h'))
    return map(read, scattered(path for path in paths if path.parent.name != 'ops' and 'generated' not in path.parts))


def reference_prose() -> Iterable[str]:
    """Paragraphs of pydoc's language reference and of docstrings that read as English; a topic or a file a document."""
    for node in ast.parse(read(STDLIB / 'pydoc_data' / 'topics.py') or '{}').body:
        if isinstance(node, ast.Assign):  # topics = {name: text, ...}
            for text in node.value.values:
                yield '\n\n'.join(prose(ast.literal_eval(text)))
    paths = (path for package in DOCSTRINGS_OF for path in (PACKAGES / package).rglob('*.py') if 'tests' not in path.parts)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in scattered(paths):
        try:
            nodes = statements(ast.parse(read(path)))
        except (SyntaxError, ValueError):
            continue
        texts = filter(None, (ast.get_docstring(node) for node in nodes if isinstance(node, owners)))
        yield '\n\n'.join(paragraph for text in texts for paragraph in prose(text))


def statements(tree: ast.Module) -> Iterable[ast.AST]:
    """In the order of ast.walk, but not into expressions, which are most of a tree and have no docstrings."""
    nodes = [tree]
    for node in nodes:  # grows
        nodes += [
            child for child in ast.iter_child_nodes(node) if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case))
        ]
    return nodes


def prose(text: str) -> list[str]:
    """Paragraphs without code: at least 80 characters, mostly words, ending as a sentence does."""
    paragraphs = []
    for block in re.split(r'\n\s*\n', text):
        block = '\n'.join(line.strip() for line in block.strip().splitlines())
        words = len(re.findall(r"\b[A-Za-z][a-z']+\b", block))
        code = any(mark in block for mark in ('>>>', '...', '::=', '==', ' = ', '{', '---'))
        if len(block) >= 80 and block.endswith('.') and words * 9 > len(block) and not code:
            paragraphs.append(block)
    return paragraphs


def package_readmes() -> Iterable[str]:
    """Long descriptions (READMEs) and licences out of the metadata of requirements.txt's packages and all that they need,
    by name; not of whatever else is installed, so that adding a package leaves the demo as it is."""
    names, packages = re.findall(r'^[\w.-]+', REQUIREMENTS.read_text(encoding='utf-8'), re.M), {}
    while names:
        name = re.sub(r'[-_.]+', '-', names.pop()).lower()
        try:
            package = packages.get(name) or metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # needed elsewhere: on another system, or for an extra
        if name not in packages:
            packages[name] = package
            names += [re.match(r'[\w.-]+', need)[0] for need in package.requires or [] if 'extra ==' not in need]
    for _, package in sorted(packages.items()):
        yield package.metadata.get_payload() or ''
        for file in sorted(package.files or [], key=str):
            name, suffix = file.name.lower(), file.suffix.lower()
            if re.search(r'licen[cs]e|notice|copying', name) and suffix in ('', '.txt', '.md', '.rst'):
                yield read(Path(file.locate()))

"""tools/routing.py: scores, shares, pieces of text, and a page on which a text is nothing but text."""

import base64
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import tiktoken
import torch
from conftest import devices, refused, user_streams, write_dataset

from config.default import METHODS
from data.stream import encoding
from eval import open_run
from model import evaluate
from tools import routing
from tools.routing import token_scores

HOSTILE = '</script><img src=x onerror="document.title=1"><!-- <b>&amp;</b> \u2028\u2029 é—👩\r\n\t ]]> {{data}}'
BYTES = {bytes([i]): i for i in range(256)}
# pieces that begin, end and cut characters: é is C3 A9, — is E2 80 94
MERGED = tiktoken.Encoding(
    'gpt2',
    pat_str=r'(?s).+',
    mergeable_ranks=BYTES | {b'ab': 256, b'\xa9\xe2': 257, b'\x80\x94': 258, b'abab': 259},
    special_tokens={},
)


def numbers(page: str) -> dict:
    """What a browser finds in the page's script element."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def report(*args) -> dict:
    """The page that the tool writes for a run."""
    routing.main([*map(str, args)])
    return numbers((args[0] / 'routing.html').read_text(encoding='utf-8'))


# ---- scores
@pytest.mark.parametrize(
    'args',
    [
        ['--n_experts=3'],
        ['--n_experts=3', '--top_k=1'],
        ['--n_experts=4', '--n_generalists=2', '--routing_unit=prefix'],
        ['--n_experts=3', '--one_routing'],
    ],
)
def test_scores_are_the_softmax_of_router_logits(tiny, args):
    """softmax(Φ LN2(x)), written out with numpy on the inputs that each layer's router saw, for each token in its place."""
    user = devices(tiny.model, '--method=comigs_1gxs', *args)[0]
    model, tokens, inputs = user.model, user.data['test'][:41], {}
    for layer, block in enumerate(model.h):
        if block.mlp.router is not None:
            block.mlp.router.weight.data *= 20  # scores far apart
        block.ln_2.register_forward_hook(lambda _, __, x, layer=layer: inputs.setdefault(layer, []).append(x.flatten(0, 1)))
    loss, scores = token_scores(model, tokens, 16)
    assert scores.shape == (2, 40, model.h[0].mlp.router.out_features) and scores.dtype == np.float32
    assert loss == evaluate(model, tokens, 16)['loss']
    for layer, block in enumerate(model.h):
        source = layer if block.mlp.router is not None else 0  # --one_routing: the first layer decides for all
        x, phi = torch.cat(inputs[source][:2]).double().numpy(), model.h[source].mlp.router.weight.detach().double().numpy()
        logits = x @ phi.T  # (40, E): windows of 16, 16 and 8
        if 'prefix' in args[-1]:
            logits = np.concatenate([np.cumsum(w, 0) / np.arange(1, len(w) + 1)[:, None] for w in np.split(logits, [16, 32])])
        by_hand = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        np.testing.assert_allclose(scores[layer], by_hand, atol=1e-6)


def test_scores_agree_with_the_report_and_one_expert_scores_one(finished):
    three, one, _ = finished.users
    result = evaluate(three.model, three.data['test'], 16)
    scores = token_scores(three.model, three.data['test'], 16)[1]
    np.testing.assert_allclose(scores.mean(1), result['scores'], atol=1e-6)
    np.testing.assert_allclose(routing.generalist_share(scores, 1), np.array(result['top1'])[:, 0])
    assert (token_scores(one.model, one.data['test'], 16)[1] == np.ones((2, 149, 1))).all()


def test_share_and_extremes_by_hand():
    """Two layers, tokens 65 and 66 five times each, 67 once; generalist scores 65: (0.9 + 0.3) / 2, 66: (0.5 + 0.1) / 2."""
    tokens = np.array([65, 66] * 5 + [67])
    layer0, layer1 = np.array([0.9, 0.5] * 5 + [0.0]), np.array([0.3, 0.1] * 5 + [0.0])
    scores = np.stack([np.stack([g, (1 - g) / 3, (1 - g) * 2 / 3], -1) for g in (layer0, layer1)])  # (2, 11, 3)
    # layer 0: 0.9 and 0.5 win, 0 loses; layer 1: all lose, 0.3 to 0.7 * 2/3
    assert routing.generalist_share(scores, 1) == [10 / 11, 0]
    assert routing.generalist_share(scores, 2) == [10 / 11, 0] and routing.generalist_share(scores, 3) == [1, 1]
    said = routing.extremes(tokens, scores, 1, encoding('bytes'))  # 67 is too rare
    assert said == {'least': 5, 'generalist': [['A', 0.6, 5]], 'specialist': [['B', 0.3, 5]]}
    both = routing.extremes(tokens, scores, 2, encoding('bytes'))  # of two the sum: A (0.9 + 0.1/3 + 0.3 + 0.7/3) / 2
    assert both['generalist'] == [['A', 0.733, 5]]
    assert all(routing.extremes(tokens, scores, k, encoding('bytes')) is None for k in (0, 3))


def test_quantised_scores_keep_their_best():
    """A byte per score, off by less than 1.5 in 255; the best expert of a token is the only one with its number."""
    z = np.random.default_rng(0).normal(size=(3, 500, 5)) * [[[1]], [[1e-3]], [[9]]]  # layer 1: near ties everywhere
    scores = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    q = np.frombuffer(base64.b64decode(routing.quantised(scores)), np.uint8).reshape(scores.shape).astype(int)
    assert (q.argmax(-1) == scores.argmax(-1)).all() and ((q == q.max(-1, keepdims=True)).sum(-1) == 1).all()
    assert np.abs(q - 255 * scores).max() < 1.5
    assert base64.b64decode(routing.quantised(np.ones((1, 2, 1)))) == b'\xff\xff'


# ---- text
@pytest.mark.parametrize('enc', [encoding('bytes'), MERGED])
@pytest.mark.parametrize('text', [HOSTILE, 'ababé—', '你好👩‍👩‍👧', 'x'])
def test_pieces_join_to_the_text(enc, text):
    raw = [enc.decode_single_token_bytes(t) for t in enc.encode_ordinary(text)]
    assert ''.join(routing.pieces(raw)) == text
    cut = raw[1:-1]  # a stream may begin and end within a character
    assert ''.join(routing.pieces(cut)) == b''.join(cut).decode('utf-8', 'replace')


def test_a_character_is_shown_where_it_is_complete():
    text = routing.passage('', np.array(MERGED.encode_ordinary('abé—')), MERGED)
    assert text['pieces'] == ['ab', '', 'é', '—']  # ab, C3, A9 E2, 80 94
    assert text['raw'] == {1: '0xC3', 2: '0xA9E2', 3: '0x8094'}
    end = routing.passage('', np.array([104, 256]), encoding('bytes'))
    assert end['pieces'] == ['h', '<|endoftext|>'] and end['raw'] == {}


class Tags(HTMLParser):
    """Everything in a page that is not text."""

    def __init__(self, page: str):
        super().__init__()
        self.found = []
        self.handle_starttag = lambda *tag: self.found.append(tag)
        self.handle_comment = self.handle_decl = self.handle_endtag = self.found.append
        self.feed(page)


def test_no_text_can_leave_the_script_element():
    """The page has the template's tags and no other, and what the browser parses is the text, to the character."""
    given = {
        'run': HOSTILE,
        'texts': [HOSTILE, '\ud800', '{{data}}'],
        'models': ['_under', '$x$', '\u5f20\u4e09', '</td>&amp;'],
    }
    page, template = routing.html(given), routing.TEMPLATE.read_text(encoding='utf-8')
    assert numbers(page) == given and Tags(page).found == Tags(template).found
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert data.isascii() and not set('<>&') & set(data)


def test_the_template_has_one_place_for_the_data_and_no_address():
    template = routing.TEMPLATE.read_text(encoding='utf-8')
    assert template.count('{{data}}') == 1 and '//' not in re.sub(r'(^|\s)//\s.*', '', template)
    assert not re.search(r'innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|src=|href=|@import|url\(', template)


# ---- the page of a run
def test_page_of_a_run(finished, tmp_path, capsys):
    """Every cell has its numbers: the run's perplexities on the diagonal, the shares, and the scores of what is shown."""
    run = shutil.copytree(finished.out, tmp_path / 'run', ignore=shutil.ignore_patterns('eval.json'))
    data, models = report(run, '--passage_tokens=20'), open_run(run).models  # as tested: finished.users have had a mean since
    said, page = capsys.readouterr().out, (run / 'routing.html').read_bytes()
    assert data['models'] == [t['name'] for t in data['texts']] == ['user 0', 'user 1', 'user 2']
    for i, text in enumerate(data['texts']):
        tokens = finished.users[i].data['test']
        assert ''.join(text['pieces']) == bytes(tokens[:20].astype('u1')).decode() and text['counted'] == 149
        assert text['own'] == i and text['cells'][i]['ppl'] == pytest.approx(finished.summary['test_ppl'][i], abs=1e-3)
        for j, (model, c) in enumerate(zip(models, text['cells'])):
            result = evaluate(model, tokens, 16)
            assert c['ppl'] == pytest.approx(result['ppl'], abs=1e-4)
            share = [layer[0] for layer in result['top1']] if result['top1'] else [1, 1]
            assert c['share'] == pytest.approx(share, abs=1e-4) and c['experts'] == [3, 1, 2][j]
            assert len(base64.b64decode(c['scores'])) == 2 * 20 * c['experts']
    assert data['texts'][1]['extremes'] is None and data['texts'][0]['extremes']['generalist']
    assert f'{np.mean(data["texts"][1]["cells"][0]["share"]):.3f}' in said and 'wrote' in said
    report(run, '--passage_tokens=20')
    assert (run / 'routing.html').read_bytes() == page and not (run / 'eval.json').exists()


@pytest.mark.parametrize(
    'args',
    [
        ['--method=comigs_2s'],
        ['--method=comigs_2g', '--n_experts=3', '--n_generalists=2', '--top_k=1', '--one_routing'],
        ['--method=centralized', '--router=learned', '--router_data=joint'],
    ],
)
def test_no_generalist_several_and_one_model_for_all(train, args):
    run = train(*args, '--rounds=1')
    data = report(run.out)
    assert data['models'] == (['all'] if run.c.pooled else ['user 0', 'user 1', 'user 2']) and len(data['texts']) == 3
    assert [t['own'] for t in data['texts']] == ([0, 0, 0] if run.c.pooled else [0, 1, 2])
    assert all(len(c['share']) == 2 for t in data['texts'] for c in t['cells'])
    if run.c.n_generalists == 0:
        assert all(c['share'] == [0, 0] for t in data['texts'] for c in t['cells']) and not data['texts'][0]['extremes']


def test_eight_of_many_users(train, tmp_path):
    data = write_dataset(tmp_path / 'many', [user_streams(i % 5, 100) for i in range(11)])
    said = report(train(f'--dataset={data}', '--rounds=1', '--local_steps=1').out)
    assert said['users'] == 11 and said['models'] == [f'user {i}' for i in (0, 1, 3, 4, 6, 7, 9, 10)]


def test_users_that_have_not_taken_part_are_left_out(train):
    run = train('--participation=0.34', '--rounds=1')  # one of three users: the others have no checkpoint
    (run.out / 'summary.json').unlink()  # as if it were still running
    data = report(run.out)
    took_part = {f'user {line["user"]}' for line in run.lines if line['kind'] == 'train'}
    assert data['models'] == [*took_part] and data['users'] == 3


def test_bad_input(train, finished, monkeypatch, capsys, tmp_path):
    """One line, before the models are built."""
    with_routers = [name for name, (row, *_) in METHODS.items() if row[3] != 'mean']
    monkeypatch.setattr(routing, 'open_run', None)
    cases = [
        (train('--method=local', '--rounds=0', out='l').out, [], ['no routers', 'router=mean', *with_routers]),
        (train('--method=ffa_lora', '--rounds=0', out='f').out, [], ['no routers', 'one expert each', *with_routers]),
        (finished.out, ['--target=mixture'], ['unrecognized arguments: --target=mixture']),
        (finished.out, [finished.out], ['unrecognized arguments']),
        (finished.out, ['--passage_tokens=0'], ['expected a number >= 1']),
        (tmp_path / 'none', [], ['is no run']),
    ]
    for out, args, words in cases:
        err = refused(capsys, report, out, *args)
        assert all(word in err for word in words), err
    assert not (finished.out / 'routing.html').exists()


def test_a_run_that_diverged(finished, monkeypatch, capsys):
    monkeypatch.setattr(routing, 'token_scores', lambda *_: (float('nan'), np.full((2, 149, 2), np.nan)))
    assert 'scores that are no numbers' in refused(capsys, report, finished.out)


# ---- in a browser

browser = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@pytest.mark.skipif(browser is None, reason='no Chromium to look at the page with')
def test_in_a_browser_text_is_text(tmp_path):
    """A text and names full of HTML are on the page, character by character; no element comes from them, no script runs."""
    image = '<img src=x onerror=document.title=1>'  # short enough for a name, and here one token
    enc = tiktoken.Encoding('gpt2', pat_str='', mergeable_ranks={**BYTES, image.encode(): 256}, special_tokens={})
    tokens = np.array([*HOSTILE.encode(), 256])
    scores = np.random.default_rng(0).dirichlet([1, 1, 1], (2, len(tokens)))
    texts = [
        routing.passage(image, tokens, enc)
        | {
            'counted': len(tokens),
            'own': i,
            'extremes': routing.extremes(np.repeat(tokens, 5), np.repeat(scores, 5, 1), 1, enc),
        }
        | {'cells': [routing.measured(float('inf'), scores, 1, len(tokens)) for _ in range(2)]}
        for i in range(2)
    ]
    facts = dict.fromkeys(('run', 'init_from', 'method', 'dataset', 'tokenizer'), image)
    facts |= {'generalists': 1, 'block_size': 16, 'users': 2, 'models': [image, HOSTILE], 'texts': texts}
    (tmp_path / 'page.html').write_text(routing.html(facts), encoding='utf-8')
    command = [browser, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path}/profile', '--dump-dom']
    address = f'file://{tmp_path}/page.html#layer=1&model=all'
    dom = subprocess.run([*command, address], capture_output=True, text=True, timeout=120).stdout
    drawn = re.sub(r'<script.*?</script>', '', dom, flags=re.DOTALL)
    assert '<img' not in drawn and '<!--' not in drawn
    assert unescape(re.search('<title>(.*?)</title>', drawn, re.DOTALL)[1]) == f'Routing: {image}'
    passages = re.findall(r'<div class="passage".*?</div>', drawn, re.DOTALL)
    assert len(passages) == 4 and all(passage.count('class="token') == len(tokens) for passage in passages)
    shown = re.sub(r'<i class="mark">(.*?)</i>', r'\1', passages[0])
    shown = unescape(re.sub(r'<[^>]*>', '', shown))
    for mark, text in (('↵', ''), ('⇥', ''), ('␍', '\r'), ('U+2028', '\u2028'), ('U+2029', '\u2029')):
        shown = shown.replace(mark, text)
    assert shown == HOSTILE + image

"""Flower's processes of one device in tests/test_devices.py: what it sends is written down (RECORD), what may not leave it is
filled with a marker (MARK), or it sends rubbish, twice (HOSTILE). The look-up hook of all tests comes first."""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
exec(compile((TESTS / 'no_network/sitecustomize.py').read_text(), 'sitecustomize.py', 'exec'), globals())
MARK = 12345.678

if {'RECORD', 'HOSTILE'} & os.environ.keys() and 'start.py' in ' '.join(sys.orig_argv):  # what speaks with the server
    import httpx

    request_sent = httpx.Client.send

    def once(*message) -> tuple:
        once.message = message
        return once.send(*message)

    def watched(client: httpx.Client, request: httpx.Request, **how) -> httpx.Response:
        if 'RECORD' in os.environ:
            with open(os.environ['RECORD'], 'ab') as f:
                f.write(f'\n{request.url.path} '.encode() + request.read())
        node = sys.modules['flwr.supernode.start_client_internal']  # imported by now, in the environment that start.py makes
        if 'HOSTILE' in os.environ and not hasattr(once, 'push'):
            once.push = node._push_messages

            def push(send, **how) -> None:
                once.send = send
                once.push(send=once, **how)
                try:
                    print(f'sent again, answered {send(*once.message)}', flush=True)
                except Exception as error:  # the server's answer
                    print(f'sent again, refused: {error}', flush=True)

            node._push_messages = push
        return request_sent(client, request, **how)

    httpx.Client.send = watched

if {'MARK', 'HOSTILE'} & os.environ.keys() and 'flower-superexec' in ' '.join(sys.orig_argv):
    sys.path[:0] = [str(TESTS.parent / 'devices'), str(TESTS.parent)]
    import client
    import torch
    from flwr.app import Array, ArrayRecord

    packed, upload = client.packed, client.User.upload

    def marked(user: client.User) -> dict:
        with torch.no_grad():
            for name, p in user.adapter.items():
                if user.role[name] in ('specialist', 'router'):
                    p.fill_(MARK)
                    for moment in user.expert_opt.state.get(p, {}).values():
                        moment.fill_(MARK)
        return upload(user)

    def hostile(tensors: dict, facts: dict) -> object:
        """Another kind of rubbish in every round."""
        kind, first = facts['round'], next(iter(tensors), None)
        if kind == 0:
            tensors[first] = tensors[first] * float('nan')
        elif kind == 1:
            tensors[first] = tensors[first][:-1]
        facts |= {2: {'round': 0}, 3: {'user': 'u0'}}.get(kind, {})
        made = packed(tensors, facts)
        if kind == 4:
            made['tensors'] = ArrayRecord({'0': Array('float32', (2, 2), 'numpy.ndarray', b'\x80\x04no array')})
        return made

    if 'MARK' in os.environ:
        client.User.upload = marked
    else:
        client.packed = hostile

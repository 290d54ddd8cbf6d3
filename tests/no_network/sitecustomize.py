"""Every Python process that the tests start writes down the names it looks up and the addresses it connects to, but for this
machine's own: tests/conftest.py puts this folder on PYTHONPATH, and fails the run if anything was written."""

import os
import sys

LOCAL = ('localhost', '127.', '::1', '0.0.0.0')


def hook(event: str, args: tuple) -> None:
    if event in ('socket.getaddrinfo', 'socket.gethostbyname', 'socket.connect', 'socket.sendto'):
        target = args[1] if event in ('socket.connect', 'socket.sendto') else args[0]
        host = target[0] if isinstance(target, tuple) else target
        if event in ('socket.connect', 'socket.sendto') and not isinstance(target, tuple):
            return  # a socket of this machine's own, AF_UNIX
        host = host.decode(errors='replace') if isinstance(host, bytes) else host
        if host and not host.startswith(LOCAL) and host not in OWN:
            with open(os.environ['LOOKUPS'], 'a') as f:
                f.write(f'{event} {host} by {" ".join(sys.argv[:2])}\n')


if 'LOOKUPS' in os.environ:
    OWN = {os.uname().nodename}
    sys.addaudithook(hook)

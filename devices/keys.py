"""Keys for trying: a certificate for the server, and a key for every user, whose name is then known.

    python devices/keys.py my/keys --host=192.168.1.10 ada bob     # the server's, and those of two users
    python devices/keys.py my/keys cleo                            # one more user, whenever it comes

    ca.pem, server.key    whom devices trust to be the server, for ten years; only the server has server.key
    NAME.pub, NAME.key    a user's: the server needs NAME.pub, the device alone NAME.key (and ca.pem)
    users.json            the names in the order in which they came: a user's number is its place

Needs `cryptography`, which comes with Flower. What is there is never written over."""

import datetime
import ipaddress
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import die, parser, read_json


def write(file: Path, raw: bytes) -> None:
    """A new file that only its owner reads."""
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'wb') as f:
        f.write(raw)


def certify(folder: Path, hosts: list[str]) -> None:
    """ca.pem, server.key: a certificate that nobody but itself has signed, and that can sign no other one."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key, now = ec.generate_private_key(ec.SECP384R1()), datetime.datetime.now()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, 'federation')])

    def address(host: str) -> x509.GeneralName:
        return x509.IPAddress(ipaddress.ip_address(host)) if re.fullmatch(r'[\d.]+|.*:.*', host) else x509.DNSName(host)

    reached = x509.SubjectAlternativeName([address(host) for host in ('127.0.0.1', 'localhost', *hosts)])
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - datetime.timedelta(2)).not_valid_after(now + datetime.timedelta(3650))
    made = made.add_extension(x509.BasicConstraints(False, None), True).add_extension(reached, False)
    write(folder / 'ca.pem', made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    write(folder / 'server.key', key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def user_key(folder: Path, name: str) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = ec.generate_private_key(ec.SECP384R1())
    write(folder / f'{name}.key', key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    write(folder / f'{name}.pub', key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))


def main(argv: list[str]) -> None:
    p = parser(__doc__)
    p.add_argument('folder', type=Path)
    p.add_argument('names', nargs='+', help='of users: letters, digits, _ and -')
    p.add_argument('--host', action='append', default=[], help='an address or name of the server, besides 127.0.0.1')
    a = p.parse_args(argv)
    file = a.folder / 'users.json'
    try:
        users = read_json(file, 'users')['users'] if file.exists() else []
        for name in a.names:
            if not re.fullmatch(r'[\w-]{1,40}', name, re.A) or name in ('server', 'ca', *users) or a.names.count(name) > 1:
                raise ValueError(f'{name!r:.50}: expected a new name of at most 40 letters, digits, _ and -')
        a.folder.mkdir(parents=True, exist_ok=True)
        if not users:
            certify(a.folder, a.host)
        for name in a.names:
            user_key(a.folder, name)
        (partial := file.with_suffix('.partial')).write_text(json.dumps({'users': users + a.names}))
        os.replace(partial, file)
    except (OSError, ValueError) as error:
        die(error)


if __name__ == '__main__':
    main(sys.argv[1:])

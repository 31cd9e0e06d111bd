"""Make, show, authorise, rotate and revoke the RSA identities of the links."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hpc.errors import HpcError
from hpc.link import identity
from hpc.undumped import hide_memory


def main() -> int:
    args = _parse()
    hide_memory(shares_memory=False)
    try:
        _ACTIONS[args.action](args)
    except HpcError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _make(args: argparse.Namespace) -> None:
    for name in args.names or [identity.SERVER, *map(identity.client_name, range(args.clients))]:
        made = identity.make(args.keys_dir, name)
        print(f"{name} {identity.short(made.fingerprint)}")


def _show(args: argparse.Namespace) -> None:
    for state, name, fingerprint in identity.show(args.keys_dir):
        print(f"{state:<10} {name:<12} {fingerprint if args.full else identity.short(fingerprint)}")


def _authorise(args: argparse.Namespace) -> None:
    print(f"authorised {Path(args.file).stem} {identity.short(identity.authorise(args.keys_dir, args.file))}")


def _rotate(args: argparse.Namespace) -> None:
    fresh, public = identity.rotate(args.keys_dir, args.name)
    print(f"{args.name} {identity.short(fresh.fingerprint)}; the old key is revoked and gone")
    if args.name == identity.SERVER:
        print(f"every client replaces its server.pem by {public}, compares this fingerprint, and revokes the old one")
    else:
        print(f"every other party: keys.py revoke {args.name}; keys.py authorise {public.name} (from {public})")


def _revoke(args: argparse.Namespace) -> None:
    print(f"revoked {args.name}: {identity.revoke(args.keys_dir, args.name)}")


_ACTIONS = {"make": _make, "show": _show, "authorise": _authorise, "rotate": _rotate, "revoke": _revoke}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--keys_dir", default="keys", help="folder of the identities (default: keys)")
    actions = parser.add_subparsers(dest="action", required=True)
    make = actions.add_parser("make", parents=[common], help="create identities; existing ones are never replaced")
    make.add_argument("names", nargs="*", metavar="NAME", help="server or client-<k>; none: server and --clients")
    make.add_argument("--clients", type=int, default=2, help="clients to make without NAME (default: 2)")
    show = actions.add_parser("show", parents=[common], help="list the public keys with their fingerprints")
    show.add_argument("--full", action="store_true", help="all 64 digits of a fingerprint, not the first 16")
    authorise = actions.add_parser("authorise", parents=[common], help="let the client of this public key log in")
    authorise.add_argument("file", metavar="FILE.pem", help="public key, named client-<k>.pem")
    rotate = actions.add_parser("rotate", parents=[common], help="a new key for an identity; the old one is revoked")
    rotate.add_argument("name", metavar="NAME", help="server or client-<k>, whose private key is here")
    revoke = actions.add_parser("revoke", parents=[common], help="refuse a client, or an old server key, from now on")
    revoke.add_argument("name", metavar="NAME", help="client-<k>, or server for the key pinned in server.pem")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

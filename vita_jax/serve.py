"""`python -m vita_jax.serve --checkpoint DIR`: a model for programs that speak OpenAI's API, and for a browser."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vita_jax.command_line import ArgumentParser, add_int8, run_command
from vita_jax.errors import UserError
from vita_jax.parallel.huge_pages import restart_with_huge_pages

if TYPE_CHECKING:
    from vita_jax.serving.limits import Limits
    from vita_jax.serving.service import Service

EXAMPLES = """\
Serves /v1/chat/completions, /v1/audio/transcriptions, /v1/audio/speech, /v1/realtime and /v1/models as far as the
model can hear and speak, and /health and /metrics. Only programs on this machine can reach it; with --host it listens
elsewhere, for which it wants a token. See docs/serving.md.

examples:
  python -m vita_jax.serve --checkpoint experiments/quickstart/weights
  python -m vita_jax.serve --checkpoint runs/quickstart --port 9000 --answers 8 --limit images=4
  python -m vita_jax.serve --checkpoint runs/quickstart --int8 weights cache
  VITA_JAX_TOKEN=... python -m vita_jax.serve --checkpoint runs/quickstart --host 0.0.0.0 --tls
  python -m vita_jax.serve --checkpoint runs/mine --host 10.0.0.5 --token-file token.txt --tls \\
      --certificate cert.pem --key key.pem --origin https://example.org

  curl http://localhost:8400/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"model": "quickstart", "messages": [{"role": "user", "content": "3+4"}]}'
"""

TOKEN_VARIABLE = "VITA_JAX_TOKEN"
SHORTEST_TOKEN = 16
CERTIFICATES = Path(".cache") / "vita_jax" / "certificates"  # below the home folder
VOICES = ("model", "espeak")


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(prog="python -m vita_jax.serve", description="Serves a trained model.", epilog=EXAMPLES)
    parser.add_argument("--checkpoint", metavar="DIR", required=True, help="a run, a checkpoint or kept weights")
    parser.add_argument("--name", help="what requests call the model; default the name of its configuration")
    parser.add_argument("--host", default="localhost", help="address to listen on (default localhost)")
    parser.add_argument("--port", type=int, default=8400, help="port to listen on (default 8400)")
    parser.add_argument(
        "--token-file", metavar="FILE", help=f"holds the token that requests must bring; or set {TOKEN_VARIABLE}"
    )
    parser.add_argument(
        "--tls", action="store_true", help="serve https, with a certificate made for it if none is given"
    )
    parser.add_argument("--certificate", metavar="FILE", help="certificate for --tls, in PEM")
    parser.add_argument("--key", metavar="FILE", help="its key")
    parser.add_argument(
        "--origin", metavar="URL", action="append", default=[], help="another site whose pages may use the server"
    )
    parser.add_argument("--answers", type=int, default=4, help="requests that are answered at a time (default 4)")
    parser.add_argument(
        "--limit", metavar="NAME=VALUE", action="append", default=[], help="changes a limit, see docs/serving.md"
    )
    parser.add_argument(
        "--voice", choices=VOICES, default=VOICES[0], help="what speaks: the model itself, or espeak-ng"
    )
    parser.add_argument("--cold", action="store_true", help="compile when it is needed, not before the first request")
    add_int8(parser)
    return parser


def serve(arguments: argparse.Namespace) -> int:
    """Loads the model and serves it until a signal."""
    # Imported here so that --help and a mistyped argument answer at once.
    try:
        from vita_jax.serving.limits import Limits, changed_limits
        from vita_jax.serving.server import bound_socket, run
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}: pip install 'vita_jax[serve]'") from error
    limits = changed_limits(Limits(), arguments.limit)
    token = read_token(arguments)
    check_arguments(arguments, token)
    tls = certificate(arguments)
    # Before the model is loaded, so that an address that is taken costs no time.
    with bound_socket(arguments.host, arguments.port, limits) as listening:
        service = make_service(arguments, limits, token)
        from vita_jax.serving.app import create_app
        from vita_jax.serving.pages import PAGE

        app = create_app(service)
        scheme = "http" if tls is None else "https"
        port = listening.getsockname()[1]
        print(f"{service.name}: {scheme}://{shown_host(arguments.host)}:{port}", flush=True)
        for path in (route.path for route in app.routes if not route.path.startswith(PAGE)):
            print(f"  {path}")
        if service.mute_reason is not None:
            print(f"  no realtime sessions: {service.mute_reason}")
        if tls is not None and arguments.certificate is None:
            print("  the certificate is one of this machine's own; a browser asks once whether to trust it")
        sys.stdout.flush()
        run(app, service, listening, tls)
    print("stopped")
    return 0


def shown_host(host: str) -> str:
    """As it stands in a URL."""
    return f"[{host}]" if ":" in host else host


def read_token(arguments: argparse.Namespace) -> str | None:
    """The token, if there is one. Raises UserError for a file that cannot be read, or a token that is too weak."""
    if arguments.token_file is None:
        token, where = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    else:
        where = arguments.token_file
        try:
            token = Path(where).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--token-file {where} cannot be read: {error}") from error
    if token is None:
        return None
    if not re.fullmatch(rf"[\w.~-]{{{SHORTEST_TOKEN},512}}", token, re.ASCII):
        raise UserError(
            f"the token of {where} must have {SHORTEST_TOKEN} to 512 letters, digits or . _ ~ -; make one: "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return token


def check_arguments(arguments: argparse.Namespace, token: str | None) -> None:
    """Raises UserError for what does not go together."""
    from vita_jax.serving.guard import is_loopback

    if token is None and not is_loopback(arguments.host):
        raise UserError(
            f"--host {arguments.host} lets other machines in: set {TOKEN_VARIABLE} or give a --token-file, which "
            "requests have to bring"
        )
    if not 0 <= arguments.port <= 65535:
        raise UserError(f"--port {arguments.port} must be 0 to 65535")
    if arguments.answers < 1:
        raise UserError(f"--answers {arguments.answers} must be at least 1")
    if (arguments.certificate is None) != (arguments.key is None):
        raise UserError("--certificate and --key belong together; give both, or none for a generated certificate")
    if arguments.certificate is not None and not arguments.tls:
        raise UserError("--certificate is for --tls; give that, too")
    for origin in arguments.origin:
        if not re.fullmatch(r"https?://[^/\s]+", origin):
            raise UserError(f"--origin {origin} must be a scheme and a host, such as https://example.org")


def certificate(arguments: argparse.Namespace) -> tuple[str, str] | None:
    """Files of certificate and key; None without --tls. Raises UserError if they do not fit."""
    import ssl

    from vita_jax.serving.tls import machine_names, own_certificate

    if not arguments.tls:
        return None
    if arguments.certificate is None:
        files = own_certificate(Path.home() / CERTIFICATES, machine_names(arguments.host))
    else:
        files = (Path(arguments.certificate), Path(arguments.key))
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(*files)
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"--certificate {files[0]} and --key {files[1]} cannot be used: {error}") from error
    return str(files[0]), str(files[1])


def make_service(arguments: argparse.Namespace, limits: Limits, token: str | None) -> Service:
    """Loads the model and compiles what requests will run."""
    from vita_jax.chat import espeak_voice
    from vita_jax.inference.quantization import int8_parts
    from vita_jax.inference.session import Session
    from vita_jax.parallel.process import prepare_process
    from vita_jax.serving.service import Service
    from vita_jax.serving.warm_up import warm_up

    prepare_process()
    # A realtime session takes two: one that answers, one that listens.
    num_rows = arguments.answers + 2 * limits.sessions
    session = Session.load(arguments.checkpoint, num_rows=num_rows, quantization=int8_parts(arguments.int8))
    if arguments.int8:
        print(session.memory, flush=True)
    if arguments.voice == "espeak":
        session = dataclasses.replace(session, external=espeak_voice)
    service = Service(
        session,
        arguments.name or session.config.name,
        limits,
        token=token,
        origins=tuple(arguments.origin),
        answers=arguments.answers,
    )
    if not arguments.cold:
        print("compiling ...", flush=True)
        warm_up(service)
    return service


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 bad input."""
    return run_command(serve, make_parser(), argv)


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())

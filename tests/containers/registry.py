"""A registry of images with one small image in it. Engines ask those of this machine without TLS."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"


def _layer(size: int) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = tarfile.TarInfo("content")
        member.size = size
        archive.addfile(member, io.BytesIO(bytes(size)))
    return packed.getvalue()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _contents(*, damaged: bool) -> tuple[bytes, dict[str, bytes]]:
    """A manifest, and what it names by digest; a damaged layer is not what its digest says."""
    layer = _layer(1 << 20)
    unpacked = {"type": "layers", "diff_ids": [_digest(gzip.decompress(layer))]}
    config = json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": unpacked}).encode()
    blobs = {_digest(layer): layer[::-1] if damaged else layer, _digest(config): config}

    def entry(kind: str, data: bytes) -> dict[str, object]:
        return {"mediaType": kind, "size": len(data), "digest": _digest(data)}

    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": entry("application/vnd.docker.container.image.v1+json", config),
        "layers": [entry("application/vnd.docker.image.rootfs.diff.tar.gzip", layer)],
    }
    return json.dumps(manifest).encode(), blobs


@contextmanager
def serving(*, damaged: bool = False) -> Iterator[tuple[str, str]]:
    """(name without tag, digest) of an image that `host:port/name:any-tag` and `@digest` pull."""
    manifest, blobs = _contents(damaged=damaged)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, _, reference = self.path.rpartition("/")
            known = {**blobs, "": b"{}", _digest(manifest): manifest}
            answer = manifest if kind.endswith("manifests") else known.get(reference)
            self.send_response(404 if answer is None else 200)
            self.send_header("content-type", _MANIFEST if answer is manifest else "application/octet-stream")
            self.send_header("content-length", str(len(answer or b"")))
            if answer is manifest:
                self.send_header("docker-content-digest", _digest(manifest))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(answer or b"")

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}/soppu-tiny", _digest(manifest)
    finally:
        server.shutdown()
        server.server_close()

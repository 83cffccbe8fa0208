"""A bucket that is a folder: for `etils.epath`, and over HTTP for tensorstore, which Orbax writes arrays with."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

from etils.epath import backend, gpath
from orbax.checkpoint._src.path import gcs_utils

from vita_jax import storage

GS = "gs://"


class FolderBackend(backend._OsPathBackend):
    """What epath asks of a store, on the files of a folder; objects are written whole and not appended to."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def disk(self, path) -> str:
        text = os.fspath(path)
        assert text.startswith(GS), f"{text} is not in the bucket"
        return str(self._root / text.removeprefix(GS))

    def open(self, path, mode):
        if "a" in mode:
            raise OSError(f"{os.fspath(path)}: objects are not appended to")
        if "w" in mode:
            os.makedirs(os.path.dirname(self.disk(path)), exist_ok=True)
        return super().open(self.disk(path), mode)

    def exists(self, path):
        return super().exists(self.disk(path))

    def isdir(self, path):
        return super().isdir(self.disk(path))

    def listdir(self, path):
        return super().listdir(self.disk(path))

    def glob(self, path):
        return [GS + os.path.relpath(found, self._root) for found in super().glob(self.disk(path))]

    def walk(self, top, *, top_down=True, on_error=None):
        for folder, folders, files in os.walk(self.disk(top), topdown=top_down, onerror=on_error):
            yield GS + os.path.relpath(folder, self._root), folders, files

    def makedirs(self, path, *, exist_ok=False, mode=None):
        super().makedirs(self.disk(path), exist_ok=exist_ok)

    def mkdir(self, path, *, exist_ok=False, mode=None):
        super().makedirs(self.disk(path), exist_ok=exist_ok)

    def rmtree(self, path):
        super().rmtree(self.disk(path))

    def remove(self, path):
        super().remove(self.disk(path))

    def rename(self, path, dst):
        shutil.move(self.disk(path), self.disk(dst))

    def replace(self, path, dst):
        os.replace(self.disk(path), self.disk(dst))

    def copy(self, path, dst, overwrite):
        shutil.copyfile(self.disk(path), self.disk(dst))

    def stat(self, path):
        return super().stat(self.disk(path))


def handler(root: Path) -> type[BaseHTTPRequestHandler]:
    """The part of the JSON API of Cloud Storage that tensorstore uses; generations are times of change."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def asked(self) -> tuple[Path, Path | None, dict[str, str]]:
            """Bucket, object if one is named, and what else is in the address."""
            url = urlsplit(self.path)
            bucket, _, name = url.path.split("/b/", 1)[1].partition("/o")
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            name = unquote(name.removeprefix("/")) or query.get("name", "")
            return root / bucket, root / bucket / name if name else None, query

        def generation(self, file: Path) -> int:
            return file.stat().st_mtime_ns if file.is_file() else 0

        def refused(self, file: Path, query: dict[str, str]) -> bool:
            now = self.generation(file)
            if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != now:
                self.answer(412)
                return True
            if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == now:
                self.answer(304)
                return True
            return False

        def about(self, bucket: Path, file: Path) -> dict[str, str]:
            stat = file.stat()
            when = "2026-01-01T00:00:00.000Z"
            return {
                "kind": "storage#object",
                "name": file.relative_to(bucket).as_posix(),
                "bucket": bucket.name,
                "generation": str(stat.st_mtime_ns),
                "metageneration": "1",
                "size": str(stat.st_size),
                "timeCreated": when,
                "updated": when,
            }

        def do_GET(self) -> None:
            bucket, file, query = self.asked()
            if file is None:
                found = sorted(path for path in bucket.rglob("*") if path.is_file())
                items = [self.about(bucket, path) for path in found]
                items = [item for item in items if item["name"].startswith(query.get("prefix", ""))]
                return self.answer(200, json.dumps({"items": items}).encode(), Content_Type="application/json")
            if not file.is_file():
                return self.answer(404)
            if self.refused(file, query):
                return None
            data, headers = file.read_bytes(), {"x_goog_generation": str(self.generation(file))}
            if asked := self.headers.get("Range"):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start = int(first) if first else max(0, len(data) - int(last))
                stop = min(len(data), int(last) + 1) if first and last else len(data)
                if start >= stop:
                    return self.answer(416, **headers)
                headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
                return self.answer(206, data[start:stop], **headers)
            return self.answer(200, data, **headers)

        def do_POST(self) -> None:
            bucket, file, query = self.asked()
            data = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                if self.refused(file, query):
                    return
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
                self.answer(200, json.dumps(self.about(bucket, file)).encode(), Content_Type="application/json")

        def do_DELETE(self) -> None:
            _, file, query = self.asked()
            with lock:
                if not self.refused(file, query):
                    there = file.is_file()
                    file.unlink(missing_ok=True)
                    self.answer(204 if there else 404)

    return Handler


@contextlib.contextmanager
def folder_as_bucket(root: Path) -> Iterator[None]:
    """Every bucket is a folder in `root`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(root))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = {
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{server.server_port}",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    }
    with (
        mock.patch.dict(os.environ, address),
        mock.patch.dict(gpath._PREFIX_TO_BACKEND, {"gs": FolderBackend(root)}),
        mock.patch.object(gpath, "_is_tf_installed", lambda: False),
        mock.patch.object(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False),
        mock.patch.object(storage, "_has_driver", lambda: True),
    ):
        yield
    server.shutdown()
    thread.join()
    server.server_close()

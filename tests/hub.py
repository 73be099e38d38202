"""A small Hugging Face Hub on this machine: serves repositories from memory, counts, fails when told to."""

import hashlib
import io
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

FIRE_RISK, GAMEPLAY_IMAGES = "datasets/blanchon/FireRisk", "datasets/Bingsu/Gameplay_Images"
FIRE_CLASSES = ["high", "low", "moderate", "non-burnable", "very_high", "very_low", "water"]
GAME_CLASSES = ["Among Us", "Apex Legends", "Fortnite", "Forza Horizon", "Free Fire", "Genshin Impact", "God of War",
                "Minecraft", "Roblox", "Terraria"]

Files = dict[str, bytes]  # path in the repository -> content


def colour(label: int, index: int) -> tuple[int, int, int]:
    """The one colour of image `index` of class `label`, by which a test knows the image again."""
    return 20 * label + 10, index, 255 - 20 * label


def png(label: int, index: int) -> bytes:
    """An 8 x 8 PNG of that colour."""
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8), colour(label, index)).save(buffer, "PNG")
    return buffer.getvalue()


def noisy_png(label: int, index: int) -> bytes:
    """A PNG of noise, about 8 KB, whose corner is of that colour."""
    pixels = np.random.default_rng([label, index]).integers(0, 256, (52, 52, 3), dtype=np.uint8)
    pixels[0, 0] = colour(label, index)
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def image_dataset(classes: list[str], counts: int | list[int], draw: Callable[[int, int], bytes] = png) -> Dataset:
    """Rows sorted by label, as `datasets` keeps them: image (encoded bytes and path), label (ClassLabel)."""
    counts = [counts] * len(classes) if isinstance(counts, int) else counts
    keys = [(label, index) for label, count in enumerate(counts) for index in range(count)]
    images = [{"bytes": draw(*key), "path": f"{key[0]}_{key[1]}.png"} for key in keys]
    features = Features({"image": Image(), "label": ClassLabel(names=classes)})
    return Dataset.from_dict({"image": images, "label": [label for label, _ in keys]}, features=features)


def dataset_repo(classes: list[str], counts: int | list[int], shards: int, rows_per_group: int | None = None,
                 draw: Callable[[int, int], bytes] = png) -> Files:
    """A published image dataset: one split `train` in several Parquet files, and a card that describes them."""
    dataset = image_dataset(classes, counts, draw)
    names = "".join(f"          '{label}': {name}\n" for label, name in enumerate(classes))
    card = ("---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
            f"      class_label:\n        names:\n{names}  splits:\n  - name: train\n    num_examples: {len(dataset)}\n"
            f"    num_bytes: {dataset.data.nbytes}\n---\n# Images\n")
    files = {"README.md": card.encode()}
    for shard in range(shards):
        buffer = io.BytesIO()
        dataset.shard(shards, shard, contiguous=True).to_parquet(buffer, batch_size=rows_per_group)
        files[f"data/train-{shard:05d}-of-{shards:05d}.parquet"] = buffer.getvalue()
    return files


def folder_repo(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Hub(ThreadingHTTPServer):
    """Repositories by name ("owner/model" or "datasets/owner/dataset") and the faults to serve them with.

    gated: repositories that answer 401. server_errors: how many of the next requests answer 500. cuts: by file name,
    how many of its next downloads break off after half the bytes. most_bytes: after so many bytes of Parquet there is only
    500. requests: paths of all so far. served: by file name, how many bytes have been sent. earlier: what repositories held
    before an upload, by (name, commit).
    """

    daemon_threads = True

    def __init__(self, repos: dict[str, Files], port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.repos = repos
        self.earlier: dict[tuple[str, str], Files] = {}
        self.gated: set[str] = set()
        self.server_errors = 0
        self.most_bytes = math.inf
        self.cuts: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.requests: list[str] = []
        self.lock = threading.Lock()

    @property
    def parquet_bytes(self) -> int:
        return sum(size for path, size in self.served.items() if path.endswith(".parquet"))

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


@contextmanager
def serve(repos: dict[str, Files], port: int = 0) -> Iterator[Hub]:
    """Run a hub while the block runs, at http://127.0.0.1:PORT, which is what HF_ENDPOINT has to be; 0 takes any port."""
    with Hub(repos, port) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    """The part of the Hub's HTTP interface that `datasets`, `HfFileSystem` and `from_pretrained` use."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which would hold a body back for 40 ms
    server: Hub
    resolve = re.compile(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)")
    api = re.compile(r"/api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)(?:/(?:revision|(tree))/([^/]+)/?(.*))?")

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.server.requests.append(self.path)
        path = unquote(url.path)
        if self.server.server_errors > 0:
            self.server.server_errors -= 1
            self.answer(500)
        elif found := self.resolve.fullmatch(path):
            name, revision, file = found.groups()
            if files := self.repo(name, revision):
                self.file(files, file)
        elif found := self.api.fullmatch(path):
            name, tree, revision, folder = found.groups()
            if not (files := self.repo(name, revision or "main")):
                return
            if tree:
                self.tree(files, folder, "recursive=true" in url.query.lower())
            else:
                self.json({"id": name, "sha": commit(files), "siblings": [{"rfilename": path} for path in files]})
        else:
            self.answer(404)

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        """Nothing on stderr; `Hub.requests` has it all."""

    def repo(self, name: str, revision: str) -> Files | None:
        """The files of a repository that may be read, or None once the refusal is sent."""
        files = self.server.earlier.get((name, revision), self.server.repos.get(name))
        if files is None:
            self.answer(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif name in self.server.gated:
            self.answer(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {name} is restricted."})
        elif revision not in ("main", commit(files)):
            self.answer(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
        else:
            return files
        return None

    def file(self, files: Files, path: str) -> None:
        if path not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit(files)})
        if path.endswith(".parquet") and self.server.parquet_bytes >= self.server.most_bytes:
            return self.answer(500)
        body = files[path]
        headers = {"ETag": f'"{oid(body)}"', "X-Repo-Commit": commit(files), "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            start, end = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
            body = body[start : end + 1]
        cut = self.command == "GET" and self.server.cuts[path] > 0
        self.server.cuts[path] -= cut
        if self.command == "GET":
            with self.server.lock:
                self.server.served[path] += len(body) // 2 if cut else len(body)
        return self.answer(206 if wanted else 200, headers, body, cut)

    def tree(self, files: Files, folder: str, recursive: bool) -> None:
        """The files and folders in a folder, or in all below it as well."""
        inside = f"{folder}/" if folder else ""
        paths = {*files, *(str(parent) for path in files for parent in PurePosixPath(path).parents if parent.name)}
        self.json([{"type": "file" if path in files else "directory", "path": path, "size": len(files.get(path, b"")),
                    "oid": oid(files.get(path, path.encode()))} for path in sorted(paths)
                   if path.startswith(inside) and (recursive or "/" not in path.removeprefix(inside))])

    def json(self, content: object) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut:
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body)


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def commit(files: Files) -> str:
    return oid("".join(f"{path} {oid(content)}\n" for path, content in sorted(files.items())).encode())

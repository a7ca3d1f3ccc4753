"""Google's object storage on a loopback port, with faults at a test's word.

A thin front before the requests of gcp_storage_emulator, which knows neither
generations nor what Google answers for a bucket that is not there.
"""

import contextlib
import dataclasses
import http
import io
import json
import os
import re
import socketserver
import sys
import threading
import urllib.parse
from collections.abc import Callable
from http import server as http_server

from gcp_storage_emulator import exceptions, server, settings, storage
from gcp_storage_emulator.handlers import buckets

_PAGE = 1000  # objects of a listing at once
Where = Callable[[str, str], bool]  # of method and path, with its query
_BUCKET = re.compile(r"/b/([-.\w]+)")
_OBJECT = re.compile(r"/b/[-.\w]+/o/([^/]+)$")
_UPLOADED = re.compile(rb'"name": *("(?:[^"\\]|\\.)*")')


@dataclasses.dataclass(eq=False)
class Fault:
  """What happens to requests; as a context manager, until its end.

  Attributes:
    hits: how many requests it happened to.
  """

  status: int | None  # None: the connection is closed without an answer
  times: int | None
  every: int
  where: Where
  done: bool
  end: Callable[["Fault"], None]
  hits: int = 0
  seen: int = 0

  def takes(self, method: str, path: str) -> bool:
    over = self.times is not None and self.hits >= self.times
    if over or not self.where(method, path):
      return False
    self.seen += 1
    if self.seen % self.every:
      return False
    self.hits += 1
    return True

  def __enter__(self) -> "Fault":
    return self

  def __exit__(self, *_) -> None:
    self.end(self)


class Emulator:
  """`with Emulator() as emulator:` serves from the first line to the last.

  Attributes:
    address: `http://127.0.0.1:port`, the same after `gone` and `back`.
    environment: that of a subprocess which shall use it.
    requests: (method, path with query) of what was asked, failed or not.
    uploads: "bucket/name" of each object written, as often as it was.
    sizes: of these, in bytes.
  """

  def __init__(self):
    self.requests: list[tuple[str, str]] = []
    self.uploads: list[str] = []
    self.sizes: list[int] = []
    self._storage = _Storage(self.uploads, self.sizes)
    self._lock = threading.RLock()
    self._faults: list[Fault] = []
    self._forbidden: set[str] = set()
    self._server = None
    self._port = 0

  def __enter__(self) -> "Emulator":
    self.back()
    self.address = f"http://127.0.0.1:{self._port}"
    self.environment = os.environ | {
      "STORAGE_EMULATOR_HOST": self.address,
      "TENSORSTORE_GCS_HTTP_URL": self.address,
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
      "NO_GCE_CHECK": "true",
    }
    return self

  def __exit__(self, *_) -> None:
    self.gone()

  def fail(
    self,
    status: int,
    times: int | None = 1,
    every: int = 1,
    where: Where = lambda method, path: True,
    done: bool = False,
  ) -> Fault:
    """Answers `status` to the next requests.

    Args:
      status: such as 403, 429, 500, 503.
      times: to how many; None for all that come.
      every: to each `every`-th of those that match.
      where: the method and path that match.
      done: what is asked for is done all the same; only the answer is lost.
    """
    return self._add(Fault(status, times, every, where, done, self._end))

  def drop(
    self,
    times: int | None = 1,
    every: int = 1,
    where: Where = lambda method, path: True,
    done: bool = False,
  ) -> Fault:
    """Closes connections without an answer; arguments as for `fail`."""
    return self._add(Fault(None, times, every, where, done, self._end))

  def gone(self) -> contextlib.ExitStack:
    """Refuses connections, until `back`; those under way are answered.

    As a context manager, until its end.
    """
    if self._server is not None:
      self._server.shutdown()
      self._server.server_close()
      self._thread.join()
      self._server = None
    return _finally(self.back)

  def back(self) -> None:
    """Serves again, on the same port, what was there."""
    if self._server is None:
      self._server = _Server(("127.0.0.1", self._port), _Handler)
      self._server.emulator = self
      self._port = self._server.server_address[1]
      self._thread = threading.Thread(
        target=self._server.serve_forever, kwargs={"poll_interval": 0.02}
      )
      self._thread.start()

  def forbid(self, bucket: str) -> contextlib.ExitStack:
    """Answers 403 to whatever is asked of a bucket, there or not.

    Until `allow`; as a context manager, until its end.
    """
    self._forbidden.add(bucket)
    return _finally(lambda: self.allow(bucket))

  def allow(self, bucket: str) -> None:
    self._forbidden.discard(bucket)

  def heal(self) -> None:
    """Ends all faults and the absence; allows all buckets."""
    with self._lock:
      self._faults.clear()
    self._forbidden.clear()
    self.back()

  def forget(self) -> None:
    """Empties `requests`, `uploads` and `sizes`."""
    self.requests.clear()
    self.uploads.clear()
    self.sizes.clear()

  def create(self, bucket: str) -> str:
    """`gs://bucket`, made if it is not there."""
    with self._lock:
      if buckets.create_bucket(bucket, self._storage):
        policy = self._storage.buckets[bucket]["softDeletePolicy"]
        policy["retentionDurationSeconds"] = "0"
    return f"gs://{bucket}"

  def names(self, bucket: str, prefix: str = "") -> list[str]:
    with self._lock:
      found = self._storage.objects.get(bucket, {})
      return sorted(name for name in found if name.startswith(prefix))

  def read(self, bucket: str, name: str) -> bytes:
    """Raises KeyError if it is not there."""
    with self._lock:
      self._storage.objects[bucket][name]
      return self._storage.get_file(bucket, name)

  def delete(self, bucket: str, name: str) -> None:
    """Raises KeyError if it is not there."""
    with self._lock:
      self._storage.objects[bucket][name]
      self._storage.delete_file(bucket, name)

  def _add(self, fault: Fault) -> Fault:
    with self._lock:
      self._faults.append(fault)
    return fault

  def _end(self, fault: Fault) -> None:
    with self._lock, contextlib.suppress(ValueError):
      self._faults.remove(fault)

  def _fault(self, method: str, path: str) -> Fault | None:
    """The first to take the request, which is written down."""
    with self._lock:
      self.requests.append((method, path))
      taking = (fault for fault in self._faults if fault.takes(method, path))
      return next(taking, None)

  def _refusal(self, path: str, body: bytes) -> tuple[int, str] | None:
    """(status, reason) of what Google, but not the emulator, refuses."""
    path, _, query = path.partition("?")
    batch = path.startswith(settings.BATCH_API_ENDPOINT)
    found = _BUCKET.search(body.decode() if batch else path)
    if not found:
      return None
    bucket = found[1]
    if bucket in self._forbidden:
      return 403, f"The caller has no access to the bucket {bucket}."
    if bucket not in self._storage.buckets:
      return 404, "The specified bucket does not exist."
    options = dict(urllib.parse.parse_qsl(query))
    name = options.get("name")
    if found := _OBJECT.search(path):
      name = urllib.parse.unquote(found[1])
    elif not name and (found := _UPLOADED.search(body[:10_000])):
      name = json.loads(found[1])
    generation = self._generation(bucket, name) or "0"
    if options.get("ifGenerationMatch", generation) != generation:
      return 412, "At least one of the pre-conditions did not hold."
    if options.get("ifGenerationNotMatch") == generation:
      return 304, ""
    offsets = options.get("startOffset", ""), options.get("endOffset", "")
    self._storage.offsets = offsets
    most = min(int(options.get("maxResults", _PAGE)), _PAGE)
    self._storage.page = options.get("pageToken", ""), most
    return None

  def _generation(self, bucket: str, name: str | None) -> str | None:
    with contextlib.suppress(exceptions.NotFound):
      return self._storage.get_file_obj(bucket, name)["generation"]
    return None


def _finally(end: Callable[[], None]) -> contextlib.ExitStack:
  stack = contextlib.ExitStack()
  stack.callback(end)
  return stack


class _Storage(storage.Storage):
  """In memory; notes what is written, lists between two names, in pages."""

  offsets, page = ("", ""), ("", _PAGE)
  following = ""  # the name after those of a page

  def __init__(self, uploads: list[str], sizes: list[int]):
    super().__init__(use_memory_fs=True)
    self._uploads, self._sizes = uploads, sizes

  def get_file_list(self, *args, **kwargs):
    start, end = self.offsets
    inside = lambda name: name >= start and (not end or name < end)
    files, prefixes = super().get_file_list(*args, **kwargs)
    first, most = self.page
    files = [x for x in files if inside(x["name"]) and x["name"] >= first]
    self.following = "".join(x["name"] for x in files[most : most + 1])
    return files[:most], [prefix for prefix in prefixes if inside(prefix)]

  def create_file(self, bucket_name, file_name, content, *args):
    super().create_file(bucket_name, file_name, content, *args)
    self._uploads.append(f"{bucket_name}/{file_name}")
    self._sizes.append(len(content))

  def _write_config_to_file(self):
    pass  # all objects' metadata, again for each that is written


class _Server(http_server.ThreadingHTTPServer):
  daemon_threads = False  # closing waits for them
  request_queue_size = 128

  def handle_error(self, request, client_address):
    if not isinstance(sys.exception(), ConnectionError):  # a client was killed
      super().handle_error(request, client_address)


class _Handler(server.RequestHandler):
  """One connection; the storage is used by one at a time."""

  timeout = 20

  def __init__(self, *args):
    socketserver.StreamRequestHandler.__init__(self, *args)

  def do_GET(self):  # noqa: N802
    self._answer()

  do_POST = do_DELETE = do_PUT = do_PATCH = do_GET  # noqa: N815

  def _answer(self):
    body = server._read_raw_data(self) or b""
    emulator = self.server.emulator
    fault = emulator._fault(self.command, self.path)
    if fault is None or fault.done:
      answer = self._emulated(emulator, body)
      if fault is None:
        self.wfile.write(answer)
    if fault is not None and fault.status is not None:
      self._refuse(fault.status, "As the test wants it.")

  def _emulated(self, emulator, body: bytes) -> bytes:
    """The whole answer, made while no other request is."""
    rfile, wfile = self.rfile, self.wfile
    self.rfile, self.wfile = io.BytesIO(body), io.BytesIO()
    del self.headers["Transfer-Encoding"], self.headers["Content-Length"]
    self.headers["Content-Length"] = str(len(body))
    try:
      with emulator._lock:
        self.storage = emulator._storage
        refusal = emulator._refusal(self.path, body)
        if refusal is None:
          self.storage.following = ""
          server.Router(self).handle(self.command)
          if token := self.storage.following:
            found = json.loads(self.wfile.getvalue().partition(b"\r\n\r\n")[2])
            self.wfile = io.BytesIO()
            self._send(self._status, found | {"nextPageToken": token})
          empty = self.wfile.getvalue().endswith(b"\r\n\r\n")
          if self._status >= 400 and empty:
            refusal = self._status, f"{self._status}: {self.path}"
        if refusal is not None:
          self.wfile = io.BytesIO()
          self._refuse(*refusal)
      return self.wfile.getvalue()
    finally:
      self.rfile, self.wfile = rfile, wfile

  def send_response(self, code, message=None):
    self._status = code
    super().send_response(code, message)

  def end_headers(self):
    path = self.path.partition("?")[0]
    bucket, name = _BUCKET.search(path), _OBJECT.search(path)
    if self.command == "GET" and name and self._status < 300:
      # Google's own server sends this header, and orbax's format reads it.
      name = urllib.parse.unquote(name[1])
      generation = self.server.emulator._generation(bucket[1], name)
      self.send_header("X-Goog-Generation", generation)
    super().end_headers()

  def _refuse(self, status: int, reason: str) -> None:
    """As Google does: the reason is told in JSON."""
    error = {"code": status, "message": reason}
    error["errors"] = [{"domain": "global", "message": reason}]
    self._send(status, None if status == 304 else {"error": error})

  def _send(self, status: int, value: dict | None):
    body = b"" if value is None else json.dumps(value).encode()
    self.send_response(status, http.HTTPStatus(status).phrase)
    self.send_header("Content-Type", "application/json; charset=UTF-8")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

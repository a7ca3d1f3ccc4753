"""Filling a directory of record shards, by any number of processes and starts.

A shard is finished when its rows of the index are below `progress/shards/`,
which are written after it. In the end, the first process makes one index of
them.
"""

import itertools
import json
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import process
from typing import Any

from dcae_jax import errors
from dcae_jax.data import batches, index, preparation
from dcae_jax.data.sources import records
from dcae_jax.runs import owned_directory, resumable_store

_LEFT_OUT, _BYTES = b"left_out", b"bytes"  # of a shard, in its rows' metadata
_ROWS = "progress/shards/{:05d}.parquet"


class RecordStore(resumable_store.ResumableStore):
  """Where shards and their index go."""

  def __init__(self, path: str, retries: int):
    super().__init__(
      path,
      what="what was prepared from other images, or in another way",
      description=records.FORMAT,
      retries=retries,
    )

  def clear(self) -> None:
    self.storage.delete("shards/")

  def missing(self, shards: list[preparation.Shard]) -> list[preparation.Shard]:
    """Those of which the rows are not there, which are written last."""
    done = self.storage.list_keys("progress/shards/")
    return [x for x in shards if _ROWS.format(x.number) not in done]

  def finish(
    self,
    shards: list[preparation.Shard],
    classes: list[str],
    described: dict[str, Any],
  ) -> dict[str, Any]:
    """Writes the index and the manifest, which is returned.

    Raises UserError if no image can be used, or rows of a shard are damaged.
    """
    names = [_ROWS.format(shard.number) for shard in shards]
    tables, files, left_out = [], [], {}
    for shard, name in zip(shards, names, strict=True):
      path = f"{self.storage.path}/{name}"
      (data,) = self.storage.read_all([name])
      table = index.from_parquet(data, path)
      noted = table.schema.metadata or {}
      if not {_LEFT_OUT, _BYTES} <= noted.keys():
        raise errors.UserError(f"{path} is damaged; remove it, and run again")
      left_out |= json.loads(noted[_LEFT_OUT])
      files.append({"name": shard.name, "bytes": int(noted[_BYTES])})
      tables.append(table.replace_schema_metadata())
    rows = preparation.in_order(tables)
    if not len(rows):
      raise errors.UserError(
        f"none of the {len(left_out)} images can be used, the first "
        f"{min(left_out)}: {left_out[min(left_out)]}"
      )
    data = index.to_parquet(rows)
    self.storage.write(records.INDEX, data)
    manifest = described | {
      "classes": classes,
      "count": len(rows),
      "index_sha256": index.sha256(data),
      "shards": files,
      "left_out": left_out,
    }
    self.storage.write_sealed_json(
      resumable_store.MANIFEST, self.description | manifest
    )
    self.remove_progress()
    return manifest


class Writer:
  """Makes shards, in any process: picklable."""

  def __init__(
    self,
    path: str,
    retries: int,
    members: list[preparation.Member],
    encoding: preparation.Encoding,
    threads: int,
  ):
    self._store = RecordStore(path, retries)
    self._members, self._encoding = members, encoding
    self._threads = threads

  def write_all(
    self,
    shards: Sequence[preparation.Shard],
    workers: int,
    stopped: Callable[[], bool],
  ) -> Iterator[int]:
    """Writes shards until it is stopped; yields the number of images of each.

    In so many processes, a shard each; 0: in this one.
    """
    left = iter(shards)
    if not workers:
      for shard in left:
        if stopped():
          return
        yield self.write(shard)
      return
    pool = futures.ProcessPoolExecutor(
      workers,
      multiprocessing.get_context("spawn"),
      initializer=_begin_worker,
      initargs=(self,),
    )
    with pool:
      running = {
        pool.submit(_write, shard) for shard in itertools.islice(left, workers)
      }
      try:
        while running:
          done, running = futures.wait(
            running, return_when=futures.FIRST_COMPLETED
          )
          for future in done:
            yield future.result()
          more = 0 if stopped() else len(done)
          for shard in itertools.islice(left, more):
            running.add(pool.submit(_write, shard))
      except process.BrokenProcessPool as error:
        raise errors.UserError(
          f"a worker was killed ({errors.first_line(error)}), maybe for want "
          "of memory; run again, with fewer config.workers if it was: it goes "
          "on from what is saved"
        ) from error

  def write(self, shard: preparation.Shard) -> int:
    """Writes a shard, then its rows; returns how many images it is made of."""
    storage = self._store.storage
    owned = owned_directory.OwnedDirectory("dcae_jax_shard")
    path = pathlib.Path(owned.path) / "shard"
    rows, left_out = preparation.write(
      shard,
      self._members[shard.member],
      self._encoding,
      self._threads,
      os.fspath(path),
    )
    data = path.read_bytes()
    storage.write(shard.name, data)
    noted = {_LEFT_OUT: json.dumps(left_out), _BYTES: str(len(data))}
    table = rows.replace_schema_metadata(noted)
    storage.write(_ROWS.format(shard.number), index.to_parquet(table))
    return shard.stop - shard.start


_WRITER: Writer | None = None  # of a worker


def _begin_worker(writer: Writer) -> None:
  global _WRITER
  batches.follow_the_main_process()
  _WRITER = writer


def _write(shard: preparation.Shard) -> int:
  return _WRITER.write(shard)

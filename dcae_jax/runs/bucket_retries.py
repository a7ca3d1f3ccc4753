"""How soon gcsfs, through which paths of a bucket are read, asks again.

It waits for one to two seconds before the first time; a checkpoint asks for
some hundred things, one after the other, and would wait for each that fails.
"""

import asyncio
import random
import urllib.parse
from typing import Any

import gcsfs
from gcsfs import retry

FIRST_DELAY, LARGEST_DELAY = 0.02, 16.0  # seconds; doubled each time
ATTEMPTS = 15  # about two minutes in all


def hasten() -> None:
  """From here on, gcsfs asks again after `FIRST_DELAY`; again does no harm."""
  once = getattr(gcsfs.GCSFileSystem._request, "__wrapped__", None)
  if once is None:  # as it is below, or in another version
    return

  async def request(
    self: Any, method: str, path: str, *arguments: Any, **options: Any
  ) -> Any:
    for attempt in range(ATTEMPTS):
      try:
        return await once(self, method, path, *arguments, **options)
      except FileNotFoundError:
        uploaded = urllib.parse.urlparse(path)
        query = urllib.parse.parse_qs(uploaded.query)
        if not attempt or "upload_id" not in query:
          raise
        # No such upload any more: it was finished, and the answer was lost.
        bucket = uploaded.path.split("/b/")[1].split("/")[0]
        name = query["name"][0]
        _, contents = await self._call("GET", "b/{}/o/{}", bucket, name)
        return 200, {}, None, contents
      except Exception as error:
        if attempt == ATTEMPTS - 1 or not retry.is_retriable(error):
          raise
      delay = FIRST_DELAY * 2**attempt * (1 + random.random())
      await asyncio.sleep(min(delay, LARGEST_DELAY))

  gcsfs.core.GCSFileSystem._request = request

"""Work that is shared and resumed; several processes are in other tests."""

import pytest

from dcae_jax.runs import resumable


def test_it_begins_where_it_may_and_is_found_there():
  place, seen = {}, []

  def check(begun):
    seen.append((begun, dict(place)))

  work = resumable.Work("work", lambda: False)
  work.begin(check, lambda: place.update(identity=1))
  assert seen == [(False, {}), (True, {"identity": 1})]


def test_nothing_is_written_where_other_work_is():
  def check(begun):
    raise ValueError("other work")

  with pytest.raises(ValueError, match="other work"):
    resumable.Work("work", lambda: False).begin(check, pytest.fail)


def test_one_process_has_all_pieces_and_stops_when_it_is_told():
  told = []
  work = resumable.Work("work", lambda: bool(told))
  assert work.share([3, 5]) == [3, 5]
  assert work.all_done("pieces")
  told.append("SIGTERM")
  assert not work.all_done("pieces")

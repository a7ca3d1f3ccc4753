import logging
import time

from dcae_jax.training import watchdog


def test_a_long_wait_is_named_again_and_again_a_short_one_never(caplog):
  caplog.set_level(logging.WARNING, "dcae_jax")
  dog = watchdog.Watchdog(patience=0.1)
  try:
    for _ in range(5):
      with dog.waiting_for("nothing much"):
        time.sleep(0.02)
    with dog.waiting_for("the batch of step 7 to be loaded"):
      deadline = time.monotonic() + 20
      while len(caplog.messages) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
  finally:
    dog.close()
  assert len(caplog.messages) >= 2
  for message in caplog.messages:
    assert message.startswith("waiting for the batch of step 7 to be loaded")


def test_the_first_warning_comes_within_a_minute():
  dog = watchdog.Watchdog()
  dog.close()
  assert dog._patience * 1.1 < 60

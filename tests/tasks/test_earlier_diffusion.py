"""A store and a diffusion model's run that the code of commit a83ad59 wrote.

There, a store did not say which conditions it has.
"""

import json
import pathlib
import tarfile

import jax
import numpy as np
import pytest
from etils import epath

from configs import base
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.latents import reader
from dcae_jax.runs import work_directory
from dcae_jax.setup import denoising
from dcae_jax.tasks import evaluate_diffusion, train_diffusion

STORED = pathlib.Path(__file__).parent.parent / "stored"


@pytest.fixture
def earlier(tmp_path, monkeypatch) -> pathlib.Path:
  """The folders `store`, `run` and `samples`, and the run's denoiser."""
  with tarfile.open(STORED / "earlier_diffusion.tar.xz") as archive:
    archive.extractall(tmp_path, filter="data")
  size = {"depth": 2, "hidden": 8, "heads": 2}
  monkeypatch.setitem(denoisers.DENOISERS["UViT"].sizes, "speck", size)
  return tmp_path


def test_a_store_from_before_conditions_had_names_is_read(earlier):
  store = reader.Latents(earlier / "store")
  assert "conditions" not in json.loads(
    (earlier / "store/manifest.json").read_text()
  )
  assert store.conditions == ("labels",) and len(store) == 40
  assert store.condition("labels").tolist() == [0] * 10 + [1] * 10
  assert store.keys()[:2] == ["animals/00.png", "animals/02.png"]
  store.check()
  assert store.verify() == []


def test_a_run_from_before_draws_the_samples_that_it_drew(earlier):
  c = base.evaluate_diffusion()
  c.init_from = str(earlier / "run")
  trained = work_directory.read_run_config(c.init_from, "train_diffusion")
  model = evaluate_diffusion.open_model(c, trained)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  step, variables = denoising.averages(c.init_from, model.denoiser, device)
  assert step == 3
  for scale in (1.0, 2.5):
    file = earlier / f"samples/parts/guidance_{scale:g}/000000_4.npz"
    record = np.load(file)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0)
    sample = jax.jit(model.sample_function(scale, device))
    z = sample(variables, key, record["labels"])
    rms = np.sqrt(np.square(np.asarray(z)).mean((1, 2, 3)))
    np.testing.assert_allclose(rms, record["latent_rms"], rtol=1e-3)


def test_a_run_from_before_goes_on(earlier, compilation_cache):
  c = base.latent_diffusion()
  c.latents = str(earlier / "store")
  c.model.variant, c.model.dtype = "UViT-speck", "float32"
  c.batch_size, c.steps = 8, 4
  c.optimizer.warmup_steps, c.ema.decay = 1, 0.9
  c.samples.count, c.log_every, c.data.threads = 0, 1, 1
  c.compilation_cache = compilation_cache
  assert train_diffusion.run(c, epath.Path(earlier / "run"))
  text = (earlier / "run/metrics.jsonl").read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  steps = [line["step"] for line in lines if "train/loss/mse" in line]
  assert steps == [1, 2, 3, 4]

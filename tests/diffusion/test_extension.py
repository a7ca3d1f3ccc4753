"""A denoiser and a kind of condition of one's own: one line in the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fill_store
from etils import epath

from configs import base
from dcae_jax.diffusion import (
  conditioning,
  objectives,
  samplers,
  sampling,
)
from dcae_jax.latents import reader
from dcae_jax.setup import denoising
from dcae_jax.tasks import evaluate_diffusion, train_diffusion
from dcae_jax.training import sharding

PRIMARIES = np.eye(3, dtype=np.float32)


@pytest.fixture(scope="module")
def mine(plugin):
  """Tints, and Blend, which is told them: those of docs/extend.md."""
  return plugin("my_condition")


def test_a_denoiser_and_a_condition_are_a_line_in_the_table(
  mine, tiny_autoencoder, tiny_diffusion, compilation_cache, tmp_path
):
  """They are trained from a store with such an array, drawn and shown."""
  labels = np.arange(32, dtype=np.int32) % 3
  store = fill_store(
    tmp_path / "store", tiny_autoencoder, labels, 3, tints=PRIMARIES[labels]
  )
  assert reader.Latents(store).conditions == ("labels", "tints")
  run = epath.Path(tmp_path / "run")
  changes = {"model.variant": "Blend-small", "samples.count": 3}
  c = tiny_diffusion(latents=store, steps=2, **changes)
  assert train_diffusion.run(c, run)
  assert len(list(run.glob("samples/samples_*2.png"))) == 1
  c = base.evaluate_diffusion()
  c.init_from, c.metrics, c.guidance = str(run), (), (2.0,)
  c.samples, c.batch_size, c.compilation_cache = 10, 8, compilation_cache
  c.picture.classes, c.picture.latents = 2, store
  assert evaluate_diffusion.run(c, epath.Path(tmp_path / "samples"))
  names = {x.name[:7] for x in (tmp_path / "samples/images").glob("*/*_tint_*")}
  assert names == {f"{i:07d}" for i in range(10)}
  assert (tmp_path / "samples/samples.png").exists()


def test_a_store_without_the_condition_is_refused(
  mine, tiny_diffusion, tmp_path
):
  c = tiny_diffusion(**{"model.variant": "Blend-small"})
  with pytest.raises(ValueError, match=r"has no tints, .* it has labels"):
    denoising.open_store(c)


def test_guidance_leads_away_from_another_condition_if_one_is_given(mine):
  """Of a denoiser that tells nothing but the first number of a tint."""
  denoiser = mine.Blend(1, (2, 2), 1, mine.Tints(3))
  kernels = {
    "told": jnp.array([[1.0], [0.0], [0.0], [0.0]]),
    "project_in": jnp.zeros((1, 1)),
    "project_out": jnp.ones((1, 1)),
  }
  layers = {k: {"kernel": x, "bias": jnp.zeros(1)} for k, x in kernels.items()}
  variables = {"params": layers}
  model = sampling.LatentDiffusion(
    denoiser, objectives.FlowMatching(), samplers.Euler(), 5
  )
  mesh = sharding.local_mesh()
  sample = model.sample_function(3.0, sharding.replicated(mesh))
  condition, key = jnp.full((2, 3), 0.5), jax.random.key(0)
  plain = sample(variables, key, condition)
  # Velocities are 3 * 0.5 - 2 * null, from time 1 to 0.
  for null, moved in ((jnp.zeros((2, 3)), 0.0), (jnp.full((2, 3), 0.2), 0.4)):
    found = sample(variables, key, condition, null)
    np.testing.assert_allclose(found, plain + moved, atol=1e-5)


def test_dropped_rows_are_null_and_the_others_stay(mine):
  labels = jnp.arange(1000) % 7
  kind = conditioning.ClassLabels(7)
  key = jax.random.key(0)
  found = conditioning.dropped(kind, key, labels, 0.25)
  is_null = np.asarray(found == 7)
  assert 0.2 < is_null.mean() < 0.3
  np.testing.assert_array_equal(found[~is_null], labels[~is_null])
  tints = jnp.ones((1000, 3))
  found = conditioning.dropped(mine.Tints(3), key, tints, 0.25)
  np.testing.assert_array_equal(found, np.where(is_null[:, None], 0, tints))


def test_labels_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match="num_classes=0 is below 1"):
    conditioning.ClassLabels(0)

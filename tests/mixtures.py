"""Mixtures of Gaussians as latents, whose denoisers are known exactly.

Written in numpy and float64 from the definitions of the processes, without the
code under test, so that it can stand for the truth.
"""

import jax.numpy as jnp
import numpy as np


class Mixture:
  """Weights [k], means [k, d], covariances [k, d, d]; latents [b, 1, 1, d]."""

  def __init__(self, weights, means, covariances):
    self.weights, self.means, self.covariances = (
      np.asarray(x, np.float64) for x in (weights, means, covariances)
    )

  @property
  def mean(self):
    return self.weights @ self.means

  @property
  def covariance(self):
    centred = self.means - self.mean
    spread = np.einsum("k,ki,kj->ij", self.weights, centred, centred)
    return np.einsum("k,kij->ij", self.weights, self.covariances) + spread

  def sample(self, seed, n):
    rng = np.random.default_rng(seed)
    component = rng.choice(len(self.weights), n, p=self.weights)
    factors = np.linalg.cholesky(self.covariances)[component]
    normal = rng.normal(size=(n, self.means.shape[1]))
    z = self.means[component] + np.einsum("nij,nj->ni", factors, normal)
    return jnp.asarray(z[:, None, None], jnp.float32)

  def sample_noisy(self, seed, n, alpha, sigma):
    """Of the density at alpha and sigma."""
    noise = np.random.default_rng(seed + 1).normal(
      size=(n, 1, 1, self.means.shape[1])
    )
    return alpha * self.sample(seed, n) + sigma * jnp.asarray(
      noise, jnp.float32
    )

  def expectations(self, z, alpha, sigma):
    """(E[z_0 | z], E[noise | z]), where alpha and sigma are [b].

    They divide by neither.
    """
    z = z[:, 0, 0]
    alpha, sigma = alpha[:, None], sigma[:, None]
    logits, clean, noise = [], [], []
    for weight, mean, covariance in zip(
      self.weights, self.means, self.covariances, strict=True
    ):
      values, vectors = np.linalg.eigh(covariance)
      mean, values = (jnp.asarray(x, jnp.float32)[None] for x in (mean, values))
      vectors = jnp.asarray(vectors, jnp.float32)
      total = alpha**2 * values + sigma**2
      rotated = (z - alpha * mean) @ vectors
      solved = rotated / total
      logits.append(
        np.log(weight) - jnp.sum(jnp.log(total) + rotated * solved, 1) / 2
      )
      clean.append(mean + (alpha * values * solved) @ vectors.T)
      noise.append((sigma * solved) @ vectors.T)
    logits = jnp.stack(logits)
    weights = jnp.exp(logits - logits.max(0, keepdims=True))
    weights = (weights / weights.sum(0, keepdims=True))[..., None]
    return tuple(
      jnp.sum(weights * jnp.stack(values), 0)[:, None, None]
      for values in (clean, noise)
    )


def two_components():
  """Different full covariances in three dimensions."""
  rng = np.random.default_rng(3)
  factors = rng.normal(size=(2, 3, 3)) * 0.4
  covariances = factors @ factors.transpose(0, 2, 1) + 0.05 * np.eye(3)
  return Mixture([0.3, 0.7], [[1.0, -0.8, 0.3], [-0.5, 0.4, -0.6]], covariances)


def gaussian(means=(0.5, -0.3), variances=(0.25, 0.6)):
  """One component, independent values."""
  return Mixture([1.0], [means], [np.diag(variances)])


LINEAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
SCALED_LINEAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def noise_function(mixture, alphas_cumprod):
  """The exact noise, as a network that sees times 0 to 999."""
  table = jnp.asarray(np.log(alphas_cumprod) / 2, jnp.float32)

  def model_fn(z, t):
    before = jnp.clip(t.astype(int), 0, 998)
    part = t - before
    log_alpha = (1 - part) * table[before] + part * table[before + 1]
    sigma = jnp.sqrt(-jnp.expm1(2 * log_alpha))
    return mixture.expectations(z, jnp.exp(log_alpha), sigma)[1]

  return model_fn


def velocity_function(mixture):
  """The exact velocity, as a network that sees times 0 to 1000."""

  def model_fn(z, t):
    clean, noise = mixture.expectations(z, 1 - t / 1000, t / 1000)
    return noise - clean

  return model_fn

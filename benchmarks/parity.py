"""How far encode and decode are from diffusers' models, float32.

  python -m benchmarks.parity            # prints the table; needs torch
  python -m benchmarks.parity --full     # also f32c32 and f8c4 at full width
  python -m benchmarks.parity --store    # renews tests/stored/parity.npz

Every variant at an eighth of its width, with random weights, norm parameters
and batch statistics: fresh initial values would hide errors. Both go through
files: diffusers writes a folder, and `dcae_jax.load` reads it.
"""

import argparse
import datetime
import importlib.metadata
import pathlib
import tempfile
import zlib
from typing import Any

import numpy as np

import dcae_jax
from benchmarks import torchvision_import

STORED = pathlib.Path(__file__).parent.parent / "tests/stored/parity.npz"

# config.json of the released models, as far as they are not the defaults.
_RES, _VIT = "ResBlock", "EfficientViTBlock"
_WIDTHS = [128, 256, 512, 512, 1024, 1024]


def _paper(latent_channels: int, widths: list[int]) -> dict[str, Any]:
  deep = len(widths) - 3
  return {
    "latent_channels": latent_channels,
    "encoder_block_types": [_RES] * 3 + [_VIT] * deep,
    "decoder_block_types": [_RES] * 3 + [_VIT] * deep,
    "encoder_block_out_channels": widths,
    "decoder_block_out_channels": widths,
    "encoder_layers_per_block": [0, 4, 8] + [2] * deep,
    "decoder_layers_per_block": [0, 5, 10] + [2] * deep,
    "encoder_qkv_multiscales": [[]] * len(widths),
    "decoder_qkv_multiscales": [[]] * len(widths),
    "decoder_norm_types": ["batch_norm"] * 3 + ["rms_norm"] * deep,
    "decoder_act_fns": ["relu"] * 3 + ["silu"] * deep,
  }


def _one_five(widths: list[int]) -> dict[str, Any]:
  depths = [0, 5, 10] + [4] * (len(widths) - 3)
  return {
    "latent_channels": 128,
    "encoder_block_out_channels": widths,
    "decoder_block_out_channels": widths,
    "encoder_layers_per_block": depths,
    "decoder_layers_per_block": depths,
    "encoder_qkv_multiscales": [[]] * len(widths),
    "decoder_qkv_multiscales": [[]] * len(widths),
    "encoder_out_shortcut": False,
    "decoder_in_shortcut": False,
    "decoder_conv_act_fn": "silu",
  }


_SANA = {
  "latent_channels": 32,
  "encoder_block_types": [_RES] * 3 + [_VIT] * 3,
  "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
  "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
  "downsample_block_type": "Conv",
}
CONFIGS: dict[str, dict[str, Any]] = {
  "f32c32": _paper(32, _WIDTHS),
  "f64c128": _paper(128, [*_WIDTHS, 2048]),
  "f128c512": _paper(512, [*_WIDTHS, 2048, 2048]),
  "f32c32-sana": _SANA
  | {
    "decoder_block_types": [_RES] * 3 + [_VIT] * 3,
    "decoder_layers_per_block": [3] * 6,
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "upsample_block_type": "interpolate",
  },
  "f32c32-lite": _SANA
  | {
    "decoder_block_types": _RES,
    "decoder_layers_per_block": [0, 3, 5, 4, 4, 4],
    "decoder_qkv_multiscales": [[]] * 6,
    "decoder_conv_act_fn": "silu",
  },
  "f32c128-1.5": _one_five(_WIDTHS),
  "f64c128-1.5": _one_five([*_WIDTHS, 1024]),
}


def _sd_vae(
  latent_channels: int, stages: int, **changes: Any
) -> dict[str, Any]:
  return {
    "_class_name": "AutoencoderKL",
    "latent_channels": latent_channels,
    "block_out_channels": [128, 256, 512, 512, 512, 512][:stages],
    "down_block_types": ["DownEncoderBlock2D"] * stages,
    "up_block_types": ["UpDecoderBlock2D"] * stages,
    "layers_per_block": 2,
  } | changes


# The baseline, in the structures that are in use.
SD_VAES: dict[str, dict[str, Any]] = {
  "sd-vae-f8c4": _sd_vae(4, 4),
  "sd-vae-f32c32": _sd_vae(32, 6),
  # As latent diffusion's f16: attention wherever there are few positions.
  "attention in the last stages": _sd_vae(
    16,
    4,
    down_block_types=["DownEncoderBlock2D"] * 2
    + ["AttnDownEncoderBlock2D"] * 2,
    up_block_types=["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3,
  ),
  # As Stable Diffusion 3's.
  "latents not mixed": _sd_vae(
    16, 4, use_quant_conv=False, use_post_quant_conv=False
  ),
  "no attention": _sd_vae(4, 3, mid_block_add_attention=False),
}


def reduced(config: dict[str, Any]) -> dict[str, Any]:
  """An eighth of the width and of the latent channels, at most two blocks."""
  config = dict(config)
  if _is_sd_vae(config):
    widths = config["block_out_channels"]
    config["block_out_channels"] = [width // 8 for width in widths]
    return config | {"norm_num_groups": 4}
  config["latent_channels"] = max(config["latent_channels"] // 8, 8)
  for part in ("encoder", "decoder"):
    widths = config.get(f"{part}_block_out_channels", _WIDTHS)
    depths = config[f"{part}_layers_per_block"]
    config[f"{part}_block_out_channels"] = [width // 8 for width in widths]
    config[f"{part}_layers_per_block"] = [min(depth, 2) for depth in depths]
  return config


def sizes(compression: int) -> dict[str, tuple[int, int, int]]:
  """Batch, height and width; attention has another form above 32 positions."""
  return {
    "few positions": (2, compression, 3 * compression),
    "many positions": (1, 6 * compression, 6 * compression),
  }


def random_images(shape: tuple[int, int, int]) -> np.ndarray:
  rng = np.random.default_rng(zlib.crc32(repr(shape).encode()))
  return rng.uniform(-1, 1, (*shape, 3)).astype(np.float32)


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """By its name in the diffusers layout, so that it can be made anywhere.

  What enters a norm is small (about 0.02), so that an epsilon of 1e-5 changes
  the result by about one percent, and each bias and scale tells.
  """
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  module, _, leaf = name.rpartition(".")
  if ".resnets." in name:  # an epsilon of 1e-6 tells for the second norm
    scale = 0.003 if module.endswith("conv1") else 1.0
    value = rng.normal(size=shape) * scale * 0.3
    if len(shape) > 1:
      value *= np.prod(shape[1:]) ** -0.5 / 0.3
    return (value + ("norm" in module and leaf == "weight")).astype(np.float32)
  if leaf == "num_batches_tracked":
    return np.array(rng.integers(1, 10**6), np.int64)
  if leaf == "weight" and len(shape) > 1:
    value = rng.normal(size=shape) * np.prod(shape[1:]) ** -0.5
    if module.endswith(("conv2", "to_out", "conv_point")):
      value *= 0.02
  elif leaf == "weight":
    value = rng.uniform(0.5, 1.5, shape)
  elif leaf == "running_var":
    value = rng.uniform(1e-4, 1e-3, shape)
  else:
    value = rng.normal(size=shape) * {"bias": 0.3, "running_mean": 0.02}[leaf]
  return value.astype(np.float32)


def reference(config: dict[str, Any]):
  """Diffusers' model with the random tensors."""
  torchvision_import.import_first()
  import diffusers
  import torch

  config = dict(config)
  name = config.pop("_class_name", "AutoencoderDC")
  model = getattr(diffusers, name)(**config).eval()
  for name, tensor in model.state_dict().items():
    tensor.copy_(torch.from_numpy(random_tensor(name, tuple(tensor.shape))))
  return model


def reference_outputs(
  model: Any, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Latents (an SD-VAE's means), and the images decoded from them, NHWC."""
  import torch

  with torch.no_grad():
    found = model.encode(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    z = found.latent if "latent" in found else found.latent_dist.mode()
    y = model.decode(z).sample
  return tuple(x.numpy().transpose(0, 2, 3, 1) for x in (z, y))


def relative_error(found: Any, expected: np.ndarray) -> float:
  """Norm of the difference over the norm."""
  assert found.shape == expected.shape, (found.shape, expected.shape)
  difference = np.asarray(found, np.float64) - expected
  return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def errors(
  autoencoder: dcae_jax.Autoencoder, images: np.ndarray, z: Any, y: Any
) -> tuple[float, float]:
  """Of encode, and of decode of the reference's latents."""
  return (
    relative_error(autoencoder.encode(images), z),
    relative_error(autoencoder.decode(z), y),
  )


def _compare(config: dict[str, Any], shapes: list[tuple[int, int, int]]):
  """The largest errors over the shapes."""
  model = reference(config)
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    autoencoder = dcae_jax.load(folder)
  found = []
  for shape in shapes:
    images = random_images(shape)
    z, y = reference_outputs(model, images)
    found.append(errors(autoencoder, images, z, y))
  return [max(column) for column in zip(*found, strict=True)]


def _is_sd_vae(config: dict[str, Any]) -> bool:
  return config.get("_class_name") == "AutoencoderKL"


def _compression(config: dict[str, Any]) -> int:
  key = "encoder_layers_per_block"
  key = "block_out_channels" if _is_sd_vae(config) else key
  return 2 ** (len(config[key]) - 1)


def _store() -> None:
  arrays = {}
  for name, config in (CONFIGS | SD_VAES).items():
    small = reduced(config)
    model = reference(small)
    for case, shape in sizes(_compression(small)).items():
      z, y = reference_outputs(model, random_images(shape))
      # Every eleventh pixel of each side tells as much, in a smaller file.
      arrays |= {f"{name}/{case}/z": z, f"{name}/{case}/y": y[:, ::11, ::11]}
  STORED.parent.mkdir(exist_ok=True)
  np.savez_compressed(STORED, **arrays)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--full", action="store_true")
  parser.add_argument("--store", action="store_true")
  options = parser.parse_args()
  if options.store:
    _store()
    return
  packages = ("diffusers", "torch", "jax", "flax")
  versions = [f"{x} {importlib.metadata.version(x)}" for x in packages]
  print(f"{datetime.date.today()}, {', '.join(versions)}, float32, CPU\n")
  print("| variant | width | encode | decode |\n| --- | --- | --- | --- |")
  for name, config in (CONFIGS | SD_VAES).items():
    small = reduced(config)
    found = _compare(small, list(sizes(_compression(small)).values()))
    print("| {} | 1/8 | {:.1e} | {:.1e} |".format(name, *found), flush=True)
  if options.full:
    shapes = [(2, 96, 160), (1, 192, 224)]
    for name in ("f32c32", "sd-vae-f8c4"):
      found = _compare((CONFIGS | SD_VAES)[name], shapes)
      print("| {} | full | {:.1e} | {:.1e} |".format(name, *found))


if __name__ == "__main__":
  main()

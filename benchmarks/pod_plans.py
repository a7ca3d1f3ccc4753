"""The plans of the configs that are meant for pods, as a table.

  python -m benchmarks.pod_plans [--only=f64]

Compiled roughly (exec_time_optimization_effort of -1): memory and bytes are
those of a program that is compiled in full, to a few per cent; compile times
are not. Half an hour on two cores.
"""

import argparse
import pathlib

from dcae_jax.tasks import plan

_ROUGHLY = {"exec_time_optimization_effort": -1.0}
_LATENTS = {
  "f32": {"latent_size": 16, "latent_channels": 32},
  "f64": {"latent_size": 8, "latent_channels": 128},
  "f128": {"latent_size": 4, "latent_channels": 512},
  "pixart_f32": {"latent_size": 16, "latent_channels": 32},
  "pixart_sd_vae_f8": {"latent_size": 64, "latent_channels": 4},
  "sana": {"latent_size": 16, "latent_channels": 32},
}
_SPATIAL = {"mesh": {"data": -1, "fsdp": 8, "spatial": 4}}
_LARGE = {"resolution": 2048, "data": {"min_size": 2048}}
_T5 = {"text": {"encoder": "t5-v1_1-xxl"}}  # a size: no weights are read
_T5_BEFORE = {"text": {"encoder": "t5-v1_1-xxl", "cache": "states"}}
_GEMMA = {"text": {"encoder": "gemma-2-2b"}}

# Config, topology, images for each chip (None: the config's batch), changes.
_ROWS = (
  ("f32_phase1", "v5e:2x4", None, {}),
  ("f32_phase2", "v5e:2x4", None, {}),
  ("f32_phase3", "v5e:2x4", None, {}),
  ("f64_phase1", "v5e:4x4", None, {}),
  ("f64_phase1", "v5e:16x16", 6, {}),
  ("f64_phase2", "v5e:4x4", None, {}),
  ("f64_phase2", "v5e:4x4", 8, {}),
  ("f64_phase2", "v5e:16x16", 8, {}),
  ("f64_phase3", "v5e:4x4", None, {}),
  ("f64_phase3", "v5e:16x16", 6, {}),
  ("f128_phase1", "v5e:4x8", None, {}),
  ("f128_phase2", "v5e:4x8", None, {}),
  ("f128_phase2", "v5e:4x8", 0.25, _SPATIAL),
  ("f128_phase2", "v5e:4x8", 0.25, _SPATIAL | _LARGE),
  ("f128_phase3", "v5e:4x8", None, {}),
  ("f32_uvit_h", "v5e:4x4", None, {}),
  ("f64_uvit_h", "v5e:4x4", None, {}),
  ("f128_uvit_h", "v5e:4x4", None, {}),
  ("f32_usit_2b", "v5e:4x4", None, {}),
  ("f32_dit_xl", "v5e:4x4", None, {}),
  ("pixart_f32", "v5e:4x8", None, _T5),
  ("pixart_f32", "v5e:4x8", None, _T5_BEFORE),
  ("pixart_f32", "v5p:2x2x4", None, _T5),
  ("pixart_sd_vae_f8", "v5e:4x8", None, _T5),
  ("pixart_sd_vae_f8", "v5p:2x2x4", None, _T5),
  ("sana_600m", "v5e:4x8", None, _GEMMA),
  ("sana_600m", "v5p:2x2x4", None, _GEMMA),
  ("sana_1600m", "v5e:4x8", None, _GEMMA),
  ("sana_1600m", "v5p:2x2x4", None, _GEMMA),
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--only", default="", help="start of the config's name")
  only = parser.parse_args().only
  plans = []
  for name, topology, per_chip, changes in _ROWS:
    if not name.startswith(only):
      continue
    config = plan.load(str(pathlib.Path("configs") / f"{name}.py"), changes)[""]
    if config.task == "train_diffusion":
      latents = next(x for k, x in _LATENTS.items() if name.startswith(k))
      config.model.update(latents | {"num_classes": 1000})
    devices = plan.devices_of(topology)
    if per_chip is not None:
      plan.set_batch_size(config, per_chip, len(devices))
    label = name if "resolution" not in changes else f"{name}, 2048 px"
    label += ", states read" if changes.get("text", {}).get("cache") else ""
    training = plan.build(config, devices)
    plans.append(plan.measure(label, topology, training, _ROUGHLY))
    print(plan.details(plans[-1]), flush=True)
  print(plan.table(plans))


if __name__ == "__main__":
  main()

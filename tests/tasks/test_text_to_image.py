"""Captions to images: encoded, learned from, drawn, and nothing else mistaken.

The text encoder is a tiny BERT, whose tokens are letters.
"""

import copy
import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny_clip
import tiny_text_encoders
from conftest import fill_store
from etils import epath
from PIL import Image

import dcae_jax
from configs import base
from dcae_jax.data import captions
from dcae_jax.diffusion import conditioning
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.diffusion.text import encoders
from dcae_jax.evaluation import fid, metrics
from dcae_jax.evaluation.networks import clip
from dcae_jax.runs import metrics_writer
from dcae_jax.setup import denoising, diffusion_training
from dcae_jax.tasks import (
  encode_captions,
  evaluate_diffusion,
  export_latents,
  train_diffusion,
)
from dcae_jax.training import sharding

TEXTS = ("red bus", "two birds\t3\nbirds", "a grey square")
MITE = {"depth": 1, "hidden": 24, "heads": 2}
ROWS, TOKENS = 32, 12


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
  path = tmp_path_factory.mktemp("encoder") / "bert"
  return str(tiny_text_encoders.save(path, "minilm"))


@pytest.fixture(scope="module")
def store(tiny_autoencoder, tmp_path_factory) -> str:
  labels = np.arange(ROWS, dtype=np.int32) % 3
  path = tmp_path_factory.mktemp("captioned") / "store"
  texts = np.array(TEXTS)[labels]
  return fill_store(path, tiny_autoencoder, labels, 3, captions=texts)


@pytest.fixture(scope="module")
def training(tiny_diffusion, store, encoder):
  """A function: four steps of a tiny PixArt."""

  def create(**changes):
    settings = {
      "latents": store, "model.variant": "PixArt-mite", "batch_size": 8,
      "text.encoder": encoder, "text.max_tokens": TOKENS,
      "text.dtype": "float32", "objective.kind": "flow",
      "sampler.kind": "euler", "optimizer.learning_rate": 0.03,
    }  # fmt: skip
    return tiny_diffusion(**settings | changes)

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(denoisers.DENOISERS["PixArt"].sizes, "mite", MITE)
    yield create


@pytest.fixture(scope="module")
def encoding(store, encoder, compilation_cache):
  def create(**changes):
    c = base.encode_captions()
    c.latents, c.text.encoder, c.text.max_tokens = store, encoder, TOKENS
    c.text.dtype, c.compilation_cache = "float32", compilation_cache
    c.update_from_flattened_dict(changes)
    return c

  return create


@pytest.fixture(scope="module")
def states(encoding, tmp_path_factory) -> str:
  path = tmp_path_factory.mktemp("states")
  c = encoding(output=str(path / "states"))
  assert encode_captions.run(c, epath.Path(path / "work"))
  result = json.loads((path / "work/result.json").read_text())
  assert result["texts"] == 4 and result["captions"] == ROWS + 11
  assert result["cut"] == 1  # "a grey square" and its two marks
  return c.output


@pytest.fixture(scope="module")
def run(training, tmp_path_factory) -> pathlib.Path:
  """Four steps, with the captions encoded in each, and a picture."""
  workdir = tmp_path_factory.mktemp("trained") / "run"
  c = training(**{"samples.count": 2, "samples.prompts": ("a bus",)})
  assert train_diffusion.run(c, epath.Path(workdir))
  return workdir


def _losses(workdir):
  lines = metrics_writer.read_lines(epath.Path(workdir) / "metrics.jsonl")
  return [x["train/loss/total"] for x in lines if "train/loss/total" in x]


def _params(workdir, training):
  c = denoising.with_store(training(), denoising.open_store(training()))
  model = diffusion_training.build(c).model.denoiser
  whole = sharding.replicated(sharding.create_mesh(-1, 1, 1))
  return denoising.averages(str(workdir), model, whole)[1]["params"]


def test_states_that_are_kept_teach_what_encoding_in_each_step_does(
  training, states, run, tmp_path
):
  c = training(**{"text.cache": states})
  assert train_diffusion.run(c, epath.Path(tmp_path))
  found, expected = _losses(tmp_path), _losses(run)
  assert len(found) == 4
  np.testing.assert_allclose(found, expected, rtol=2e-3)  # of bfloat16


def test_encoder_and_denoiser_split_over_devices_learn_the_same(
  training, run, tmp_path
):
  c = training(**{"mesh.data": 2, "mesh.fsdp": 4})
  assert train_diffusion.run(c, epath.Path(tmp_path))
  np.testing.assert_allclose(_losses(tmp_path), _losses(run), rtol=1e-4)


def test_a_run_that_goes_on_is_the_same_bit_for_bit(training, run, tmp_path):
  for steps in (2, 4):
    c = training(**{"steps": steps, "samples.prompts": ("a bus",)})
    assert train_diffusion.run(c, epath.Path(tmp_path))
  jax.tree.map(
    np.testing.assert_array_equal,
    _params(tmp_path, training),
    _params(run, training),
  )


def test_the_null_caption_is_the_empty_one_and_stays(training, encoder, run):
  (expected,), _ = encoders.load(encoder, max_tokens=TOKENS).encode([""])
  found = _params(run, training)["null_caption"]
  np.testing.assert_allclose(found, expected, atol=1e-6)
  described = json.loads((run / "config.json").read_text())
  assert described["text"]["null"] == "empty"


@pytest.mark.parametrize("null", ["random", "learned"])
def test_the_null_caption_learns_if_it_may(null, training, tmp_path):
  c = training(**{"text.null": null, "steps": 2, "label_dropout": 0.5})
  before = denoising.with_store(c, denoising.open_store(c))
  before = diffusion_training.build(before).begin().params["null_caption"]
  before = np.array(before)
  assert train_diffusion.run(c, epath.Path(tmp_path))
  after = _params(tmp_path, training)["null_caption"]
  assert before.std() > 0.1
  assert np.array_equal(before, after) == (null == "random")


def test_samples_of_prompts_are_shown(run):
  (picture,) = (run / "samples").glob("*.png")
  with Image.open(picture) as image:
    assert image.width > 2 * 16 and image.height > 2 * 16


def test_each_caption_is_learned_as_often_as_its_weight_says(
  training, store, encoder
):
  c = training(**{"data.shuffle_shards": 0, "data.shuffle_streams": 1})
  batches = train_diffusion._batches(
    denoising.with_store(c, denoising.open_store(c)),
    denoising.open_store(c),
    train_diffusion.text.Told(
      {
        "captions": train_diffusion.text.captions.Tokens(
          encoders.load(encoder, max_tokens=TOKENS).tokenizer
        )
      },
      (),
      None,
    ),
  )
  lengths = [
    length
    for _ in range(100)
    for length in next(batches)["captions"]["mask"].sum(1)
  ]
  batches.close()
  two_birds, birds = lengths.count(11), lengths.count(7)
  assert 0.65 < two_birds / (two_birds + birds) < 0.85


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"text.null": "none"}, "text.null='none' is not among empty, random"),
    ({"text.encoder": "/nowhere"}, "/nowhere"),
    ({"text.instruction": "say "}, "instruction is for Gemma 2"),
    ({"model.caption_width": 4096}, "caption_width=4096, but .* has 16; lea"),
    ({"text.max_tokens": 2}, "max_tokens=2 is below 3"),
    ({"samples.prompts": ("",), "samples.count": 1}, "prompt '' is empty"),
    ({"text.cache": "/nowhere"}, "/nowhere is no caption store"),
  ],
)
def test_what_cannot_be_learned_is_refused(
  changes, message, training, tmp_path
):
  with pytest.raises(ValueError, match=message):
    train_diffusion.run(training(**changes), epath.Path(tmp_path / "run"))
  assert not (tmp_path / "run/checkpoints").exists()


def test_other_states_are_refused(training, states, encoder, tmp_path):
  c = training(**{"text.cache": states, "text.max_tokens": 11})
  with pytest.raises(ValueError, match=r"encoder.max_tokens: 12 there, 11 now"):
    train_diffusion.run(c, epath.Path(tmp_path / "run"))
  other = tmp_path / "other"
  shutil.copytree(encoder, other)
  tensors = tiny_text_encoders.tensors("minilm", seed=1)
  tiny_text_encoders.safetensors.numpy.save_file(
    tensors, other / "model.safetensors"
  )
  c = training(**{"text.cache": states, "text.encoder": str(other)})
  with pytest.raises(ValueError, match=r"another encoder \(encoder.finger"):
    train_diffusion.run(c, epath.Path(tmp_path / "run"))


def test_a_run_does_not_go_on_with_another_encoder(
  training, encoder, run, tmp_path
):
  shutil.copytree(run, tmp_path / "run")
  described = json.loads((tmp_path / "run/latents.json").read_text())
  described["text_encoder"]["fingerprint"] = "of another one"
  (tmp_path / "run/latents.json").write_text(json.dumps(described))
  c = training(**{"samples.count": 2, "samples.prompts": ("a bus",)})
  with pytest.raises(ValueError, match="began with another text encoder"):
    train_diffusion.run(c, epath.Path(tmp_path / "run"))


def test_latents_without_captions_teach_no_text(training, tiny_latents):
  c = training(latents=tiny_latents)
  with pytest.raises(ValueError, match=r"has no captions, .* it has labels"):
    denoising.open_store(c)


def test_killed_before_its_result_encoding_has_one_in_the_end(
  encoding, states, tmp_path
):
  assert encode_captions.run(encoding(output=states), epath.Path(tmp_path))
  first = pathlib.Path(states).parent / "work"
  before, after = (
    json.loads((x / "result.json").read_text()) for x in (first, tmp_path)
  )
  assert before.pop("seconds") and after.pop("seconds") and after == before


def test_encoding_again_does_nothing_and_other_captions_are_refused(
  encoding, states, tmp_path
):
  assert encode_captions.run(encoding(output=states), epath.Path(tmp_path))
  c = encoding(output=states, **{"text.max_tokens": 10})
  with pytest.raises(ValueError, match=r"another export \(encoder.max_tokens"):
    encode_captions.run(c, epath.Path(tmp_path))


@pytest.fixture
def evaluation(run, compilation_cache):
  def create(**changes):
    c = base.evaluate_diffusion()
    c.init_from, c.metrics, c.guidance = str(run), (), (2.0,)
    c.prompts = ("red bus", "grün, größer", "two birds")
    c.samples_per_prompt, c.batch_size = 3, 8
    c.picture.classes = 0
    c.compilation_cache = compilation_cache
    c.update_from_flattened_dict(changes)
    return c

  return create


def _pixels(folder, pattern="*.png"):
  return {x.name: np.asarray(Image.open(x)) for x in folder.rglob(pattern)}


def test_prompts_are_drawn_in_turn_and_stand_in_their_images(
  evaluation, tmp_path
):
  c = evaluation(**{"picture.classes": 3})
  assert evaluate_diffusion.run(c, epath.Path(tmp_path))
  folder = tmp_path / "images/guidance_2"
  names = sorted(x.name for x in folder.iterdir())
  assert len(names) == 9 and names[4] == "0000004_gr_n_gr_er.png"
  with Image.open(folder / names[4]) as image:
    assert image.text == {"guidance": "2", "prompt": "grün, größer"}
  assert (tmp_path / "samples.png").exists()
  # Again, after a part is lost: the same images.
  before = _pixels(folder)
  (tmp_path / "parts/guidance_2/000001_1.npz").unlink()
  (folder / names[8]).unlink()
  assert evaluate_diffusion.run(c, epath.Path(tmp_path))
  after = _pixels(folder)
  assert before.keys() == after.keys()
  for name, pixels in before.items():
    np.testing.assert_array_equal(pixels, after[name])
  c = evaluation(prompts=("red bus",), samples_per_prompt=9)
  with pytest.raises(ValueError, match=r"drawn otherwise \(prompts_sha256"):
    evaluate_diffusion.run(c, epath.Path(tmp_path))


def test_negative_prompts_lead_elsewhere(evaluation, tmp_path):
  found = []
  for i, negative in enumerate(("", "grey", "")):
    c = evaluation(
      negative_prompt=negative, samples_per_prompt=1, guidance=(300.0,)
    )
    assert evaluate_diffusion.run(c, epath.Path(tmp_path / str(i)))
    part = tmp_path / f"{i}/parts/guidance_300/000000_3.npz"
    found.append(np.load(part)["latent_rms"])  # the model learned too little
  assert (found[0] != found[1]).all()
  np.testing.assert_array_equal(found[0], found[2])


def test_images_lie_as_geneval_wants_them(evaluation, tmp_path):
  lines = [{"tag": "color", "prompt": "red bus"}, {"prompt": "two birds"}]
  file = tmp_path / "metadata.jsonl"
  file.write_text("\n".join(map(json.dumps, lines)))
  c = evaluation(
    prompts=(), prompt_file=str(file), images="geneval", samples_per_prompt=5,
  )  # fmt: skip
  assert evaluate_diffusion.run(c, epath.Path(tmp_path / "work"))
  folder = tmp_path / "work/images/guidance_2"
  for i, line in enumerate(lines):
    assert json.loads((folder / f"{i:05d}/metadata.jsonl").read_text()) == line
    names = sorted(x.name for x in (folder / f"{i:05d}/samples").iterdir())
    assert names == [f"{k:05d}.png" for k in range(5)]
  with Image.open(folder / "00001/samples/00004.png") as image:
    assert image.text == {"guidance": "2", "prompt": "two birds"}
  (folder / "00001/samples/00004.png").unlink()
  assert evaluate_diffusion.run(c, epath.Path(tmp_path / "work"))
  assert (folder / "00001/samples/00004.png").exists()


def test_prompts_of_mjhq_come_by_category(tmp_path):
  images = {
    "b": {"category": "people", "prompt": "two"},
    "c": {"category": "animals", "prompt": "three"},
    "a": {"category": "people", "prompt": "one"},
  }
  file = tmp_path / "meta_data.json"
  file.write_text(json.dumps(images))
  found = evaluate_diffusion.prompts_lib.read(file)
  assert [(x.text, x.category) for x in found] == [
    ("three", "animals"), ("one", "people"), ("two", "people"),
  ]  # fmt: skip


def test_a_prompt_of_a_json_line_may_have_unicodes_ends_of_lines(tmp_path):
  file = tmp_path / "prompts.jsonl"
  file.write_text('{"prompt": "a\u2028b"}\r\n{"prompt": "c"}\n', "utf-8")
  found = evaluate_diffusion.prompts_lib.read(file)
  assert [x.text for x in found] == ["a\u2028b", "c"]


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("a.txt", "\n"),
    ("a.json", "{}"),
    ("a.json", '["a"]'),
    ("a.json", '{"a": {"prompt": "b"}}'),
    ("a.jsonl", '{"text": "a"}'),
    ("a.jsonl", '{"prompt": ""}'),
    ("a.jsonl", '{"prompt": 3}'),
    ("a.json", '{"a": {"prompt": "b", "category": null}}'),
    ("a.txt", None),
  ],
)
def test_files_without_prompts_are_refused(name, text, evaluation, tmp_path):
  if text is not None:
    (tmp_path / name).write_text(text)
  c = evaluation(prompts=(), prompt_file=str(tmp_path / name))
  with pytest.raises(ValueError, match=f"prompts|{name}"):
    evaluate_diffusion.run(c, epath.Path(tmp_path / "work"))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"classes": (0,)}, r"config.classes=\(0,\) is not for PixArt-mite"),
    ({"prompt_file": "a.txt"}, "are both given"),
    ({"prompts": ()}, "there are no prompts"),
    ({"prompts": (" ",)}, "prompt ' ' is empty"),
    ({"prompts": ("a \udce9",)}, r"prompt 'a .udce9' is no whole text"),
    ({"text_encoder": "/nowhere"}, "/nowhere"),
  ],
)
def test_what_cannot_be_drawn_is_refused(
  changes, message, evaluation, tmp_path
):
  with pytest.raises(ValueError, match=message):
    evaluate_diffusion.run(evaluation(**changes), epath.Path(tmp_path))
  assert not (tmp_path / "parts").exists()


def test_models_of_classes_take_no_prompts(
  tiny_diffusion, evaluation, tmp_path
):
  run = tmp_path / "run"
  train_diffusion.run(tiny_diffusion(steps=1), epath.Path(run))
  c = evaluation(init_from=str(run))
  with pytest.raises(ValueError, match=r"prompts.* is not for UViT-mite"):
    evaluate_diffusion.run(c, epath.Path(tmp_path / "work"))
  c.prompts, c.samples_per_prompt, c.samples = (), 0, 4
  c.negative_prompt = "grey"
  with pytest.raises(ValueError, match="negative_prompt='grey' is not for UVi"):
    evaluate_diffusion.run(c, epath.Path(tmp_path / "work"))


def test_images_without_a_caption_are_left_out_of_an_export(
  tiny_autoencoder, photographs, compilation_cache, tmp_path
):
  folder = tmp_path / "images"
  folder.mkdir()
  for i, file in enumerate(sorted(photographs.rglob("*.png"))[:3]):
    shutil.copy(file, folder / f"{i}.png")
    if i:
      (folder / f"{i}.txt").write_text(f"number {i}\nanother")
  c = base.export_latents()
  c.init_from, c.resolution = str(tiny_autoencoder), 16
  c.source = base.source("folder", str(folder), captions=True)
  c.compilation_cache = compilation_cache
  assert export_latents.run(c, epath.Path(tmp_path / "out"))
  latents = denoising.reader.Latents(str(tmp_path / "out/latents"))
  assert latents.conditions == ("labels", "captions")
  found = [captions.split(row)[0].text for row in latents.condition("captions")]
  assert found == ["number 1", "number 2"]
  (left_out,) = latents.manifest["unreadable"]
  assert left_out["reason"] == "it has no caption"
  assert not latents.verify()


def test_samples_are_compared_with_their_prompts_and_by_category(
  evaluation, monkeypatch, tmp_path
):
  """The tiny CLIP's score by hand; references of random features."""
  weights = tiny_clip.weights(tmp_path)
  metric = metrics.METRICS["clip_score"]
  network = dataclasses.replace(metric.network, load=lambda path: weights)
  metric = dataclasses.replace(metric, network=network)
  monkeypatch.setitem(metrics.METRICS, "clip_score", metric)
  rng = np.random.default_rng(0)
  for name in ("animals", "things", "all"):
    features = rng.normal(size=(30, metrics.EFFICIENTNET.features))
    covariance = np.cov(features, rowvar=False)
    fid.save_statistics(tmp_path / f"{name}.npz", features.mean(0), covariance)
  images = {
    "a": {"category": "things", "prompt": "red bus"},
    "b": {"category": "animals", "prompt": "two birds"},
    "c": {"category": "things", "prompt": "grey"},
  }
  (tmp_path / "meta_data.json").write_text(json.dumps(images))
  c = evaluation(
    prompts=(),
    prompt_file=str(tmp_path / "meta_data.json"),
    metrics=("clip_score", "frechet_efficientnet_lite0"),
    reference=str(tmp_path / "all.npz"),
    category_reference=str(tmp_path / "{category}.npz"),
  )
  assert evaluate_diffusion.run(c, epath.Path(tmp_path / "work"))
  result = json.loads((tmp_path / "work/result.json").read_text())
  found = result["guidance"]["2"]
  scores = {}
  for file in sorted((tmp_path / "work/images").rglob("*.png")):
    with Image.open(file) as image:
      text, pixels = image.text["prompt"], np.asarray(image, np.float32)
    pixels = jax.numpy.asarray(pixels[None])
    x = np.asarray(clip.image_features(weights.parameters, pixels))[0]
    y = clip.text_features(weights, [text])[0]
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    scores.setdefault(text, []).append(100 * max(cosine, 0))
  every = [score for of_prompt in scores.values() for score in of_prompt]
  np.testing.assert_allclose(found["clip_score"], np.mean(every), rtol=1e-4)
  animals, things = (found["categories"][x] for x in ("animals", "things"))
  np.testing.assert_allclose(
    animals["clip_score"], np.mean(scores["two birds"]), rtol=1e-4
  )
  distances = {
    x["frechet_efficientnet_lite0"] for x in (found, animals, things)
  }
  assert len(distances) == 3


def test_models_of_classes_have_no_clip_score(
  tiny_diffusion, evaluation, tmp_path
):
  run = tmp_path / "run"
  train_diffusion.run(tiny_diffusion(steps=1), epath.Path(run))
  c = evaluation(
    init_from=str(run), prompts=(), samples_per_prompt=0, samples=4,
    metrics=("clip_score",),
  )  # fmt: skip
  with pytest.raises(ValueError, match=r"clip_score in config.metrics c"):
    evaluate_diffusion.run(c, epath.Path(tmp_path / "work"))


@pytest.fixture(scope="module")
def denoiser(run):
  return dcae_jax.load_denoiser(run)


def test_a_denoiser_draws_prompts(denoiser):
  images = denoiser.sample(prompts=["red bus", "two birds"], guidance=300.0)
  assert images.shape == (2, 16, 16, 3)
  other = denoiser.sample(
    prompts=["red bus", "two birds"], guidance=300.0, negative_prompt="grey"
  )
  assert (images != other).any()
  with pytest.raises(ValueError, match="draws samples of prompts"):
    denoiser.sample(labels=[0])
  with pytest.raises(ValueError, match="prompt '' is empty"):
    denoiser.sample(prompts=[""])
  with pytest.raises(ValueError, match="'bus' is one prompt"):
    denoiser.sample(prompts="bus")
  diverged = copy.copy(denoiser)
  diverged.variables = jax.tree.map(lambda x: x * np.nan, denoiser.variables)
  with pytest.raises(FloatingPointError, match="at guidance 2 are not finite"):
    diverged.sample(prompts=["bus"], guidance=2.0)


def test_a_prediction_is_of_the_states_and_their_mask(denoiser):
  states, mask = denoiser.text_encoder.encode(["red", "two birds"])
  z = np.random.default_rng(0).normal(size=(2, 2, 2, 16))
  t = [100.0, 900.0]
  found = denoiser.predict(z, t, states=states, mask=mask)
  beyond = np.where(mask[..., None], states, 7.0)
  np.testing.assert_array_equal(
    found, denoiser.predict(z, t, states=beyond, mask=mask)
  )
  assert (found != denoiser.predict(z, t, states=-states, mask=mask)).any()
  with pytest.raises(ValueError, match="is told captions"):
    denoiser.predict(z, t, labels=[0, 0])
  with pytest.raises(ValueError, match=r"mask has the shape \[2, 3\], not"):
    denoiser.predict(z, t, states=states, mask=mask[:, :3])


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_denoiser_of_captions_is_saved_and_loaded(
  layout, denoiser, encoder, tiny_autoencoder, tmp_path
):
  """As a pipeline, too: a folder of each of its parts."""
  denoiser.save(tmp_path / "transformer", layout=layout)
  (tmp_path / "text_encoder").symlink_to(encoder)
  (tmp_path / "vae").symlink_to(tiny_autoencoder)
  again = dcae_jax.load_denoiser(tmp_path)
  states, mask = denoiser.text_encoder.encode(["two birds"])
  z = np.random.default_rng(0).normal(size=(1, 2, 2, 16))
  np.testing.assert_allclose(
    again.predict(z, [10.0], states=states, mask=mask),
    denoiser.predict(z, [10.0], states=states, mask=mask),
    atol=1e-6,
  )
  np.testing.assert_array_equal(
    again.variables["params"]["null_caption"],
    denoiser.variables["params"]["null_caption"],
  )
  assert again.sample(prompts=["two birds"], steps=2).shape == (1, 16, 16, 3)


def test_without_a_null_caption_guidance_leads_away_from_an_empty_prompt(
  denoiser, encoder, tiny_autoencoder, tmp_path
):
  denoiser.save(tmp_path, layout="diffusers")
  (tmp_path / "null_caption.npy").unlink()
  bare = dcae_jax.load_denoiser(
    tmp_path, text_encoder=encoder, autoencoder=tiny_autoencoder
  )
  settings = {"prompts": ["red bus"], "guidance": 300.0, "steps": 2}
  images = np.asarray(bare.sample(**settings))
  prompt, empty = (
    conditioning.told(*bare.text_encoder.encode([text]))
    for text in ("red bus", "")
  )
  mesh = sharding.create_mesh(1, 1, 1, jax.local_devices()[:1])
  whole = sharding.replicated(mesh)
  diffusion = dataclasses.replace(bare.diffusion, steps=2)
  draw = jax.jit(diffusion.sample_function(300.0, whole))
  key = jax.random.fold_in(jax.random.key(0), 0)
  z = draw(bare.variables, key, prompt, empty)
  expected = bare.autoencoder.decode(z / bare.autoencoder.scaling_factor)
  np.testing.assert_allclose(images, np.clip(expected, -1, 1), atol=1e-4)


def test_a_pipeline_of_the_hub_has_a_denoiser_and_its_text_encoder(
  denoiser, encoder, tiny_autoencoder, tmp_path, monkeypatch
):
  commit = "0123456789abcdef0123456789abcdef01234567"
  model = tmp_path / "models--somebody--pixart"
  folder = model / "snapshots" / commit
  denoiser.save(folder / "transformer", layout="diffusers")
  shutil.copytree(encoder, folder / "text_encoder")
  (model / "refs").mkdir()
  (model / "refs" / "main").write_text(commit)
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
  again = dcae_jax.load_denoiser(
    "somebody/pixart", autoencoder=tiny_autoencoder
  )
  settings = {"prompts": ["red bus"], "steps": 2}
  np.testing.assert_allclose(
    again.sample(**settings), denoiser.sample(**settings), atol=1e-2
  )

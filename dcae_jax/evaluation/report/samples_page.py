"""The page of samples: metrics at each guidance scale, and pictures."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from dcae_jax.evaluation.report import page
from dcae_jax.runs import versions


def html_of(
  result: Mapping[str, Any],
  table: Sequence[Sequence[str]],
  plot: str,
  picture: str,
) -> str:
  """The whole page, beside `result.json`; "": there is no such file."""
  absent = "; ".join(f"{k}: {why}" for k, why in result["absent"].items())
  about = {
    "model": f"{result['init_from']}, averages of step {result['step']}",
    "sampler": f"{result['sampler']}, {result['steps']} steps of "
    f"{result['objective']}",
    "samples": f"{result['samples']:,} at each guidance scale, seed "
    f"{result['seed']}",
    "reference": ", ".join(x["file"] for x in result["reference"].values()),
    "absent": absent,
    "computed by": versions.in_words([result["versions"]]),
  }
  about = {name: html.escape(text) for name, text in about.items() if text}
  about["numbers"] = page.link("result.json", "result.json")
  parts = [page.Part("Metrics", page.table(table))]
  if plot:
    curves = page.plot(plot, "metrics over guidance")
    parts.append(page.Part("Over guidance", curves))
  if picture:
    parts.append(page.Part("Samples", page.sheet(picture, "samples")))
  return page.document("Samples", about, parts)

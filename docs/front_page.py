"""A hook of mkdocs: the site's front page is the README."""

import pathlib

from mkdocs.structure.files import File

_README = pathlib.Path(__file__).parent.parent / "README.md"


def on_files(files, config):
  """Adds the README as `index.md`, with its links as they are from there."""
  text = _README.read_text().replace("](docs/", "](")
  files.append(File.generated(config, "index.md", content=text))
  return files


def on_page_markdown(markdown, **_):
  """Leads links to the README, which are for readers of the files, to it."""
  return markdown.replace("](../README.md", "](index.md")

"""A hook of mkdocs: the README is the site's front page, and the other pages of
the repository's top are pages of the site.
"""

import pathlib

from mkdocs.structure.files import File

_TOP = pathlib.Path(__file__).parent.parent
_README = "README.md"


def on_files(files, config):
  """Adds the pages, with links to docs/ as they are from there."""
  for page in (_README, "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"):
    text = (_TOP / page).read_text().replace("](docs/", "](")
    name = "index.md" if page == _README else page
    files.append(File.generated(config, name, content=text))
  return files


def on_page_markdown(markdown, **_):
  """Leads links to the README, which are for readers of the files, to it."""
  return markdown.replace("](../README.md", "](index.md").replace("](../", "](")

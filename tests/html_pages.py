"""Pages of HTML as a browser without a network has them."""

import html.parser
import pathlib
import urllib.parse

from PIL import Image


class Page(html.parser.HTMLParser):
  """What stands in a page.

  Attributes:
    text: the file.
    tables: of each, rows of cells, the heads first.
    bold: of each table, the cells that are bold, as (row, column).
    links: what is referred to.
    anchors: what a reference within the page can name.
    tags: in their order.
  """

  def __init__(self, text: str):
    super().__init__()
    self.text, self.tables, self.bold = text, [], []
    self.links, self.anchors, self.tags = set(), set(), []
    self._is_cell = False
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    values = dict(attributes)
    self.tags.append(tag)
    self.links |= {values[x] for x in ("src", "href") if x in values}
    if "id" in values:
      self.anchors.add(values["id"])
    if tag == "option":
      self.links.add(values["value"])
    elif tag == "table":
      self.tables.append([])
      self.bold.append([])
    elif tag == "tr":
      self.tables[-1].append([])
    elif tag in ("td", "th"):
      self.tables[-1][-1].append("")
      self._is_cell = True
    elif tag == "b" and self.tags[-2] == "td":
      rows = self.tables[-1]
      self.bold[-1].append((len(rows) - 1, len(rows[-1]) - 1))

  def handle_endtag(self, tag):
    if tag in ("td", "th"):
      self._is_cell = False

  def handle_data(self, data):
    if self._is_cell:
      self.tables[-1][-1][-1] += data.replace("\xa0", " ")


def read(file) -> Page:
  """A page that shows and links what is there, and nothing on a network."""
  file = pathlib.Path(file)
  page = Page(file.read_text())
  assert not {"link", "iframe", "object"} & set(page.tags)
  assert "@import" not in page.text and "url(" not in page.text
  for link in page.links:
    if link.startswith("#"):
      assert link[1:] in page.anchors, link
      continue
    path = urllib.parse.unquote(link)
    assert "://" not in path and not path.startswith("/"), link
    assert (file.parent / path).exists(), link
    if path.endswith(".png"):
      with Image.open(file.parent / path) as image:
        image.load()
  return page

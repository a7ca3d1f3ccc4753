import html_pages

from dcae_jax.evaluation.report import page


def _bold(rows, kinds=None):
  """Columns of the bold cells of each row below the heads."""
  ((heads, *found),) = html_pages.Page(page.table(rows, kinds)).tables
  assert [heads, *found] == [list(row) for row in rows]
  (bold,) = html_pages.Page(page.table(rows, kinds)).bold
  return [
    [column for at, column in bold if at == row] for row in range(1, len(rows))
  ]


def test_the_best_of_each_column_is_bold_by_its_direction():
  heads = ["model", "PSNR, dB ↑", "rFID ↓", "latent mean"]
  rows = [
    heads,
    ["a", "9.50", "1,200", "1.0"],
    ["b", "10.00", "absent", "2.0"],
    ["c", "9.99", "900", "3.0"],
  ]
  assert _bold(rows) == [[], [1], [2]]


def test_all_that_a_reader_sees_as_equal_is_bold():
  rows = [["model", "SSIM ↑"], ["a", "0.81"], ["b", "0.81"], ["c", "0.80"]]
  assert _bold(rows) == [[1], [1], []]


def test_what_has_nothing_beside_it_is_not_the_best():
  assert _bold([["model", "PSNR ↑"], ["a", "10.0"]]) == [[]]
  rows = [["model", "PSNR ↑"], ["a", "10.0"], ["b", "absent"]]
  assert _bold(rows) == [[], []]


def test_rows_of_other_images_are_not_compared():
  rows = [["model", "PSNR ↑"], ["a", "10"], ["a", "30"], ["b", "11"]]
  assert _bold(rows, [64, 128, 64]) == [[], [], [1]]


def test_means_with_ranges_are_compared_by_their_means():
  rows = [
    ["arm", "LPIPS ↓"],
    ["a", "0.20 (0.10 to 0.30)"],
    ["b", "0.19 (0.18 to 0.20), 2 of 3"],
    ["c", "0.18, 1 of 3"],
  ]
  assert _bold(rows) == [[], [], [1]]


def test_columns_are_sorted_by_numbers_where_they_are_numbers():
  text = page.table(
    [["name", "n"], ["7_b", "1,024"], ["a", "absent"], ["2", "-1e-05"]]
  )
  assert "<td>7_b</td><td data-number=1024.0>1,024</td>" in text
  assert "<td>a</td><td>absent</td>" in text
  assert "<td data-number=2.0>2</td><td data-number=-1e-05>-1e-05</td>" in text


def test_all_numbers_keep_their_digits_in_the_order():
  text = page.table([["n"], ["50,000,001"], ["50,000,002"]])
  assert "data-number=50000001.0>" in text and "data-number=50000002.0>" in text


def test_a_page_lists_its_parts_and_shows_names_as_they_are():
  name = "<b>&'\"\x1b"
  text = page.document(
    name,
    {name: page.link(name, "a #1%.png")},
    [
      page.Part(name, page.table([[name], [name]])),
      page.Part("second", page.folded(name, page.facts({name: "x"}))),
    ],
  )
  assert "\x1b" not in text and name[:4] not in text.partition("</style>")[2]
  found = html_pages.Page(text)
  assert found.tables == [[["<b>&'\"\\x1b"], ["<b>&'\"\\x1b"]]]
  assert {"#part-0", "#part-1", "a%20%231%25.png"} == found.links
  assert {"part-0", "part-1"} == found.anchors


def test_a_picture_is_a_link_to_itself():
  """Without the script, too, it can be seen large, with a mouse or keys."""
  text = page.picture("a'b.png", "<'>", "pixels")
  found = html_pages.Page(text)
  assert found.tags == ["a", "img"] and found.links == {"a%27b.png"}
  assert "alt='&lt;&#x27;&gt;'" in text

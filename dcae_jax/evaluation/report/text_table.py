"""Tables of text: Markdown with aligned columns, for files and terminals."""

from collections.abc import Mapping, Sequence

# Key, heading, digits; an arrow says which way is better.
COLUMNS = (
  ("rfid", "rFID ↓", 3),
  ("psnr", "PSNR, dB ↑", 2),
  ("ssim", "SSIM ↑", 4),
  ("lpips", "LPIPS ↓", 4),
  ("frechet_efficientnet_lite0", "Fréchet EfficientNet-Lite0 ↓", 2),
)


def markdown(rows: Sequence[Sequence[str]]) -> str:
  """The first row is heads, the first column names."""
  rows = [[cell.replace("|", "/") for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  header, *rest = (
    [
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    for row in rows
  )
  rule = [
    "-" * (width - 1) + ":" if i else "-" * width
    for i, width in enumerate(widths)
  ]
  lines = [header, rule, *rest]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_metrics(
  found: Mapping[str, Mapping[int, Mapping[str, float]]],
) -> str:
  """A row for each resolution and name, those of a resolution together.

  Args:
    found: by name and resolution, the metrics.
  """
  sizes = dict.fromkeys(size for sizes in found.values() for size in sizes)
  shown = [
    column
    for column in COLUMNS
    if any(
      column[0] in metrics
      for sizes in found.values()
      for metrics in sizes.values()
    )
  ]
  rows = [["", "px", *(title for _, title, _ in shown)]]
  for size in sizes:
    for name, of_name in found.items():
      if size in of_name:
        numbers = [number(of_name[size].get(k), n) for k, _, n in shown]
        rows.append([name, str(size), *numbers])
  return markdown(rows)


def number(value: float | None, digits: int) -> str:
  """For a table; a metric that could not be computed is "absent"."""
  return "absent" if value is None else f"{value:.{digits}f}"

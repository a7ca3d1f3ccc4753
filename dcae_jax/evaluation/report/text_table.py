"""Tables of text: Markdown with aligned columns, for files and terminals."""

from collections.abc import Mapping, Sequence

from dcae_jax.evaluation import metrics as metrics_table


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
  found: Mapping[str, Mapping[int | str, Mapping[str, float]]],
) -> str:
  """A row for each resolution and name, those of a resolution together.

  Args:
    found: by name and resolution, the metrics.
  """
  sizes = dict.fromkeys(size for sizes in found.values() for size in sizes)
  columns = metrics_table.columns_of(
    values for sizes in found.values() for values in sizes.values()
  )
  rows = [["", "px", *(column.title for column in columns.values())]]
  for size in sizes:
    for name, of_name in found.items():
      if size in of_name:
        values = of_name[size]
        numbers = [x.text(values.get(key)) for key, x in columns.items()]
        rows.append([name, str(size), *numbers])
  return markdown(rows)

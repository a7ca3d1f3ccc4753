"""Tables of text: Markdown with aligned columns, for files and terminals."""

from collections.abc import Mapping, Sequence

from dcae_jax.evaluation import metrics as metrics_table
from dcae_jax.runs import plain_text


def markdown(rows: Sequence[Sequence[str]]) -> str:
  """The first row is heads, the first column names."""
  columns = []
  for i, cells in enumerate(zip(*rows, strict=True)):
    cells = [plain_text.markdown(cell) for cell in cells]
    width = max(map(len, cells))
    rule = "-" * (width - 1) + ":" if i else "-" * width
    cells = [cell.rjust(width) if i else cell.ljust(width) for cell in cells]
    columns.append([cells[0], rule, *cells[1:]])
  lines = zip(*columns, strict=True)
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_metrics(
  metrics: Mapping[str, Mapping[int | str, Mapping[str, float]]],
) -> str:
  """Of metrics by name and resolution; rows of a resolution are together."""
  sizes = dict.fromkeys(size for sizes in metrics.values() for size in sizes)
  columns = metrics_table.columns_of(
    values for sizes in metrics.values() for values in sizes.values()
  )
  rows = [["", "px", *(column.title for column in columns.values())]]
  for size in sizes:
    for name, of_name in metrics.items():
      if size in of_name:
        values = of_name[size]
        numbers = [x.text(values.get(key)) for key, x in columns.items()]
        rows.append([name, str(size), *numbers])
  return markdown(rows)

"""What a program computes, needs and moves: in memory, and between devices.

Before it is compiled, as XLA counts it: FLOPs and bytes, where the body of a
loop counts once. Of a compiled one: memory, and, read from its text, bytes and
collectives, where it counts as often as it runs.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

COLLECTIVES = (
  "all-reduce", "all-gather", "reduce-scatter", "collective-permute",
  "all-to-all",
)  # fmt: skip
# They move nothing themselves, or what another instruction counts.
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while",
  "conditional", "call", "after-all", "partition-id", "replica-id", "iota",
  "optimization-barrier", "copy-done", "slice-done", "async-done",
  "async-update", "add-dependency",
}  # fmt: skip
_INSTRUCTION = re.compile(
  r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$"
)
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^{}]*\})?")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|branch_computations)="
  r"(\{[^}]*\}|%?[\w.-]+)"
)


class Instruction(NamedTuple):
  """A line of a program: `name = type opcode(operands)text`.

  The type has shapes and layouts; the root is the result of its computation.
  """

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  text: str
  is_root: bool


class Cost(NamedTuple):
  """Of one run of a program, on one device.

  Attributes:
    bytes_accessed: read from and written to main memory.
    collectives: kind to number of runs and bytes; those of the larger one of
      operand and result.
  """

  bytes_accessed: float
  collectives: dict[str, tuple[int, float]]


class Counted(NamedTuple):
  """Of one run of a program, before operations are fused."""

  flops: float
  bytes_accessed: float


class _Program(NamedTuple):
  computations: dict[str, dict[str, Instruction]]
  entry: str


def memory(program: jax.stages.Compiled) -> int:
  """Bytes that it needs on a device; 0 where its compiler does not say."""
  m = program.memory_analysis()
  if m is None:
    return 0
  held = m.argument_size_in_bytes + m.output_size_in_bytes
  # The CPU's compiler leaves temporaries out of its peak.
  peak = max(
    m.peak_memory_in_bytes,
    held - m.alias_size_in_bytes + m.temp_size_in_bytes,
  )
  return peak + m.generated_code_size_in_bytes


def counted(function: Callable[..., Any], *arguments: Any) -> Counted:
  """Of a function of arrays, or of their shapes; nothing is compiled.

  As a TPU would get it, without the CPU's own convolutions, which are loops and
  save multiplications. Raises RuntimeError where JAX_PLATFORMS leaves out the
  CPU, whose compiler counts for all: others cannot before compiling.
  """
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments
  )
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    traced = jax.jit(function).trace(*shapes)
    found = traced.lower(lowering_platforms=("tpu",)).cost_analysis()
  return Counted(found["flops"], found["bytes accessed"])


def cost(text: str) -> Cost:
  """Of a compiled program, `compiled.as_text()`."""
  program = _parse(text)
  moved, collectives = 0.0, {}
  for name, times in _runs(program).items():
    for instruction in program.computations[name].values():
      moved += times * _bytes_accessed(program, name, instruction)
  for name, times in _runs(program, fused=True).items():
    for instruction in program.computations[name].values():
      kind = instruction.opcode.removesuffix("-start")
      if kind in COLLECTIVES:
        if name.startswith("all-reduce-scatter"):  # how XLA:TPU writes it
          kind = "reduce-scatter"
        number, size = collectives.get(kind, (0, 0.0))
        payload = _payload(program, name, instruction)
        collectives[kind] = (number + times, size + times * payload)
  return Cost(moved, collectives)


def _parse(text: str) -> _Program:
  computations, entry, current = {}, "", None
  for line in text.splitlines():
    if line.startswith(("%", "ENTRY")) and line.endswith("{"):
      name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
      current = computations[name] = {}
      entry = name if line.startswith("ENTRY") else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      root, name, type_, opcode, rest = match.groups()
      end = _closing(rest)
      operands = tuple(re.findall(r"%([\w.-]+)", rest[:end]))
      if opcode in ("parameter", "constant"):  # its number, its value
        operands = (rest[:end],)
      current[name] = Instruction(
        name, type_, opcode, operands, rest[end:], bool(root)
      )
  return _Program(computations, entry)


def _closing(text: str) -> int:
  """Where the parenthesis closes that was opened before the text."""
  depth = 1
  for position, character in enumerate(text):
    depth += (character == "(") - (character == ")")
    if not depth:
      return position
  return len(text)


def _called(instruction: Instruction) -> Iterator[str]:
  for names in _CALLED.findall(instruction.text):
    yield from re.findall(r"[\w.-]+", names)


def _runs(program: _Program, fused: bool = False) -> dict[str, int]:
  """How often each computation runs; those inside fusions if `fused`."""
  runs = {}

  def visit(name: str, times: int) -> None:
    runs[name] = runs.get(name, 0) + times
    for instruction in program.computations[name].values():
      if instruction.opcode in ("while", "conditional", "call") or fused:
        repeats = 1
        if instruction.opcode == "while":
          repeats = _trip_count(program, instruction)
        for called in _called(instruction):
          if called in program.computations:
            visit(called, times * repeats)

  visit(program.entry, 1)
  return runs


def _trip_count(program: _Program, instruction: Instruction) -> int:
  """The bound that the loop's counter, from 0 by 1, is compared with; or 1."""
  condition = re.search(r"condition=%?([\w.-]+)", instruction.text)[1]
  bounds = [
    int(line.operands[0])
    for line in program.computations[condition].values()
    if line.opcode == "constant"
    and line.type.startswith("s32[]")
    and line.operands[0].isdigit()
  ]
  return max(bounds, default=1)


@functools.lru_cache(maxsize=65536)
def _sizes(type_: str) -> tuple[tuple[float, bool], ...]:
  """Bytes of each array of a type, and whether it is in main memory."""
  sizes = []
  for dtype, sides, layout in _SHAPE.findall(type_):
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    count = math.prod(int(side) for side in sides.split(",") if side)
    sizes.append((count * bits / 8, "S(" not in layout))
  return tuple(sizes)


def _bytes(type_: str) -> float:
  return sum(size for size, _ in _sizes(type_))


def _in_memory(type_: str) -> float:
  return sum(size for size, is_main in _sizes(type_) if is_main)


def _payload(program: _Program, name: str, instruction: Instruction) -> float:
  """Bytes of the larger one of a collective's operands and its results."""
  lines = program.computations[name]
  operands = sum(
    _bytes(lines[x].type) for x in instruction.operands if x in lines
  )
  results = _bytes(instruction.type)
  if instruction.opcode.endswith("-start"):  # its type holds the operands, too
    results -= operands
  return max(operands, results)


def _bytes_accessed(
  program: _Program, name: str, instruction: Instruction
) -> float:
  lines, opcode = program.computations[name], instruction.opcode
  if opcode in _FREE or opcode.endswith("-done"):
    return 0.0
  written = _in_memory(instruction.type)
  if opcode.endswith("-start"):  # its type holds what is read and written
    return written
  operands = [lines[x].type for x in instruction.operands if x in lines]
  if opcode in ("dynamic-slice", "slice", "gather"):
    return 2 * written
  if opcode == "dynamic-update-slice":
    return 2 * _in_memory(operands[1])
  if opcode != "fusion":
    return written + sum(map(_in_memory, operands))
  inner = next(_called(instruction))
  read = sum(
    min(_in_memory(type_), _read_of_parameter(program, inner, i))
    for i, type_ in enumerate(operands)
  )
  return read + min(written, _written_by(program, inner))


def _read_of_parameter(program: _Program, name: str, index: int) -> float:
  """Bytes that a fusion reads of a parameter of which it may take slices."""
  lines = program.computations[name]
  parameter = next(
    line
    for line in lines.values()
    if line.opcode == "parameter" and line.operands == (str(index),)
  )
  read = 0.0
  for line in lines.values():
    for i, operand in enumerate(line.operands):
      if operand != parameter.name or line.opcode == "parameter":
        continue
      if line.opcode in ("dynamic-slice", "slice", "gather"):
        read += _bytes(line.type)
      elif line.opcode == "fusion":
        read += _read_of_parameter(program, next(_called(line)), i)
      elif line.opcode != "dynamic-update-slice" or i:
        return float("inf")
  return read


def _written_by(program: _Program, name: str) -> float:
  """Bytes that a fusion writes, where it updates slices of a result."""
  lines = program.computations[name]
  root = next(line for line in lines.values() if line.is_root)
  while root.opcode == "bitcast":
    root = lines[root.operands[0]]
  if root.opcode == "dynamic-update-slice":
    return _bytes(lines[root.operands[1]].type)
  if root.opcode == "fusion":
    return _written_by(program, next(_called(root)))
  return float("inf")

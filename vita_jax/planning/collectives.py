"""Which collectives a compiled program runs, how often, and what they move: read from its HLO text.

A scan over layers is one `while` whose body stands in the text once, so every instruction is counted as often as the
loops around it turn: what the compiler notes (`known_trip_count`), or the constant that the loop's counter is compared
with, which for a scan is the same. Bytes are what one device sends, n the devices of a group:

    all-gather           (n - 1) / n of its result
    reduce-scatter       (n - 1) / n of its operand
    all-reduce           both, one after the other: 2 (n - 1) / n of its operand
    all-to-all           (n - 1) / n of its operand
    ragged-all-to-all    (n - 1) / n of its operand or of its result, the smaller: what is sent if all send alike
    collective-permute   its operand
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
    "c128": 16,
}

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<rest>.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(
    r"(?:condition|body|calls|to_apply|called_computations|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OPERAND = re.compile(r"%([\w.\-]+)")
_GROUPS_LISTED = re.compile(r"replica_groups=\{\{([0-9,]*)\}")
_GROUPS_COUNTED = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_GROUPS_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: one of `KINDS`.
      times: how often a step runs it.
      bytes_sent: by each device, every time.
      group: devices that take part together.
      shape: of its result, as HLO writes it.
      source: the traced operation it comes from, "" if the compiler made it.
    """

    kind: str
    times: int
    bytes_sent: float
    group: int
    shape: str
    source: str = ""

    @property
    def total(self) -> float:
        """Bytes each device sends in a step."""
        return self.times * self.bytes_sent


@dataclasses.dataclass
class _Instruction:
    name: str
    type: str
    op: str
    rest: str


@dataclasses.dataclass
class _Computation:
    entry: bool
    instructions: list[_Instruction]


def array_bytes(text: str) -> float:
    """Bytes of all arrays of an HLO type such as `(bf16[8,128]{1,0}, f32[])`; tokens and contexts count nothing."""
    sizes = (
        BYTES.get(dtype, 0) * math.prod(int(size) for size in shape.split(",") if size)
        for dtype, shape in _ARRAY.findall(text)
    )
    return float(sum(sizes))


def collectives(hlo: str, num_devices: int) -> list[Collective]:
    """All collectives of a program.

    Args:
      hlo: text of a compiled module (`compiled.as_text()`).
      num_devices: of the program, for groups that are written as "all".
    """
    computations = _parse(hlo)
    found = []
    for name, times in _multiplicities(computations).items():
        types = {instruction.name: instruction.type for instruction in computations[name].instructions}
        for instruction in computations[name].instructions:
            kind = _kind(instruction.op)
            if kind is not None and times:
                found.append(_collective(instruction, kind, times, types, num_devices))
    return found


def by_kind(found: list[Collective]) -> dict[str, tuple[int, float]]:
    """Kind -> how many are run in a step, and bytes each device sends in all of them."""
    totals: dict[str, tuple[int, float]] = {}
    for one in found:
        number, sent = totals.get(one.kind, (0, 0.0))
        totals[one.kind] = (number + one.times, sent + one.total)
    return dict(sorted(totals.items(), key=lambda entry: -entry[1][1]))


def _parse(hlo: str) -> dict[str, _Computation]:
    computations: dict[str, _Computation] = {}
    current: _Computation | None = None
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations[header["name"]] = _Computation(bool(header["entry"]), [])
        elif line == "}":  # what a kernel is called with may go on in lines that begin with such a brace, too
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.instructions.append(_Instruction(match["name"], match["type"], match["op"], match["rest"]))
    return computations


def _multiplicities(computations: dict[str, _Computation]) -> dict[str, int]:
    """How often each computation runs in one run of the entry."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, factor: int) -> None:
        times[name] += factor
        for instruction in computations[name].instructions:
            trips = _trip_count(instruction, computations) if instruction.op == "while" else 1
            for called in _called(instruction.rest):
                if called in computations:
                    visit(called, factor * trips)

    for name, computation in computations.items():
        if computation.entry:
            visit(name, 1)
    return times


def _trip_count(loop: _Instruction, computations: dict[str, _Computation]) -> int:
    """How often a loop turns; 1 where the text does not say."""
    if noted := _TRIPS.search(loop.rest):
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    instructions = computations[condition[1]].instructions if condition and condition[1] in computations else []
    if not any(one.op == "compare" and "direction=LT" in one.rest for one in instructions):
        return 1
    limits = [one.rest.split(")")[0] for one in instructions if one.op == "constant" and one.type.startswith("s32[]")]
    return int(limits[0]) if len(limits) == 1 and limits[0].isdecimal() else 1


def _called(rest: str) -> Iterator[str]:
    for group in _CALLED.findall(rest):
        for name in group.strip("{}").split(","):
            yield name.strip().lstrip("%")


def _kind(op: str) -> str | None:
    """The kind of an instruction; the second half of an asynchronous pair counts nothing."""
    base = op.removesuffix("-start")
    return base if base in KINDS else None


def _collective(
    instruction: _Instruction, kind: str, times: int, types: dict[str, str], num_devices: int
) -> Collective:
    operands = instruction.rest.split("), ")[0]
    sizes = [array_bytes(types.get(name, "")) for name in _OPERAND.findall(operands)]
    # The first two are rows to send and the buffer that receives rows; either may have room that is not used.
    sent = min(sizes[:2], default=0.0) if kind == "ragged-all-to-all" else sum(sizes)
    sent = sent or array_bytes(operands)  # types may stand beside the operands
    group = _group_size(instruction.rest, num_devices)
    others = (group - 1) / group
    if kind == "all-gather":
        size = sent * group * others
    elif kind == "all-reduce":
        size = 2 * sent * others
    elif kind in ("collective-permute", "collective-broadcast"):
        size = sent
    else:
        size = sent * others
    source = re.search(r'op_name="([^"]*)"', instruction.rest)
    return Collective(kind, times, size, group, instruction.type, source[1] if source else "")


def _group_size(rest: str, num_devices: int) -> int:
    if match := _GROUPS_COUNTED.search(rest):
        return int(match[2])
    if match := _GROUPS_NAMED.search(rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", match[2]))
    if match := _GROUPS_LISTED.search(rest):
        return match[1].count(",") + 1
    return num_devices

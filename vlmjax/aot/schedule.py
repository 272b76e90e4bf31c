"""Exposed communication as XLA's own latency-hiding scheduler sees it.

Read from `*.schedule.txt` (`xla_dump_latency_hiding_schedule`), a text proto of megabytes. The
scheduler takes operations for two to three times as long as the final program's estimates, so it
sees more overlap than `replay` does: a second opinion, not the figure of the report.
"""

import re

# Fields of interest at their nesting: instructions of computations, then of schedules.
FIELD = re.compile(
    r"\s*(name|opcode|id|computation_id|start_timestamp_cycles|end_timestamp_cycles|"
    r'total_wasted_cycles|cycles_per_microsecond): "?([^"\n]*)"?'
)
SYNCHRONOUS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def exposed_seconds(lines, trips):
    """Returns the seconds the scheduler expects nothing but communication to run, or None.

    Args:
      lines: of the dump.
      trips: {computation: times it runs}.
    """
    opcodes, names, cycles, stack, rate, fields = {}, {}, {}, [], None, {}
    for line in lines:
        text = line.strip()
        if text.endswith("{"):
            stack.append(text[:-1].strip())
            if stack[-1] in ("instructions", "computations", "computation_schedules"):
                fields[len(stack)] = {}
        elif text == "}":
            kind = stack.pop()
            found = fields.pop(len(stack) + 1, None)
            if found is None:
                continue
            if kind == "instructions" and stack[-1] == "computations":
                opcodes[found["id"]] = found["opcode"]
            elif kind == "computations":
                names[found["id"]] = found["name"]
            elif kind == "instructions" and opcodes.get(found.get("id")) in SYNCHRONOUS:
                schedule = fields[len(stack)]
                spent = float(found["end_timestamp_cycles"])
                spent -= float(found.get("start_timestamp_cycles", 0))
                schedule["synchronous"] = schedule.get("synchronous", 0.0) + spent
            elif kind == "computation_schedules":
                wasted = float(found.get("total_wasted_cycles", 0))
                cycles[found["computation_id"]] = wasted + found.get("synchronous", 0.0)
        elif stack and (found := FIELD.match(line)):
            if found[1] == "cycles_per_microsecond":
                rate = float(found[2]) * 1e6
            depth = len(stack) - (stack[-1] == "scheduler_statistics")
            if depth in fields:
                fields[depth].setdefault(found[1], found[2])
    if rate is None:
        return None
    return sum(c * trips.get(names.get(i), 0) for i, c in cycles.items()) / rate

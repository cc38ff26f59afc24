"""What a reader sees: the machine, the table, the stress run."""

from __future__ import annotations

import math
import sys
from typing import Any

from subject import Subject

Row = dict[str, Any]

# Reserved memory may lie a tenth, or 0.3 GiB, above the limit.
RESERVED_SHARE, RESERVED_MARGIN = 1.1, 0.3 * 2**30

HEADER = (
    f"{'method':<24} {'limit':>6} {'seconds':>8} {'ratio':>6} {'loop':>8} {'ratio':>6}"
    f" {'alloc':>7} {'steady':>7} {'reserv':>7} {'steady':>7} {'RSS':>6}"
    f" {'attach':>7} {'first':>7} {'ratio':>6} same"
)
LEGEND = """\
seconds: median of the forwards after warm-up; first: the first forward
loop: as many forwards in a row, without a wait in between
ratio: of either to max(compute, streamed bytes / link); of first likewise, all bytes
alloc, reserv: most GiB of PyTorch's allocator in any forward, then in the timed ones;
    ! is above the limit (reserved: also above 1.1 of it and 0.3 GiB more)
RSS: most GiB of RAM; attach: seconds; same: all outputs equal the plain model's
"""


def print_machine(
    machine: Row, subject: Subject, weights: int, build_seconds: float | None
) -> None:
    """Prints what is measured, and where."""
    device, total = machine["device"], machine["total"]
    memory = f", {total / 2**30:.1f} GiB" if total else ""
    print(f"{device}{memory}, torch {machine['torch']}, python {machine['python']}")
    print(
        f"{subject.name}: {weights / 2**30:.2f} GiB of weights (bfloat16), "
        f"{subject.resolution}x{subject.resolution}, batch {subject.batch}; "
        + (
            "each row builds its own"
            if build_seconds is None
            else f"built once in {build_seconds:.1f} s, rows are forked"
        ),
        flush=True,
    )


def short(row: Row) -> str:
    """Returns one line about a row, to be read while the others run."""
    what = " ".join(
        str(part)
        for part in (
            row["kind"] if row["kind"] != "time" else "",
            row["method"],
            row["storage"] or "",
            _limit(row),
        )
        if part and part != "-"
    )
    if "error" in row:
        return f"{what}: {_cut(row['error'])}"
    took = f"the row took {row['row_seconds']:.0f} s"
    if row["kind"] != "time":
        return f"{what}: {took}"
    return f"{what}: {row['seconds']:.4f} s, first {row['first_seconds']:.3f} s; {took}"


def print_table(rows: list[Row], machine: Row) -> None:
    """Prints one line a row, then what has to be said about them."""
    good = [row for row in rows if "error" not in row]
    plain = {r["storage"]: r for r in good if r["method"] == "resident"}
    compute = min((row["seconds"] for row in plain.values()), default=None)
    links = [row["link"] for row in [machine, *good] if row.get("link")]
    link: float | None = max(links, default=None)
    print()
    if links:
        print(
            f"link {max(links) / 1e9:.1f} GB/s: best of {len(links)} measurements, "
            f"worst {min(links) / 1e9:.1f}"
        )
    print(HEADER)
    for row in rows:
        print(_line(row, plain.get(row["storage"]), compute, link))
    print(LEGEND, end="")
    for row in rows:
        for note in row.get("notes", [])[:3]:
            print(f"{row['method']} {_limit(row)}: {_cut(note, 300)}")
        if "profile" in row:
            print(f"{row['method']} {_limit(row)}, one forward: {_calls(row)}")
    sys.stdout.flush()


def print_stress(row: Row) -> None:
    """Prints what a stress run showed."""
    print()
    if "error" in row:
        print(f"stress: {row['error']}")
        print(str(row.get("traceback") or row.get("log"))[-2000:])
        return
    print(
        f"stress: {row['forwards']} forwards in {row['seconds']:.0f} s, "
        f"{row['attached']} times attached, {row['set_limit']} times set_limit, "
        f"{row['broken_off']} broken off by an exception"
    )
    print(f"  wrong outputs: {row['wrong']} (against {row['against']})")
    for line in row["wrong_ones"]:
        print(f"    {line}")
    print(
        f"  forwards above their limit: {row['over_limit']}, "
        f"at most by {row['worst_over_bytes'] / 2**20:.1f} MiB"
    )
    for what, before in row["before"].items():
        after = row["after"][what]
        if before is not None:
            print(
                f"  {what}, detached: {before / 2**20:.1f} MiB before, "
                f"{after / 2**20:.1f} after: {(after - before) / 2**20:+.1f} MiB"
            )
    course = [f"{size / 2**20:.0f}" for size in row["rss_course"] if size]
    if course:  # memory that is not given back to the system ends growing; a leak not
        print(f"  rss at every detach: {' '.join(course)}")
    for note in row["notes"][:5]:
        print(f"  {_cut(note, 300)}")
    sys.stdout.flush()


def _line(
    row: Row, plain: Row | None, compute: float | None, link: float | None
) -> str:
    method = row["method"]
    if row["storage"]:
        method += " " + row["storage"].removeprefix("float8_")
    start = f"{method:<24} {_limit(row):>6}"
    if "error" in row:
        return f"{start} {_cut(row['error'])}"
    ratio = loop_ratio = first_ratio = None
    if "pass_bytes" in row and compute is not None:
        bound = max(compute, row["pass_bytes"] / link if link else 0)
        ratio = row["seconds"] / bound
        loop_ratio = row["loop_seconds"] / bound
        bound = max(compute, row["all_bytes"] / link if link else 0)
        first_ratio = row["first_seconds"] / bound
    same = "-"
    if plain is not None:
        right = row["one_checksum"] and row["checksum"] == plain["checksum"]
        # Wherever all values are NaN, all methods agree.
        right = right and math.isfinite(row["mean"])
        same = "yes" if right else "NO"
    limit = row["limit_gb"] * 2**30 if method.startswith("hookoffload") else None
    reserved = limit and max(limit * RESERVED_SHARE, limit + RESERVED_MARGIN)
    return (
        f"{start} {row['seconds']:>8.4f} {_number(ratio, 3):>6}"
        f" {row['loop_seconds']:>8.4f} {_number(loop_ratio, 3):>6}"
        f" {_gib(row['allocated_peak'], limit):>7}"
        f" {_gib(row['allocated_steady'], limit):>7}"
        f" {_gib(row['reserved_peak'], reserved):>7}"
        f" {_gib(row['reserved_steady'], reserved):>7}"
        f" {_gib(row['rss_peak']):>6} {row['attach_seconds']:>7.2f}"
        f" {row['first_seconds']:>7.3f} {_number(first_ratio, 2):>6} {same}"
    )


def _limit(row: Row) -> str:
    return "-" if row["limit_gb"] is None else f"{row['limit_gb']:.4g}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _gib(value: int | None, limit: float | None = None) -> str:
    if value is None:
        return "-"
    mark = "!" if limit is not None and value > limit else ""
    return f"{value / 2**30:.2f}{mark}"


def _calls(row: Row) -> str:
    if "error" in row["profile"]:
        return f"no trace: {_cut(row['profile']['error'])}"
    telling = {
        name: count
        for name, count in row["profile"]["calls"].items()
        if any(word in name for word in ("Synchronize", "Malloc", "Alloc", "Free"))
    }
    found = ", ".join(f"{count} {name}" for name, count in sorted(telling.items()))
    return found or "no synchronisation, no allocation"


def _cut(text: str, length: int = 160) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."

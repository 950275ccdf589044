"""A plan as tables in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from lmtrain.plan.memory import ERROR

GIB = 2**30
SAID = {"fits": "", "at the limit": " at the limit", "does not fit": " too much"}


def table(plan: dict[str, Any], console: Console | None = None) -> None:
    """Prints `plan.plan`'s result."""
    out = console or Console()
    tested = "" if plan["tested"] else "; by the model alone, not compiled at this size"
    out.print(
        f"[bold]{plan['stage']}[/] on {plan['topology']}: {plan['devices']:,} devices, {mesh(plan['mesh'])}{tested}"
    )
    out.print(f"{plan['parameters']:,} parameters ({plan['active']:,} for a token), {plan['flops_per_token']:.3g} "
              f"training FLOPs a token; {plan['batch_size']} rows of {plan['row_length']} in {plan['accumulate']} "
              f"microbatch{'es' if plan['accumulate'] > 1 else ''}, remat={plan['remat']}, {plan['optimizer']}, "
              f"{plan['attention']} attention", soft_wrap=True)  # fmt: skip

    memory = plan["memory"]
    rows = Table("memory of a device", "GiB", title_justify="left")
    for part, size in memory.items():
        if part not in ("total", "available", "fits", "says", "height"):
            rows.add_row(part, f"{size / GIB:.2f}")
    rows.add_row(
        f"[bold]at the height[/] ({memory['height']})",
        f"[bold]{memory['total'] / GIB:.2f}[/] of {memory['available'] / GIB:.2f}: {memory['says']}",
    )
    _numbers(rows)
    out.print(rows)
    if memory["says"] == "at the limit" and "compiled" not in plan:
        out.print(f"The estimate may be off by {ERROR:.0%}: --compile tells whether it fits.")

    time = plan["time"]
    rows = Table("what waits for what, in an update", "bytes", "at", "seconds")
    rows.add_row("compute", "", f"{plan['chips']['flops'] / 1e12:.3g} TFLOP/s", f"{time['compute']:.4g}")
    rows.add_row("memory", "", f"{plan['chips']['hbm'] / 1e9:.0f} GB/s", f"{time['memory']:.4g}")
    merged: dict[tuple[str, str, str], list[float]] = {}
    for x in plan["traffic"]:
        entry = merged.setdefault((x["axis"], x["kind"], x["what"]), [0.0, x["bandwidth"], 0.0])
        entry[0], entry[2] = entry[0] + x["bytes"], entry[2] + x["seconds"]
    for (axis, kind, what), (size, rate, seconds) in merged.items():
        rows.add_row(f"{axis}: {kind}, {what}", f"{size / 1e9:.3g} GB", f"{rate / 1e9:.0f} GB/s", f"{seconds:.4g}")
    _numbers(rows)
    out.print(rows)

    out.print(f"a step takes {time['step']:.4g} s at best (bound by {time['bound']}), {time['serial']:.4g} s where "
              f"nothing overlaps: MFU {plan['mfu']:.0%}, {plan['mfu_serial']:.0%}", soft_wrap=True)  # fmt: skip
    days, most = plan["days"], plan["days_serial"]
    money = f": {plan['cost']:,.0f} to {plan['cost'] * most / days:,.0f} in money" if plan["cost"] else ""
    out.print(f"{plan['tokens_per_day']:.3g} tokens a day; {plan['tokens']:.3g} tokens in {_days(days)}, {_days(most)} "
              f"where nothing overlaps{money}", soft_wrap=True)  # fmt: skip
    if "search" in plan:
        _search(out, plan["search"])
    if "compiled" in plan:
        _compiled(out, plan["compiled"])


def mesh(sizes: dict[str, int]) -> str:
    """ "fsdp=8, tensor=2"."""
    return ", ".join(f"{axis}={n}" for axis, n in sizes.items())


def _days(days: float) -> str:
    for unit, n in {"days": days, "hours": days * 24, "minutes": days * 1440}.items():
        if n >= (2 if unit == "days" else 1):
            return f"{n:,.1f} {unit}"
    return f"{days * 86400:.2g} seconds"


def _search(out: Console, found: list[dict[str, Any]]) -> None:
    rows = Table("mesh", "accumulate", "remat", "GiB", "seconds", "MFU", "bound by", title="the best by the roofline",
                 title_justify="left")  # fmt: skip
    for c in found:
        size = f"{c['memory'] / GIB:.1f}{SAID[c['says']]}"
        share = f"{c['mfu_serial']:.0%} to {c['mfu']:.0%}"
        rows.add_row(mesh(c["mesh"]), str(c["accumulate"]), c["remat"], size, f"{c['seconds']:.4g}", share, c["bound"])
    _numbers(rows, (1, 3, 4, 5))
    out.print(rows)


def _compiled(out: Console, c: dict[str, Any]) -> None:
    begin = f"[bold]compiled[/] in {c['seconds']:.0f} s: "
    need, has, said = (f"{c[name] / GIB:.2f}" for name in ("peak", "available", "estimate"))
    if not c["fits"]:
        out.print(f"{begin}does not fit, needs {need} of {has} GiB (estimate {said})")
        return
    out.print(f"{begin}{need} of {has} GiB at the height; the estimate is off by {c['off']:+.0%}")
    rows = Table("collectives of the program", "along", "GB", "times")
    for x in c["collectives"][:12]:
        rows.add_row(x["kind"], ", ".join(x["axes"]) or "-", f"{x['bytes'] / 1e9:.3g}", f"{x['times']:,}")
    _numbers(rows, (2, 3))
    out.print(rows)


def _numbers(rows: Table, which: tuple[int, ...] = (1, 2, 3)) -> None:
    for i in which:
        if i < len(rows.columns):
            rows.columns[i].justify = "right"

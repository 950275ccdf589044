"""What a run has to show: `lmtrain inspect` in words, report.html with curves, scores and samples on one page."""

from __future__ import annotations

import html
import io
import json
import os
import pathlib
from typing import Any

from lmtrain import checkpoint, log, origins, runs
from lmtrain.eval.estimates import Estimate
from lmtrain.models import transformer
from lmtrain.types import LmtrainError

EVALUATION = "eval.json"  # what `lmtrain eval` keeps in a run's folder: stage -> suite -> scores


def inspect(folder: str | os.PathLike[str]) -> str:
    """Stages, steps, parameter count, sha256 over the parameters, and the configuration of the last stage, as text."""
    last = origins.find_stage(pathlib.Path(folder))
    lines = []
    for here in origins.stages(last.parent):
        steps = checkpoint.steps(here / "checkpoints")
        if not steps:
            lines.append(f"{here}: no checkpoint yet")
            continue
        stored = origins.read_json(here / "config.json")
        newest = checkpoint.newest_sound(here / "checkpoints")
        params = checkpoint.load_params(here / "checkpoints", newest)
        counted = transformer.count(origins.stored_model(stored))
        scored = [m for m in log.read_metrics(here) if "heldout_loss" in m]
        lines += [
            f"{here}",
            f"    step        {newest} of {stored['stages'][here.name]['steps']}",
            f"    checkpoints {', '.join(map(str, steps))}",
            f"    parameters  {counted['total']:,}",
            f"    sha256      {checkpoint.params_sha256(params)}",
        ]
        if scored:
            m = scored[-1]
            bits = m["heldout_bits_per_byte"]
            lines.append(
                f"    held out    {m['heldout_loss']:.4f} nats a token, {bits:.4f} bits per byte, at step {m['step']}"
            )
    if table := comparison(last.parent):
        lines.append(table)
    stored = origins.read_json(last / "config.json")
    lines += [f"configuration of {last.name}:", json.dumps(stored["stages"][last.name], indent=1)]
    lines.append(f"lmtrain inspect: {len(origins.stages(last.parent))} stage(s) in {last.parent}")
    return "\n".join(lines)


def comparison(folder: pathlib.Path) -> str:
    """A table of held-out losses before and after, where several stages of a run were scored on the same text; else
    "". A stage that has not ended yet is shown as far as it got."""
    same: dict[str, list[tuple[str, dict[str, Any], dict[str, Any]]]] = {}
    for here in origins.stages(folder):
        scored = [m for m in log.read_metrics(here) if "heldout_loss" in m]
        if len(scored) > 1:
            stored = origins.read_json(here / "config.json")["stages"][here.name]
            text = json.dumps([stored["data"], stored["objective"]], sort_keys=True)
            same.setdefault(text, []).append((here.name, scored[0], scored[-1]))
    lines: list[str] = []
    for stages in (s for s in same.values() if len(s) > 1):
        lines.append("held-out loss on the same text (nats a token, bits per byte)")
        lines.append(f"{'stage':<16}{'step':>8}{'before':>18}{'after':>18}")
        for name, first, last in stages:
            said = [f"{m['heldout_loss']:.4f} {m['heldout_bits_per_byte']:.4f}" for m in (first, last)]
            lines.append(f"{name:<16}{last['step']:>8,}{said[0]:>18}{said[1]:>18}")
    return "\n".join(lines)


def write(folder: str | os.PathLike[str]) -> pathlib.Path | None:
    """Writes report.html into a run's folder and returns its path; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("svg", force=False)
    root = pathlib.Path(folder)
    parts = [f"<h1>{html.escape(root.name)}</h1>"]
    scored = origins.read_json(root / EVALUATION) if (root / EVALUATION).exists() else {}
    for here in origins.stages(root):
        entry = runs.read_summary(root).get(here.name, {})
        parts += [f"<h2>{html.escape(here.name)}</h2>", curve(log.read_metrics(here)), _table(entry)]
        parts += [_evaluation(scored.get(here.name, {})), _samples(here)]
        settings = html.escape((here / "config.json").read_text())
        parts.append(f"<details><summary>configuration</summary><pre>{settings}</pre></details>")
    file = root / "report.html"
    file.write_text(_PAGE.replace("BODY", "\n".join(parts)).replace("TITLE", html.escape(root.name)), encoding="utf-8")
    return file


def curve(metrics: list[dict[str, Any]]) -> str:
    """What a stage learned, against tokens seen, as SVG: the loss (or reward, or accuracy on pairs) of every logged
    step, and the same held out."""
    from matplotlib.figure import Figure

    if not metrics:
        raise LmtrainError("no metrics to draw: metrics.jsonl is empty.")
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    learned, held, says = next(
        (names for names in CURVES if any(names[0] in m for m in metrics) and any(names[1] in m for m in metrics)),
        CURVES[-1],
    )
    found = [m for m in metrics if m.get(learned) is not None]
    label = "training" if learned != held else "held out"
    axes.plot([m["tokens"] for m in found], [m[learned] for m in found], lw=0.8, color="#9db4c8", label=label)
    scored = [m for m in metrics if held in m]
    if scored:
        x, y = [m["tokens"] for m in scored], [m[held] for m in scored]
        axes.plot(x, y, "o-", ms=4, lw=1.6, color="#1f5f8b", label="held out")
        axes.annotate(f"{y[-1]:.3f}", (x[-1], y[-1]), xytext=(0, 8), textcoords="offset points", ha="right")
    axes.set(xlabel="tokens seen", ylabel=says)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


#: What is drawn while a stage trains, the same held out, and what the axis says. The first that is there.
CURVES = (
    ("reward", "heldout_score", "reward of a conversation"),
    ("accuracy", "heldout_accuracy", "pairs told apart"),
    ("loss", "heldout_loss", "loss (nats a token)"),
)


def _table(entry: dict[str, Any]) -> str:
    rows = []
    for name, value in entry.items():
        if name == "tasks":
            for task, scores in value.items():
                told = [_score(scores[when]) for when in ("before", "after") if scores.get(when)]
                rows.append((f"{task}, held out", " → ".join(told)))
        elif isinstance(value, dict) and value.keys() == {"before", "after"}:
            rows.append((name.replace("_", " "), f"{value['before']:.4f} → <b>{value['after']:.4f}</b>"))
        elif isinstance(value, dict):
            rows += [(k, f"{v:.4f}") for k, v in value.items()]
        else:
            rows.append((name, f"{value:,}"))
    cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{v}</td></tr>" for k, v in rows)
    return f"<table>{cells}</table>"


def _evaluation(suites: dict[str, Any]) -> str:
    """What `lmtrain eval` found, a table a suite."""
    parts = []
    for name, found in suites.items():
        rows = []
        for what, e in found["scores"].items():
            value, interval = Estimate(e["value"], e["ci95"][0], e["ci95"][1], e["rows"], e["unit"]).says()
            rows.append(f"<tr><th>{html.escape(what)}</th><td><b>{value}</b></td><td>{interval}</td>"
                        f"<td>{e['rows']:,} rows</td></tr>")  # fmt: skip
        alarms = "".join(f"<p><b>Alarm</b>: {html.escape(text)}</p>" for text in found["alarms"])
        parts.append(f"<h3>{html.escape(name)}</h3>{alarms}<table>{''.join(rows)}</table>")
    return "".join(parts)


def _score(s: dict[str, Any]) -> str:
    return f"<b>{s['score']:.1%}</b> ({s['ci95'][0]:.1%} to {s['ci95'][1]:.1%}, {s['rows']} rows)"


def _samples(here: pathlib.Path) -> str:
    file = here / "samples.jsonl"
    if not file.exists():
        return ""
    lines = log.read_jsonl(file)
    last = [s["text"] for s in lines if s["step"] == lines[-1]["step"]]
    return "<h3>samples</h3>" + "".join(f"<pre>{html.escape(t)}</pre>" for t in last)


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>TITLE</title>
<meta name="viewport" content="width=device-width"><style>
body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#222}
pre{background:#f5f6f7;padding:.8rem;overflow-x:auto;white-space:pre-wrap;font-size:.85rem}
th{text-align:left;font-weight:500;padding-right:2rem}svg{width:100%;height:auto}
</style><body>BODY</body></html>
"""

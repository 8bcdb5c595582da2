"""The report of `ascend-twin simulate --html`: one file that needs no other, and no network."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import Any

from ..scheduler.cost import PARAMETERS
from .simulate_plots import cost_plot, latency_plot, running_plot, trade_off_plot
from .simulate_runs import Row
from .simulate_tables import LEFT, tables

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>$title</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #1d2733; max-width: 1080px; margin: 2em auto; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; }
pre { background: #f3f5f7; padding: 0.7em; overflow-x: auto; white-space: pre-wrap; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15em 0.7em; text-align: right; border-bottom: 1px solid #dde2e7; white-space: nowrap; }
th { vertical-align: bottom; white-space: pre; } .text { text-align: left; white-space: pre-wrap; }
figure { margin: 1em 0; } figcaption { color: #52606d; } svg { max-width: 100%; height: auto; }
</style>
</head>
<body>
<h1>$title</h1>
<pre>$headline</pre>
<p>This command makes it again:</p>
<pre>$command</pre>
<h2>Throughput and latency</h2>
$tables
$plots
<h2>Setup</h2>
$setup
</body>
</html>
""")

TRADE_OFF = "TTFT against output throughput: right is more, low is sooner. A point for each seed."
LATENCY = "How many of the requests, or of the tokens, took at most so long."
COST = (
    "Where the time goes, above in the whole run, below in its course. Red is prefill of the slowest rank "
    "that the others wait for, on average over the ranks; white is time in which no rank has work."
)
RUNNING = "Requests of each rank. Where curves lie apart, ranks are loaded unevenly."


def report(headline: str, command: str, data: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The page.

    Args:
        headline: what is simulated, in some lines.
        command: that makes it again.
        data: the object of `--json`, for its `config` and `cost`.
        rows: each with the result of its first seed.
    """
    plots = ["<h2>TTFT against throughput</h2>", _figure("trade", trade_off_plot(rows), TRADE_OFF)]
    for dp_size in dict.fromkeys(row.dp_size for row in rows):
        own = [row for row in rows if row.dp_size == dp_size]
        plots.append(f"<h2>DP {dp_size}, first seed</h2>")
        plots.append(_figure(f"latency{dp_size}", latency_plot(own), LATENCY))
        plots.append(_figure(f"cost{dp_size}", cost_plot(own), COST))
        plots.append(_figure(f"running{dp_size}", running_plot(own), RUNNING))
    return PAGE.substitute(
        title="Data-parallel ranks by admission policy",
        headline=escape(headline),
        command=escape(command),
        tables="\n".join(_table(*table) for table in tables(rows)),
        plots="\n".join(plots),
        setup=_setup(data),
    )


def _figure(name: str, svg: str, caption: str) -> str:
    """With ids of its own: in one page, no two may be alike."""
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return f'<figure id="{name}">\n{svg}\n<figcaption>{escape(caption)}</figcaption>\n</figure>'


def _setup(data: Mapping[str, Any]) -> str:
    cost = [(f"{name}", f"{data['cost'][name]:g}", p.meaning) for name, p in PARAMETERS.items()]
    config = [(name, str(value)) for name, value in data["config"].items()]
    source = f"<p>Source of the cost model: {escape(data['cost']['source'] or 'not stated')}</p>"
    return "\n".join(
        [_table(("parameter", "", "meaning"), *cost), source, _table(("each rank", ""), *config)]
    )


def _table(header: Sequence[str], *lines: Sequence[str]) -> str:
    text = [name in (*LEFT, "parameter", "meaning", "each rank") for name in header]

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = (' class="text"' if is_text else "" for is_text in text)
        return "".join(
            f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)
        )

    body = "\n".join(f"<tr>{line('td', cells)}</tr>" for cells in lines)
    return f"<table>\n<thead><tr>{line('th', header)}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"

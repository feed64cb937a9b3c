"""A report of results as one HTML page, which needs no network."""

import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from keras_dwd import plots
from keras_dwd.evaluation.methods import strength_of
from keras_dwd.evaluation.metric import primary, recorded
from keras_dwd.evaluation.stored import Results, factor_of, matrices_of, results_of, tuned_of
from keras_dwd.files import FileError, replaced
from keras_dwd.plots.of_results import chosen_methods
from keras_dwd.plots.style import FAINT, INK, style
from keras_dwd.version import __version__
from keras_dwd.words import counted, decimals, sized

# Metrics of the table of costs: name in files, heading, digits (`None`: as many as a rate needs).
_COST = (
    ("steps_per_second", "steps/s", None),
    ("steps_per_second_with_boundaries", "steps/s with boundaries", None),
    ("seconds", "seconds in all", 1),
    ("peak_memory_mb", "peak memory MB", 0),
)


_OF_SEQUENCES = ("forgetting", "relative_forgetting", "backward_transfer", "forward_transfer")


def report(results: Results | Sequence[Results]) -> str:
    """One self-contained HTML page about results, with figures, for a browser or a phone.

    Args:
        results: Results of `Experiment.compare`, the path of a file of `keras-dwd run --out`, or
            several of these.

    Returns:
        The page, which fetches nothing. Whatever comes from a file is escaped.

    Raises:
        FileError: If one of these are no results.

    Example:

    ```python
    Path("report.html").write_text(report("results.json"))
    ```
    """
    sources: Sequence[Any] = (
        results if isinstance(results, Sequence) and not isinstance(results, str) else [results]
    )
    if not sources:
        raise ValueError("`results` must hold at least one file. Received none.")
    loaded = [results_of(each) for each in sources]
    with style():
        sections = "\n".join(map(_section, loaded))
    titles = [str(each["protocol"]["title"]) for each in loaded]
    contents = ""
    if len(loaded) > 1:
        links = (f'<li><a href="#{_anchor(t)}">{_text(t)}</a></li>' for t in titles)
        contents = f"<nav><ul>{''.join(links)}</ul></nav>"
    return _PAGE.format(
        title=_text(titles[0] if len(titles) == 1 else "Results of keras_dwd"),
        style=_STYLE,
        contents=contents,
        sections=sections,
        version=_text(__version__),
    )


def write_report(path: str | Path, results: Results | Sequence[Results]) -> None:
    """Write the page of `report` to a file, which is replaced when the page is complete."""
    content = report(results)
    with replaced(Path(path)) as unfinished:
        unfinished.write_text(content, encoding="utf-8")


def _section(results: Mapping[str, Any]) -> str:
    """The part of the page about the results of one file, all of which may be wrong."""
    try:
        return _results(results)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise FileError(
            f"The results {str(results['protocol']['title'])!r} are not as `keras-dwd run --out` "
            f"writes them: {error!r}"
        ) from error


def _results(results: Mapping[str, Any]) -> str:
    """The part of the page about the results of one file."""
    protocol, methods = results["protocol"], results["methods"]
    drawn = chosen_methods(results)
    metric = primary(protocol).name.capitalize()
    parts = [
        f'<h1 id="{_anchor(protocol["title"])}">{_text(protocol["title"])}</h1>',
        f"<p>{_text(protocol['text'])}</p>",
        "<h2>Methods side by side</h2>",
        _metrics_table(results, _quality(results)),
        '<div class="figures">',
        _figure(plots.method_comparison(results), "After the last task, over all tasks."),
        _forgetting(results),
        "</div><p>Bars are means over the seeds, dots are seeds.</p>",
        f"<h2>{_text(metric)} on each task while the tasks are learned</h2>",
        _figure(plots.accuracy_over_time(results), _of_lines(drawn, results)),
        f"<h2>{_text(metric)} on each task after each</h2>",
        '<div class="figures">',
        *(_figure(plots.accuracy_matrix(results, name), "") for name in drawn if name != "joint"),
        "</div>",
        *_strengths(results),
        *_retained(results, drawn),
        "<h2>Cost</h2>",
        _metrics_table(results, _COST),
        _seconds_table(methods),
        "<h2>Protocol and versions</h2>",
        _table(
            ["", ""], [[k, _value(v)] for k, v in protocol.items() if k not in ("title", "text")]
        ),
        _table(["", ""], [[k, _value(v)] for k, v in results.get("versions", {}).items()]),
        *_settings(methods),
    ]
    return f"<section>{chr(10).join(parts)}</section>"


def _quality(results: Mapping[str, Any]) -> list[tuple[str, str, int | None]]:
    """What the main table shows: name in files, heading and digits, see `_COST`."""
    first, *others = recorded(results["protocol"])
    keys = [
        f"average_{first.name}",
        *_OF_SEQUENCES,
        f"learning_{first.name}",
        *(f"average_{other.name}" for other in others),
    ]
    shown: list[tuple[str, str, int | None]] = []
    for key in keys:
        percent = factor_of(results, key) == 100
        words = key.replace("learning_", "right after learning_").replace("average_", "")
        shown.append(
            (key, words.replace("_", " ") + (" %" if percent else ""), 1 if percent else 3)
        )
    return shown


def _metrics_table(
    results: Mapping[str, Any], metrics: Iterable[tuple[str, str, int | None]]
) -> str:
    methods = results["methods"]
    shown = [m for m in metrics if all(m[0] in row["metrics"] for row in methods.values())]
    rows = []
    for name, row in methods.items():
        cells = [
            "–"
            if name == "joint" and key in _OF_SEQUENCES  # which learns all tasks at once
            else spread(row["metrics"][key], factor_of(results, key), digits)
            for key, _, digits in shown
        ]
        strength = strength_of(row["settings"])
        rows.append([name, f"{strength:g}" if strength else "", *cells])
    return _table(["method", "λ", *(heading for _, heading, _ in shown)], rows)


def spread(metric: Mapping[str, Any], factor: float = 1, digits: int | None = 1) -> str:
    """A metric as text: mean ± standard deviation, or the value alone where there is one seed."""
    digits = decimals(factor * metric["mean"]) if digits is None else digits
    shown = f"{factor * metric['mean']:.{digits}f}"
    if len(metric["per_seed"]) > 1:
        shown += f" ± {factor * metric['std']:.{digits}f}"
    return shown.replace("-", "−")


def _forgetting(results: Mapping[str, Any]) -> str:
    names = [name for name in results["methods"] if name != "joint"]
    if not names:
        return ""
    return _figure(plots.method_comparison(results, "forgetting", names), "Forgetting.")


def _of_lines(drawn: Sequence[str], results: Mapping[str, Any]) -> str:
    methods = results["methods"]
    seeds = max(len(matrices_of(results, name)) for name in drawn)
    text = "Lines are means over the seeds, bands reach from the lowest seed to the highest. "
    left = len(methods) - len(drawn)
    others = f"{counted(left, 'more method')} in the tables alone." if left else ""
    return (text if seeds > 1 else "") + others


def _strengths(results: Mapping[str, Any]) -> list[str]:
    """λ of each method and how it was chosen, if it was tuned."""
    tuned = tuned_of(results)
    if not tuned:
        return []
    metric = primary(results["protocol"])
    rows = []
    for name, tried in tuned.items():
        best = (max if metric.higher_is_better else min)(tried, key=lambda s: tried[s])
        end = ", an end of the grid" if len(tried) > 1 and best in (min(tried), max(tried)) else ""
        value = f"{100 * tried[best]:.1f} %" if metric.percent else f"{tried[best]:.3g}"
        rows.append([name, f"{best:g}{end}", value, str(len(tried))])
    return [
        "<h2>The strength λ that was chosen</h2>",
        _figure(plots.strength_curve(results), "Chosen on held-back training data."),
        _table(["method", "λ chosen", f"{metric.name} on validation data", "values tried"], rows),
    ]


def _retained(results: Mapping[str, Any], drawn: Sequence[str]) -> list[str]:
    """What the model of each method retains, where the file has it."""
    parts = []
    for name in drawn:
        retained = results["methods"][name].get("consolidation") or {}
        if not retained.get("layers"):
            continue
        parts += [
            f"<details><summary>{_text(name)}</summary>",
            f"<p>{_text(_words(retained))}</p>",
            '<div class="figures">',
            _figure(plots.layer_importance(retained), "Layers by importance."),
        ]
        if retained.get("groups"):
            parts += [
                _figure(plots.groups(retained), "Groups and the Fisher information."),
                _figure(plots.layers_by_groups(retained), "Layers and groups."),
            ]
        if retained.get("similarity"):
            parts.append(_figure(plots.task_graph(retained), "Task graph."))
        parts.append("</div></details>")
    heading = ["<h2>What the models retain</h2>", "<p>Of the first seed, after the last task.</p>"]
    return [*heading, *parts] if parts else []


def _words(retained: Mapping[str, Any]) -> str:
    return (
        f"{retained['held']:,} of {retained['trainable']:,} trainable parameters are held with "
        f"λ = {retained['strength']:g}, by {sized(retained['bytes'])} of state. The pull is "
        f"{retained['pull']}. 90 % of the importance is in {100 * retained['directions']:.1f} % of "
        "the directions."
    )


def _seconds_table(methods: Mapping[str, Any]) -> str:
    """Seconds of training and of the boundary for each task, the mean over the seeds."""
    rows = []
    for name, row in methods.items():
        for what in ("train", "boundary"):
            seconds = np.asarray(row.get(f"{what}_seconds") or [[]], "float64").mean(0)
            if seconds.size:
                rows.append([name, what, *(f"{s:.1f}" for s in seconds)])
    if not rows:
        return ""
    longest = max(map(len, rows)) - 2
    headings = ["method", "seconds of", *(f"task {t + 1}" for t in range(longest))]
    return _details("Seconds by task", _table(headings, rows))


def _settings(methods: Mapping[str, Any]) -> list[str]:
    rows = [[name, _value(row["settings"])] for name, row in methods.items()]
    return [_details("Settings of the methods", _table(["method", "settings"], rows))]


def _details(title: str, content: str) -> str:
    return f"<details><summary>{_text(title)}</summary>{content}</details>"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_value(v)}" for k, v in value.items() if v not in (None, {}, ""))
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, which scrolls by itself where it is wider than the page."""
    head = "".join(f"<th>{_text(heading)}</th>" for heading in headings)
    head = f"<thead><tr>{head}</tr></thead>" if any(headings) else ""
    body = "".join(
        f"<tr><th>{_text(first)}</th>{''.join(f'<td>{_text(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def _figure(drawn: Figure, caption: str) -> str:
    below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return f"<figure>{svg(drawn)}{below}</figure>"


def svg(figure: Figure) -> str:
    """A figure as inline SVG, as wide as the page allows, with the colours of the page's text."""
    written = io.StringIO()
    with style():
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # names that several figures would share
    width, height = re.findall(r'(?:width|height)="([\d.]+)pt"', text[: text.index(">")])
    text = re.sub(r"^<svg[^>]*>", f'<svg viewBox="0 0 {width} {height}" role="img">', text)
    for ours, of_page in ((INK, "var(--ink)"), (FAINT, "var(--faint)")):
        text = text.replace(ours, of_page)
    return text


def _anchor(title: Any) -> str:
    return re.sub(r"\W+", "-", str(title)).strip("-").lower()


def _text(value: Any) -> str:
    return html.escape(str(value))


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #c8ccd1; --paper: #fff; --link: #0b57a4;
  --shade: #f4f5f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6ea; --faint: #4a515a; --paper: #14171b;
  --link: #7cb7ff; --shade: #1d2127; } }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
a { color: var(--link); }
.wide { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th:only-of-type, thead th:last-child:nth-child(2) { text-align: left; }
th, td { padding: .25rem .75rem .25rem 0; text-align: right; border-bottom: 1px solid var(--faint);
  vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; }
td:only-of-type { text-align: left; white-space: normal; overflow-wrap: anywhere; }
tbody th { font-weight: 500; white-space: nowrap; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; flex: 1 1 26rem; max-width: 34rem; }
figcaption { font-size: .875rem; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, sans-serif !important; }
details { margin: .5rem 0; background: var(--shade); padding: .5rem .75rem; border-radius: .4rem; }
summary { cursor: pointer; }
footer { margin-top: 2rem; font-size: .875rem; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{contents}
<main>
{sections}
</main>
<footer>Made by keras_dwd {version}.</footer>
</body>
</html>
"""

"""The report: turns what is known of sensors into one page of HTML that needs no network and no other file.

Plots are drawn by Bokeh's own script, which is put into the page. What there is of each single defect is packed once,
and drawn when it is asked for: so 5,000 of them open at once.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hotpixd import __version__
from hotpixd.core.overview import STATIC_SCENE, STATIC_SCENE_ADVICE
from hotpixd.store.durable import StateError, WrongUse, require_place, written_beside
from hotpixd.views.answers import now
from hotpixd.views.evidence import REACH, unpacked
from hotpixd.views.history import moment_s
from hotpixd.views.text import history_words, printable, sensor_name

Answer = Mapping[str, Any]

KIND_COLOURS = {
    "hot": "#e8590c",
    "warm": "#f0a202",
    "bright": "#d6336c",
    "unstable": "#0ca678",
    "stuck": "#1c7ed6",
    "dead": "#7048e8",
    "dim": "#8a94a0",
}

_MARK = '<meta name="generator" content="hotpixd">'
"""What tells a report of ours from a file of others. Within its first bytes."""


class ReportError(StateError):
    """The disk does not take the report; a sentence for people."""


def gathered(ask: Callable[..., dict[str, Any]], sensor: str | None, gap_h: float) -> dict[str, Any]:
    """Ask for all that a report shows: the history of the sensors wanted, then each sensor by itself.

    One by one, so that no answer is large, and shots are folded in between.
    """
    history = ask("history", sensor=sensor, gap_h=gap_h)
    return {**history, "shown": [ask("report", sensor=one["id"]) for one in history["sensors"]]}


def look_at(path: Path, *, force: bool) -> None:
    """Raise `WrongUse` if something stands at `path` that must not be replaced, or nothing can be written there."""
    require_place(path, force=True)
    if force or not path.exists():
        return
    with path.open("rb") as file:
        ours = _MARK.encode() in file.read(1024)
    if not ours:
        raise WrongUse(f"{path} is not an earlier report, so it stays. Name another with -o, or say --force.")


def write(path: Path, page: str) -> int:
    """Write a page so that there is all of it or what was there before; return its bytes."""
    content = page.encode("utf-8")
    try:
        with written_beside(path, content, replace=True):
            pass
    except OSError as error:
        raise ReportError(f"The report {path} cannot be written: {error.strerror}.") from error
    return len(content)


def page_of(told: Answer) -> str:
    """Return the page of what `gathered` returned.

    Raises
    ------
    WrongUse
        If the library that draws is not installed.
    """
    try:
        from bokeh.resources import Resources
    except ImportError:
        raise WrongUse("Reports are drawn with Bokeh, which is not installed: pip install 'hotpixd[report]'") from None
    library = "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)
    pairs = list(zip(told["sensors"], told["shown"], strict=True))
    parts = {
        "mark": _MARK,
        "title": _title(pairs),
        "css": _file("report.css"),
        "contents": _contents(pairs),
        "sections": "".join(_section(n, history, shown) for n, (history, shown) in enumerate(pairs)) or _NOTHING,
        "made": f"hotpixd {html.escape(__version__)}, {now()[:16].replace('T', ' ')} UTC",
        "data": _json({"kinds": KIND_COLOURS, "reach": REACH, "sensors": [_data(h, s) for h, s in pairs]}),
        # Of the library: a closing tag in one of its texts would end it.
        "library": library.replace("</script", "<\\/script"),
        "js": _file("report.js"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _file("report.html"))


def _file(name: str) -> str:
    return resources.files("hotpixd.views").joinpath(name).read_text("utf-8")


def _json(value: Any) -> str:
    """Return JSON that may stand in a script."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _said(text: object) -> str:
    """Return a text from outside as HTML."""
    return html.escape(printable(str(text)))


_NOTHING = "<section><p>No sensor is known yet: no shot was folded.</p></section>"


def _title(pairs: Sequence[tuple[Answer, Answer]]) -> str:
    named = [sensor_name(shown).split(",")[0] for _, shown in pairs]
    return _said(f"Pixel defects of {', '.join(dict.fromkeys(named[:3]))}") if named else "Pixel defects"


def _contents(pairs: Sequence[tuple[Answer, Answer]]) -> str:
    if len(pairs) < 2:
        return ""
    links = (f'<a href="#sensor-{n}">{_said(sensor_name(shown))}</a>' for n, (_, shown) in enumerate(pairs))
    return f"<nav>{''.join(links)}</nav>"


# One sensor: its words


def _section(n: int, history: Answer, shown: Answer) -> str:
    """Return the frame of a sensor's section; the script fills in what depends on a choice."""
    defects = shown["defects"]
    states = defects.get("state", [])
    stable = states.count("stable")
    name, _, more = sensor_name(shown).partition(", ")
    sessions = history["sessions"]
    days = [sessions[0]["begin"][:10], sessions[-1]["end"][:10]] if sessions else ["no frames yet"]
    span = " to ".join(dict.fromkeys(days))
    per_million = 1e6 * stable / (shown["width"] * shown["height"])
    growth = history["growth"]
    tiles = [
        (f"{stable:,}", f"stable {'defect' if stable == 1 else 'defects'}", f"{per_million:.3g} per million pixels"),
        (f"{states.count('candidate'):,}", "candidates", "not certain yet"),
        (f"{states.count('recovered'):,}", "recovered", "behave well again"),
        (f"{shown['frames_counted']:,}", "frames counted", f"of {shown['frames']:,}, {_count(sessions, 'session')}"),
        (
            "–" if growth is None else f"{growth['per_month']:.2g}",
            "new defects a month",
            "not enough time yet" if growth is None else f"{growth['low']:.2g} to {growth['high']:.2g} (95 %)",
        ),
    ]
    boxes = "".join(f"<div><b>{a}</b><span>{b}</span><small>{c}</small></div>" for a, b, c in tiles)
    notes = [f"{said}." for said in history_words({**history, "growth": None})]
    if shown["left_out"]:
        notes.append(f"{shown['left_out']:,} weaker candidates are left out of this report.")
    listed = "".join(f"<li>{_said(note)}</li>" for note in notes)
    # The first one below the map, beside which there is what is known of one defect.
    below, *figures = [
        f"<figure><figcaption><h3>{title}</h3></figcaption>"
        f'<div class="plot" data-plot="{plot}"></div><p>{text}</p></figure>'
        for plot, title, text in _plots_of(history, shown)
    ] or [""]
    return f"""
<section class="sensor" id="sensor-{n}" data-sensor="{n}">
<h2>{_said(name)}</h2>
<p class="about">{_said(more)}, {_said(shown["colours"])} · {span}</p>
<div class="tiles">{boxes}</div>
{f'<ul class="notes">{listed}</ul>' if listed else ""}
<p class="promise">If frames are independent, the chance that any defect ever called stable here is false is at most
{100 * shown["alpha"]:g} %.</p>
<div class="pair">
<div class="left"><figure class="map"><figcaption><h3>Where they are</h3><div class="legend"></div></figcaption>
<div class="plot" data-plot="map"></div>
<p>Pixels from the top left, as stored. Drag and scroll to zoom; tap a defect to see it.</p></figure>{below}</div>
<div class="home"><article class="one" hidden></article></div>
</div>
<div class="grid">{"".join(figures)}</div>
{_agreement(shown)}
{_uncounted(shown)}
<h3>All of them</h3>
<form class="filter" onsubmit="return false">
<input type="search" placeholder="Find: 1042, hot, stable …" aria-label="Find">
<select data-key="kind" aria-label="Kind"><option value="">every kind</option></select>
<select data-key="state" aria-label="State"><option value="">every state</option></select>
<output></output>
</form>
<table class="defects"><thead></thead><tbody></tbody></table>
<p class="cut">The first 100 rows; the page has all.</p>
</section>"""


def _count(items: Sequence[object], word: str) -> str:
    return f"{len(items):,} {word}{'' if len(items) == 1 else 's'}"


def _plots_of(history: Answer, shown: Answer) -> list[tuple[str, str, str]]:
    """Return (plot, title, text) of the plots of a sensor's section."""
    plots = []
    if history["events"]:
        plots.append(("growth", "Defects over time", "Stable ones after each shot. Dashed: many vanished at once."))
    if len(_currents(shown)):
        plots.append(("currents", "Dark current", "Of stable defects, at ISO 100; its median over their frames."))
    elif shown["defects"].get("state"):
        plots.append(
            ("strengths", "Strength", "Mean excess over the neighbours. Exposures do not tell dark currents here.")
        )
    if any(shown["defects"].get("evidence", ())):
        text = (
            "From candidate to stable, as written down, straight in between. Thin: from the first frame, for those that"
            " may have been there."
        )
        plots.append(("evidence", "Evidence", text))
    if history["sessions"]:
        plots.append(("sessions", "Frames by session", "Counted as evidence or not; the reasons are below."))
    return plots


def _agreement(shown: Answer) -> str:
    """Say how declared defects and found ones agree."""
    declared = shown.get("declared") or []
    if not declared:
        return ""
    found = _positions(shown, "stable")
    wanted = {(d["x"], d["y"]) for d in declared}
    rows = []
    for source in sorted({name for d in declared for name in d["sources"]}):
        own = {(d["x"], d["y"]) for d in declared if source in d["sources"]}
        rows.append(f"<tr><td>{_said(source)}<td>{len(own):,}<td>{len(own & found):,}<td>{len(own - found):,}</tr>")
    return f"""<h3>Declared defects</h3>
<p>{_count(list(wanted), "declared defect")}: {len(wanted & found):,} found stable, {len(wanted - found):,} not;
{len(found - wanted):,} found but not declared.</p>
<table class="small"><thead><tr><th>Source<th>declared<th>found<th>not found</tr></thead><tbody>{"".join(rows)}</tbody>
</table>"""


def _positions(shown: Answer, state: str) -> set[tuple[int, int]]:
    defects = shown["defects"]
    if not defects.get("x"):
        return set()
    triples = zip(defects["x"], defects["y"], defects["state"], strict=True)
    return {(x, y) for x, y, found in triples if found == state}


def _uncounted(shown: Answer) -> str:
    """Say which frames were no evidence, and why."""
    if not shown["not_counted"]:
        return "<h3>Frames not counted</h3><p>None: each frame was new evidence.</p>"
    rows = "".join(
        f"<tr><td>{_said(one['reason'])}<td>{one['count']:,}<td>{one['first'][:10]}<td>{one['last'][:10]}</tr>"
        for one in shown["not_counted"]
    )
    latest = shown["not_counted_frames"]
    frames = "".join(
        f"<tr><td>{one['at'][:16].replace('T', ' ')}<td>{_said(one['name'])}<td>{_said(one['reason'])}</tr>"
        for one in reversed(latest)
    )
    static = any(one["reason"] == STATIC_SCENE for one in shown["not_counted"])
    advice = f" {STATIC_SCENE_ADVICE}" if static else ""
    return f"""<h3>Frames not counted</h3>
<p>They are in the means, but are no new evidence.{advice}</p>
<table class="small"><thead><tr><th>Why<th>frames<th>first<th>last</tr></thead><tbody>{rows}</tbody></table>
<details><summary>The latest {len(latest):,}</summary>
<table class="small names"><thead><tr><th>Taken<th>File<th>Why</tr></thead><tbody>{frames}</tbody></table></details>"""


# One sensor: its numbers


def _data(history: Answer, shown: Answer) -> dict[str, Any]:
    """Return what the script needs of a sensor."""
    defects = {key: list(column) for key, column in shown["defects"].items()}
    evidence = defects.pop("evidence", [])
    declared = {(d["x"], d["y"]): ", ".join(d["sources"]) for d in shown.get("declared") or []}
    places = list(zip(defects.get("x", []), defects.get("y", []), strict=True))
    crops = unpacked(shown["crops"], "u1").reshape(-1, 2 * REACH + 1, 2 * REACH + 1)
    atlas, columns = _atlas(crops)
    lives = {(d["x"], d["y"]): d for d in history["defects"]}
    for k, place in enumerate(places):
        if defects["state"][k] == "recovered" and place in lives:
            # Its kind now is that of a site without an excess.
            defects["kind"][k] = lives[place]["kind"]
    known = set(places)
    seen = {**shown, "defects": {**defects, "evidence": evidence}}
    from_start = [place in lives and lives[place]["from_start"] for place in places]
    return {
        **{key: shown[key] for key in ("width", "height", "samples", "frames_shown", "excess", "excess_scale", "fits")},
        "defects": {**defects, "declared": [declared.get(place) for place in places]},
        "declared_only": [[x, y, printable(source)] for (x, y), source in declared.items() if (x, y) not in known],
        "atlas": atlas,
        "atlas_columns": columns,
        "plots": _plots(history, seen, evidence, from_start),
    }


def _atlas(crops: NDArray[np.uint8]) -> tuple[str, int]:
    """Return all crops side by side in a square, as the URL of a PNG, and how many are in a row."""
    from PIL import Image

    size = crops.shape[1]
    columns = max(1, int(np.ceil(np.sqrt(len(crops)))))
    rows = max(1, -(-len(crops) // columns))
    sheet = np.zeros((rows * columns, size, size), np.uint8)
    sheet[: len(crops)] = crops
    picture = Image.fromarray(sheet.reshape(rows, columns, size, size).swapaxes(1, 2).reshape(rows * size, -1), "P")
    picture.putpalette(_palette().tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", columns


def _palette() -> NDArray[np.uint8]:
    """Return 256 colours: dark in the middle, from there to yellow for more and to light blue for less. 0: outside."""
    stops = [0, 64, 104, 128, 150, 184, 224, 255]
    colours = np.array(
        [
            (214, 242, 255),
            (74, 152, 214),
            (36, 58, 92),
            (24, 24, 36),
            (92, 22, 50),
            (214, 72, 18),
            (250, 176, 44),
            (255, 250, 205),
        ]
    )
    palette = np.stack([np.interp(np.arange(256), stops, colours[:, c]) for c in range(3)], axis=1)
    palette[0] = 128
    return palette.astype(np.uint8)


def _currents(shown: Answer) -> NDArray[np.float64]:
    """Return the dark currents of the stable defects at ISO 100, ADU/s."""
    defects = shown["defects"]
    if not defects.get("state"):
        return np.empty(0)
    triples = zip(defects["state"], defects["dark_current_adu_per_s"], defects["dark_current_iso"], strict=True)
    found = [current * 100.0 / iso for state, current, iso in triples if state == "stable" and current and iso]
    return np.array([current for current in found if current > 0])


def _plots(
    history: Answer, shown: Answer, evidence: Sequence[Sequence[Sequence[float]]], from_start: Sequence[bool]
) -> dict[str, Any]:
    """Return the plots of a sensor by name, as Bokeh describes them; the script fills those of single defects."""
    from bokeh.embed import json_item

    drawn = {
        "map": _map(shown),
        "over_time": _single("Excess (ADU)", "datetime", "Taken"),
        "over_exposure": _single("Excess (ADU)", "linear", "Exposure × ISO / 100 (s)"),
        "over_temperature": _single("ADU/s at ISO 100", "linear", "Sensor temperature (°C)", log=True),
    }
    for name, _, _ in _plots_of(history, shown):
        match name:
            case "currents":
                drawn[name] = _histogram(_currents(shown), "Dark current at ISO 100 (ADU/s)")
            case "strengths":
                sigma = np.array([abs(s or 0.0) for s in shown["defects"]["excess_sigma"]])
                drawn[name] = _histogram(sigma[sigma > 0], "Excess (σ of one frame)")
            case "growth":
                drawn[name] = _growth(history)
            case "evidence":
                drawn[name] = _evidence(shown, evidence, from_start)
            case "sessions":
                drawn[name] = _sessions(history["sessions"])
    return {name: json_item(figure, theme=None) for name, figure in drawn.items()}


def _figure(tools: str = "", height: int = 240, **options: Any) -> Any:
    from bokeh.models import NoOverlap
    from bokeh.plotting import figure

    plot = figure(height=height, sizing_mode="stretch_width", tools=tools, toolbar_location=None, **options)
    plot.background_fill_color = plot.border_fill_color = None
    plot.outline_line_color = None
    plot.min_border_right = 16
    for axis in plot.axis:
        axis.major_label_policy = NoOverlap(min_distance=8)
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
        axis.minor_tick_line_color = None
    return plot


def _map(shown: Answer) -> Any:
    from bokeh.models import ColumnDataSource, HoverTool, Range1d, TapTool

    width, height = shown["width"], shown["height"]
    plot = _figure(
        "pan,wheel_zoom,box_zoom,reset",
        400,
        x_range=Range1d(-0.02 * width, 1.02 * width),
        y_range=Range1d(1.02 * height, -0.02 * height),
        match_aspect=True,
        x_axis_label="x (pixels)",
        y_axis_label="y (pixels)",
    )
    plot.height = None
    plot.aspect_ratio = float(np.clip(width / height, 0.8, 1.8))
    plot.toolbar_location = "above"
    plot.toolbar.logo = None
    plot.toolbar.active_scroll = plot.select_one({"type": _wheel()})
    plot.rect(width / 2 - 0.5, height / 2 - 0.5, width, height, fill_color=None, line_color="#8a94a0", name="rim")
    renderers = []
    for state, marker, options in (
        ("recovered", "x", {"line_width": 1.5, "size": 7}),
        ("candidate", "circle", {"fill_alpha": 0.0, "line_width": 1.2, "size": 6}),
        ("stable", "circle", {"fill_alpha": 0.85, "line_alpha": 0.0, "size": 7}),
        ("declared", "square_x", {"fill_alpha": 0.0, "line_width": 1.2, "size": 9}),
    ):
        source = ColumnDataSource({key: [] for key in ("x", "y", "at", "colour", "what")}, name=state)
        renderer = plot.scatter(
            "x", "y", source=source, marker=marker, fill_color="colour", line_color="colour", **options
        )
        renderer.nonselection_glyph = renderer.selection_glyph = None
        renderers.append(renderer)
    chosen = ColumnDataSource({"x": [], "y": []}, name="chosen")
    plot.scatter("x", "y", source=chosen, size=18, fill_color=None, line_color="#e03131", line_width=2)
    plot.add_tools(
        HoverTool(renderers=renderers, tooltips=[("", "@x, @y"), ("", "@what")]), TapTool(renderers=renderers)
    )
    return plot


def _wheel() -> Any:
    from bokeh.models import WheelZoomTool

    return WheelZoomTool


def _single(y_label: str, x_type: str, x_label: str, *, log: bool = False) -> Any:
    """Return an empty plot of one defect: darks filled, light frames hollow, and a fit."""
    from bokeh.models import ColumnDataSource

    options: dict[str, Any] = {"y_axis_type": "log"} if log else {}
    plot = _figure(height=210, x_axis_type=x_type, x_axis_label=x_label, y_axis_label=y_label, **options)
    fit = ColumnDataSource({"x": [], "y": []})
    plot.line("x", "y", source=fit, line_width=2, line_color="#8a94a0", name="fit")
    for name, alpha in (("dark", 0.75), ("light", 0.0)):
        source = ColumnDataSource({"x": [], "y": []})
        plot.scatter("x", "y", source=source, size=6, fill_alpha=alpha, line_alpha=0.9, name=name)
    return plot


def _histogram(values: NDArray[np.float64], label: str) -> Any:
    low, high = np.log10(values.min()), np.log10(values.max())
    edges = np.logspace(low - 0.05, max(high, low + 0.3) + 0.05, int(np.clip(2 * len(values) ** 0.5, 8, 40)) + 1)
    counts, _ = np.histogram(values, edges)
    plot = _figure(x_axis_type="log", x_axis_label=label, y_axis_label="Defects", y_range=(0, 1.08 * counts.max()))
    plot.quad(
        left=edges[:-1].tolist(),
        right=edges[1:].tolist(),
        top=counts.tolist(),
        bottom=0,
        fill_color=KIND_COLOURS["hot"],
        fill_alpha=0.85,
        line_color=None,
    )
    plot.yaxis.ticker.mantissas = [1, 2, 5]
    plot.yaxis.ticker.min_interval = 1
    return plot


def _growth(history: Answer) -> Any:
    from bokeh.models.annotations import Label, Span

    sessions = history["sessions"]
    steps = [(moment_s(event["at"]), 1 if event["change"] == "stable" else -1) for event in history["events"]]
    steps.sort()
    times = [moment_s(sessions[0]["begin"]), *(at for at, _ in steps), moment_s(sessions[-1]["end"])]
    counts = [0, *np.cumsum([step for _, step in steps]).tolist()]
    counts.append(counts[-1])
    plot = _figure(
        x_axis_type="datetime",
        x_axis_label="Taken (UTC)",
        y_axis_label="Stable defects",
        y_range=(0, max(1.15 * max(counts), 1)),
    )
    milliseconds = [1000 * at for at in times]
    plot.varea_step(milliseconds, 0, counts, step_mode="after", fill_color=KIND_COLOURS["hot"], fill_alpha=0.18)
    plot.step(milliseconds, counts, mode="after", line_width=2, line_color=KIND_COLOURS["hot"])
    for remap in history["remaps"]:
        at = 1000 * moment_s(remap["before"])
        plot.add_layout(Span(location=at, dimension="height", line_dash="dashed", line_color="#8a94a0"))
        text = f"−{remap['defects']} {'cold' if remap['cause'] == 'colder' else 'remap'}"
        late = at > 1000 * (times[0] + 0.8 * (times[-1] - times[0]))
        plot.add_layout(
            Label(
                x=at,
                y=1.14 * max(counts),
                text=text,
                text_baseline="top",
                text_align="right" if late else "left",
                x_offset=-5 if late else 5,
                text_font_size="12px",
                name="label",
            )
        )
    plot.yaxis.ticker.min_interval = 1
    return plot


def _evidence(shown: Answer, evidence: Sequence[Sequence[Sequence[float]]], from_start: Sequence[bool]) -> Any:
    from bokeh.models.annotations import Label, Span

    defects, threshold, counted = shown["defects"], shown["threshold"], shown["frames_counted"]
    lines: dict[str, list[Any]] = {"xs": [], "ys": [], "colour": []}
    starts: dict[str, list[Any]] = {"xs": [], "ys": [], "colour": []}
    ends: dict[str, list[Any]] = {"x": [], "y": [], "colour": []}
    for k, points in enumerate(evidence):
        if not points:
            continue
        colour = KIND_COLOURS[defects["kind"][k]]
        known = [list(point) for point in points]
        if defects["state"][k] == "candidate":
            known.append([counted, defects["log_e"][k]])
        lines["xs"].append([x for x, _ in known])
        lines["ys"].append([y for _, y in known])
        lines["colour"].append(colour)
        ends["x"].append(known[-1][0])
        ends["y"].append(known[-1][1])
        ends["colour"].append(colour)
        if from_start[k]:
            starts["xs"].append([0, known[0][0]])
            starts["ys"].append([0, known[0][1]])
            starts["colour"].append(colour)
    plot = _figure(x_axis_label="Counted frames", y_axis_label="Evidence (ln e)")
    few = 1.0 if len(lines["xs"]) < 100 else 0.4
    plot.multi_line("xs", "ys", source=starts, line_color="colour", line_alpha=0.25 * few)
    plot.multi_line("xs", "ys", source=lines, line_color="colour", line_alpha=0.8 * few, line_width=1.5)
    plot.scatter("x", "y", source=ends, size=4, fill_color="colour", line_color=None, fill_alpha=0.8)
    plot.add_layout(Span(location=threshold, dimension="width", line_dash="dashed", line_color="#8a94a0"))
    highest = max([*ends["y"], threshold])
    plot.y_range.start, plot.y_range.end = 0, 1.18 * highest
    plot.x_range.start, plot.x_range.end = 0, 1.04 * max([*ends["x"], 1])
    plot.add_layout(
        Label(
            x=1.03 * max([*ends["x"], 1]),
            y=threshold,
            text=f"stable from {threshold:.1f}",
            text_align="right",
            text_baseline="top",
            y_offset=-3,
            text_font_size="12px",
            name="label",
        )
    )
    return plot


def _sessions(sessions: Sequence[Answer]) -> Any:
    numbers = [one["session"] for one in sessions]
    counted = [one["frames_counted"] for one in sessions]
    total = [one["frames"] for one in sessions]
    plot = _figure(
        x_axis_label="Session",
        y_axis_label="Frames",
        y_range=(0, 1.25 * max(total)),
        x_range=(0.3, max(len(numbers), 8) + 0.7),
    )
    width = 0.8
    plot.vbar(numbers, width, counted, 0, fill_color="#1c7ed6", line_color=None, legend_label="counted")
    plot.vbar(numbers, width, total, counted, fill_color="#8a94a0", line_color=None, legend_label="not counted")
    plot.legend.orientation = "horizontal"
    plot.legend.location = "top_left"
    plot.legend.label_text_font_size = "12px"
    plot.legend.background_fill_alpha = 0.0
    plot.legend.border_line_color = None
    plot.legend.padding = plot.legend.margin = 2
    plot.xaxis.ticker.min_interval = 1
    plot.yaxis.ticker.min_interval = 1
    return plot

"use strict";
// Fills the page from the data in it. What is shown of one defect is drawn when it is chosen.
const DATA = JSON.parse(document.getElementById("data").textContent);
const SIZE = 2 * DATA.reach + 1, ROWS_AT_ONCE = 500, ROWS_AT_FIRST = 100;
const STATES = ["stable", "recovered", "candidate"];

const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
const escaped = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
const digits = (value, places = 0) =>
  value === null || value === undefined ? "" : value.toLocaleString("en", {minimumFractionDigits: places, maximumFractionDigits: places});
const rounded = (value) => (value === null ? "" : digits(value, Math.abs(value) >= 99.5 ? 0 : Math.abs(value) >= 9.95 ? 1 : 2));
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// --- plots

Bokeh.set_log_level("error"); // It warns of plots that are filled only when asked for.
const plots = new Set();

function paint(plot) {
  // A canvas does not know the page's colours.
  const text = css("--text"), soft = css("--soft"), line = css("--line"), grid = css("--grid");
  for (const part of [...plot.below, ...plot.left, ...plot.center]) {
    switch (part.type) {
      case "Grid": part.setv({grid_line_color: grid}); break;
      case "Legend": part.setv({label_text_color: soft}); break;
      case "Label": part.setv({text_color: text, background_fill_color: css("--card"), background_fill_alpha: 0.8}); break;
      case "Span": break;
      default:
        part.setv({axis_label_text_color: soft, major_label_text_color: soft, axis_line_color: line, major_tick_line_color: line});
    }
  }
}

const repaint = () => plots.forEach(paint);
const dark = matchMedia("(prefers-color-scheme: dark)");
dark.addEventListener("change", repaint);
addEventListener("beforeprint", repaint);
addEventListener("afterprint", repaint);

// Rows that nobody sees yet come when the plots are there.
const drawn = new Promise((resolve) => { draw.all = resolve; });
const whenIdle = (work) => drawn.then(() => setTimeout(work, 20));

async function draw(item, place) {
  const id = `plot-${draw.count = (draw.count || 0) + 1}`;
  place.id = id;
  const views = await Bokeh.embed.embed_item(item, id);
  const plot = views.roots[0].model;
  plots.add(plot);
  paint(plot);
  return plot;
}

const source = (plot, name) => plot.document.get_model_by_name(name);

// --- one sensor

class SensorView {
  constructor(section) {
    this.section = section;
    this.data = DATA.sensors[Number(section.dataset.sensor)];
    this.of = this.data.defects;
    this.count = (this.of.x || []).length;
    this.one = section.querySelector(".one");
    this.home = section.querySelector(".home");
    this.tbody = section.querySelector("table.defects tbody");
    this.thead = section.querySelector("table.defects thead");
    this.shown = [];
    this.chosen = -1;
    const at = this.data.frames_shown;
    this.excess = new Int16Array(bytesOf(this.data.excess));
    this.scale = new Float32Array(bytesOf(this.data.excess_scale));
    this.frames = at.at.length;
    this.atlas = new Image();
    this.atlas.src = this.data.atlas;
    this.fillLegend();
    this.fillFilter();
    this.fillHead();
    this.apply();
  }

  async drawPlots() {
    for (const place of this.section.querySelectorAll("[data-plot]")) {
      const plot = await draw(this.data.plots[place.dataset.plot], place);
      if (place.dataset.plot === "map") this.useMap(plot);
      await new Promise((resolve) => setTimeout(resolve));
    }
  }

  colour(k) { return DATA.kinds[this.of.kind[k]]; }

  fillLegend() {
    const legend = this.section.querySelector(".legend");
    const kinds = Object.keys(DATA.kinds).filter((kind) => (this.of.kind || []).includes(kind));
    const states = STATES.slice(1).filter((state) => (this.of.state || []).includes(state));
    if (this.data.declared_only.length) states.push("declared");
    legend.innerHTML = kinds.map((kind) => `<span><i style="--k:${DATA.kinds[kind]}"></i>${kind}</span>`)
      .concat(states.map((state) => `<span><i class="${state}"></i>${state === "declared" ? "declared, not found" : state}</span>`)).join("");
  }

  // --- the table

  columns() {
    const of = this.of, any = (key) => (of[key] || []).some((value) => value !== null);
    const moment = (text) => (text === null ? "" : text.slice(0, 10));
    const all = [
      {key: "x", title: "x", show: (k) => of.x[k]},
      {key: "y", title: "y", show: (k) => of.y[k]},
      {key: "colour", title: "colour", text: true, wide: true, show: (k) => of.colour[k]},
      {key: "kind", title: "kind", text: true, show: (k) => `<i class="k" style="--k:${this.colour(k)}"></i>${of.kind[k]}`},
      {key: "state", title: "state", text: true, show: (k) => of.state[k]},
      {key: "certainty", title: "certain (%)", wide: true, show: (k) => Math.floor(100 * of.certainty[k])},
      {key: "excess_adu", title: "excess (ADU)", wide: true, show: (k) => rounded(of.excess_adu[k])},
      {key: "excess_sigma", title: "excess (σ)", show: (k) => rounded(of.excess_sigma[k])},
      any("dark_current_adu_per_s") && {key: "dark_current_adu_per_s", title: "dark current (ADU/s)", wide: true, show: (k) => rounded(of.dark_current_adu_per_s[k])},
      {key: "stable_since", title: "stable since", text: true, wide: true, show: (k) => moment(of.stable_since[k])},
      {key: "frames_to_stable", title: "frames it took", wide: true, show: (k) => digits(of.frames_to_stable[k])},
      any("declared") && {key: "declared", title: "declared by", text: true, wide: true, show: (k) => escaped(of.declared[k] ?? "")},
    ];
    return all.filter(Boolean);
  }

  fillHead() {
    this.sorting = {key: "state", down: false};
    const cells = this.columns().map(({key, title, text, wide}) =>
      `<th data-key="${key}" class="${text ? "t" : ""} ${wide ? "wide" : ""}"><button type="button">${title}</button></th>`);
    this.thead.innerHTML = `<tr><th><span hidden>around it</span></th>${cells.join("")}</tr>`;
    this.thead.addEventListener("click", (event) => {
      const key = event.target.closest("th[data-key]")?.dataset.key;
      if (!key) return;
      const numeric = typeof this.of[key].find((value) => value !== null) === "number";
      const first = numeric && key !== "x" && key !== "y";
      this.sorting = {key, down: this.sorting.key === key ? !this.sorting.down : first};
      this.apply();
    });
    this.tbody.addEventListener("click", (event) => {
      const row = event.target.closest("tr[data-at]");
      if (row) this.choose(Number(row.dataset.at), row);
    });
  }

  fillFilter() {
    this.form = this.section.querySelector(".filter");
    for (const select of this.form.querySelectorAll("select")) {
      const values = [...new Set(this.of[select.dataset.key] || [])];
      values.sort();
      select.insertAdjacentHTML("beforeend", values.map((value) => `<option>${escaped(value)}</option>`).join(""));
    }
    this.form.addEventListener("input", () => this.apply());
  }

  wanted() {
    const words = this.form.querySelector("input").value.toLowerCase().split(/[\s,;]+/).filter(Boolean);
    const selects = [...this.form.querySelectorAll("select")].filter((select) => select.value);
    const of = this.of, found = [];
    for (let k = 0; k < this.count; k++) {
      if (selects.some((select) => of[select.dataset.key][k] !== select.value)) continue;
      const named = [of.x[k], of.y[k]].map(String), text = [of.kind[k], of.state[k], of.colour[k].toLowerCase(), String(of.declared[k] ?? "").toLowerCase()];
      if (words.every((word) => (/^\d+$/.test(word) ? named.includes(word) : text.some((t) => t.includes(word))))) found.push(k);
    }
    return found;
  }

  apply() {
    const {key, down} = this.sorting, of = this.of;
    const strength = (k) => Math.abs(of.excess_sigma[k] ?? 0);
    const value = key === "state" ? (k) => STATES.indexOf(of.state[k]) : (k) => of[key][k];
    this.shown = this.wanted().sort((a, b) => {
      const u = value(a), v = value(b);
      // What is not known comes last, whichever way.
      if (u === null || v === null) return (u === null) - (v === null) || a - b;
      const order = typeof u === "string" ? (u < v ? -1 : u > v ? 1 : 0) : u - v;
      return (down ? -order : order) || strength(b) - strength(a) || a - b;
    });
    for (const head of this.thead.querySelectorAll("th[data-key]")) {
      if (head.dataset.key === key) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    this.form.querySelector("output").textContent = `${digits(this.shown.length)} of ${digits(this.count)}`;
    this.section.classList.toggle("many", this.shown.length > 100);
    if (this.one.closest("tbody")) this.home.append(this.one);
    this.tbody.textContent = "";
    this.fill(0);
    if (this.map) this.fillMap();
  }

  fill(from) {
    // In parts, so that the page answers while thousands of rows are made.
    const columns = this.columns(), parts = [];
    const across = this.data.atlas_columns, sheet = `url(${this.data.atlas})`;
    const shown = this.shown, to = from + (from ? ROWS_AT_ONCE : ROWS_AT_FIRST);
    for (const k of shown.slice(from, to)) {
      const x = -26 * (k % across), y = -26 * Math.floor(k / across);
      const cells = columns.map(({text, wide, show}) => `<td class="${text ? "t" : ""} ${wide ? "wide" : ""}">${show(k)}</td>`);
      parts.push(`<tr data-at="${k}"${k === this.chosen ? ' class="chosen"' : ""}><td><i class="crop" style="background-position:${x}px ${y}px"></i></td>${cells.join("")}</tr>`);
    }
    if (!this.style) {
      this.style = document.createElement("style");
      this.style.textContent = `#${this.section.id} i.crop { background-image: ${sheet}; background-size: ${26 * across}px auto; }`;
      document.head.append(this.style);
    }
    this.tbody.insertAdjacentHTML("beforeend", parts.join(""));
    if (to < this.shown.length) whenIdle(() => shown === this.shown && this.fill(to));
  }

  // --- the map

  useMap(plot) {
    this.map = plot;
    for (const state of [...STATES, "declared"]) {
      const points = source(plot, state);
      points.selected.properties.indices.change.connect(() => {
        const [index] = points.selected.indices;
        if (index === undefined) return;
        const k = points.data.at[index];
        points.selected.indices = [];
        if (k >= 0) this.choose(k, null);
      });
    }
    this.fillMap();
  }

  fillMap() {
    const of = this.of, points = {};
    for (const state of [...STATES, "declared"]) points[state] = {x: [], y: [], at: [], colour: [], what: []};
    const add = (state, x, y, k, colour, what) => {
      const to = points[state];
      to.x.push(x); to.y.push(y); to.at.push(k); to.colour.push(colour); to.what.push(what);
    };
    for (const k of this.shown) add(of.state[k], of.x[k], of.y[k], k, this.colour(k), `${of.kind[k]}, ${of.state[k]}`);
    for (const [x, y, by] of this.data.declared_only) add("declared", x, y, -1, css("--soft"), `declared by ${escaped(by)}, not found`);
    for (const [state, data] of Object.entries(points)) source(this.map, state).data = data;
    this.mark();
  }

  mark() {
    const k = this.chosen;
    if (this.map) source(this.map, "chosen").data = k < 0 ? {x: [], y: []} : {x: [this.of.x[k]], y: [this.of.y[k]]};
    for (const row of this.tbody.querySelectorAll("tr.chosen")) row.classList.remove("chosen");
    this.tbody.querySelector(`tr[data-at="${k}"]`)?.classList.add("chosen");
  }

  // --- one defect

  async choose(k, row) {
    this.chosen = k;
    this.mark();
    this.tbody.querySelector("tr.below")?.remove();
    if (row) {
      const below = document.createElement("tr");
      below.className = "below";
      below.innerHTML = `<td colspan="${this.columns().length + 1}"></td>`;
      row.after(below);
      below.firstChild.append(this.one);
    } else {
      this.home.append(this.one);
    }
    this.one.hidden = false;
    this.describe(k);
    if (!this.single) {
      this.single = {};
      for (const place of this.one.querySelectorAll("[data-single]")) {
        this.single[place.dataset.single] = await draw(this.data.plots[place.dataset.single], place);
      }
    }
    this.fillSingle(this.chosen);
  }

  describe(k) {
    const of = this.of, fit = this.data.fits[k];
    if (!this.one.firstElementChild) {
      const part = (name, title) => `<div data-part="${name}"><h4>${title}</h4><div class="plot" data-single="${name}"></div><p class="none" hidden></p></div>`;
      this.one.innerHTML = `<header><canvas class="crop" width="${SIZE}" height="${SIZE}"></canvas><div><h3></h3><dl></dl></div></header>
        <p class="key">Filled: darks. Hollow: light frames. Line: the fit.</p>
        <div class="plots">${part("over_time", "Excess over time")}${part("over_exposure", "Excess and exposure")}${part("over_temperature", "Excess and temperature")}</div>`;
    }
    this.one.querySelector("h3").textContent = `${of.x[k]}, ${of.y[k]}: ${of.kind[k]}`;
    const minute = (text) => text.slice(0, 16).replace("T", " ");
    const facts = [
      ["state", `${of.state[k]}, ${Math.floor(100 * of.certainty[k])} % certain`],
      ["colour", of.colour[k]],
      of.excess_adu[k] !== null && ["excess", `${rounded(of.excess_adu[k])} ADU, ${rounded(of.excess_sigma[k])} σ`],
      of.dark_current_adu_per_s[k] !== null && ["dark current", `${rounded(of.dark_current_adu_per_s[k])} ADU/s at ISO ${digits(of.dark_current_iso[k])}`],
      fit && ["doubles every", `${digits(fit[2], fit[3] < 0.095 ? 2 : 1)} ± ${digits(fit[3], fit[3] < 0.095 ? 2 : 1)} °C`],
      of.share_on[k] !== null && of.share_on[k] < 1 && ["there in", `${Math.round(100 * of.share_on[k])} % of frames`],
      of.first_seen[k] && ["first seen", minute(of.first_seen[k])],
      of.stable_since[k] && ["stable since", `${minute(of.stable_since[k])}, after ${of.frames_to_stable[k]} frames`],
      of.declared[k] && ["declared by", of.declared[k]],
    ].filter(Boolean);
    this.one.querySelector("dl").innerHTML = facts.map(([term, what]) => `<dt>${term}</dt><dd>${escaped(what)}</dd>`).join("");
    const across = this.data.atlas_columns, context = this.one.querySelector("canvas.crop").getContext("2d");
    const show = () => context.drawImage(this.atlas, SIZE * (k % across), SIZE * Math.floor(k / across), SIZE, SIZE, 0, 0, SIZE, SIZE);
    this.atlas.complete ? show() : this.atlas.addEventListener("load", show, {once: true});
  }

  fillSingle(k) {
    const {at, exposure_s, iso, sensor_temp_c, dark: isDark} = this.data.frames_shown;
    const of = this.of, fit = this.data.fits[k], colour = this.colour(k);
    const seen = [];
    for (let n = 0; n < this.frames; n++) {
      const level = this.excess[k * this.frames + n];
      if (level === -32768) continue;
      const gain = iso[n] > 0 ? iso[n] / 100 : 1;
      seen.push({n, excess: level * this.scale[k], exposure: exposure_s[n] === null ? null : exposure_s[n] * gain, temp: sensor_temp_c[n], dark: isDark[n]});
    }
    const set = (name, points, line, why) => {
      const part = this.one.querySelector(`[data-part="${name}"]`), none = part.querySelector(".none");
      part.querySelector(".plot").hidden = !points.length;
      none.hidden = Boolean(points.length);
      none.textContent = why;
      if (!points.length) return;
      const plot = this.single[name];
      for (const kind of ["dark", "light"]) {
        const own = points.filter((point) => point.dark === (kind === "dark"));
        this.data_of(plot, kind).data = {x: own.map((p) => p.x), y: own.map((p) => p.y)};
        const glyph = this.drawer_of(plot, kind).glyph;
        glyph.setv({fill_color: {value: colour}, line_color: {value: colour}});
      }
      this.data_of(plot, "fit").data = line || {x: [], y: []};
    };
    const unknown = this.frames ? "The files do not tell." : "No frames are kept of it.";
    set("over_time", seen.map((s) => ({x: 1000 * at[s.n], y: s.excess, dark: s.dark})), null, "No single observations of it are kept.");
    // Where temperatures differ, all is brought to one, or no line could be seen.
    const factor = (s) => (fit ? 2 ** ((fit[1] - s.temp) / fit[2]) : 1);
    // Light hides dark current.
    const own = seen.some((s) => s.dark) ? seen.filter((s) => s.dark) : seen;
    const exposed = own.filter((s) => s.exposure !== null && (!fit || s.temp !== null)).map((s) => ({x: s.exposure, y: s.excess * factor(s), dark: s.dark}));
    const longest = exposed.reduce((most, p) => Math.max(most, p.x), 0);
    const rate = fit ? fit[0] : of.dark_current_adu_per_s[k] === null ? null : of.dark_current_adu_per_s[k] * 100 / of.dark_current_iso[k];
    this.one.querySelector('[data-part="over_exposure"] h4').textContent = fit ? `Excess and exposure, brought to ${digits(fit[1])} °C` : "Excess and exposure";
    set("over_exposure", exposed, rate === null ? null : {x: [0, longest], y: [0, rate * longest]}, unknown);
    const warm = own.filter((s) => s.temp !== null && s.exposure > 0 && s.excess > 0).map((s) => ({x: s.temp, y: s.excess / s.exposure, dark: s.dark}));
    let line = null;
    if (fit) {
      const temps = warm.map((p) => p.x), low = Math.min(...temps), high = Math.max(...temps);
      const steps = [...Array(33).keys()].map((n) => low + ((high - low) * n) / 32);
      line = {x: steps, y: steps.map((t) => fit[0] * 2 ** ((t - fit[1]) / fit[2]))};
    }
    set("over_temperature", warm, line, unknown);
  }

  data_of(plot, name) { return this.drawer_of(plot, name).data_source; }

  drawer_of(plot, name) { return plot.renderers.find((renderer) => renderer.name === name); }
}

const views = [...document.querySelectorAll("section.sensor")].map((section) => new SensorView(section));

async function drawAll() {
  for (const view of views) {
    await view.drawPlots();
    if (view.count && view === views[0]) await view.choose(view.shown[0], null);
  }
  document.documentElement.dataset.drawn = "all";
  draw.all();
}
// After the first paint: words and tables come at once.
requestAnimationFrame(() => setTimeout(drawAll));

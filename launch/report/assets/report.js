"use strict";
// Draws the curves of the page from the JSON beside it, and turns its pictures. It loads nothing and stores nothing.

const ROOT = document.documentElement;
window.addEventListener("error", (event) => broke(event.message));
window.addEventListener("unhandledrejection", (event) => broke(String(event.reason)));

/** Show what went wrong, rather than half a page that looks whole. */
function broke(message) {
  ROOT.dataset.broken = message;
  const box = document.body.appendChild(document.createElement("p"));
  box.id = "broken";
  box.textContent = `A part of this page could not be drawn: ${message}`;
}

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 170, TALL = 230, TOP = 10, BOTTOM = 22, LEFT = 46;

function svg(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function html(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Offer a text as a file. */
function save(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: name.endsWith("svg") ? "image/svg+xml" : "text/csv" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** The classes of the series of a number: 8 colours and, for eyes that do not tell them apart, 3 dashes; 24 pairs. */
function kind(number) {
  return `c${number % 8} d${number % 3}`;
}

/** A value in few characters. */
function told(value, percent) {
  if (value === null || !Number.isFinite(value)) return "–";
  if (percent) {
    const hundredths = Math.abs(100 * value);
    return hundredths > 0 && hundredths < 0.01 ? "< 0.01 %" : `${(100 * value).toFixed(hundredths < 1 ? 2 : 1)} %`;
  }
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2).replace("e+", "e");
  if (size >= 1e4) return Math.round(value).toLocaleString("en");
  return trim(value.toPrecision(4));
}

function trim(text) {
  return text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text;
}

/** A label of an axis whose neighbours are `step` away. */
function tick(value, step, percent) {
  const scaled = percent ? 100 * value : value, apart = percent ? 100 * step : step;
  const size = Math.abs(scaled);
  if (size >= 1e6) return `${trim((scaled / 1e6).toFixed(apart < 1e5 ? 2 : 1))}M`;
  if (size >= 1e4) return `${trim((scaled / 1e3).toFixed(apart < 1e3 ? 1 : 0))}k`;
  if (size !== 0 && apart < 1e-4) return scaled.toExponential(1).replace("e+", "e");
  const digits = Math.max(0, -Math.floor(Math.log10(apart) + 1e-9));
  return scaled.toFixed(Math.min(digits, 6)) + (percent ? "%" : "");
}

/** Round numbers from `low` to `high`, about `count` of them, and their distance. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let number = Math.ceil(low / step - 1e-9); number * step <= high + 1e-9 * step; number++) found.push(number * step);
  return [found, step];
}

/** Powers of ten within a range, or 1-2-5 steps where it holds fewer than two. */
function powers(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const factor of [1, 2, 5]) found.push([factor * 10 ** power, factor]);
  const inside = found.filter(([value]) => value >= low * 0.999 && value <= high * 1.001);
  const tens = inside.filter(([, factor]) => factor === 1).map(([value]) => value);
  const all = inside.map(([value]) => value);
  const chosen = tens.length >= 2 ? tens : all;
  return chosen.filter((_, index) => index % Math.ceil(chosen.length / 5) === 0);
}

/** An exponential average of `values`, unbiased at its start. */
function smoothed(values, weight) {
  let sum = 0, share = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    share = weight * share + (1 - weight);
    return sum / share;
  });
}

/** The index of the entry of ascending `xs` that is nearest to `x`. */
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
}

const shared = { smoothing: 0, logarithmic: false, clipped: false, view: null };
const charts = [];

/** One small plot. All plots share the range of steps, so that what happened together is seen together. */
class Chart {
  constructor(given, marks, whole, place) {
    Object.assign(this, given, { marks, whole, ownLog: given.log });
    this.height = this.wide ? TALL : HEIGHT;
    this.figure = place.appendChild(html("figure", this.wide ? "chart wide" : "chart"));
    const caption = this.figure.appendChild(html("figcaption"));
    caption.append(html("b", "", this.title));
    const right = caption.appendChild(html("span"));
    this.readout = right.appendChild(document.createElement("output"));
    this.button = right.appendChild(html("button", "log", "log"));
    this.button.type = "button";
    this.button.title = "Logarithmic scale for this curve";
    this.button.addEventListener("click", () => { this.ownLog = !this.ownLog; this.draw(); });
    for (const [form, make] of [["csv", () => this.csv()], ["svg", () => this.image()]]) {
      const button = right.appendChild(html("button", "save", form));
      button.type = "button";
      button.title = `Download this curve as ${form.toUpperCase()}`;
      button.addEventListener("click", () => save(`${this.title.replace(/[^\p{L}\p{N}]+/gu, "-")}.${form}`, make()));
    }
    this.plot = this.figure.appendChild(svg("svg", { role: "img", tabindex: 0 }));
    this.plot.addEventListener("pointermove", (event) => this.moved(event));
    this.plot.addEventListener("pointerleave", () => { if (!this.from) charts.forEach((chart) => chart.point(null)); });
    this.plot.addEventListener("pointerdown", (event) => this.grabbed(event));
    this.plot.addEventListener("pointerup", (event) => this.released(event));
    this.plot.addEventListener("dblclick", () => look(null));
    this.plot.addEventListener("keydown", (event) => this.typed(event));
    this.plot.addEventListener("blur", () => charts.forEach((chart) => chart.point(null)));
    const parts = this.series.filter((each) => each.y.length).map((each) =>
      `${each.label} ends at ${told(each.y.at(-1), this.percent)} in step ${each.x.at(-1)}`);
    this.plot.setAttribute("aria-label", `${this.title}: ${parts.join("; ") || "no finite value"}`);
  }

  /** Its values, a line a point: of several neighbours that were joined, mean, lowest and highest. */
  csv() {
    const quoted = (text) => `"${String(text).replace(/^(?=[=+@\-\t])/, "'").replaceAll('"', '""')}"`;  // no formula
    const lines = ["series,step,value,low,high"];
    for (const each of this.series)
      each.x.forEach((x, index) => lines.push([quoted(each.label), x, each.y[index], each.lo?.[index] ?? "", each.hi?.[index] ?? ""].join()));
    return lines.join("\r\n") + "\r\n";
  }

  /** The drawing as a file of its own, with the colours it has now. */
  image() {
    this.point(null);
    const copy = this.plot.cloneNode(true), parts = this.plot.querySelectorAll("*"), box = this.plot.viewBox.baseVal;
    copy.querySelectorAll("*").forEach((part, index) => {
      const style = getComputedStyle(parts[index]);
      for (const name of ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size", "font-family", "font-weight"])
        part.style.setProperty(name, style.getPropertyValue(name));
    });
    for (const [name, value] of [["xmlns", SVG], ["width", box.width], ["height", box.height + 20], ["viewBox", `0 -20 ${box.width} ${box.height + 20}`]])
      copy.setAttribute(name, value);
    const ground = svg("rect", { x: 0, y: -20, width: "100%", height: "100%", fill: getComputedStyle(document.body).backgroundColor });
    copy.prepend(ground, svg("text", { x: 4, y: -6, "font-family": "sans-serif", "font-size": 12, fill: getComputedStyle(document.body).color }, this.title));
    return new XMLSerializer().serializeToString(copy);
  }

  get range() {
    const [first, last] = shared.view ?? this.whole;
    return first === last ? [first - 1, last + 1] : [first, last];
  }

  /** What is to be seen of a series: its points in the range, with one more on each side. */
  visible(each) {
    const [first, last] = this.range;
    let start = each.x.findIndex((x) => x >= first);
    if (start < 0) start = each.x.length;
    let end = each.x.findLastIndex((x) => x <= last) + 1;
    start = Math.max(0, start - 1); end = Math.min(each.x.length, end + 1);
    const cut = (values) => values?.slice(start, end);
    const y = shared.smoothing && !each.points ? smoothed(each.y, shared.smoothing) : each.y;
    return { ...each, x: cut(each.x), raw: cut(each.y), y: cut(y), lo: cut(each.lo), hi: cut(each.hi) };
  }

  draw() {
    this.log = this.ownLog !== shared.logarithmic;
    const shown = this.series.map((each) => this.visible(each));
    let values = shown.flatMap((each) => [...(each.lo ?? []), ...(each.hi ?? []), ...each.raw]).filter(Number.isFinite);
    if (this.log) values = values.filter((value) => value > 0);
    this.log = this.log && values.length > 0;
    this.button.setAttribute("aria-pressed", String(this.log));
    values.sort((a, b) => a - b);
    const cut = shared.clipped && values.length > 50 ? Math.floor(values.length / 50) : 0;
    let low = values[cut] ?? 0, high = values[values.length - 1 - cut] ?? 1;
    if (this.log) {
      if (high / low < 1.2) { low /= 1.1; high *= 1.1; }
    } else {
      if (low >= 0 && low < 0.35 * high) low = 0;  // a curve that comes near to zero is seen from zero
      if (high === low) { const room = Math.abs(high) / 10 || 1; low -= low === 0 ? 0 : room; high += room; }
      const room = 0.04 * (high - low);
      low = low === 0 ? 0 : low - room; high += room;
    }
    this.low = low; this.high = high;
    const width = Math.max(160, this.plot.clientWidth || 320);
    this.right = 50; this.width = width;
    this.plot.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    this.plot.replaceChildren();
    this.axes();
    this.drawMarks();
    const clip = `clip-${charts.indexOf(this)}`;
    const inside = svg("clipPath", { id: clip });
    inside.append(svg("rect", { x: LEFT - 4, y: 0, width: width - LEFT - this.right + 8, height: this.height - BOTTOM + 2 }));
    this.plot.append(inside);
    const lines = this.plot.appendChild(svg("g", { "clip-path": `url(#${clip})` }));
    for (const each of shown) this.drawSeries(lines, each);
    this.drawEnds(shown);
    this.cursor = this.plot.appendChild(svg("g", {}));
    this.chosen = this.plot.appendChild(svg("rect", { class: "chosen", y: TOP, height: this.height - TOP - BOTTOM, width: 0 }));
    this.point(null);
  }

  px(x) {
    const [first, last] = this.range;
    return LEFT + (x - first) / (last - first) * (this.width - LEFT - this.right);
  }

  py(y) {
    const share = this.log ? Math.log(y / this.low) / Math.log(this.high / this.low) : (y - this.low) / (this.high - this.low);
    const clear = Number.isFinite(share) ? Math.max(-1, Math.min(2, share)) : -1;
    return this.height - BOTTOM - clear * (this.height - TOP - BOTTOM);
  }

  axes() {
    const [values, apart] = this.log ? [powers(this.low, this.high), 0] : ticks(this.low, this.high, this.height > HEIGHT ? 7 : 5);
    for (const value of values) {
      const y = this.py(value);
      this.plot.append(svg("line", { class: "grid", x1: LEFT, x2: this.width - this.right, y1: y, y2: y }));
      const text = this.log ? told(value, this.percent).replace(" ", "") : tick(value, apart, this.percent);
      this.plot.append(svg("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, text));
    }
    const bottom = this.height - BOTTOM;
    this.plot.append(svg("line", { class: "axis", x1: LEFT, x2: this.width - this.right, y1: bottom, y2: bottom }));
    const [steps, between] = ticks(...this.range, Math.max(2, Math.floor(this.width / 95)));
    for (const step of steps.filter(Number.isInteger)) {
      const text = svg("text", { x: this.px(step), y: this.height - 6, "text-anchor": "middle" }, tick(step, between, false));
      this.plot.append(svg("line", { class: "axis", x1: this.px(step), x2: this.px(step), y1: bottom, y2: bottom + 4 }), text);
    }
    for (const reference of this.references) {
      if (reference.y < this.low || reference.y > this.high) continue;
      const y = this.py(reference.y);
      this.plot.append(svg("line", { class: "reference", x1: LEFT, x2: this.width - this.right, y1: y, y2: y }));
      this.plot.append(svg("text", { x: LEFT + 4, y: y - 3 }, reference.label));
    }
  }

  drawMarks() {
    const [first, last] = this.range;
    for (const mark of this.marks) {
      if (mark.step < first || mark.step > last) continue;
      const x = this.px(mark.step), bottom = this.height - BOTTOM;
      const made = mark.kind === "restart"
        ? svg("line", { class: "restart", x1: x, x2: x, y1: TOP, y2: bottom })
        : svg("path", { class: "alarm", d: `M${x - 4} ${TOP - 8}h8l-4 7z` });
      made.append(svg("title", {}, `step ${mark.step}: ${mark.label}`));
      this.plot.append(made);
    }
  }

  drawSeries(place, each) {
    const group = place.appendChild(svg("g", { class: kind(each.color) }));
    const at = (values) => each.x.map((x, index) => `${this.px(x).toFixed(1)} ${this.py(values[index]).toFixed(1)}`);
    if (each.points) {
      group.append(svg("path", { class: "line", d: each.x.length ? `M${at(each.y).join("L")}` : "" }));
      each.x.forEach((x, index) => {
        const px = this.px(x);
        group.append(svg("line", { class: "whisker", x1: px, x2: px, y1: this.py(each.lo[index]), y2: this.py(each.hi[index]) }));
        group.append(svg("circle", { class: "point", cx: px, cy: this.py(each.y[index]), r: 3 }));
      });
      return;
    }
    if (each.x.length === 1) group.append(svg("circle", { class: "point", cx: this.px(each.x[0]), cy: this.py(each.y[0]), r: 3 }));
    if (each.x.length > 1) {
      if (each.lo) group.append(svg("path", { class: "band", d: `M${at(each.hi).join("L")}L${at(each.lo).reverse().join("L")}Z` }));
      if (shared.smoothing) group.append(svg("path", { class: "line faint", d: `M${at(each.raw).join("L")}` }));
      group.append(svg("path", { class: "line", d: `M${at(each.y).join("L")}` }));
    }
    for (const step of each.bad ?? []) {
      const x = this.px(step), bottom = this.height - BOTTOM;
      const mark = svg("path", { class: "bad", d: `M${x - 4} ${bottom}h8l-4 -7z` });
      mark.append(svg("title", {}, `step ${step}: not a finite number`));
      group.append(mark);
    }
  }

  /** The last value of each series beside its end, moved apart where they would lie on each other. */
  drawEnds(shown) {
    const last = this.range[1];
    const ends = shown.filter((each) => each.y.length).map((each) => {
      let index = each.x.findLastIndex((x) => x <= last);
      if (index < 0) index = 0;
      return { each, value: each.y[index], y: Math.max(TOP, Math.min(this.height - BOTTOM, this.py(each.y[index]))) + 4 };
    }).sort((a, b) => a.y - b.y);
    if (ends.length > 10) return;
    for (let index = 1; index < ends.length; index++) ends[index].y = Math.max(ends[index].y, ends[index - 1].y + 12);
    const over = ends.length ? Math.max(0, ends.at(-1).y - (this.height - 8)) : 0;
    for (const end of ends) {
      const text = told(end.value, this.percent).replace(" %", "%");
      this.plot.append(svg("text", { class: `end ${kind(end.each.color)}`, x: this.width - this.right + 6, y: end.y - over }, text));
    }
  }

  stepAt(event) {
    const box = this.plot.getBoundingClientRect();
    const share = ((event.clientX - box.left) * this.width / box.width - LEFT) / (this.width - LEFT - this.right);
    const [first, last] = this.range;
    return first + Math.max(0, Math.min(1, share)) * (last - first);
  }

  moved(event) {
    const step = this.stepAt(event);
    if (this.from !== undefined) {
      const [a, b] = [this.px(this.from), this.px(step)].sort((x, y) => x - y);
      this.chosen.setAttribute("x", a);
      this.chosen.setAttribute("width", b - a);
    }
    charts.forEach((chart) => chart.point(step));
  }

  /** Arrows walk over the points, with Shift ten at a time; Home and End go to the first and the last in sight. */
  typed(event) {
    const [first, last] = this.range;
    const steps = (this.series.find((each) => each.x.length)?.x ?? []).filter((x) => x >= first && x <= last);
    const far = event.shiftKey ? 10 : 1, at = this.at === null ? steps.length : nearest(steps, this.at);
    const to = { ArrowLeft: at - far, ArrowRight: at + far, Home: 0, End: steps.length - 1 }[event.key];
    if (event.key === "Escape") look(null);
    if (to === undefined || !steps.length) return;
    event.preventDefault();
    const step = steps[Math.max(0, Math.min(steps.length - 1, to))];
    charts.forEach((chart) => chart.point(step));
  }

  grabbed(event) {
    if (event.pointerType !== "mouse" || event.button) return;
    this.from = this.stepAt(event);
    this.plot.setPointerCapture(event.pointerId);
  }

  released(event) {
    if (this.from === undefined) return;
    const range = [this.from, this.stepAt(event)].sort((a, b) => a - b);
    this.from = undefined;
    if (this.px(range[1]) - this.px(range[0]) > 6) look(range); else this.chosen.setAttribute("width", 0);
  }

  /** Tell the values at a step, or with null nothing. */
  point(step) {
    this.at = step;
    this.cursor?.replaceChildren();
    if (step === null || !this.cursor) { this.readout.textContent = ""; return; }
    const parts = [];
    let at = null;
    for (const each of this.series) {
      if (!each.x.length) continue;
      const index = nearest(each.x, step);
      const value = each.y[index];
      if (at === null || Math.abs(each.x[index] - step) < Math.abs(at - step)) at = each.x[index];
      const spread = each.lo && each.hi[index] > each.lo[index]
        ? ` (${told(each.lo[index], this.percent)} … ${told(each.hi[index], this.percent)})` : "";
      if (parts.length < 4) parts.push(told(value, this.percent) + (this.series.length === 1 ? spread : ""));
      this.cursor.append(svg("circle", { class: `point ${kind(each.color)}`, cx: this.px(each.x[index]), cy: this.py(value), r: 3 }));
    }
    if (at === null) return;
    const x = this.px(at);
    if (x >= LEFT - 1 && x <= this.width - this.right + 1)
      this.cursor.prepend(svg("line", { class: "cross", x1: x, x2: x, y1: TOP, y2: this.height - BOTTOM }));
    this.readout.textContent = `step ${at.toLocaleString("en")}: ${parts.join(" · ")} `;
  }
}

/** Show these steps, or with null all. */
function look(range) {
  shared.view = range;
  document.getElementById("whole").disabled = range === null;
  redraw();
}

function redraw() {
  for (const chart of charts) chart.draw();
}

function drawAll() {
  const given = JSON.parse(document.getElementById("charts").textContent);
  const ends = given.groups.flatMap((group) => group.charts.flatMap((chart) => chart.series.flatMap(
    (each) => [...each.x, ...(each.bad ?? [])])));
  const whole = ends.reduce(([low, high], x) => [Math.min(low, x), Math.max(high, x)], [Infinity, -Infinity]);
  for (const place of document.querySelectorAll("[data-group]")) {
    const group = given.groups[Number(place.dataset.group)];
    const labels = new Map(group.charts.flatMap((chart) => chart.series.map((each) => [each.label, each.color])));
    if (labels.size > 1 && labels.size <= 24) {
      const legend = html("ul", "legend");
      for (const [label, color] of labels) legend.append(html("li", kind(color), label));
      place.before(legend);
    }
    for (const chart of group.charts) charts.push(new Chart(chart, given.marks, whole, place));
  }
  redraw();
  for (const part of document.querySelectorAll("details:has(.charts)")) part.addEventListener("toggle", redraw);
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) { width = window.innerWidth; requestAnimationFrame(redraw); }
  });
}

function listen() {
  const byId = (id) => document.getElementById(id);
  byId("theme").addEventListener("click", () => {
    const dark = ROOT.dataset.theme ? ROOT.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    ROOT.dataset.theme = dark ? "light" : "dark";
  });
  if (!byId("smoothing")) return;
  byId("smoothing").addEventListener("input", (event) => {
    shared.smoothing = Number(event.target.value);
    byId("smoothed").textContent = event.target.value;
    redraw();
  });
  for (const name of ["logarithmic", "clipped"])
    byId(name).addEventListener("change", (event) => { shared[name] = event.target.checked; redraw(); });
  byId("whole").addEventListener("click", () => look(null));
  byId("smoothing").form.addEventListener("submit", (event) => event.preventDefault());
}

/** Pictures of many steps one at a time in the same place, where a change is seen best; or all in a row. */
function turnPictures() {
  for (const gallery of document.querySelectorAll(".gallery")) {
    const strip = gallery.querySelector(".strip"), figures = [...strip.children];
    if (figures.length < 2) continue;
    const bar = html("div", "turning");
    const range = bar.appendChild(document.createElement("input"));
    Object.assign(range, { type: "range", min: 0, max: figures.length - 1, value: figures.length - 1 });
    range.setAttribute("aria-label", "step");
    const toggle = bar.appendChild(html("button", "", "one at a time"));
    toggle.type = "button";
    range.hidden = true;
    const show = () => figures.forEach((figure, index) => figure.classList.toggle("shown", index === Number(range.value)));
    range.addEventListener("input", show);
    toggle.addEventListener("click", () => {
      const single = strip.classList.toggle("single");
      range.hidden = !single;
      toggle.textContent = single ? "all in a row" : "one at a time";
      show();
    });
    strip.before(bar);
    if (!document.querySelector(".side")) toggle.click();
  }
}

window.addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});

listen();
turnPictures();
drawAll();
ROOT.dataset.drawn = String(charts.length);

// When all is loaded: what is there in the browser's eyes, then what the controls do to it; written into the page.
const all = (selector) => [...document.querySelectorAll(selector)];
const byId = (id) => document.getElementById(id);
const lines = () => all(".chart path.line").map((path) => path.getAttribute("d"));
const isBad = (part) => [...part.attributes].some((each) => /NaN|Infinity/.test(each.value));

function seen() {
  return {
    drawn: document.documentElement.dataset.drawn,
    broken: document.documentElement.dataset.broken ?? null,
    titles: all(".chart figcaption b").map((title) => title.textContent),
    lines: lines().map((line) => (line.match(/[ML]/g) ?? []).length),
    dashes: all(".chart path.line").map((path) => getComputedStyle(path).strokeDasharray),
    nan: all("svg *").filter(isBad).length,
    outside: all(".chart svg").filter((plot) => plot.getBoundingClientRect().right > innerWidth + 1).length,
    labelled: all(".chart svg").filter((plot) => plot.getAttribute("aria-label")).length,
    restarts: all(".chart line.restart").length,
    alarms: all(".chart path.alarm").length,
    bad: all(".chart path.bad").length,
    pictures: all(".gallery img").map((image) => image.naturalWidth),
    tables: all("table").length,
    wide: document.documentElement.scrollWidth - innerWidth,
    paper: getComputedStyle(document.body).backgroundColor,
  };
}

function change(id, key, value, kind) {
  byId(id)[key] = value;
  byId(id).dispatchEvent(new Event(kind));
  return lines().join();
}

function moved() {
  const found = {}, before = lines().join();
  found.smoothed = change("smoothing", "value", 0.9, "input") !== before && all(".chart path.faint").length > 0;
  found.restored = change("smoothing", "value", 0, "input") === before;
  found.logarithmic = change("logarithmic", "checked", true, "change") !== before;
  change("logarithmic", "checked", false, "change");
  change("clipped", "checked", true, "change");
  change("clipped", "checked", false, "change");
  const plot = document.querySelector(".chart svg"), box = plot.getBoundingClientRect();
  plot.setPointerCapture = () => {};
  const point = (kind, share) => plot.dispatchEvent(new PointerEvent(kind, {
    clientX: box.left + share * box.width, clientY: box.top + 50, pointerType: "mouse" }));
  point("pointermove", 0.5);
  found.told = all(".chart output").map((output) => output.textContent);
  found.crosses = all(".chart line.cross").length;
  point("pointerdown", 0.4);
  point("pointermove", 0.6);
  point("pointerup", 0.6);
  found.zoomed = lines().join() !== before && !byId("whole").disabled;
  byId("whole").click();
  found.whole = lines().join() === before;
  const type = (key) => plot.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
  found.typed = ["Home", "ArrowRight", "End"].map((key) => {
    type(key);
    return document.querySelector(".chart output").textContent;
  });
  return found;
}

/** What the buttons of the first curve offer as files; the texts are taken before they are downloads. */
function saved() {
  const texts = [], Kept = window.Blob;
  window.Blob = function (parts, options) { texts.push(parts.join("")); return new Kept(parts, options); };
  HTMLAnchorElement.prototype.click = () => {};
  all(".chart").slice(0, 1).forEach((chart) => chart.querySelectorAll("button.save").forEach((button) => button.click()));
  window.Blob = Kept;
  const drawn = new DOMParser().parseFromString(texts[1] ?? "", "image/svg+xml");
  return { csv: texts[0], svg: drawn.documentElement.nodeName, svgLines: drawn.querySelectorAll("path.line").length };
}

function turned() {
  const toggle = document.querySelector(".turning button");
  if (!toggle) return {};
  const range = document.querySelector(".turning input");
  range.value = 0;
  range.dispatchEvent(new Event("input"));
  return { single: [...toggle.closest(".gallery").querySelectorAll("figure")].map((each) => each.checkVisibility()) };
}

addEventListener("load", () => {
  const found = { ...seen(), ...(byId("smoothing") ? moved() : {}), ...saved(), ...turned() };
  byId("theme").click();
  found.turned = getComputedStyle(document.body).backgroundColor;
  const asked = performance.getEntriesByType("resource").map((each) => each.name);
  found.requests = asked.filter((name) => !name.startsWith("data:"));
  found.wrong = wrong;
  const told = document.body.appendChild(document.createElement("pre"));
  told.id = "found";
  told.textContent = JSON.stringify(found);
});

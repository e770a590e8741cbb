"use strict";
// Everything shown is made from the JSON in the page, as text nodes: a token is never read as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
// What routers decide about: layers, or each layer's attention and MLP, by their shares of its weights.
const units = data.shares.length;
const [firstUnit, all] = [data.start_layer * units, data.layers * units];
const unitOf = (unit) => (units === 1 ? `layer ${unit}` : `layer ${Math.floor(unit / units)}'s ${["attention", "MLP"][unit % units]}`);
const get = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / Math.max(1, values.length);
const several = data.precisions.length > 1;

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const names = data.precisions.map((precision) => `${precision.bits} bits`);
const countOf = (executed) => data.shares.reduce((sum, share, unit) =>
  sum + share * [...executed].filter((decision, i) => i % units === unit && decision === "1").length, data.start_layer);
const counted = (layers) => layers.toFixed(units === 1 ? 0 : 1);
const reserved = (token) => token < data.reserved_tokens;

// The units that a precision decides otherwise than the first one (16 bits).
function changedUnits(text, precision, token) {
  const [one, other] = [text.traces[0].executed[token], text.traces[precision].executed[token]];
  return [...one].flatMap((decision, i) => (decision === other[i] ? [] : [firstUnit + i]));
}

// ---------------------------------------------------------------------------------------------- strips of layers

// Columns: {height: 0..1, kind: executed | skipped | always, changed: 0..1, title}. One SVG figure.
function strip(caption, label, columns, theta) {
  const [width, height, top] = [13, 46, 9];
  const drawing = svg("svg", { role: "img", "aria-label": label, width: width * columns.length + 24, height: height + top + 13,
    viewBox: `0 0 ${width * columns.length + 24} ${height + top + 13}` });
  columns.forEach((column, unit) => {
    const [x, tall] = [unit * width, Math.max(1, column.height * (height - 1))];
    const group = svg("g", { class: "layer", "data-layer": unit / units });
    group.append(svg("title", {}, column.title), svg("rect", { class: "back", x, y: top, width: width - 2, height }));
    group.append(svg("rect", { class: column.kind, x: x + 0.5, y: top + height - tall - 0.5, width: width - 3, height: tall }));
    if (column.mark) group.append(svg("path", { class: "mark", d: `M${x} 0 h${width - 2} l${1 - width / 2} 8 z` }));
    if (column.changed) group.append(svg("rect", { class: "mark", x, y: top + height * (1 - column.changed) - 1.5, width: width - 2, height: 3 }));
    drawing.append(group);
    if (unit % (5 * units) === 0) drawing.append(svg("text", { x, y: top + height + 10 }, `${unit / units}`));
  });
  if (theta !== undefined) {
    const [y, end] = [top + height * (1 - theta), width * columns.length];
    drawing.append(svg("line", { class: "theta", x1: 0, x2: end, y1: y, y2: y }), svg("text", { x: end + 2, y: y + 3 }, "θ"));
  }
  return el("figure", { class: "strip" }, el("figcaption", {}, ...caption), drawing);
}

function tokenStrip(text, precision, token) {
  const trace = text.traces[precision];
  const changed = new Set(changedUnits(text, precision, token));
  const columns = Array.from({ length: all }, (_, unit) => {
    const i = unit - firstUnit;
    const decision = i < 0 || trace.executed[token][i] === "1" ? "executed" : "skipped";
    if (i < 0) return { height: 1, kind: "always", title: `${unitOf(unit)}: no router, always executed` };
    const p = trace.probability[token][i] / 1000;
    const title = `${unitOf(unit)}: p(execute) = ${p.toFixed(3)}, ${decision}`;
    if (reserved(token)) return { height: 1, kind: "always", title: `${unitOf(unit)}: reserved token, always executed` };
    return { height: p, kind: decision, mark: changed.has(unit), title: title + (changed.has(unit) ? `, unlike ${names[0]}` : "") };
  });
  const count = countOf(trace.executed[token]);
  const nll = trace.nll[token];
  const parts = [el("b", {}, names[precision]), ` · ${counted(count)} of ${data.layers} layers`];
  if (nll !== null) parts.push(` · nll ${nll.toFixed(2)}`);
  if (changed.size) parts.push(` · changed: ${[...changed].map((unit) => (units === 1 ? unit : unitOf(unit))).join(", ")}`);
  return strip(parts, `${names[precision]}: p(execute) by layer`, columns, data.theta);
}

function layerStrip(precision) {
  const columns = Array.from({ length: all }, (_, unit) => ({ executed: [], changed: [], unit }));
  for (const text of data.texts) {
    text.tokens.forEach((_, token) => {
      if (reserved(token)) return;
      const changed = new Set(changedUnits(text, precision, token));
      for (const column of columns) {
        const i = column.unit - firstUnit;
        column.executed.push(i < 0 || text.traces[precision].executed[token][i] === "1" ? 1 : 0);
        column.changed.push(changed.has(column.unit) ? 1 : 0);
      }
    });
  }
  const shown = columns.map(({ executed, changed, unit }) => ({
    height: mean(executed), kind: unit < firstUnit ? "always" : "executed", changed: mean(changed),
    title: `${unitOf(unit)}: ${percent(mean(executed))} of the tokens execute it` +
      (precision ? `, ${percent(mean(changed))} decide otherwise than at ${names[0]}` : ""),
  }));
  return strip([el("b", {}, names[precision])], `${names[precision]}: share of tokens that execute each layer`, shown);
}

// ---------------------------------------------------------------------------------------------------- the summary

// Of the texts in the page, where nothing was measured on more.
function summarised(precision) {
  const [executed, changed] = [[], []];
  for (const text of data.texts) {
    text.tokens.forEach((_, token) => {
      executed.push(countOf(text.traces[precision].executed[token]) / data.layers);
      if (!reserved(token)) changed.push(changedUnits(text, precision, token).length);
    });
  }
  return { execution_ratio: mean(executed), decisions_changed: mean(changed) / (all - firstUnit), paths_changed: mean(changed.map((n) => n > 0)) };
}

const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);

function costOf(row, first, name) {
  return `At ${name} the nll of the answers changes by ${signed(row.nll - first.nll)} nats; by ` +
    `${signed(row.nll_same_decisions - first.nll)} where the decisions of ${names[0]} are forced on the model. So changed decisions account for ` +
    `${signed(row.nll - row.nll_same_decisions)} ± ${row.nll_difference_stderr.toFixed(3)} (standard error over questions).`;
}

function showSummary() {
  const measured = data.precisions[0].tokens !== undefined;
  const rows = data.precisions.map((known, i) => (measured ? known : summarised(i)));
  const columns = [["layers executed", (row) => percent(row.execution_ratio)]];
  if (several) columns.push(["decisions changed", (row) => percent(row.decisions_changed)], ["paths changed", (row) => percent(row.paths_changed)]);
  if (measured) {
    columns.push(["flipped by noise", (row) => percent(row.flip_ratio)], ["distinct paths", (row) => row.paths.distinct.toLocaleString("en")],
      ["entropy of paths, nats", (row) => row.paths.entropy.toFixed(2)], ["nll of answers", (row) => row.nll.toFixed(3)]);
    if (several) columns.push([`nll with ${names[0]}' decisions`, (row) => row.nll_same_decisions.toFixed(3)]);
  }
  get("summary").append(el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "precision"), ...columns.map(([name]) => el("th", { scope: "col" }, name)))));
  get("summary").append(el("tbody", {}, ...rows.map((row, i) =>
    el("tr", {}, el("th", { scope: "row" }, names[i]), ...columns.map(([, cell]) => el("td", {}, cell(row)))))));
  const first = rows[0];
  get("summary-note").textContent =
    (measured ? `Measured on ${first.examples.toLocaleString("en")} validation questions with their gold answers, ${first.tokens.toLocaleString("en")} tokens that routers decide about. ` : "") +
    (several ? `Changed: decided otherwise than at ${names[0]}, at the same θ; a path is a token's decisions in all layers.` : "");
  if (measured) get("costs").append(...rows.slice(1).map((row, i) => el("li", {}, costOf(row, first, names[i + 1]))));
  get("layers-note").textContent = "Bar: share of the tokens below that execute a layer; grey: no router." +
    (several ? ` Orange line: share that decides otherwise than at ${names[0]}.` : "");
}

// ------------------------------------------------------------------------------------------------------ the texts

const MODES = [
  { id: "executed", name: "layers executed", unit: "layers", value: (text, p, t) => countOf(text.traces[p].executed[t]) },
  { id: "changed", name: `decisions unlike ${names[0]}`, unit: "decisions", value: (text, p, t) => changedUnits(text, p, t).length },
].slice(0, several ? 2 : 1);
for (const mode of MODES) {
  const values = data.texts.flatMap((text) => text.traces.flatMap((_, p) => text.tokens.flatMap((_, t) => (reserved(t) ? [] : [mode.value(text, p, t)]))));
  mode.low = mode.id === "changed" ? 1 : values.reduce((a, b) => Math.min(a, b), data.layers);
  mode.high = Math.max(mode.low + 1, values.reduce((a, b) => Math.max(a, b), 0));
}

function colourOf(mode, value) {
  if (mode.id === "changed" && value === 0) return "#ffffff"; // what is as before stays quiet
  const share = (value - mode.low) / (mode.high - mode.low);
  return data.palette[Math.round(Math.min(1, Math.max(0, share)) * (data.palette.length - 1))];
}

// Black or white, whichever has the higher contrast with a colour "#rrggbb" (WCAG's relative luminance).
function inkOn(colour) {
  const parts = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16) / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] > 0.179 ? "#000" : "#fff";
}

function tokenSpan(text, at, precision, token) {
  const piece = text.tokens[token];
  const made = el("span", { class: "token", role: "option", "aria-selected": "false", tabindex: token === 0 ? "0" : "-1",
    "data-text": at, "data-precision": precision, "data-token": token }, piece);
  if (reserved(token)) made.classList.add("reserved");
  if (token >= text.answer) made.classList.add("answer");
  if (piece.startsWith("\n")) made.classList.add("newline");
  if (piece === "") made.classList.add("empty");
  return made;
}

function showTexts() {
  data.texts.forEach((text, at) => {
    const versions = text.traces.map((trace, precision) => {
      const free = text.tokens.map((_, token) => token).filter((token) => !reserved(token));
      const caption = [el("b", {}, names[precision]), ` · ${mean(trace.executed.map(countOf)).toFixed(1)} layers a token`];
      const answer = trace.nll.slice(text.answer).filter((value) => value !== null);
      if (answer.length) caption.push(` · nll ${mean(answer).toFixed(2)}`);
      if (precision) caption.push(` · ${percent(mean(free.map((t) => changedUnits(text, precision, t).length)) / (all - firstUnit))} changed`);
      const tokens = el("p", { class: "tokens", role: "listbox", "aria-label": `text ${at + 1}, ${names[precision]}`, "aria-orientation": "horizontal" },
        ...text.tokens.map((_, token) => tokenSpan(text, at, precision, token)));
      return el("div", { class: "version" }, el("h4", {}, ...caption), tokens);
    });
    get("texts").append(el("article", {}, el("h3", {}, `${at + 1} · ${text.name}`), el("div", { class: "versions" }, ...versions)));
  });
}

function paint(mode) {
  for (const token of document.querySelectorAll(".token:not(.reserved)")) {
    const { text, precision, token: t } = token.dataset;
    const colour = colourOf(mode, mode.value(data.texts[text], +precision, +t));
    token.style.backgroundColor = colour;
    token.style.color = inkOn(colour);
  }
  const scale = el("span", { id: "scale" });
  scale.style.background = `linear-gradient(to right, ${data.palette.join(", ")})`;
  get("legend").replaceChildren(mode.id === "changed" ? "0: white, 1" : counted(mode.low), scale, `${counted(mode.high)} ${mode.unit}`);
}

function showModes() {
  for (const mode of MODES) {
    const radio = el("input", { type: "radio", name: "mode", value: mode.id });
    radio.checked = mode === MODES[0];
    radio.addEventListener("change", () => paint(mode));
    get("mode").append(el("label", {}, radio, ` ${mode.name}`));
  }
  get("texts-note").textContent = "Point at a token, or step to a text with Tab and through it with the arrow keys. " +
    `Grey, dotted: the first ${data.reserved_tokens} tokens, which execute every layer. Underlined: the answer.`;
}

// ------------------------------------------------------------------------------------------------- one token's detail

let chosen = null;

function choose(token) {
  if (token === chosen) return;
  chosen?.classList.remove("chosen");
  chosen?.setAttribute("aria-selected", "false");
  chosen = token;
  token.classList.add("chosen");
  token.setAttribute("aria-selected", "true");
  const [text, t] = [data.texts[token.dataset.text], +token.dataset.token];
  const strips = text.traces.map((_, precision) => tokenStrip(text, precision, t));
  get("detail").replaceChildren(
    el("p", {}, el("code", {}, JSON.stringify(text.tokens[t])), ` token ${t} of text ${+token.dataset.text + 1} (${text.name})`),
    el("div", { class: "strips" }, ...strips));
}

function explain() {
  get("detail").replaceChildren(el("p", {}, "One token's layers are drawn here. Bar: p(execute), from 0 to 1, against θ; filled: executed; hollow: skipped" +
    (several ? `; orange triangle: decided otherwise than at ${names[0]}.` : ".")));
}

function step(event) {
  const target = event.target;
  if (!target.classList.contains("token")) return;
  const row = [...target.parentElement.children];
  const places = { ArrowRight: row.indexOf(target) + 1, ArrowLeft: row.indexOf(target) - 1, Home: 0, End: row.length - 1 };
  const next = row[places[event.key]];
  if (!next) return;
  event.preventDefault();
  target.tabIndex = -1; // one stop of Tab in each text: where the reader was last
  next.tabIndex = 0;
  next.focus();
}

const engines = [...new Set(data.precisions.map((precision) => precision.engine))].filter((engine) => engine !== "none");
get("run").textContent = `${data.title} · ${engines.map((engine) => `quantized by ${engine} · `).join("")}θ = ${data.theta} · ${data.texts.length} text${data.texts.length === 1 ? "" : "s"}: ` +
  `a token executes ${units === 1 ? "a layer" : "the attention, or the MLP, of a layer"} where the router of that gives p(execute) ≥ θ, and skips it otherwise.`;
showSummary();
get("layers").append(...data.precisions.map((_, precision) => layerStrip(precision)));
showModes();
showTexts();
paint(MODES[0]);
explain();
get("texts").addEventListener("pointerover", (event) => event.target.classList.contains("token") && choose(event.target));
get("texts").addEventListener("focusin", (event) => event.target.classList.contains("token") && choose(event.target));
get("texts").addEventListener("keydown", step);

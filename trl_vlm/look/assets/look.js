"use strict";
// What models and people wrote reaches the page as text nodes alone: no markup is made of data, and the policy forbids it.
// The address (#view?q=filter&page=2) and the filter line hold the whole state, so that a bookmark brings back a view.

const $ = (id) => document.getElementById(id);
const blocks = new Map();
const block = (id) => blocks.get(id) ?? blocks.set(id, JSON.parse($(id).textContent)).get(id);
const page = block("page");
const rowOf = (view, i) => block(`rows-${view.id}-${Math.floor(i / page.chunk)}`)[i % page.chunk];
function picture(i) { // null while the file is still being read
  const id = `images-${Math.floor(i / page.chunk)}`;
  return $(id) ? `data:image/jpeg;base64,${block(id)[i % page.chunk]}` : null;
}
const state = { view: page.views[0], query: "", page: 0, cursor: 0, annotating: page.annotate };
const MARKS = {
  added: ["ins", "changed: only in the chosen reply"], removed: ["del", "changed: only in the rejected reply"],
  right: ["mark", "right: the image shows it"], invented: ["mark", "invented: the image does not show it"],
  missed: ["span", "missed: shown, not named"],
};
const KINDS = ["object", "attribute", "place", "number", "other"];

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes))
    if (name.startsWith("on")) node[name] = value;
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  node.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false && child !== ""));
  return node;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const plain = (value) => (value === true ? "yes" : value === false ? "no" : String(value));
const show = (value) => (typeof value !== "number" ? plain(value)
  : (Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(3)))).replace(/^-/, "−"));

// ---- filter and order: `score<3 type=counting -dog "a phrase" sort:-margin`

const TERM = /(-?)(?:sort:(-?)([\w./]+)|([\w./]+)(<=|>=|!=|[<>=~])("[^"]*"?|\S*)|"([^"]*)"?|(\S+))/g;
const COMPARE = {
  "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "=": (a, b) => a === b, "!=": (a, b) => a !== b,
};
const found = { key: null, rows: [], problem: "", isAll: true };
const termsOf = (query) => [...query.matchAll(TERM)].map(([term]) => term);
const replyOf = (text) => text.pieces.map(([words]) => words).join("");
const wordsOf = (row) => [row.name, ...row.facts, ...row.prompt.map(([, text]) => text), ...row.said.map(([, text]) => text), ...row.texts.map(replyOf)];
const textOf = (row) => wordsOf(row).join("\n").toLowerCase();

function termFor(name, value) {
  const words = plain(value);
  if (words.includes('"')) return `${name}~"${words.split('"').sort((a, b) => b.length - a.length)[0]}"`;
  return /^$|\s/.test(words) ? `${name}="${words}"` : `${name}=${words}`;
}

function understood(query, view) {
  const tests = [], problems = [], sorts = [];
  const column = (name) => {
    const known = view.columns.find((each) => each.name.toLowerCase() === name.toLowerCase());
    if (!known) problems.push(`There is no column “${name}”. There are ${view.columns.map((each) => each.name).join(", ")}.`);
    return known;
  };
  for (const [, not, down, sort, name, sign, quoted, phrase, word] of query.matchAll(TERM)) {
    const field = sort || name ? column(sort || name) : null, wanted = quoted?.replaceAll('"', "");
    if (sort && field) sorts.push([field.name, down ? -1 : 1]);
    else if (field && wanted && field.kind === "number" && sign !== "~") {
      if (Number.isNaN(Number(wanted))) problems.push(`“${wanted}” is no number.`);
      tests.push(({ values }) => Object.hasOwn(values, field.name) && COMPARE[sign](values[field.name], Number(wanted)) !== Boolean(not));
    } else if (field && wanted) {
      if ("<>".includes(sign[0])) problems.push(`“${name}” is a word; ask for ${name}=… or ${name}~….`);
      const same = (value) => (sign === "~" ? value.includes(wanted.toLowerCase()) : value === wanted.toLowerCase());
      tests.push(({ values }) => same(plain(values[field.name] ?? "").toLowerCase()) !== ((sign === "!=") !== Boolean(not)));
    } else if (phrase || word) {
      const needle = (phrase || word).toLowerCase();
      tests.push((row) => (row.text ??= textOf(row)).includes(needle) !== Boolean(not));
    }
  }
  return { tests, sorts, problem: problems[0] ?? "" };
}

function select() {
  const { view, query } = state, key = `${view.id}\n${query}`;
  if (found.key === key) return found;
  const { tests, sorts, problem } = understood(query, view);
  let rows = Array.from({ length: view.count }, (_, i) => i);
  if (!problem && tests.length) rows = rows.filter((i) => tests.every((test) => test(rowOf(view, i))));
  for (const [name, sign] of problem ? [] : sorts.reverse()) {
    const valueOf = (i) => rowOf(view, i).values[name];
    rows.sort((i, j) => { // rows without a value stand last
      const [a, b] = [valueOf(i), valueOf(j)];
      return (a === undefined) - (b === undefined) || (a < b ? -sign : a > b ? sign : 0);
    });
  }
  return Object.assign(found, { key, rows, problem, isAll: !tests.length || Boolean(problem) });
}

// ---- rows

const sharpen = ({ target }) => target.classList.toggle("tiny", target.naturalWidth < 128); // a toy world: keep its pixels

function marked([words, mark, weight]) {
  if (!mark) return words;
  const [tag, meaning] = MARKS[mark];
  const node = el(tag, { class: mark, title: weight > 1 ? `${meaning}; weight ${show(weight)}` : meaning }, words);
  node.style.setProperty("--weight", weight > 1 ? 1 - 1 / weight : 0);
  return node;
}

function textNode(row, text, i, t) {
  return el("section", { class: `text ${text.kind}` },
    el("h3", {}, text.label, text.note && el("span", {}, text.note)),
    el("p", { class: "reply", dir: "auto" }, text.pieces.length ? text.pieces.map(marked) : el("em", {}, "empty reply")),
    text.missed.length > 0 && el("p", { class: "missing" }, "missed ", text.missed.map((name) => [el("bdi", { class: "missed" }, name), " "])),
    state.annotating && annotation(text, noteId(row, state.view, i, t)));
}

function rowNode(i, place) {
  const row = rowOf(state.view, i), names = state.view.columns.filter(({ name, varies }) => varies && Object.hasOwn(row.values, name));
  const chip = ({ name }) => {
    const term = termFor(name, row.values[name]);
    return el("button", { class: "chip", title: `Filter: ${term}`, onclick: () => toggleTerm(term) }, el("span", {}, name), " ", el("bdi", {}, show(row.values[name])));
  };
  const imageOf = (k) => el("img", {
    src: picture(k), alt: `Image of ${row.name}`, decoding: "async", onload: sharpen, onclick: ({ target }) => enlarge(target.src),
  });
  const turn = ([role, text]) => el("p", { class: "prompt", dir: "auto" }, row.prompt.length > 1 && el("span", { class: "role" }, role, " "), text);
  return el("article", { class: "row", id: `row-${place}`, tabindex: "-1", "aria-label": row.name, onclick: () => point(place, false) },
    el("figure", {}, row.images.map(imageOf), row.problem && el("p", { class: "problem" }, row.problem), el("figcaption", {}, row.name)),
    el("div", {},
      row.prompt.map(turn),
      el("div", { class: "texts" }, row.texts.map((text, t) => textNode(row, text, i, t))),
      row.said.map(([who, text]) => el("p", { class: "said", dir: "auto" }, el("span", {}, who), text)),
      row.facts.length > 0 && el("details", {},
        el("summary", {}, `${row.facts.length} fact${row.facts.length > 1 ? "s" : ""}`),
        el("ul", {}, row.facts.map((fact) => el("li", { dir: "auto" }, fact)))),
      el("p", { class: "chips" }, names.map(chip))));
}

function columnNode(column, rows, isAll) {
  if (!column.varies && state.view.count > 1) return null;
  const terms = termsOf(state.query), { name } = column, order = terms.find((term) => term.replace("-", "") === `sort:${name}`);
  const head = el("button", { "data-key": name, title: "Sort: falling, rising, not at all", onclick: () => sortBy(name, order) },
    name, order && (order.includes("-") ? " ↓" : " ↑"));
  if (column.kind === "number") return el("div", { class: "column" }, head, histogram(column, rows, isAll),
    el("span", { class: "ends" }, el("span", {}, show(column.min)), el("span", {}, show(column.max))));
  if (column.top[0][1] === 1 && state.view.count > 4) return null; // texts, not classes
  return el("div", { class: "column words" }, head, column.top.map(([word, count]) => {
    const term = termFor(name, word);
    const node = el("button", { class: "value", "data-key": term, "aria-pressed": String(terms.includes(term)), onclick: () => toggleTerm(term) },
      el("bdi", { title: word }, word), el("span", {}, show(count)));
    node.style.setProperty("--share", count / state.view.count);
    return node;
  }));
}

function histogram({ name, min, max, bins }, rows, isAll) {
  const width = (max - min) / bins.length || 1, now = isAll ? bins : new Array(bins.length).fill(0), top = Math.max(...bins);
  for (const i of isAll ? [] : rows) {
    const value = rowOf(state.view, i).values[name];
    if (value !== undefined) now[Math.min(bins.length - 1, Math.floor((value - min) / width))] += 1;
  }
  const bars = (counts, kind) => counts.map((count, k) => count > 0 &&
    svg("rect", { class: kind, x: k, width: 0.84, y: 31 - 31 * count / top, height: 1 + 31 * count / top }));
  return svg("svg", { viewBox: `0 0 ${bins.length} 32`, preserveAspectRatio: "none", "aria-hidden": "true" }, isAll ? [] : bars(bins, "all"), bars(now, "now"));
}

// ---- what is wrong with a reply, by hand: marked words and a rewritten reply, kept by the browser, exported as JSON lines

const kept = { key: `look:${page.digest}`, notes: {} };
try { kept.notes = JSON.parse(localStorage.getItem(kept.key)) ?? {}; } catch { /* some browsers keep nothing for files */ }
const noteId = (row, view, i, t) => `${view.id}/${i}/${t}`;
const keptNotes = () => Object.entries(kept.notes).filter(([, note]) => note.spans.length || note.rewrite !== null);

function keep(id, change) {
  kept.notes[id] = { spans: [], rewrite: null, ...kept.notes[id], ...change };
  try { localStorage.setItem(kept.key, JSON.stringify(kept.notes)); } catch { /* then only the export keeps them */ }
  head();
}

function annotation(text, id) {
  const { spans, rewrite } = kept.notes[id] ?? { spans: [], rewrite: null }, reply = replyOf(text);
  const update = (change) => { keep(id, change); $(id).replaceWith(annotation(text, id)); };
  const mark = (kind) => {
    const selection = getSelection(), said = $(id).parentElement.querySelector(".reply");
    if (selection.isCollapsed || !said.contains(selection.getRangeAt(0).commonAncestorContainer)) return;
    const range = selection.getRangeAt(0), before = document.createRange(), words = range.toString();
    before.setStart(said, 0);
    before.setEnd(range.startContainer, range.startOffset);
    const start = [...before.toString()].length; // characters as Python counts them, not UTF-16
    const end = start + [...words].length;
    if ([...reply].slice(start, end).join("") === words) update({ spans: [...spans, { start, end, text: words, kind }] });
  };
  return el("div", { class: "annotation", id },
    el("p", {}, "Select words, then say what is wrong: ",
      KINDS.map((kind) => [el("button", { onmousedown: (event) => event.preventDefault(), onclick: () => mark(kind) }, kind), " "])),
    spans.map((span, k) => el("p", {}, el("mark", { class: "invented" }, span.text), ` ${span.kind} `,
      el("button", { onclick: () => update({ spans: spans.toSpliced(k, 1) }) }, "remove"))),
    el("textarea", { dir: "auto", rows: 3, "aria-label": "The reply as it should be",
      oninput: ({ target }) => keep(id, { rewrite: target.value === reply ? null : target.value }) }, rewrite ?? reply));
}

function exportNotes() {
  const lines = keptNotes().map(([id, note]) => {
    const [view, i, t] = id.split("/"), row = rowOf(page.views.find((each) => each.id === view), i), text = row.texts[t];
    const prompt = row.prompt.map(([role, content]) => ({ role, content }));
    const spans = [...note.spans].sort((a, b) => a.start - b.start);
    return `${JSON.stringify({ name: row.name, view, label: text.label, image: row.source ?? null, prompt, reply: replyOf(text), rewrite: note.rewrite, spans })}\n`;
  });
  el("a", { download: "annotations.jsonl", href: URL.createObjectURL(new Blob(lines)) }).click();
}

// ---- curves

const WIDTH = 380, HEIGHT = 150, LEFT = 46, RIGHT = WIDTH - 8, BASE = HEIGHT - 20;
let panels = [];

function ticks(low, high) {
  const least = (high - low || 1) / 4.5, power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 5, 10].map((n) => n * power).find((each) => each >= least);
  return Array.from({ length: 6 }, (_, k) => Number(((Math.ceil(low / step) + k) * step).toPrecision(6))).filter((tick) => tick <= high);
}

function curveNode({ name, help, lines }) {
  const arms = Object.entries(lines), points = arms.flatMap(([, line]) => line), classOf = (arm) => `arm-${state.view.arms.indexOf(arm)}`;
  const range = (k) => [Math.min(...points.map((point) => point[k])), Math.max(...points.map((point) => point[k]))];
  const [[x0, x1], [y0, y1]] = [range(0), range(1)];
  const x = (v) => LEFT + (RIGHT - LEFT) * (v - x0) / (x1 - x0 || 1), y = (v) => BASE - (BASE - 8) * (y1 > y0 ? (v - y0) / (y1 - y0) : 0.5);
  const ends = (line) => `${show(line[0][1])} → ${show(line.at(-1)[1])}`;
  const rule = svg("line", { class: "rule", y1: 4, y2: BASE, visibility: "hidden" });
  const reads = arms.map(([arm, line]) => [line, el("span", { class: classOf(arm), title: arm }, ends(line))]);
  panels.push((step) => { // every panel shows the same step
    rule.setAttribute("visibility", step === null ? "hidden" : "visible");
    for (const end of ["x1", "x2"]) rule.setAttribute(end, x(Math.min(x1, Math.max(x0, step))));
    const nearest = (line) => line.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
    for (const [line, node] of reads) node.textContent = step === null ? ends(line) : show(nearest(line)[1]);
  });
  const pointed = ({ currentTarget, clientX }) => {
    const box = currentTarget.getBoundingClientRect(), step = x0 + (x1 - x0) * ((clientX - box.left) / box.width * WIDTH - LEFT) / (RIGHT - LEFT);
    panels.forEach((panel) => panel(step));
  };
  const said = `${name}: ${arms.map(([arm, line]) => `${arm} ${ends(line)}`).join("; ")}`;
  return el("section", { class: "curve" }, el("h3", {}, name, el("span", { class: "reads" }, reads.map(([, node]) => node))),
    svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": said, onpointermove: pointed, onpointerleave: () => panels.forEach((panel) => panel(null)) },
      ticks(y0, y1).map((v) => [svg("line", { class: "grid", x1: LEFT, x2: RIGHT, y1: y(v), y2: y(v) }),
        svg("text", { x: LEFT - 6, y: y(v) + 4, "text-anchor": "end" }, show(v))]),
      svg("text", { x: LEFT, y: HEIGHT - 4 }, show(x0)), svg("text", { x: RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, `step ${show(x1)}`), rule,
      arms.map(([arm, line]) => svg("polyline", { class: classOf(arm), points: line.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ") }))),
    help && el("p", {}, help));
}

function runNodes({ arms, curves }) {
  const words = state.query.toLowerCase().split(/\s+/);
  const wanted = curves.filter(({ name, help }) => words.every((word) => `${name} ${help}`.toLowerCase().includes(word)));
  const isMain = (curve) => curve.first || state.query, others = wanted.filter((curve) => !isMain(curve));
  const key = (k) => svg("svg", { viewBox: "0 0 28 8", "aria-hidden": "true" }, svg("polyline", { class: `arm-${k}`, points: "0,4 28,4" }));
  const counted = `${wanted.length} of ${curves.length} curves`;
  $("count").textContent = counted;
  panels = [(step) => { $("count").textContent = step === null ? counted : `step ${Math.round(step)}`; }];
  return [el("p", { class: "legend" }, arms.map((arm, k) => el("span", { class: "arm" }, key(k), arm))),
    el("div", { class: "curves" }, wanted.filter(isMain).map(curveNode)),
    others.length > 0 && el("details", {}, el("summary", {}, `${others.length} more`), el("div", { class: "curves" }, others.map(curveNode)))];
}

// ---- the page

function head() {
  $("tabs").replaceChildren(...page.views.map((view) => el("a", { href: `#${view.id}`, "aria-current": view === state.view && "page" },
    view.title, view.count > 0 && el("span", {}, show(view.count)))));
  const count = keptNotes().length;
  $("tools").replaceChildren();
  fill($("tools"), {}, [
    page.annotate && el("button", { "aria-pressed": String(state.annotating), title: "Key a", onclick: KEYS.a }, "Annotate"),
    count > 0 && el("button", { onclick: exportNotes }, `Export ${count}`),
    el("button", { title: "Key ?", "aria-label": "Help", onclick: KEYS["?"] }, "?")]);
}

function summaryNode(view) {
  const said = view.summary.map((each) => [typeof each === "string" ? each : el("a", { href: addressOf(view, each[1]), title: each[1] }, each[0]), " "]);
  const cellNode = (cell, r, c) => el(r && c ? "td" : "th", { scope: !r ? "col" : !c && "row" }, cell);
  return el("div", { class: "summary" }, el("p", {}, said),
    view.tables?.map((table) => el("div", { class: "table" }, el("table", {}, table.map((cells, r) => el("tr", {}, cells.map((cell, c) => cellNode(cell, r, c))))))));
}

function rowsNodes(view) {
  const { rows, problem, isAll } = select(), pages = Math.max(1, Math.ceil(rows.length / page.chunk));
  state.page = Math.min(state.page, pages - 1);
  const start = state.page * page.chunk, shown = rows.slice(start, start + page.chunk);
  $("count").textContent = isAll ? `${show(rows.length)} rows` : `${show(rows.length)} of ${show(view.count)}`;
  $("problem").textContent = problem;
  const legend = view.legend.map((mark) => { const [word, meaning] = MARKS[mark][1].split(": "); return el("span", {}, marked([word, mark, 5]), ` ${meaning}`); });
  return [el("div", { class: "columns" }, view.columns.map((column) => columnNode(column, rows, isAll))),
    el("p", { class: "legend" }, legend), shown.map(rowNode),
    el("nav", { class: "pager", "aria-label": "Pages" },
      el("button", { disabled: state.page === 0 && "", onclick: () => turn(-1) }, "← Back"),
      el("span", {}, rows.length ? `${show(start + 1)}–${show(start + shown.length)} of ${show(rows.length)}` : "No row fits the filter."),
      el("button", { disabled: state.page === pages - 1 && "", onclick: () => turn(1) }, "Next →"))];
}

function render() {
  const { view, query } = state, focus = document.activeElement?.dataset?.key;
  $("problem").textContent = "";
  $("main").replaceChildren();
  fill($("main"), {}, [summaryNode(view), view.curves ? runNodes(view) : rowsNodes(view)]);
  head();
  point(Math.max(0, Math.min(state.cursor, document.querySelectorAll(".row").length - 1)), false);
  if (focus) document.querySelector(`[data-key="${CSS.escape(focus)}"]`)?.focus({ preventScroll: true });
  history.replaceState(null, "", addressOf(view, query, state.page));
}

function addressOf(view, query, to = 0) {
  const asked = new URLSearchParams({ ...((query || view.query) && { q: query }), ...(to && { page: to + 1 }) }).toString();
  return `#${view.id}${asked && `?${asked}`}`;
}

function go(query, to = 0) {
  Object.assign(state, { query, page: to, cursor: 0 });
  if ($("filter").value !== query) $("filter").value = query;
  render();
}

function toggleTerm(term) {
  const terms = termsOf(state.query);
  go((terms.includes(term) ? terms.filter((each) => each !== term) : [...terms, term]).join(" "));
}

function sortBy(name, order) {
  const next = !order ? [`sort:-${name}`] : order.includes("-") ? [`sort:${name}`] : [];
  go([...termsOf(state.query).filter((term) => !term.startsWith("sort:")), ...next].join(" "));
}

function turn(by) {
  const before = state.page;
  if (state.view.curves || before + by < 0) return;
  Object.assign(state, { page: before + by, cursor: 0 });
  render();
  if (state.page !== before) $("row-0").scrollIntoView({ block: "start" });
}

function point(place, scrolls = true) {
  document.querySelector(".row.current")?.classList.remove("current");
  const node = $(`row-${place}`);
  if (!node) return;
  state.cursor = place;
  node.classList.add("current");
  if (scrolls) { node.focus({ preventScroll: true }); node.scrollIntoView({ block: "nearest" }); }
}

function step(by) {
  if ($(`row-${state.cursor + by}`)) point(state.cursor + by);
  else if (by > 0 || state.page > 0) { turn(by); if (by < 0) point(document.querySelectorAll(".row").length - 1); }
}

function enlarge(src) { $("large").replaceChildren(el("img", { src, alt: "", onload: sharpen })); $("large").showModal(); }

function arrive() {
  const [id, search] = location.hash.slice(1).split("?"), asked = new URLSearchParams(search);
  const view = state.view = page.views.find((each) => each.id === id) ?? page.views[0];
  const first = (kind) => view.columns?.find((column) => column.kind === kind && column.varies), number = first("number"), word = first("word");
  $("filter").placeholder = ["Filter:", view.curves ? "kl" : "dog", word && termFor(word.name, word.top[0][0]), number && `${number.name}<${number.max}  sort:-${number.name}`].filter(Boolean).join("  ");
  go(asked.get("q") ?? view.query ?? "", Math.max(0, (Number(asked.get("page")) || 1) - 1));
}

let typing;
const KEYS = {
  j: () => step(1), k: () => step(-1), ArrowDown: () => step(1), ArrowUp: () => step(-1), ArrowRight: () => turn(1), ArrowLeft: () => turn(-1),
  "/": () => $("filter").select(), Escape: () => state.query && go(""), "?": () => $("help").showModal(),
  f: () => document.querySelector(".row.current summary")?.click(), a: () => { if (page.annotate) { state.annotating = !state.annotating; render(); } },
  ...Object.fromEntries(page.views.map((view, i) => [i + 1, () => { location.hash = view.id; }])),
};
const HELP = [
  ["j  k  ↓  ↑", "next and previous row"], ["→  ←", "next and previous page"], ["1 … 9", "views"], ["/", "to the filter"], ["Esc", "no filter"],
  ["f", "facts of the row"], ...(page.annotate ? [["a", "annotate"]] : []), ["dog", "rows with the word"], ["-dog", "rows without it"], ['"a red dog"', "words in a row"],
  ["score<3", "also <= > >= = !="], ["type=counting", "a word; ~ for a part of it"], ["sort:-changed", "falling; sort:changed rises"],
];

document.body.append(
  el("header", {},
    el("div", { class: "bar" }, el("h1", {}, page.title), el("nav", { id: "tabs", "aria-label": "Views" }), el("span", { id: "tools" })),
    el("div", { class: "bar" },
      el("input", { id: "filter", type: "search", "aria-label": "Filter and sort", spellcheck: "false", autocomplete: "off",
        oninput: ({ target }) => { clearTimeout(typing); typing = setTimeout(() => go(target.value), 120); } }),
      el("output", { id: "count" })),
    el("p", { id: "problem", role: "status" })),
  el("main", { id: "main" }), el("footer", {}, page.notes),
  el("dialog", { id: "large", onclick: ({ currentTarget }) => currentTarget.close() }),
  el("dialog", { id: "help", onclick: ({ currentTarget }) => currentTarget.close() },
    el("h2", {}, "Keys and filters"), el("dl", {}, HELP.map(([key, meaning]) => [el("dt", {}, key), el("dd", {}, meaning)]))));
addEventListener("hashchange", arrive);
addEventListener("DOMContentLoaded", () => document.querySelector(".row img:not([src])") && render());
addEventListener("keydown", (event) => {
  if (event.target.matches("input, textarea")) {
    if (event.key === "Escape" || (event.key === "Enter" && event.target.id === "filter")) { event.preventDefault(); event.target.blur(); }
  } else if (!event.ctrlKey && !event.metaKey && !event.altKey && !document.querySelector("dialog[open]") && Object.hasOwn(KEYS, event.key)) {
    event.preventDefault();
    KEYS[event.key]();
  }
});
arrive();
document.documentElement.dataset.ready = Math.round(performance.now()); // milliseconds to the first row, for the test

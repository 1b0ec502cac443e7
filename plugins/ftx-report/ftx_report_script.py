"""What moves on the pages: the item browser, values under the pointer, copy buttons. Texts go in as text nodes only, never as HTML."""

SCRIPT = r"""
(() => {
"use strict";
const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};

// ---- copy buttons
const copied = async (text) => {
  try { await navigator.clipboard.writeText(text); return true; } catch (refused) { /* not a secure context, or not allowed */ }
  const area = make("textarea", "", text);
  area.style.position = "fixed"; area.style.opacity = "0";
  document.body.append(area); area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
};
for (const button of document.querySelectorAll("button[data-copy]"))
  button.addEventListener("click", async () => {
    const before = button.textContent;
    button.textContent = await copied(document.getElementById(button.dataset.copy).textContent) ? "copied" : "cannot copy";
    setTimeout(() => { button.textContent = before; }, 1500);
  });

// ---- values under the pointer
const SVG = "http://www.w3.org/2000/svg";
for (const svg of document.querySelectorAll("svg[data-points]")) {
  const data = JSON.parse(svg.dataset.points), [left, right, top, bottom] = data.box, [low, high] = data.x;
  const said = make("div", "at"), cursor = document.createElementNS(SVG, "path");
  cursor.setAttribute("class", "cursor");
  svg.append(cursor); svg.parentElement.append(said);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), along = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const wanted = low + (along - left) / (right - left) * (high - low);
    let step = null;
    const nearest = (line) => line.reduce((best, point) => Math.abs(point[0] - wanted) < Math.abs(best[0] - wanted) ? point : best);
    const values = Object.entries(data.lines).map(([name, line]) => {
      const point = nearest(line);
      if (step === null || Math.abs(point[0] - wanted) < Math.abs(step - wanted)) step = point[0];
      return [name, point];
    });
    const many = values.length > 1;
    const here = values.filter(([, point]) => point[0] === step).map(([name, point]) => (many ? name + " " : "") + point[1].toPrecision(4));
    said.textContent = `step ${step}: ${here.join(", ")}`;
    const x = left + (step - low) / (high - low) * (right - left);
    cursor.setAttribute("d", `M${x} ${top}V${bottom}`);
  });
  svg.addEventListener("pointerleave", () => { said.textContent = ""; cursor.removeAttribute("d"); });
}

// ---- the items: all are searched, only those in sight are drawn
const source = document.getElementById("items");
if (!source) return;
const sets = JSON.parse(source.textContent);
const ROW = 48, AROUND = 4;
const [PROMPT, REFERENCE, ANSWERS, VERDICTS, STATUS, CATEGORY, MORE] = [0, 1, 2, 3, 4, 5, 6];
const list = document.getElementById("list"), sheet = document.getElementById("sheet"), detail = document.getElementById("detail");
const search = document.getElementById("search"), filters = document.getElementById("filters"), count = document.getElementById("count");
const chosenSet = document.getElementById("set"), category = document.getElementById("category");
const ORDER = ["fixed", "broken", "better", "worse", "mixed", "unchanged", "still wrong", "scored", "unscored"];
let set, shown = [], filter = "all", selected = -1, words = "";

const promptText = (item) => typeof item[PROMPT] === "string" ? item[PROMPT] : item[PROMPT].map((message) => message[1]).join("\n");
const asked = (item) => typeof item[PROMPT] === "string" ? item[PROMPT] : (item[PROMPT].filter((message) => message[0] !== "system").pop() || ["", ""])[1];
const hay = (item) => item.hay ??= [promptText(item), item[REFERENCE], ...item[ANSWERS]].join("\n").toLowerCase();
const stillWrong = (item) => item[STATUS] === "unchanged" && item[VERDICTS].at(-1) === "wrong";
const isIn = (item, name) => name === "all" || (name === "still wrong" ? stillWrong(item) : item[STATUS] === name);

const fill = (element, text) => {
  if (!words) { element.textContent = text; return element; }
  const lower = text.toLowerCase();
  let at = 0;
  for (let next = lower.indexOf(words); next >= 0; next = lower.indexOf(words, at)) {
    element.append(text.slice(at, next), make("mark", "", text.slice(next, next + words.length)));
    at = next + words.length;
  }
  element.append(text.slice(at));
  return element;
};

const draw = () => {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - AROUND);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + AROUND);
  const rows = [];
  for (let place = first; place < last; place++) {
    const number = shown[place], item = set.items[number], row = make("div", "row"), head = make("div", "soft");
    row.setAttribute("role", "option"); row.id = `item-${number}`; row.style.top = `${place * ROW}px`;
    row.setAttribute("aria-selected", number === selected); row.setAttribute("aria-posinset", place + 1); row.setAttribute("aria-setsize", shown.length);
    head.append(`${number + 1} · `, make("span", item[STATUS], item[STATUS]), item[CATEGORY] ? ` · ${item[CATEGORY]}` : "");
    row.append(fill(make("div"), asked(item).slice(0, 200)), head);
    row.addEventListener("click", () => select(place, false));
    rows.push(row);
  }
  sheet.replaceChildren(...rows);
};

const part = (title, text, className) => {
  const box = make("div");
  box.append(make("h3", className || "", title), fill(make("div", "text"), text));
  return box;
};

const tell = (number) => {
  const item = set.items[number], answers = make("div", "answers");
  const parts = [make("p", "soft", `Item ${number + 1} of ${set.items.length}`)];
  const state = make("span", item[STATUS], item[STATUS]);
  parts[0].append(" · ", state, item[CATEGORY] ? ` · ${item[CATEGORY]}` : "");
  if (typeof item[PROMPT] === "string") parts.push(part("prompt", item[PROMPT]));
  else for (const [role, text] of item[PROMPT]) parts.push(part(`prompt: ${role}`, text));
  set.who.forEach((who, place) => answers.append(part(item[VERDICTS][place] ? `${who}: ${item[VERDICTS][place]}` : who, item[ANSWERS][place] ?? "")));
  parts.push(answers);
  if (item[REFERENCE]) parts.push(part("reference", item[REFERENCE]));
  for (const [label, text] of item[MORE]) parts.push(part(label, text));
  detail.replaceChildren(...parts);
  detail.scrollTop = 0;
};

const select = (place, byKey) => {
  if (!shown.length) {
    selected = -1;
    detail.replaceChildren(make("p", "soft", "No item fits."));
    list.removeAttribute("aria-activedescendant");
    draw();
    return;
  }
  place = Math.max(0, Math.min(shown.length - 1, place));
  selected = shown[place];
  if (byKey) {
    if (place * ROW < list.scrollTop) list.scrollTop = place * ROW;
    else if ((place + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (place + 1) * ROW - list.clientHeight;
  }
  list.setAttribute("aria-activedescendant", `item-${selected}`);
  draw(); tell(selected);
};

const narrow = () => {
  words = search.value.trim().toLowerCase();
  const fits = (item) => (!category.value || item[CATEGORY] === category.value) && (!words || hay(item).includes(words));
  const within = set.items.map((item, number) => number).filter((number) => fits(set.items[number]));
  const names = ["all", ...ORDER.filter((name) => set.items.some((item) => isIn(item, name)))];
  if (!names.includes(filter)) filter = "all";
  filters.replaceChildren(...names.map((name) => {
    const button = make("button", "", `${name} ${within.filter((number) => isIn(set.items[number], name)).length}`);
    button.type = "button"; button.dataset.filter = name;
    button.setAttribute("aria-pressed", name === filter);
    button.addEventListener("click", () => { filter = name; narrow(); filters.querySelector(`[data-filter="${name}"]`).focus(); });
    return button;
  }));
  shown = within.filter((number) => isIn(set.items[number], filter));
  sheet.style.height = `${shown.length * ROW}px`;
  list.scrollTop = 0;
  const notes = [`${shown.length} of ${set.total}`];
  if (set.total > set.items.length) notes.push(`the page holds the first ${set.items.length}, the rest lie in eval/${set.name}`);
  if (set.left_out && set.left_out.length) notes.push(`${set.left_out.join(", ")} answered other questions`);
  count.textContent = notes.join("; ");
  select(Math.max(0, shown.indexOf(selected)), true);
};

const open = (place) => {
  set = sets[place]; selected = -1; filter = "all";
  const categories = [...new Set(set.items.map((item) => item[CATEGORY]))].filter(Boolean).sort();
  category.replaceChildren(new Option("every category", ""), ...categories.map((name) => new Option(name, name)));
  category.hidden = categories.length < 2;
  narrow();
};

const KEYS = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1, PageDown: 8, PageUp: -8, Home: -Infinity, End: Infinity };
list.addEventListener("keydown", (event) => {
  if (!(event.key in KEYS) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  select(shown.indexOf(selected) + KEYS[event.key], true);
});
let waiting = 0;
search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(narrow, 100); });
list.addEventListener("scroll", () => requestAnimationFrame(draw));
addEventListener("resize", draw);
category.addEventListener("change", narrow);
chosenSet.replaceChildren(...sets.map((one, place) => new Option(one.name, place)));
chosenSet.hidden = sets.length < 2;
chosenSet.addEventListener("change", () => open(Number(chosenSet.value)));
open(0);
})();
"""

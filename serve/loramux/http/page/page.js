"use strict";
// Live state of the adapters, and one prompt to two or three models at once. All text of the server and of models
// goes into the page as text nodes, never as HTML.

const POLL_MS = 2000;
const SHOWN = 200; // rows; the filter finds the others
const [LEAST, MOST] = [2, 3]; // models side by side
const KEY = "loramux-key"; // in sessionStorage: this tab only

const byId = (id) => document.getElementById(id);
const state = { base: null, cards: [], names: "", key: sessionStorage.getItem(KEY) || "", running: null };

// -- the server

class ApiError extends Error {
  constructor(error, status) {
    super(error.message || `HTTP ${status}`);
    Object.assign(this, { hint: error.hint, code: error.code, status });
  }
}

/** The server's response. Throws ApiError for an error, asks for a key where one is needed. */
async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  if (response.status === 401) byId("key-form").hidden = false;
  throw new ApiError(body.error || {}, response.status);
}

async function poll() {
  try {
    state.base ??= (await (await call("v1/models")).json()).data[0].id;
    const { data, memory } = await (await call("v1/adapters")).json();
    byId("key-form").hidden = true;
    state.cards = data;
    connection("connected", "good");
    showAdapters(memory);
    showModels();
  } catch (error) {
    if (error.status === 401) connection(state.key ? "this key is not accepted" : "needs a key", "bad");
    else connection(error.status ? error.message : "no answer", "bad");
  }
}

/** One poll after the other; none while nobody looks. */
async function pollForever() {
  if (!document.hidden) await poll();
  setTimeout(pollForever, POLL_MS);
}

// -- the table

function connection(text, kind) {
  setText(byId("connection"), text);
  byId("connection").className = kind;
}

function showAdapters(memory) {
  setText(byId("base"), state.base);
  byId("none").hidden = state.cards.length > 0;
  byId("adapters").hidden = state.cards.length === 0;
  byId("filter").hidden = state.cards.length < 10;
  setText(byId("memory"), memory ? `${bytes(memory.used_bytes)} of ${bytes(memory.capacity_bytes)}` : "");

  const wanted = byId("filter").value.toLowerCase();
  const matching = state.cards.filter((card) => card.name.toLowerCase().includes(wanted));
  const body = byId("adapters").tBodies[0];
  matching.slice(0, SHOWN).forEach((card, i) => fill(body.rows[i] || newRow(body), card));
  while (body.rows.length > Math.min(matching.length, SHOWN)) body.deleteRow(-1);
  byId("more").hidden = matching.length <= SHOWN;
  setText(byId("more"), `${matching.length - SHOWN} more; filter by name to see them.`);
}

function newRow(body) {
  const row = body.insertRow();
  const heads = [...byId("adapters").tHead.rows[0].cells];
  for (const head of heads) {
    const cell = row.insertCell();
    cell.className = head.className;
    if (head !== heads[0] && head !== heads[1]) cell.dataset.label = head.textContent;
  }
  row.cells[0].className = "name";
  row.cells[0].append(element("div"), element("div", "why error"), element("div", "why hint"));
  row.cells[1].append(element("span"), element("div", "why"));
  row.cells[4].classList.add("version");
  return row;
}

function fill(row, card) {
  const [name, message, hint] = row.cells[0].children;
  setText(name, card.name);
  setText(message, card.error ? card.error.message : "");
  setText(hint, (card.error && card.error.hint) || "");
  const [badge, next] = row.cells[1].children;
  setText(badge, card.state);
  badge.className = `state ${/^[a-z]+$/.test(card.state) ? card.state : ""}`;
  setText(next, card.pending ? `next: ${card.pending}` : "");
  const values = [card.method, card.rank, card.version, card.resident_bytes ? bytes(card.resident_bytes) : null, card.leases];
  values.forEach((value, i) => setText(row.cells[i + 2], value ?? "–"));
  setText(row.cells[7], card.pinned ? "yes" : "no");
}

// -- side by side

/** Keep every select's options up to date, and its choice. */
function showModels() {
  const names = [state.base, ...state.cards.filter(({ state: s }) => s !== "failed" && s !== "gone").map(({ name }) => name)];
  if (state.names === names.join("\n")) return;
  state.names = names.join("\n");
  while (columns().length < LEAST) addColumn();
  for (const select of document.querySelectorAll(".column select")) offer(select, names);
}

const columns = () => [...document.querySelectorAll(".column")];

function offer(select, names) {
  const chosen = select.value;
  const all = chosen && !names.includes(chosen) ? [chosen, ...names] : names; // what was asked stays readable
  select.replaceChildren(...all.map((name) => new Option(name, name)));
  const others = [...document.querySelectorAll(".column select")].filter((other) => other !== select).map(({ value }) => value);
  select.value = chosen || names.find((name) => !others.includes(name)) || names[0];
}

function addColumn() {
  const column = byId("column").content.cloneNode(true).firstElementChild;
  column.querySelector(".remove").onclick = () => {
    column.remove();
    countColumns();
    byId("add").focus();
  };
  byId("columns").append(column);
  if (state.names) offer(column.querySelector("select"), state.names.split("\n"));
  countColumns();
  return column;
}

function countColumns() {
  const count = columns().length;
  byId("add").disabled = count >= MOST;
  for (const button of document.querySelectorAll(".remove")) button.hidden = count <= LEAST;
}

async function askAll() {
  if (state.running || !byId("ask").reportValidity()) return;
  state.running = new AbortController();
  byId("send").disabled = true;
  byId("stop").disabled = false;
  const request = requestOf();
  await Promise.all(columns().map((column) => ask(column, request, state.running.signal)));
  state.running = null;
  byId("send").disabled = false;
  byId("stop").disabled = true;
}

function requestOf() {
  const messages = [{ role: "user", content: byId("prompt").value }];
  if (byId("system").value) messages.unshift({ role: "system", content: byId("system").value });
  return {
    messages,
    max_tokens: byId("max-tokens").valueAsNumber,
    temperature: byId("temperature").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
  };
}

/** Stream one answer into its column. */
async function ask(column, request, signal) {
  const answer = column.querySelector(".answer");
  const figures = column.querySelector(".figures");
  const seen = { began: performance.now(), first: 0, last: 0, tokens: 0, end: "" };
  answer.replaceChildren();
  setText(figures, "waiting…");
  try {
    const response = await call("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...request, model: column.querySelector("select").value }),
      signal,
    });
    for await (const event of events(response)) take(event, seen, answer);
    if (!seen.end) throw new ApiError({ message: "The answer broke off." }, 200);
  } catch (error) {
    seen.end = error.name === "AbortError" ? "stopped" : "failed";
    if (seen.end === "failed") answer.append(element("div", "error", error.message), element("div", "hint", error.hint || ""));
  }
  setText(figures, figuresOf(seen));
}

/** The JSON of each server-sent event, until [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "[DONE]";
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function take(event, seen, answer) {
  if (event.error) throw new ApiError(event.error, 200);
  if (event.usage) seen.tokens = event.usage.completion_tokens;
  for (const { delta, finish_reason: reason } of event.choices) {
    if (reason) seen.end = reason;
    const text = delta && (delta.content || delta.reasoning_content || delta.reasoning);
    if (!text) continue;
    seen.last = performance.now();
    seen.first ||= seen.last;
    seen.tokens += 1; // as good as it gets until `usage` comes
    const atEnd = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 8;
    answer.append(text);
    if (atEnd) answer.scrollTop = answer.scrollHeight;
  }
}

function figuresOf({ began, first, last, tokens, end }) {
  const parts = [];
  if (first) parts.push(`first token ${Math.round(first - began)} ms`);
  if (last > first && tokens > 1) parts.push(`${((tokens - 1) / ((last - first) / 1000)).toFixed(1)} tokens/s`);
  if (tokens) parts.push(tokens === 1 ? "1 token" : `${tokens} tokens`);
  if (end !== "stop") parts.push(end === "length" ? "cut at the limit" : end);
  return parts.join(" · ");
}

// -- small things

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

/** Only what changed: a poll must not take the selection or the screen reader's place away. */
function setText(node, value) {
  const text = String(value);
  if (node.textContent !== text) node.textContent = text;
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const i = Math.min(units.length - 1, count < 1 ? 0 : Math.floor(Math.log2(count) / 10));
  return `${i ? (count / 1024 ** i).toFixed(2) : count} ${units[i]}`;
}

byId("ask").onsubmit = (event) => {
  event.preventDefault();
  askAll();
};
byId("ask").addEventListener("invalid", ({ target }) => {
  const folded = target.closest("details");
  if (folded) folded.open = true; // the browser cannot point at what is folded away
}, true);
byId("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    askAll();
  }
};
byId("stop").onclick = () => state.running?.abort();
byId("add").onclick = () => addColumn().querySelector("select").focus();
byId("filter").oninput = poll;
byId("key-form").onsubmit = (event) => {
  event.preventDefault();
  state.key = byId("key").value.trim();
  if (state.key) sessionStorage.setItem(KEY, state.key);
  else sessionStorage.removeItem(KEY);
  byId("key").value = "";
  poll();
};
document.addEventListener("visibilitychange", poll);
pollForever();
